"""Several tasks in given proportions."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import itertools
import random
from typing import Any

from rlax_llm import config as config_lib
from rlax_llm.tasks import task as task_lib

_CYCLE = 1000  # indices over which the proportions hold exactly


class MixtureTask:
  """Draws each index from one of the tasks in `config.mixture`.

  A cycle of about 1000 indices, shuffled by the seed, holds each task in
  proportion to its weight (at least once), so a task's own indices run
  through 0, 1, 2, ... without gaps and any index is found at once.
  """

  def __init__(
    self,
    config: config_lib.TaskConfig,
    seed: int,
    make_task: Callable[..., task_lib.Task],
  ) -> None:
    """Makes every task of the mixture.

    Args:
      config: `mixture` maps task names to weights, `options` the same names
        to the options of each.
      seed: the run's seed.
      make_task: (config, seed) -> the task that the config names.

    Raises:
      ValueError: no tasks, a weight that is not positive, options of a task
        that is not in the mixture, or a task that cannot be made.
    """
    weights = dict(config.mixture)
    if not weights:
      raise ValueError(
        "task.name is 'mixture' but task.mixture is empty; "
        'give it {task name: weight}'
      )
    for name, weight in weights.items():
      if name == 'mixture':
        raise ValueError('task.mixture holds a mixture; list its tasks instead')
      if not weight > 0:
        raise ValueError(
          f'task.mixture[{name!r}]={weight!r}; weights are '
          'positive numbers: remove the task to leave it out'
        )
    unknown = sorted(set(config.options) - set(weights))
    if unknown:
      raise ValueError(
        f'task.options of {unknown[0]!r}, which is not in task.mixture'
        f'{config_lib.nearest(unknown[0], weights)}; options of a mixture '
        'go by task name'
      )
    self._tasks = {
      name: make_task(
        dataclasses.replace(
          config,
          name=name,
          mixture={},
          epoch_prompts=0,
          options=config.options.get(name, {}),
        ),
        seed,
      )
      for name in weights
    }
    total = sum(weights.values())
    self._counts = {
      name: max(1, round(_CYCLE * weight / total))
      for name, weight in weights.items()
    }
    self._cycle = [n for n, count in self._counts.items() for _ in range(count)]
    random.Random(f'mixture {seed}').shuffle(self._cycle)
    ranks = {name: itertools.count() for name in weights}
    self._ranks = [next(ranks[name]) for name in self._cycle]

  def problem(self, split: task_lib.Split, index: int) -> task_lib.Problem:
    """See `Task.problem`."""
    cycle, place = divmod(index, len(self._cycle))
    name = self._cycle[place]
    problem = self._tasks[name].problem(
      split, cycle * self._counts[name] + self._ranks[place]
    )
    return dataclasses.replace(
      problem, entry={'task': name, 'entry': problem.entry}
    )

  def score(
    self, entry: Mapping[str, Any], completion: str
  ) -> float | task_lib.Score:
    """See `Task.score`."""
    return self._tasks[entry['task']].score(entry['entry'], completion)

  def num_problems(self, split: task_lib.Split) -> int | None:
    """Returns None: finite tasks of a mixture recur."""
    del split
    return None
