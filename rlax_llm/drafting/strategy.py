"""How wide to draft: width by occupancy, from what segments have cost.

Speed values only: the width changes how long tokens take, never which they
are.
"""

import dataclasses
from typing import Sequence

# A probe is a short segment at a width whose gain is not known: so many rows
# times forwards, and so many forwards at least and at most.
_PROBE_ROWS, _PROBE_LEAST, _PROBE_MOST = 64, 2, 8
# What probes of one (N, S, W) may lose against W = 1, as a share of the time
# spent there.
_PROBE_SHARE = 0.02
_MEMORY = 0.7  # of the moving averages, by segment
_MARGIN = 1.03  # a wider draft must promise so much more than W = 1


@dataclasses.dataclass
class _Record:
  """What is known of one (N, S, W); averages move."""
  runs: int = 0
  cost: float = 0.0  # seconds of a forward
  accept: float = 1.0  # tokens per row and forward
  lost: float = 0.0  # seconds, against W = 1

  def add(self, cost: float, accept: float) -> None:
    self.runs += 1
    if self.runs < 2:  # The first run warms up and tells nothing.
      return
    memory = _MEMORY if self.runs > 2 else 0.0
    self.cost = memory * self.cost + (1 - memory) * cost
    self.accept = memory * self.accept + (1 - memory) * accept


class WidthPolicy:
  """Chooses W for every segment: the most tokens per second expected.

  With cost(N, S, W), measured seconds of a forward, and accept(N, S, W),
  measured tokens committed per row and forward, W pays if accept(N, S, W) *
  cost(N, S, 1) exceeds cost(N, S, W). What is not known is probed by short
  segments; where W did not pay it is probed again, since acceptance changes as
  the cache fills and the policy sharpens, as often as keeps the loss below a
  small share of the time spent at that (N, S).
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
    if self._record(rows, capacity, 1).runs < 2:
      return 1, forwards  # The yardstick comes first.
    gains = {w: self._gain(rows, capacity, w) for w in self._widths}
    best = max(self._widths, key=lambda w: (gains[w] or 0.0, -w))
    if (gains[best] or 0.0) >= _MARGIN and best != 1:
      return best, forwards
    budget = _PROBE_SHARE * self._seconds[rows, capacity]
    for width in self._widths[1:]:
      if self._record(rows, capacity, width).lost <= budget:
        wanted = -(-_PROBE_ROWS // rows)
        return width, min(forwards, max(_PROBE_LEAST, min(wanted, _PROBE_MOST)))
    return 1, forwards

  def observe(self, rows: int, capacity: int, width: int, *, seconds: float,
              forwards: int, row_forwards: int, tokens: int) -> None:
    """Learns from a segment.

    Args:
      rows: N.
      capacity: S.
      width: W.
      seconds: it took, compilation apart.
      forwards: it spent.
      row_forwards: summed over the forwards, the rows that decoded.
      tokens: committed.
    """
    if not forwards or not row_forwards:
      return
    here = rows, capacity
    self._seconds[here] = self._seconds.get(here, 0.0) + seconds
    record = self._record(rows, capacity, width)
    accept = tokens / row_forwards
    record.add(seconds / forwards, accept)
    if record.runs > 1:
      # At W = 1 the same tokens had taken accept times as many forwards.
      plain = self._record(rows, capacity, 1).cost * forwards * accept
      record.lost = max(record.lost + seconds - plain, 0.0)

  def _record(self, rows: int, capacity: int, width: int) -> _Record:
    return self._records.setdefault((rows, capacity, width), _Record())

  def _gain(self, rows: int, capacity: int, width: int) -> float | None:
    """Returns tokens per second over those of W = 1; None if unknown."""
    if width == 1:
      return 1.0
    record = self._record(rows, capacity, width)
    if record.runs < 2:
      return None
    return record.accept * self._record(rows, capacity, 1).cost / record.cost
