"""How far drafts are right, from counts by node that all widths share."""

import collections
import math
from typing import Any, Sequence

_HORIZON = 2048  # row forwards after which a count weighs 1/e
_PRIOR = 64  # row forwards that all N together count for at one N
_AGE = 16  # segments at one N after which what was seen there counts half
# Segments that pass without a node after which what was seen of it counts half:
# drafts are probed now and then, and what probes say must not have to outweigh
# all that was said before the cache filled.
_FADE = 4
# A node that no draft held for so many segments is no longer known: policies
# sharpen, caches fill.
STALE = 16


class _Counts:
  """By node behind the root: row forwards, and those that reached it."""

  def __init__(self) -> None:
    self.reached: list[float] = []
    self.offered: list[float] = []
    self.last: list[int] = []  # segment that offered it last

  def add(self, accepted: Sequence[int], row_forwards: int, now: int) -> None:
    """Counts a segment; `accepted` is without the root."""
    for node, count in enumerate(accepted):
      if node == len(self.offered):
        self.reached.append(0.0)
        self.offered.append(0.0)
        self.last.append(now)
      missed = max(now - self.last[node] - 1, 0)
      keep = math.exp(-row_forwards / _HORIZON) * 0.5**(missed / _FADE)
      self.reached[node] = keep * self.reached[node] + count
      self.offered[node] = keep * self.offered[node] + row_forwards
      self.last[node] = now


class AcceptCurve:
  """The expected accept length of every W, from segments of any W.

  E[accept length(W)] = 1 + sum over nodes i < W of P(node i is reached). In a
  chain node i is depth i: the counts are acceptance by depth. Drafts list the
  most probable nodes first, so the first nodes of a wide draft tell of a
  narrow one. P is that at the same N as far as it was seen there lately, else
  that of all N together.
  """

  def __init__(self) -> None:
    self._all = _Counts()
    self._at: dict[int, _Counts] = collections.defaultdict(_Counts)
    self._segments: dict[int, int] = collections.Counter()  # by N

  def add(self, rows: int, accepted: Sequence[int], row_forwards: int,
          now: int) -> None:
    """Counts a segment.

    Args:
      rows: N.
      accepted: see `Spent`; without a draft it ages what was seen at N.
      row_forwards: see `Spent`.
      now: number of the segment.
    """
    self._segments[rows] += 1
    self._all.add(accepted[1:], row_forwards, now)
    self._at[rows].add(accepted[1:], row_forwards, self._segments[rows])

  def is_stale(self, width: int, now: int) -> bool:
    """Returns whether a node of such a draft was not offered lately."""
    return any(self._is_stale(node, now) for node in range(width - 1))

  def evidence(self, width: int) -> float:
    """Returns row forwards that the last node of such a draft was seen in."""
    return self._all.offered[width -
                             2] if width - 2 < len(self._all.offered) else 0.0

  def length(self,
             rows: int,
             width: int,
             now: int,
             *,
             hopeful: bool = False) -> float:
    """Returns the accept length to expect, tokens per row and forward.

    Args:
      rows: N.
      width: W.
      now: number of the segment.
      hopeful: take a node that was not offered lately to be as good as the one
        before it, else as last seen.
    """
    total = probability = 1.0
    for node in range(width - 1):
      if not (hopeful and self._is_stale(node, now)):
        probability = self._probability(rows, node, now)
      total += probability
    return total

  def _is_stale(self, node: int, now: int) -> bool:
    last = self._all.last
    return node >= len(last) or now - last[node] >= STALE

  def _probability(self, rows: int, node: int, now: int) -> float:
    if node >= len(self._all.offered):
      return 0.0
    probability = self._all.reached[node] / self._all.offered[node]
    here = self._at[rows]
    if node < len(here.offered):
      weight = 0.5**((self._segments[rows] - here.last[node]) / _AGE)
      probability = ((weight * here.reached[node] + _PRIOR * probability) /
                     (weight * here.offered[node] + _PRIOR))
    return probability

  def dump(self) -> list[Any]:
    """Returns everything, as JSON can hold it."""
    fields = lambda c: [[*c.reached], [*c.offered], [*c.last]]
    return [
        fields(self._all),
        [[n, self._segments[n], fields(c)] for n, c in self._at.items()]
    ]

  def restore(self, saved: list[Any]) -> None:
    """Takes up what `dump` returned."""

    def counts(fields: list[Any]) -> _Counts:
      made = _Counts()
      made.reached, made.offered, made.last = map(list, fields)
      return made

    self._all = counts(saved[0])
    for rows, segments, fields in saved[1]:
      self._at[rows], self._segments[rows] = counts(fields), segments
