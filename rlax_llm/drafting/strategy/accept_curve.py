"""How far drafts are right, from counts that wide drafts share with narrow."""

import collections
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

_HORIZON = 8192  # row forwards after which a count weighs 1/e
_PRIOR = 64  # weight, in row forwards, of the counts of all N at one N
_AGE = 16  # half-life of the counts at one N, in segments
# Counts that a segment contradicts by more than _SURPRISE standard errors are
# discarded, at all N: probes are few and must not have to outweigh all counts
# from before a cache filled. The samples of a prompt are correlated: _ALIKE of
# them count as one observation.
_SURPRISE, _ALIKE = 2.0, 8
_MIN_VARIANCE = 0.05  # tokens^2; for drafts that are all right or all wrong
# Segments after which a width that no draft reached counts as unknown: policies
# sharpen and caches fill.
STALE = 16


def equal_forwards(
  accepted: Sequence[int], width: int, branching: int
) -> float:
  """Returns the row forwards that narrower drafts had taken for a segment.

  In a chain, a forward that commits a tokens takes ceil(a / W) of W nodes,
  since the draft of a later token continues where that of the first ended;
  summed over forwards that is the number of those with a > 0, W, 2 W ...
  tokens, and node i is reached where a > i. The first W shares alone would
  tell of W nodes too little: after a wide draft more forwards begin where
  drafting is hard. In a tree nodes say nothing about depths, and the share of
  its first W nodes is what is left.

  Args:
    accepted: see `Spent`, of at least `width` nodes.
    width: W of the narrower draft.
    branching: children of a node, at most; 1: a chain.
  """
  if branching == 1:
    return float(sum(accepted[::width]))
  return sum(accepted) * accepted[0] / sum(accepted[:width])


@dataclasses.dataclass
class _Count:
  """Tokens, and the row forwards of one W that commit them."""

  tokens: float = 0.0
  forwards: float = 0.0
  last: int = 0  # segment that told of it last

  @property
  def length(self) -> float:
    return self.tokens / self.forwards

  def add(self, tokens: float, forwards: float, now: int) -> None:
    """Counts a segment."""
    self.fade(math.exp(-forwards / _HORIZON))
    self.tokens += tokens
    self.forwards += forwards
    self.last = now

  def fade(self, keep: float) -> None:
    """Makes what was counted weigh less."""
    self.tokens *= keep
    self.forwards *= keep

  def agreement(self, width: int, tokens: float, forwards: float) -> float:
    """Returns how far what was counted stands beside a segment: 1 down to 0.

    Of accept lengths from 1 to W with mean m the variance is (m - 1) (W - m)
    at most.
    """
    if not self.forwards:
      return 1.0
    length = tokens / forwards
    mean = (length + self.length) / 2
    variance = max((mean - 1) * (width - mean), _MIN_VARIANCE)
    variance *= _ALIKE * (1 / forwards + 1 / self.forwards)
    square = (length - self.length) ** 2 / variance
    return math.exp(-max(square - _SURPRISE**2, 0.0) / 2)


class AcceptCurve:
  """The expected accept length of every W, from segments of any W.

  A segment tells of all widths up to its own, see `equal_forwards`:

    E[accept length(W)] = tokens / row forwards that W nodes had taken

  as far as it was seen at the same N lately, else of all N together.
  """

  def __init__(self, widths: Iterable[int], branching: int = 1) -> None:
    """Makes a curve that knows nothing.

    Args:
      widths: that drafts may have.
      branching: children of a node, at most; 1: chains.
    """
    self._widths = sorted(w for w in set(widths) if w > 1)
    self._branching = branching
    make = lambda: {w: _Count() for w in self._widths}
    self._all = make()
    self._at: dict[int, dict[int, _Count]] = collections.defaultdict(make)
    self._segments: dict[int, int] = collections.Counter()  # by N

  def add(self, rows: int, accepted: Sequence[int], now: int) -> None:
    """Counts a segment.

    Args:
      rows: N.
      accepted: see `Spent`; empty: nothing was drafted, what was seen at N
        grows older.
      now: number of the segment.
    """
    self._segments[rows] += 1
    tokens = sum(accepted)
    for width in self._widths:
      if width <= len(accepted):
        forwards = equal_forwards(accepted, width, self._branching)
        everywhere, here = self._all[width], self._at[rows][width]
        # Numbers of rows may differ for good; a change is one at the same N.
        keep = here.agreement(width, tokens, forwards)
        for count in (everywhere, *(at[width] for at in self._at.values())):
          count.fade(keep)
        everywhere.add(tokens, forwards, now)
        here.add(tokens, forwards, self._segments[rows])

  def is_stale(self, width: int, now: int) -> bool:
    """Returns whether no draft told of this W lately."""
    if width == 1:
      return False
    count = self._all[width]
    return not count.forwards or now - count.last >= STALE

  def evidence(self, width: int) -> float:
    """Returns row forwards that E of this W rests on."""
    return self._all[width].forwards if width > 1 else 0.0

  def length(
    self, rows: int, width: int, now: int, *, hopeful: bool = False
  ) -> float:
    """Returns the accept length to expect, tokens per row and forward.

    What is stale lies between two bounds: no less than that of the next
    narrower W, and what it would be if nodes went on to be as good as those
    up to there.

    Args:
      rows: N.
      width: W, 1 or one of the widths.
      now: number of the segment.
      hopeful: take the upper bound where E is stale, else what was seen last.
    """
    known, length, slope = 1, 1.0, 1.0  # of the widest that is not stale
    for w in self._widths[: self._widths.index(width) + 1 if width > 1 else 0]:
      most = length + slope * (w - known)
      seen = max(length, self._seen(rows, w))
      if not self.is_stale(w, now):
        slope = (seen - length) / (w - known)
        known, length = w, seen
      elif w == width:
        return most if hopeful else min(seen, most)
    return length

  def _seen(self, rows: int, width: int) -> float:
    everywhere, here = self._all[width], self._at[rows][width]
    if not everywhere.forwards:
      return 1.0
    weight = 0.5 ** ((self._segments[rows] - here.last) / _AGE)
    return (weight * here.tokens + _PRIOR * everywhere.length) / (
      weight * here.forwards + _PRIOR
    )

  def dump(self) -> list[Any]:
    """Returns everything, as JSON can hold it."""
    fields = lambda counts: [
      [w, *dataclasses.astuple(c)] for w, c in counts.items()
    ]
    return [
      fields(self._all),
      [[n, self._segments[n], fields(c)] for n, c in self._at.items()],
    ]

  def restore(self, saved: list[Any]) -> None:
    """Takes up what `dump` returned, of the widths that there are."""

    def take(counts: dict[int, _Count], fields: list[Any]) -> None:
      counts.update((w, _Count(*count)) for w, *count in fields if w in counts)

    take(self._all, saved[0])
    for rows, segments, fields in saved[1]:
      self._segments[rows] = segments
      take(self._at[rows], fields)
