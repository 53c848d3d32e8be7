"""Strategies in the engine: tokens, keys, counters."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import rollout_helpers as helpers
from rollout_helpers import World

from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.rollout import segment as segments
from rlax_llm.types import Path

STRATEGIES = {
  'cost_model': dict(strategy='cost_model', widths=(1, 3, 4)),
  'table': dict(strategy='table', buckets=((3, 6), (8, 4), (12, 1), (14, 3))),
  'bandit': dict(
    strategy='bandit',
    buckets=((4, 1, 4), (8, 1, 4), (16, 1, 3)),
    bandit_epsilon=0.5,
  ),
}


class _Fails:
  """A strategy that must not be asked."""

  def __getattr__(self, name):
    raise AssertionError(name)


@functools.cache
def _world():
  return World()


@functools.cache
def _plain():
  return tuple(_world().generate(helpers.make_requests())[0])


def _run(name, seed, **options):
  """Returns (rollouts of two steps of one engine, engine)."""
  rng = np.random.default_rng(seed)
  world = _world()
  control = dict(min_slots=4) | STRATEGIES[name]
  engine = world.engine(
    width=0,
    control=control,
    min_capacity=32,
    clock=lambda: float(rng.normal()),
    **options,
  )
  state = helpers.RolloutState()
  return [
    engine.generate(world.params, helpers.make_requests(), state)[0]
    for _ in range(3)
  ], engine


@pytest.mark.parametrize('name', STRATEGIES)
def test_no_strategy_changes_a_token(name):
  """With a random clock every strategy gives the tokens of W = 1.

  And it did choose: several widths were run, all of them reachable, and what
  it learned can be written as JSON. Mutants: a late sample is given one token
  less; a segment commits up to the width of its arm.
  """
  got, engine = _run(name, 1)
  for rollouts in got:
    helpers.assert_same_tokens(_world(), _plain(), rollouts)
  used = {key[2] for key in engine._parts[0].warm}
  assert len(used) > 1
  json.dumps(engine.strategy.dump())


@pytest.mark.parametrize('name', ['table', 'bandit'])
def test_a_bucket_compiles_its_own_arms_only(name):
  """Law: an executable exists only where its bucket can be: of N slots more
  than those of the next smaller N decode, else they were compacted.

  And without compaction every n up to N can be. Mutants: every N has every
  arm; buckets are looked up by N alone.
  """
  _, engine = _run(name, 2)
  keys = engine.reachable_keys()
  arms = {
    rows: sorted({a.width for n, _, a in keys if n == rows})
    for rows in (16, 8, 4)
  }
  if name == 'table':
    assert arms == {16: [1, 3], 8: [4], 4: [4, 6]}
  else:
    assert arms == {16: [1, 3], 8: [1, 4], 4: [1, 4]}
  assert engine._parts[0].warm <= set(keys)
  # The pool is shared with engines of other tests.
  held = engine.segment_bytes()
  assert engine._parts[0].warm <= set(held) and all(held.values())
  assert engine.stats.executables == len(held)
  engine = _world().engine(
    width=0, control=dict(compact=False) | STRATEGIES[name]
  )
  widths = {a.width for _, _, a in engine.reachable_keys()}
  assert widths == ({1, 3, 4, 6} if name == 'table' else {1, 3, 4})


def test_a_given_strategy_is_asked():
  """The engine takes a strategy of yours. Mutant: the config's is used."""
  engine = _world().engine(width=0, strategy=_Fails())
  with pytest.raises(AssertionError, match='choose'):
    engine.generate(
      _world().params, helpers.make_requests(), helpers.RolloutState()
    )


class _Recorder:
  """Times every segment of one arm and notes what it is told."""

  def __init__(self, arm):
    self._arm = arm
    self.seen = []

  def choose(self, occupancy, forwards):
    del occupancy
    return Choice(self._arm, forwards, True)

  def observe(self, *seen):
    self.seen.append(seen)


@pytest.mark.parametrize(
  'branching', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_counters_add_up(branching):
  """Law: every committed token stands behind a node that was reached; the root
  is reached in every row forward; n and N are those of the table.

  The first run of an executable is not timed. Mutants: nodes of rows that are
  done count; a node counts for the tokens before it; free slots run; the first
  run is timed.
  """
  world = _world()
  ticks = iter(range(10**6))
  recorder = _Recorder(Arm(4, branching, ('tree_cache',)))
  engine = world.engine(
    width=4,
    branching=branching,
    strategy=recorder,
    control=dict(min_slots=4),
    min_capacity=32,
    clock=lambda: float(next(ticks)),
  )
  tokens = row_forwards = 0
  for _ in range(2):
    engine.generate(
      world.params, helpers.make_requests(), helpers.RolloutState()
    )
    tokens += engine.stats.tokens
    row_forwards += engine.stats.row_forwards
  warm = set()
  for occupancy, arm, spent in recorder.seen:
    assert 0 < occupancy.running <= occupancy.rows
    assert len(spent.accepted) == arm.width == 4
    assert spent.accepted[0] == spent.row_forwards
    assert max(spent.accepted) == spent.accepted[0]
    assert spent.row_forwards <= occupancy.running * spent.forwards
    key = occupancy.rows, occupancy.capacity, arm
    assert (spent.seconds is None) == (key not in warm)
    warm.add(key)
  assert sum(s.tokens for _, _, s in recorder.seen) == tokens
  assert sum(s.row_forwards for _, _, s in recorder.seen) == row_forwards
  assert any(sum(s.accepted[1:]) for _, _, s in recorder.seen)
  assert any(o.running < o.rows for o, _, _ in recorder.seen)


def test_nodes_are_counted_along_the_path():
  """By hand: three rows, one done, one that does not count.

  Mutants: the place on the path is counted, not the node; what lies beyond the
  path's length counts.
  """
  path = Path(
    nodes=jnp.asarray([[0, 2, 3, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]]),
    tokens=jnp.zeros((4, 4), jnp.int32),
    length=jnp.asarray([3, 2, 0, 2]),
  )
  counted = jnp.asarray([True, True, True, False])
  np.testing.assert_array_equal(
    segments.count_nodes(path, counted), [2, 1, 1, 1]
  )


def test_a_fixed_width_is_one_arm():
  """rollout.width leaves nothing to choose. Mutant: W = 1 is reachable."""
  keys = _world().engine(width=4).reachable_keys()
  assert {arm.width for _, _, arm in keys} == {4}
  keys = _world().engine(width=0, drafter=helpers.tree_cache(3))
  assert {arm.width for _, _, arm in keys.reachable_keys()} == {3}
  keys = _world().engine(width=1).reachable_keys()
  assert {arm for _, _, arm in keys} == {PLAIN}
