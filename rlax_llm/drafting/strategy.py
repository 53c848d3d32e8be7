"""How wide to draft: width by occupancy, from what segments have cost.

Speed values only: the width changes how long tokens take, never which they
are.
"""

import collections
import dataclasses
from typing import Sequence

# A probe is a short segment at a width whose gain is not known: so many rows
# times forwards, and so many forwards at least and at most.
_PROBE_ROWS, _PROBE_LEAST, _PROBE_MOST = 64, 2, 8
# What probes of one (N, S, W) may lose, as a share of the time spent at
# (N, S).
_PROBE_SHARE = 0.02
_PROBE_REST = 4  # segments at least between two probes of a known width
_MEMORY = 0.7  # of the moving average of accept lengths, by segment
# Once its cost is known, every so many segments of a width are timed: a clock
# on the device's work makes the host wait for it first.
_TIMED_EVERY, _TIMED_FIRST, _TIMED_KEPT = 8, 4, 5
# A wider draft must promise so much more than W = 1: rates are measured with
# noise, and less is not worth the risk of being slower.
_MARGIN = 1.1


@dataclasses.dataclass
class _Record:
  """What is known of one (N, S, W); averages move."""
  runs: int = 0
  # Seconds of a forward in the last timed segments.
  costs: collections.deque = dataclasses.field(
      default_factory=lambda: collections.deque(maxlen=_TIMED_KEPT))
  accept: float = 1.0  # tokens per row and forward
  lost: float = 0.0  # seconds, against the best width
  rest: int = 0  # segments since the last of this width

  def add(self, cost: float | None, accept: float) -> None:
    self.runs += 1
    if self.runs < 2:  # The first run warms up and tells nothing.
      return
    memory = _MEMORY if self.runs > 2 else 0.0
    self.accept = memory * self.accept + (1 - memory) * accept
    if cost is not None:
      self.costs.append(cost)

  @property
  def cost(self) -> float:
    """Seconds of a forward, 0 if unknown: whatever disturbs, adds to it."""
    return min(self.costs, default=0.0)


class WidthPolicy:
  """Chooses W for every segment: the most tokens per second expected.

  The rate of W at (N, S) is accept / cost: measured tokens committed per row
  and forward, over measured seconds of a forward. The width of the highest
  rate is used, W > 1 only if it is clearly above that of W = 1. Every other
  width is probed by short segments now and then, since machines change their
  speed, the cache fills and the policy sharpens: as often as keeps what probes
  lose below a small share of the time spent at that (N, S).
  """

  def __init__(self, widths: Sequence[int]) -> None:
    """Makes a policy that knows nothing; W = 1 is always among the widths."""
    self._widths = sorted({1, *widths})
    self._records: dict[tuple[int, int, int], _Record] = {}
    self._seconds: dict[tuple[int, int], float] = {}  # spent at (N, S)

  def choose(self, rows: int, capacity: int, forwards: int) -> tuple[int, int]:
    """Returns (W, forwards at most) of the next segment.

    Args:
      rows: N.
      capacity: S.
      forwards: what the segment may spend if nothing is probed.
    """
    if self._rate(rows, capacity, 1) is None:
      return 1, forwards  # The yardstick comes first.
    best = self._best(rows, capacity)
    budget = _PROBE_SHARE * self._seconds[rows, capacity]
    for width in self._widths:
      record = self._record(rows, capacity, width)
      rested = not record.costs or record.rest >= _PROBE_REST
      if width != best and rested and record.lost <= budget:
        wanted = -(-_PROBE_ROWS // rows)
        return width, min(forwards, max(_PROBE_LEAST, min(wanted, _PROBE_MOST)))
    return best, forwards

  def times(self, rows: int, capacity: int, width: int) -> bool:
    """Returns whether the next segment of this width is to be timed."""
    record = self._record(rows, capacity, width)
    return (record.runs < _TIMED_FIRST or record.runs % _TIMED_EVERY == 0 or
            width != self._best(rows, capacity))

  def observe(self,
              rows: int,
              capacity: int,
              width: int,
              *,
              seconds: float | None,
              forwards: int,
              row_forwards: int,
              tokens: int,
              preparation: float = 0.0) -> None:
    """Learns from a segment.

    Args:
      rows: N.
      capacity: S.
      width: W.
      seconds: it took, compilation apart; None: it was not timed.
      forwards: it spent.
      row_forwards: summed over the forwards, the rows that decoded.
      tokens: committed.
      preparation: seconds before it that its width made necessary.
    """
    if not forwards or not row_forwards:
      return
    here = rows, capacity
    for other in self._widths:
      self._record(rows, capacity, other).rest += 1
    record = self._record(rows, capacity, width)
    record.rest = 0
    accept = tokens / row_forwards
    record.add(None if seconds is None else seconds / forwards, accept)
    spent = record.cost * forwards if seconds is None else seconds
    self._seconds[here] = self._seconds.get(here, 0.0) + spent
    best_width = self._best(rows, capacity)
    best = self._rate(rows, capacity, best_width)
    if record.runs > 1 and best:
      # Against what the best width had taken for the same tokens. A width that
      # is not above W = 1 by the margin has not earned its probes.
      margin = _MARGIN if best_width == 1 < width else 1.0
      gain = accept * forwards / (best * margin)
      record.lost = max(record.lost + spent + preparation - gain, 0.0)

  def _record(self, rows: int, capacity: int, width: int) -> _Record:
    return self._records.setdefault((rows, capacity, width), _Record())

  def _rate(self, rows: int, capacity: int, width: int) -> float | None:
    """Returns tokens per row and second; None if unknown."""
    record = self._record(rows, capacity, width)
    if record.cost <= 0:
      return None
    return record.accept / record.cost

  def _best(self, rows: int, capacity: int) -> int:
    """Returns the width to use as far as is known."""
    rate = lambda w: self._rate(rows, capacity, w) or 0.0
    best = max(self._widths, key=lambda w: (rate(w), -w))
    return best if rate(best) >= _MARGIN * rate(1) else 1
