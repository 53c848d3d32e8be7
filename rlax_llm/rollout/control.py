"""Boundary policies: pure functions from what may be seen to a decision.

The host acts only between segments. What is decided there is typed by what it
may see. A policy over a `SampleView` decides on training values: which groups
a step learns from, where a completion is cut. It sees logical time only: one
tick is one token in each of a fixed number of logical slots, filled in the
order of the requests, as if W were 1. A policy over a `SpeedView` decides when
things happen on the device and never what; it may see anything.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import heapq
import math
from typing import NamedTuple

import numpy as np

from rlax_llm.types import Request


class SampleView(NamedTuple):
  """What a decision on training values may see: a tick of logical time."""

  tick: int
  requests: tuple[Request, ...]  # in the order in which they are sampled
  complete: Mapping[int, int]  # index of a request -> tick of its last token


# Returns whether sampling stops at this tick: a sample that is not complete
# then is suspended. The first tick at which any policy returns True counts.
StopPolicy = Callable[[SampleView], bool]


def at_once(view: SampleView) -> bool:
  """Stops at the first tick at which sampling may stop."""
  del view
  return True


def stop_at_groups(
  target: int, oldest: int, policy: StopPolicy = at_once
) -> StopPolicy:
  """Lets a policy stop once enough groups are complete.

  With `at_once` this is APRIL, "APRIL: Active Partial Rollouts in Reinforcement
  Learning to Tame Long-tail Generation", https://arxiv.org/abs/2509.18521, with
  a bound on the age of deferred groups.

  Args:
    target: groups that must be complete.
    oldest: every group requested before this step must be complete, too.
    policy: decides at the ticks at which both hold.
  """

  def stop(view: SampleView) -> bool:
    return (
      len(view.complete) >= target
      and all(
        index in view.complete
        for index, request in enumerate(view.requests)
        if request.step < oldest
      )
      and policy(view)
    )

  return stop


class LogicalTime:
  """Who has how many tokens at which tick, as far as tokens are known.

  List scheduling: samples take the logical slots in order, a freed slot at
  the tick at which its last owner ended. The device may be anywhere: ticks are
  gone through once every token that they need has been sampled.
  """

  def __init__(
    self, requests: Sequence[Request], numbers: Sequence[int], slots: int
  ) -> None:
    """Stands at tick 0.

    Args:
      requests: in order.
      numbers: of the request, for each sample in order.
      slots: logical slots.
    """
    self._requests = tuple(requests)
    self._numbers = numbers
    self.tick = 0
    self.begin: dict[int, int] = {}  # sample -> tick; by logical order
    self.end: dict[int, int] = {}
    self._free = slots
    self._left = np.bincount(
      np.asarray(numbers, np.int64), minlength=len(requests)
    )
    # What has nothing left to sample is complete before the first tick.
    self._complete = {int(n): 0 for n in np.flatnonzero(self._left == 0)}

  @property
  def view(self) -> SampleView:
    return SampleView(self.tick, self._requests, self._complete)

  def advance(
    self, tokens: Sequence[int], ended: Sequence[bool]
  ) -> Iterator[SampleView]:
    """Goes as far as the tokens allow; yields when groups become complete.

    Args:
      tokens: new ones of each sample, at least what they were last time.
      ended: whether the sample will get no more.
    """
    ends: list[tuple[int, int]] = []
    horizon = math.inf

    def see(sample: int) -> None:
      nonlocal horizon
      known = self.begin[sample] + tokens[sample]
      if ended[sample]:
        heapq.heappush(ends, (known, sample))
      else:
        horizon = min(horizon, known)

    for sample in self.begin.keys() - self.end.keys():
      see(sample)
    while True:
      while self._free and len(self.begin) < len(self._numbers):
        sample = len(self.begin)
        self.begin[sample] = self.tick
        self._free -= 1
        see(sample)
      if not ends or ends[0][0] > horizon:
        return
      self.tick = ends[0][0]
      before = len(self._complete)
      while ends and ends[0][0] == self.tick:
        sample = heapq.heappop(ends)[1]
        self.end[sample] = self.tick
        self._free += 1
        self._left[self._numbers[sample]] -= 1
        if not self._left[self._numbers[sample]]:
          self._complete[self._numbers[sample]] = self.tick
      if len(self._complete) > before:
        yield self.view

  def tokens_at_tick(self, sample: int) -> int | None:
    """Returns what a sample has now; None: all that it will ever have."""
    if sample in self.end:
      return None
    return self.tick - self.begin.get(sample, self.tick)


class SpeedView(NamedTuple):
  """What a decision on speed may see, anything; here: the slots."""

  rows: int  # N
  decoding: int  # rows of this step that decode
  counted: int  # rows that do not run ahead, free ones among them
  pending: bool  # samples wait for a slot
  row_counts: Sequence[int]  # the values of N, largest first
  ahead_rows: int  # N at and below which free slots run ahead
  refill_threshold: float


def compacted_rows(view: SpeedView) -> int:
  """Returns the least N that holds the rows still decoding."""
  least = max(view.decoding, min(view.ahead_rows, view.rows))
  return min(n for n in view.row_counts if least <= n <= view.rows)


def done_rows(view: SpeedView) -> int:
  """Returns how many counted rows may be done before the host should act."""
  if view.pending:
    return max(1, math.ceil(view.refill_threshold * view.rows))
  fewer = [n for n in view.row_counts if view.ahead_rows <= n < view.rows]
  if not fewer:
    return view.counted
  return min(view.rows - max(fewer), view.counted)
