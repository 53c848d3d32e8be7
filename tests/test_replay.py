"""Strategies on recorded segments: the measure itself."""

import collections

import numpy as np
import pytest
from strategy_helpers import chain
from strategy_helpers import chains

from experiments.tlt import replay
from rlax_llm.drafting.strategy import table
from rlax_llm.drafting.strategy.base import Choice

WIDTHS = (1, 2, 4)
PASSES = 3


def _records(seed=0):
  """Segments of two epochs of three steps, at N = 8 and in a tail, N = 4.

  Each arm does the work of a step in another number of segments.
  """
  rng = np.random.default_rng(seed)
  records = []
  for epoch in (0, 1):
    for step in range(3):
      for rows in (8, 4):
        for width in WIDTHS:
          for _ in range(rng.integers(1, 5)):
            forwards = int(rng.integers(1, 9))
            row_forwards = forwards * rows - int(rng.integers(0, 2))
            reached = np.sort(rng.integers(1, row_forwards + 1, width - 1))[
              ::-1
            ]
            records.append(
              replay.Record(
                slots=8,
                epoch=epoch,
                step=step,
                width=width,
                running=rows,
                rows=rows,
                capacity=64,
                seconds=float(rng.random()),
                preparation=float(rng.random()) / 10,
                forwards=forwards,
                row_forwards=row_forwards,
                accepted=(row_forwards, *map(int, reached)),
              )
            )
  return records


@pytest.mark.parametrize('first', [0, 2])
@pytest.mark.parametrize('width', WIDTHS)
def test_a_static_arm_takes_what_was_recorded(width, first):
  """Law: its seconds are those of its own segments, the second epoch's as
  often as it is replayed, whatever step comes first.

  Mutants: the work of a step is that of W = 1, in tokens of a row; reading n
  takes a segment of W = 1 away.
  """
  records = _records()
  taken = replay.replay(
    replay.Trace(records), table.fixed(chain(width)), PASSES, first
  )
  for rows in (8, 4):
    want = sum(
      (r.seconds + r.preparation) * (PASSES if r.epoch else 1)
      for r in records
      if (r.rows, r.width) == (rows, width)
    )
    assert taken[rows] == pytest.approx(want)


class _Alternating:
  """Takes arms in turn, a few forwards each; notes what it is told."""

  def __init__(self, most):
    self.most = most
    self.told = []

  def choose(self, occupancy, forwards):
    del occupancy
    arms = chains(*WIDTHS)
    return Choice(
      arms[len(self.told) % len(arms)], min(forwards, self.most), True
    )

  def observe(self, occupancy, arm, spent):
    self.told.append((occupancy, arm, spent))


def test_a_strategy_that_changes_arms_does_all_of_the_work_once():
  """Law: where all segments of an arm take as long for the same part of the
  work, whoever mixes arms takes the sum of parts by price; no segment is longer
  than wanted, and the first of an executable is not timed.

  Mutants: what was done beyond a step's work is lost; a segment that was cut
  short is counted whole; every segment is timed.
  """
  price = {1: 3.0, 2: 2.0, 4: 1.0}  # seconds of a step's work
  records = _records(1)
  tokens = collections.Counter()
  place = lambda r: (r.epoch, r.step, r.rows, r.width)
  for r in records:
    tokens[place(r)] += sum(r.accepted)
  records = [
    r._replace(
      seconds=price[r.width] * sum(r.accepted) / tokens[place(r)],
      preparation=0.0,
    )
    for r in records
  ]
  passes = 20
  strategy = _Alternating(most=2)
  taken = replay.replay(replay.Trace(records), strategy, passes)
  seen, parts = set(), collections.Counter()
  for occupancy, arm, spent in strategy.told:
    assert 1 <= spent.forwards <= 2
    where = occupancy.rows, arm
    assert (spent.seconds is not None) == (where in seen)
    seen.add(where)
    parts[where] += (spent.seconds or 0.0) / price[arm.width]
  for rows in (8, 4):
    # All but the three that were not timed, and what is done in advance.
    work = sum(parts[rows, chain(w)] for w in WIDTHS)
    assert work == pytest.approx(3 * (passes + 1), abs=1.5)
    seconds = sum(parts[rows, chain(w)] * price[w] for w in WIDTHS)
    assert seconds < taken[rows] < seconds + 3.0


def test_each_epoch_begins_with_the_step_that_is_named():
  """Law: the steps come in turn from there. Mutant: only in the first epoch."""
  records = [r._replace(running=r.step) for r in _records(3)]
  strategy = _Alternating(most=9)
  replay.replay(replay.Trace(records), strategy, PASSES, first=1)
  steps = [occupancy.running for occupancy, _, _ in strategy.told]
  turns = [s for s, before in zip(steps, [None, *steps]) if s != before]
  assert turns == [1, 2, 0] * (PASSES + 1)


def test_what_is_cut_short_takes_its_boundary_all_the_same():
  """Law: a segment of f forwards takes boundary + f T(W), however long it was
  recorded.

  Mutants: the boundary is cut like the forwards; it is fitted over all widths
  as one.
  """
  boundary, forward = 0.7, {1: 0.5, 2: 1.0, 4: 2.5}
  records = [
    r._replace(seconds=boundary + r.forwards * forward[r.width])
    for r in _records(2)
  ]
  strategy = _Alternating(most=2)
  replay.replay(replay.Trace(records), strategy, PASSES)
  told = [
    (arm.width, spent)
    for _, arm, spent in strategy.told
    if spent.seconds is not None
  ]
  assert {1, 2} == {spent.forwards for _, spent in told}
  for width, spent in told:
    assert spent.seconds == pytest.approx(
      boundary + spent.forwards * forward[width]
    )
