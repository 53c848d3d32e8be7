"""BEG-MAB: a bucketed epsilon-greedy bandit."""

import collections
import statistics
from typing import Any

import numpy as np

from rlax_llm.config.draft_configs import Arm
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent
from rlax_llm.drafting.strategy.table import Buckets


class Bandit:
  """In each bucket of n, mostly the arm whose segments earned the most.

  The reward of a segment is r = a n / t: the accept length a, as the median
  of the arm's segments in every bucket, times the rows n that decoded, over
  the seconds t of a forward; tokens per second. With probability epsilon any
  arm of the bucket is drawn, else the one with the largest median of rewards
  in a sliding window; one that was never timed comes first. "Taming the Long
  Tail", https://arxiv.org/abs/2511.16665, section 5; there every bucket of the
  default holds one arm, which makes it a fixed table, so here one arm is no
  bandit. Rewards of one bucket mix its values of n: keep buckets narrow.
  """

  def __init__(
    self, buckets: Buckets, *, epsilon: float, window: int, seed: int
  ) -> None:
    """Makes a bandit that knows nothing.

    Args:
      buckets: of several arms each.
      epsilon: probability of a drawn arm.
      window: rewards that are remembered, for each bucket and arm.
      seed: of the run.
    """
    self._buckets = buckets
    self._epsilon = epsilon
    self._seed = seed
    self._draws = 0
    self._rewards: dict[tuple[int, Arm], collections.deque] = _windows(window)
    self._lengths: dict[Arm, collections.deque] = _windows(window)

  def choose(self, occupancy: Occupancy, forwards: int) -> Choice:
    """See `Strategy`."""
    bucket = self._buckets.find(occupancy.running)
    arms = self._buckets.arms[bucket]
    if len(arms) == 1:
      return Choice(arms[0], forwards, False)
    # A draw is a function of the seed and of its number.
    rng = np.random.default_rng((self._seed, self._draws))
    self._draws += 1
    if rng.random() < self._epsilon:
      return Choice(arms[rng.integers(len(arms))], forwards, True)
    worth = lambda arm: (
      statistics.median(self._rewards[bucket, arm])
      if self._rewards[bucket, arm]
      else float('inf')
    )
    return Choice(max(arms, key=worth), forwards, True)

  def observe(self, occupancy: Occupancy, arm: Arm, spent: Spent) -> None:
    """See `Strategy`."""
    if not spent.row_forwards or not spent.seconds or spent.seconds <= 0:
      return
    lengths = self._lengths[arm]
    lengths.append(spent.tokens / spent.row_forwards)
    reward = (
      statistics.median(lengths)
      * spent.row_forwards
      / (spent.seconds + spent.preparation)
    )
    bucket = self._buckets.find(occupancy.running)
    self._rewards[bucket, arm].append(reward)

  def reachable(self, min_rows: int, max_rows: int) -> list[Arm]:
    """See `Strategy`."""
    return self._buckets.reachable(min_rows, max_rows)

  def dump(self) -> dict[str, Any]:
    """See `Strategy`."""
    return {
      'strategy': 'bandit',
      'draws': self._draws,
      'rewards': [
        [self._limit(bucket), [*arm], [*values]]
        for (bucket, arm), values in self._rewards.items()
      ],
      'lengths': [[[*arm], [*values]] for arm, values in self._lengths.items()],
    }

  def restore(self, saved: dict[str, Any]) -> None:
    """See `Strategy`."""
    if saved.get('strategy') != 'bandit':
      return
    self._draws = saved['draws']
    known = {
      (self._limit(bucket), arm): bucket
      for bucket, arms in enumerate(self._buckets.arms)
      for arm in arms
    }
    named = lambda fields: Arm(fields[0], fields[1], tuple(fields[2]))
    for limit, fields, values in saved['rewards']:
      arm = named(fields)
      if (limit, arm) in known:
        self._rewards[known[limit, arm], arm].extend(values)
    for fields, values in saved['lengths']:
      self._lengths[named(fields)].extend(values)

  def _limit(self, bucket: int) -> int:
    """Returns the largest n of a bucket, which names it; 0: of the last."""
    return (*self._buckets.limits, 0)[bucket]


def _windows(size: int) -> collections.defaultdict[Any, collections.deque]:
  return collections.defaultdict(lambda: collections.deque(maxlen=size))
