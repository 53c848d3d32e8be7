"""The default strategy: tokens per second from measured costs and counts."""

import collections
from collections.abc import Iterable
import dataclasses
from typing import Any

from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting.strategy.accept_curve import AcceptCurve
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent

# A probe is a short segment of an arm whose gain is unknown. Its length in
# forwards is _PROBE_ROWS / rows, within these bounds.
_PROBE_ROWS, _PROBE_MIN, _PROBE_MAX = 64, 2, 8
# The share of the time at one (N, S) that its probes may lose.
_PROBE_SHARE = 0.02
# The arm in use is timed in its first _TIMED_FIRST segments and then in every
# _TIMED_EVERY-th; the last _KEPT timings are kept. Timing is rationed because
# the host has to wait for the device to read its clock.
_TIMED_FIRST, _TIMED_EVERY, _KEPT = 4, 8, 10
# An arm that is not in use is timed again after _REST_FIRST segments at its
# (N, S). The pause doubles each time, up to _REST: machines change their speed.
_REST_FIRST, _REST = 4, 64
# After n timed segments, the fraction _DISTURBED / n^2 of the measured time may
# come from other processes. After _FORGOTTEN segments without a new timing the
# measurement is ignored.
_DISTURBED, _FORGOTTEN = 0.3, 256
# Speculation starts only if its predicted rate exceeds that of W = 1 by the
# factor _MARGIN, or by _SURE_MARGIN once the prediction rests on more than
# _MANY_TIMES timed segments and _MANY_ROWS row forwards. It continues for as
# long as the predicted rate stays above that of W = 1. A promising arm with few
# measurements is probed repeatedly.
_MARGIN, _SURE_MARGIN = 1.1, 1.03
_MANY_TIMES, _MANY_ROWS = 4, 1024
_FORMAT = 3  # of saved statistics; those of another format are ignored
_MEMORY = 0.8  # decay of the moving average of preparation seconds


@dataclasses.dataclass
class _Cost:
  """Measured cost of a forward of one (N, S, arm)."""

  # (seconds of a forward, forwards) of the last timed segments.
  kept: collections.deque = dataclasses.field(
    default_factory=lambda: collections.deque(maxlen=_KEPT)
  )
  times: int = 0  # timed segments
  last: int = 0  # segment at (N, S) that was timed last
  preparation: float = 0.0  # seconds for each forward, mean

  @property
  def known(self) -> bool:
    return bool(self.kept)

  @property
  def forward(self) -> float:
    """Seconds of a forward, preparation included; 0: unknown.

    The mean over the forwards of the faster half of the segments: disturbances
    only add to a segment's seconds, and the minimum of a few hangs on one of
    them. A long segment weighs as much as a probe, which may be newer.
    """
    if not self.kept:
      return 0.0
    half = sorted(self.kept)[: (len(self.kept) + 1) // 2]
    weights = [min(forwards, _PROBE_MAX) for _, forwards in half]
    seconds = sum(each * w for (each, _), w in zip(half, weights))
    return seconds / sum(weights) + self.preparation


@dataclasses.dataclass
class _Site:
  """What is known of one (N, S)."""

  rows: int
  costs: dict[Arm, _Cost]
  segments: int = 0
  seconds: float = 0.0
  lost: float = 0.0  # of them, by probes, against the best arm
  used: Arm = PLAIN  # last, probes apart
  latest: Arm | None = None  # of the last segment
  begun: Arm | None = None  # a probe of which one segment has run

  def is_due(self, arm: Arm) -> bool:
    """Whether an arm that is not in use is to be timed again."""
    cost = self.costs[arm]
    rest = min(_REST_FIRST * 2 ** min(max(cost.times - 1, 0), 10), _REST)
    return not cost.known or self.segments - cost.last >= rest

  def min_seconds(self, arm: Arm) -> float:
    """Returns a lower bound of the seconds of a forward."""
    cost = self.costs[arm]
    if cost.known and self.segments - cost.last < _FORGOTTEN:
      return cost.forward * (1 - _DISTURBED / cost.times**2)
    # More nodes take no less time.
    return max(c.forward for a, c in self.costs.items() if a.width < arm.width)


class CostModel:
  """Chooses the arm that promises the most tokens per second.

    tokens/s(arm) = n E[accept length(arm)] / T(N, S, arm)

  T, the seconds of a forward, is measured for each executable from a few timed
  segments. E comes from counts which all widths of one shape and sources share:
  a draft tells of all that are narrower. n is common to all arms and leaves the
  comparison; N decides through T.

  What remains to be explored is bounded. An arm is probed by a short segment,
  or by two if its seconds are wanted: the first one after another arm finds
  its executable cold. It is probed only if it would win, were its forward no
  dearer than that of a narrower one and nodes that were not offered lately as
  good as those before them, or if it promises more and that rests on little;
  and as often as keeps what probes lose below a small share of the time spent
  at that (N, S). Where nothing is drafted nothing is learned about drafts, so
  there such a probe comes every `accept_curve.STALE` segments, and nowhere if
  drafts could not win even if all were right.

  The model is that of "Taming the Long Tail" (https://arxiv.org/abs/2511.16665)
  without its bandit.
  """

  def __init__(self, arms: Iterable[Arm]) -> None:
    """Makes a model that knows nothing; W = 1 is always among the arms."""
    self._arms = sorted({PLAIN, *arms})
    self._sites: dict[tuple[int, int], _Site] = {}
    families = {_family(a): a for a in self._arms}
    self._curves = {
      family: AcceptCurve(
        (a.width for a in self._arms if _family(a) == family), last.branching
      )
      for family, last in families.items()
    }
    self._now = 0  # segments so far
    self._drafted = False  # in the last segment

  def choose(self, occupancy: Occupancy, forwards: int) -> Choice:
    """See `Strategy`."""
    site = self._site(occupancy)
    if not site.costs[PLAIN].known:
      return Choice(PLAIN, forwards, True)  # The yardstick comes first.
    best = self._best(site)
    probe = self._probe(site, best)
    if probe:
      # The first segment warms up, and tells about drafts if that is wanted.
      stale = self._curves[_family(probe)].is_stale(probe.width, self._now)
      wanted = _PROBE_MIN
      if stale or site.latest == probe:
        wanted = -(-_PROBE_ROWS // max(occupancy.running, 1))
      short = max(_PROBE_MIN, min(wanted, _PROBE_MAX))
      return Choice(probe, min(forwards, short), True)
    site.used = best
    cost = site.costs[best]
    timed = site.latest == best and (
      cost.times < _TIMED_FIRST or site.segments - cost.last >= _TIMED_EVERY
    )
    return Choice(best, forwards, timed)

  def observe(self, occupancy: Occupancy, arm: Arm, spent: Spent) -> None:
    """See `Strategy`."""
    if not spent.forwards or not spent.row_forwards:
      return
    site = self._site(occupancy)
    best = self._best(site)
    rate = self._rate(site, best)
    site.segments += 1
    self._now += 1
    cost = site.costs[arm]
    settled, site.latest = site.latest == arm, arm
    site.begun = None if settled or arm == site.used else arm
    if settled and spent.seconds is not None and spent.seconds > 0:
      cost.kept.append((spent.seconds / spent.forwards, spent.forwards))
      cost.times += 1
      cost.last = site.segments
      # The first draft after W = 1 also catches up with the tokens that were
      # sampled without it; later drafts do not pay for that.
      if self._drafted:
        share = spent.preparation / spent.forwards
        cost.preparation += (1 - _MEMORY) * (share - cost.preparation)
    for family, curve in self._curves.items():
      mine = spent.accepted if family == _family(arm) else ()
      curve.add(site.rows, mine, self._now)
    self._drafted = arm != PLAIN
    took = spent.preparation + (
      spent.forwards * cost.forward
      if spent.seconds is None
      else max(spent.seconds, 0.0)
    )
    site.seconds += took
    if arm != best and rate and cost.known:
      # Against what the best arm had taken for the same tokens.
      accept = spent.tokens / spent.row_forwards
      site.lost = max(site.lost + took - accept * spent.forwards / rate, 0.0)

  def reachable(self, min_rows: int, max_rows: int) -> list[Arm]:
    """See `Strategy`."""
    return self._arms

  def dump(self) -> dict[str, Any]:
    """See `Strategy`."""
    cost = lambda c: [[*c.kept], c.times, c.last, c.preparation]
    return {
      'strategy': 'cost_model',
      'format': _FORMAT,
      'segments': self._now,
      'curves': [
        [[*family], curve.dump()] for family, curve in self._curves.items()
      ],
      'sites': [
        [
          [*key],
          [s.segments, s.seconds, s.lost],
          [[[*arm], cost(c)] for arm, c in s.costs.items()],
        ]
        for key, s in self._sites.items()
      ],
    }

  def restore(self, saved: dict[str, Any]) -> None:
    """See `Strategy`."""
    if (saved.get('strategy'), saved.get('format')) != ('cost_model', _FORMAT):
      return
    self._now = saved['segments']
    for (branching, sources), curve in saved['curves']:
      family = (branching, tuple(sources))
      if family in self._curves:
        self._curves[family].restore(curve)
    for (rows, capacity), totals, costs in saved['sites']:
      site = self._site(Occupancy(rows, rows, capacity))
      site.segments, site.seconds, site.lost = totals
      for (width, branching, sources), fields in costs:
        arm = Arm(width, branching, tuple(sources))
        if arm in site.costs:
          kept, times, last, preparation = fields
          # Another process, perhaps on another machine: no longer sure.
          site.costs[arm] = _Cost(
            kept=collections.deque(map(tuple, kept), _KEPT),
            times=min(times, 1),
            last=last,
            preparation=preparation,
          )

  def _site(self, occupancy: Occupancy) -> _Site:
    key = occupancy.rows, occupancy.capacity
    if key not in self._sites:
      self._sites[key] = _Site(occupancy.rows, {a: _Cost() for a in self._arms})
    return self._sites[key]

  def _length(self, site: _Site, arm: Arm, hopeful: bool = False) -> float:
    return self._curves[_family(arm)].length(
      site.rows, arm.width, self._now, hopeful=hopeful
    )

  def _rate(self, site: _Site, arm: Arm) -> float:
    """Returns tokens per row and second; 0 if unknown."""
    cost = site.costs[arm]
    return self._length(site, arm) / cost.forward if cost.known else 0.0

  def _front(self, site: _Site) -> Arm:
    """Returns the arm that promises most."""
    return max(self._arms, key=lambda a: (self._rate(site, a), -a.width))

  def _is_sure(self, site: _Site, arm: Arm) -> bool:
    """Returns whether what the arm promises rests on much."""
    times = min(site.costs[arm].times, site.costs[PLAIN].times)
    rows = self._curves[_family(arm)].evidence(arm.width)
    return times > _MANY_TIMES and rows > _MANY_ROWS

  def _best(self, site: _Site) -> Arm:
    """Returns the arm to use as far as is known."""
    front = self._front(site)
    if front == PLAIN:
      return PLAIN
    kept = 1.0 if site.used == front else _SURE_MARGIN
    margin = kept if self._is_sure(site, front) else _MARGIN
    pays = self._rate(site, front) >= margin * self._rate(site, PLAIN)
    return front if pays else PLAIN

  def _probe(self, site: _Site, best: Arm) -> Arm | None:
    """Returns the arm to try out now, which may be better than the best."""
    if site.begun and site.is_due(site.begun):
      return site.begun
    if site.lost > _PROBE_SHARE * site.seconds:
      return None
    front = self._front(site)
    # A yardstick that is measured short, hence too long, would flatter.
    if front != PLAIN and site.is_due(PLAIN):
      return PLAIN
    if front != best and not self._is_sure(site, front):
      return front
    hope = self._rate(site, best) * (_MARGIN if best == PLAIN else 1.0)
    found = None
    for arm in self._arms:
      stale = self._curves[_family(arm)].is_stale(arm.width, self._now)
      if arm not in (PLAIN, best) and (stale or site.is_due(arm)):
        rate = self._length(site, arm, hopeful=True) / site.min_seconds(arm)
        if rate > hope:
          found, hope = arm, rate
    return found


def _family(arm: Arm) -> tuple[int, tuple[str, ...]]:
  """Returns what arms of one accept curve have in common."""
  return arm.branching, arm.sources
