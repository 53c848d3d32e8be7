"""Sums with a tally: a chain of thought with a long tail of lengths."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlax_llm.config import TaskConfig
from rlax_llm.tasks import task as tasks

_MEAN_EXTRA, _LONG_SHARE, _LONG_TERMS = 1.5, 0.2, (18, 29)
_UNFINISHED = 0.3  # of the demonstrations leave off early


class LongTail:
  """Add and subtract digits, `4+3-2=` -> `(+3=7-2=5)5`; some are very long.

  Four problems in five have 2 terms and an exponential of mean 1.5, one has 18
  to 28, so that the longest answers are several times as long as the mean.
  Demonstrations are by a teacher who leaves off early now and then.
  """

  def __init__(self, config: TaskConfig, seed: int) -> None:
    del config
    self._seed = seed

  def problem(self, split: tasks.Split, index: int) -> tasks.Problem:
    """Returns a problem, a function of (seed, split, index)."""
    rng = np.random.default_rng([self._seed, split == 'train', index])
    count = 2 + int(rng.exponential(_MEAN_EXTRA))
    if rng.random() < _LONG_SHARE:
      count = int(rng.integers(*_LONG_TERMS))
    terms = rng.integers(1, 10, count)
    signs = rng.choice([-1, 1], len(terms))
    signs[0] = 1
    values = np.cumsum(terms * signs)
    written = [f'{"-" if s < 0 else "+"}{t}' for s, t in zip(signs, terms)]
    text = ''.join(written)[1:]
    done = len(terms)
    if len(terms) > 2 and rng.random() < _UNFINISHED:
      done = int(rng.integers(2, len(terms)))
    steps = ''.join(f'{written[i]}={values[i]}' for i in range(1, done))
    return tasks.make_problem(
      'long_tail',
      f'{text}=',
      str(values[-1]),
      f'({steps}){values[done - 1]}',
      {'answer': str(values[-1])},
    )

  def score(self, entry: Mapping[str, Any], completion: str) -> float:
    """Returns 1 if the number behind the last parenthesis is right."""
    return float(completion.rpartition(')')[2] == entry['answer'])

  def num_problems(self, split: tasks.Split) -> None:
    """Returns None: as many as are asked for."""
    del split
