"""A fixed table: arms by the number of rows that decode."""

import bisect
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent


class Buckets(NamedTuple):
  """Arms by n: bucket i takes n from limits[i - 1] + 1 to limits[i].

  Attributes:
    limits: ascending.
    arms: of each bucket, and of all n above the last limit.
  """

  limits: tuple[int, ...]
  arms: tuple[tuple[Arm, ...], ...]

  def find(self, running: int) -> int:
    """Returns the bucket of n."""
    return bisect.bisect_left(self.limits, running)

  def reachable(self, min_rows: int, max_rows: int) -> list[Arm]:
    """Returns the arms of all buckets that hold one of these n."""
    found = self.arms[self.find(min_rows) : self.find(max_rows) + 1]
    return sorted({arm for arms in found for arm in arms})


def make_buckets(rows: Sequence[tuple[int, Sequence[Arm]]]) -> Buckets:
  """Returns buckets; above the last one nothing is drafted.

  Args:
    rows: (largest n, arms) of each bucket, ascending.
  """
  return Buckets(
    tuple(most for most, _ in rows),
    tuple(tuple(arms) for _, arms in rows) + ((PLAIN,),),
  )


class Table:
  """One arm for each bucket of n; learns nothing.

  The published default of "Taming the Long Tail" (TLT),
  https://arxiv.org/abs/2511.16665: the fewer rows decode, the more nodes are
  verified, and above a threshold of running rows none are drafted. There the
  threshold has to hold for ten forwards in a row; here segments are longer.
  """

  def __init__(self, buckets: Buckets) -> None:
    """Makes a table.

    Args:
      buckets: of one arm each.
    """
    assert all(len(arms) == 1 for arms in buckets.arms)
    self._buckets = buckets

  def choose(self, occupancy: Occupancy, forwards: int) -> Choice:
    """See `Strategy`."""
    bucket = self._buckets.find(occupancy.running)
    return Choice(self._buckets.arms[bucket][0], forwards, False)

  def observe(self, occupancy: Occupancy, arm: Arm, spent: Spent) -> None:
    """See `Strategy`."""

  def reachable(self, min_rows: int, max_rows: int) -> list[Arm]:
    """See `Strategy`."""
    return self._buckets.reachable(min_rows, max_rows)

  def dump(self) -> dict[str, Any]:
    """See `Strategy`."""
    return {'strategy': 'table'}

  def restore(self, saved: dict[str, Any]) -> None:
    """See `Strategy`."""


def fixed(arm: Arm) -> Table:
  """Returns the strategy of one arm, whatever n."""
  return Table(Buckets((), ((arm,),)))
