"""What a task is, how one is made, and which prompts a step trains on."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import importlib
import json
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import Protocol

import numpy as np

from rlax_llm import config as config_lib

Split = Literal['train', 'held_out']
SPLITS: tuple[Split, ...] = ('train', 'held_out')
# Values of `task.name` that are no names of reasoning-gym.
OTHERS = ('jsonl', 'tfds', 'gsm8k', 'mixture')


@dataclasses.dataclass(frozen=True)
class Problem:
  """One prompt, and what is needed to verify a completion of it."""

  prompt_id: str  # hash of the task's name and the prompt
  prompt: str  # the text put to the model
  answer: str | None  # one right answer; None: only the verifier knows
  trace: str | None  # a whole right completion, worked in steps
  source: str  # the task's name
  entry: Mapping[str, Any]  # what `Task.score` needs; JSON types only


class Score(NamedTuple):
  """A reward, and numbers about the sample that are logged beside it.

  What a task's `score` or a reward of the user's own returns in place of a
  number. A step logs the mean of each metric, over the samples that have it,
  as `user/NAME`; an evaluation those of the task's `score`, as
  `evaluate/user/NAME`. Nothing is learned from them.

  Attributes:
    reward: a finite number.
    metrics: finite numbers by name: letters, digits and `_ . - /`.
  """

  reward: float
  metrics: Mapping[str, float] = {}


class Task(Protocol):
  """Problems and their verifier.

  Worker processes construct the task again from (config, seed), so `score`
  depends on its arguments only.
  """

  def problem(self, split: Split, index: int) -> Problem:
    """Returns a problem, a function of (seed, split, index).

    Where `num_problems` is None every index >= 0 is valid; otherwise indices
    wrap around. No problem is in both splits.
    """

  def score(self, entry: Mapping[str, Any], completion: str) -> float | Score:
    """Returns the reward of a completion; an exception means unscorable."""

  def num_problems(self, split: Split) -> int | None:
    """Returns how many problems there are; None: as many as are asked for."""


def make_problem(
  source: str,
  prompt: str,
  answer: str | None,
  trace: str | None,
  entry: Mapping[str, Any],
) -> Problem:
  """Returns a problem, its `prompt_id` computed."""
  digest = hashlib.sha256(f'{source}\n{prompt}'.encode('utf-8', 'replace'))
  return Problem(digest.hexdigest(), prompt, answer, trace, source, entry)


def problem_json(problem: Problem) -> str:
  """Returns a problem as worker processes receive it.

  Raises:
    ConfigError: a task of the user's own made something else, or an entry that
      is no JSON.
  """
  if not isinstance(problem, Problem) or not isinstance(problem.prompt, str):
    raise config_lib.ConfigError(
      f'{str(problem)[:80]!r}, of type {type(problem).__name__}, is no '
      'problem; make it with rlax_llm.tasks.task.make_problem'
    )
  try:
    return json.dumps({f.name: getattr(problem, f.name) for f in _FIELDS})
  except (TypeError, ValueError) as error:
    raise config_lib.ConfigError(
      f'the entry of a {problem.source!r} problem is no JSON ({error}); use '
      'JSON types'
    ) from error


_FIELDS = dataclasses.fields(Problem)


def with_instruction(prompt: str, config: config_lib.TaskConfig) -> str:
  """Returns the prompt with the configured instruction on its own line."""
  return f'{prompt}\n{config.instruction}' if config.instruction else prompt


def split_of(text: str) -> Split:
  """Returns the split a text belongs to: one in four is held out.

  The hash does not depend on the run's seed, so that a model is never
  evaluated on what another run's seed trained it on.
  """
  digest = hashlib.sha256(text.encode('utf-8', 'replace')).digest()
  return 'held_out' if digest[0] < 64 else 'train'


def distinct_problems(task: Task, split: Split, count: int) -> list[Problem]:
  """Returns the first `count` different problems of a split.

  Args:
    task: any task.
    split: 'train' or 'held_out'.
    count: how many.

  Raises:
    ValueError: the task has fewer, or so few that search gave up.
  """
  found: dict[str, Problem] = {}
  available = task.num_problems(split)
  index = misses = 0
  while len(found) < count:
    # Draws repeat ever more often as a small task is exhausted.
    if misses > 200 + 10 * count or index == available:
      source = next((p.source for p in found.values()), 'the task')
      raise ValueError(
        f'{source!r} has about {len(found)} different {split} problems; '
        f'{count} are wanted: lower task.epoch_prompts or '
        'evaluate.problems, or widen task.options'
      )
    problem = task.problem(split, index)
    index += 1
    misses = misses + 1 if problem.prompt_id in found else 0
    found.setdefault(problem.prompt_id, problem)
  return list(found.values())


class FiniteTask:
  """A task whose training problems are the first `count` different ones."""

  def __init__(self, task: Task, count: int) -> None:
    """Args: task: what to restrict. count: `task.epoch_prompts`."""
    self.unrestricted = task
    self._task = task
    self._count = count
    self._train: list[Problem] = []

  def problem(self, split: Split, index: int) -> Problem:
    """See `Task.problem`; the table of problems is made on first use."""
    if split != 'train':
      return self._task.problem(split, index)
    if not self._train:
      self._train = distinct_problems(self._task, 'train', self._count)
    return self._train[index % self._count]

  def score(self, entry: Mapping[str, Any], completion: str) -> float | Score:
    """See `Task.score`."""
    return self._task.score(entry, completion)

  def num_problems(self, split: Split) -> int | None:
    """See `Task.num_problems`."""
    if split == 'train':
      return self._count
    return self._task.num_problems(split)


def demonstrations(task: Task) -> Task:
  """Returns the task that the warm start imitates: every training problem.

  With `task.epoch_prompts`, RL sees some of them only; demonstrations of those
  alone would be learned by heart.
  """
  return task.unrestricted if isinstance(task, FiniteTask) else task


def problems_for_step(
  task: Task,
  config: config_lib.TaskConfig,
  seed: int,
  step: int,
  make: Callable[[Sequence[int]], list[Problem]] | None = None,
) -> list[Problem]:
  """Returns the B problems of a training step.

  A function of (task, seed, step): nothing is iterated, so that a resumed
  run sees the prompts of the uninterrupted one.

  With n training problems, each epoch is floor(n / B) steps over a fresh
  permutation: no problem occurs twice in a step, and n % B of them, others
  each time, sit an epoch out. With n < B, a step takes several permutations,
  so each problem occurs floor(B / n) or ceil(B / n) times. Without an n,
  problems are new in each step; one that repeats an earlier problem of the
  step is drawn again, up to three times.

  Args:
    task: the task.
    config: gives B, `prompts_per_step`.
    seed: the run's seed.
    step: from 0.
    make: makes the training problems of these indices; None: here, in order.

  Raises:
    ValueError: the task has too few problems.
  """
  make = make or (lambda indices: [task.problem('train', i) for i in indices])
  count = config.prompts_per_step
  available = task.num_problems('train')
  if available is not None:
    return make(_epoch_indices(available, count, seed, step))
  chosen = make(range(step * count, (step + 1) * count))
  seen: set[str] = set()
  for i in range(count):
    for attempt in range(1, 4):
      if chosen[i].prompt_id not in seen:
        break
      # Attempts live far beyond the index of any step.
      index = step * count + i + (attempt << 40)
      chosen[i] = task.problem('train', index)
    seen.add(chosen[i].prompt_id)
  return chosen


# Grain takes 10 ms and more to place one of very few problems.
@functools.lru_cache(maxsize=4096)
def _epoch_indices(
  available: int, count: int, seed: int, step: int
) -> tuple[int, ...]:
  """Returns `count` indices into `available` problems."""
  import grain  # pylint: disable=g-import-not-at-top

  if available < 1:
    raise ValueError('the task has no training problems; add some')
  size = min(available, count)
  per_step = -(-count // size)
  batches = (
    grain.MapDataset.range(available)
    .seed(seed % 2**32)
    .shuffle()
    .batch(size, drop_remainder=True)
    .repeat()
  )
  rows = [batches[step * per_step + k] for k in range(per_step)]
  return tuple(np.concatenate(rows)[:count].tolist())


def imported(path: str, field: str, form: str) -> Any:
  """Returns what 'module:name' names.

  Args:
    path: 'module:name'.
    field: of the config, for the message.
    form: what the path should look like, for the message.

  Raises:
    ConfigError: it cannot be imported, here or by a worker process.
  """
  module_name, _, name = path.partition(':')
  if module_name == '__main__':
    raise config_lib.ConfigError(
      f'{field} {path!r} is in the running script, which worker processes '
      'cannot import; move it to a module of its own'
    )
  try:
    return getattr(importlib.import_module(module_name), name)
  except (Exception, SystemExit) as error:
    raise config_lib.ConfigError(
      f'{field} {path!r} cannot be imported ({type(error).__name__}: '
      f'{error}); it is read as {form} and the module must be on '
      'PYTHONPATH'
    ) from error
