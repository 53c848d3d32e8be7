"""Tasks whose later problems do not fit."""

from rlax_llm import testing
from rlax_llm.tasks import task as tasks


class SomeLong(testing.ToyTask):
  """From the second step on, some prompts are too long or not encodable."""

  def problem(self, split, index):
    if split == 'held_out':
      return super().problem(split, index)
    # No prompt occurs twice in a step of four.
    prompt = ('a', 'b', 'ab', 'ba', 'aa', 'bb')[index % 6]
    if index > 3 and index % 3 == 0:
      prompt *= 9
    elif index > 3 and index % 7 == 0:
      prompt = f'z{prompt}'
    return tasks.make_problem('long', prompt, None, None, {'letter': 'a'})

  def num_problems(self, split):
    return None if split == 'train' else 2


class LongFromTheStart(SomeLong):
  """The first prompt of all is too long."""

  def problem(self, split, index):
    problem = super().problem(split, index)
    if split == 'train' and not index:
      return tasks.make_problem('long', 'a' * 9, None, None, problem.entry)
    return problem


class AllLong(SomeLong):
  """From the second step on, every prompt is too long."""

  def problem(self, split, index):
    problem = super().problem(split, index)
    if split == 'train' and index > 3:
      return tasks.make_problem(
        'long', f'{problem.prompt}aaaaaaaaa', None, None, problem.entry
      )
    return problem


class SomeLongTraces(testing.ToyTask):
  """Every third demonstration is too long; `all_long`: every one."""

  all_long = False

  def problem(self, split, index):
    problem = super().problem(split, index)
    if split == 'train' and (self.all_long or index % 3 == 0):
      return tasks.make_problem(
        'long', problem.prompt, None, 'a' * 99, problem.entry
      )
    return problem


class AllLongTraces(SomeLongTraces):
  all_long = True
