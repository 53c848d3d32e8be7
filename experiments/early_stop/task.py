"""Sums with a tally whose result is said again and again."""

import numpy as np

from experiments.srt.task import LongTail
from rlax_llm.tasks import task as tasks

_MOST = 32  # times that the result is said again, and one
_LONGEST = 240  # characters of a demonstration


class Hesitating(LongTail):
  """`4+3-2=` -> `(+3=7-2=5=5=5)5`: a teacher who is slow to believe it.

  Reasoning models go on after they have the answer; what stands behind the
  first result here is of that kind, up to 31 times, and can be spared.
  """

  def problem(self, split: tasks.Split, index: int) -> tasks.Problem:
    """Returns a problem, a function of (seed, split, index)."""
    plain = super().problem(split, index)
    rng = np.random.default_rng([self._seed, split == 'train', index, 1])
    steps, _, last = (plain.trace or '').rpartition(')')
    free = (_LONGEST - len(plain.trace or '')) // (len(last) + 1)
    again = f'={last}' * min(int(rng.integers(0, _MOST)), max(free, 0))
    return tasks.make_problem(
      'hesitating',
      plain.prompt,
      plain.answer or '',
      f'{steps}{again}){last}',
      dict(plain.entry),
    )
