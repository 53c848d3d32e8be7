"""The learned drafter: its state is never stale, and it changes no token."""

import dataclasses
import functools
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_helpers as helpers
from rollout_helpers import World

from rlax_llm.config import ControlConfig
from rlax_llm.config import freeze
from rlax_llm.config import RolloutConfig
from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import list_arms
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting import corpus as corpora
from rlax_llm.drafting import hybrid as hybrids
from rlax_llm.drafting import model_drafter as drafting
from rlax_llm.drafting.drafters import Learned
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.drafting.strategy.cost_model import CostModel
from rlax_llm.models.draft_model import DraftModel
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.ops import trees
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.drafts import Drafts
from rlax_llm.types import Path
from rlax_llm.types import Request
from rlax_llm.types import TRAIN
from rlax_llm.types import UNUSED

LONGEST = 18  # T of helpers.World.engine


@functools.cache
def _world(**options):
  return World(**options)


@functools.cache
def _plain():
  """Rollouts of plain sampling: 37 samples in 16 slots."""
  return _world().generate(helpers.make_requests())[0]


@functools.cache
def _self_draft(world):
  """The policy as its own drafter, with the cache of a drafter."""
  model = world.model
  width = world.params['embedding'].shape[1]

  def extend(params, tokens, features, positions, node_mask, cache, earlier):
    del features
    return model.extend(
      params.policy, tokens, positions, node_mask, cache, earlier
    )

  return DraftModel(
    init=lambda key: (),
    init_cache=model.init_cache,
    init_features=lambda rows: jnp.zeros((rows, width)),
    hidden=None,
    extend=extend,
    axes=lambda params: (),
    rounded=lambda params: params,
  )


def _drafter(width, *, branching=1, depth=0, world=None, self_draft=False):
  world = world or _world()
  draft_model = _self_draft(world) if self_draft else world.draft_model
  return drafting.model_drafter(
    width,
    drafting.ModelDrafterConfig(
      world.model, draft_model, world.sampling, branching, depth, chunk=4
    ),
  )


# --- The state is never stale.

BOUNDARIES = {
  'refill, compaction, growth': dict(),
  'N = 4': dict(slots=4, control=dict(min_slots=2)),
  'refill at once': dict(control=dict(refill_threshold=0.01)),
  'segments of 1': dict(segment_forwards=1, slots=4, control=dict(min_slots=1)),
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('refill, compaction, growth', marks=pytest.mark.slow),
    pytest.param('N = 4', marks=pytest.mark.slow),
    pytest.param('refill at once', marks=pytest.mark.slow),
    'segments of 1',
  ],
)
def test_a_policy_that_drafts_for_itself_is_always_right(name):
  """Law: drafted by the policy itself, every forward commits W tokens, up to
  EOS and the limit.

  The policy keeps a cache of its own through the drafter's state: whatever is
  stale there, in any row, after any boundary, is a rejected draft. Mutants:
  compaction gathers other rows; an admission is not taken up; a row's cache is
  one token short after it.
  """
  got, engine = _world().generate(
    helpers.make_requests(),
    drafter=_drafter(4, self_draft=True),
    **BOUNDARIES[name],
  )
  helpers.assert_same_tokens(_world(), _plain(), got)
  for r in got:
    assert r.forwards == -(-r.length // 4)
  assert engine.stats.tokens / engine.stats.row_forwards > 3


def test_a_policy_that_drafts_trees_for_itself_is_always_right():
  """Law: the first of every node's children is the target's token.

  Lines of 3 with their siblings; the most probable line is always the right
  one, so a forward commits at least 2 tokens.
  """
  got, engine = _world().generate(
    helpers.make_requests(),
    drafter=_drafter(10, branching=3, depth=3, self_draft=True),
    min_capacity=32,
  )
  helpers.assert_same_tokens(_world(), _plain(), got)
  rejected = sum(r.length - r.drafted.sum() - (r.length // 4) > 1 for r in got)
  assert rejected < len(got) / 3
  assert engine.stats.tokens / engine.stats.row_forwards > 2.5


def test_nodes_are_what_the_policy_says_of_their_lines(monkeypatch):
  """Law: drafted by the policy itself, every node's probability is that of the
  races along its line, by uncached forwards.

  Mutants: nodes see all that was evaluated before them; the tokens of a level
  are its first ones.
  """
  world, checked = _world(), []
  config = drafting.ModelDrafterConfig(
    world.model, _self_draft(world), world.sampling, 3
  )
  nodes_of = jax.jit(
    functools.partial(drafting.draft_nodes, config=config, depth=3)
  )
  take = Drafts.take

  def watched(self, width, slots):
    state = take(self, width, slots)
    if len(checked) < 3:
      nodes = jax.device_get(nodes_of(self._params, state, slots))
      row = int(np.flatnonzero(~np.asarray(slots.done))[0])
      length = int(slots.length[row])
      place = length - int(slots.prompt_length[row])
      want, lines = [0.0], [tuple(np.asarray(slots.text)[row, :length])]
      for token, parent in zip(nodes.tokens[row], nodes.parents[row]):
        text = lines[parent]
        scores = sampling_ops.race_scores(
          slots.key[row],
          jnp.int32(place + len(text) - length),
          world.law_after(text),
        )
        chance = jax.nn.log_softmax(-jnp.log(scores) / drafting._DOUBT)
        want.append(want[parent] + float(chance[token]))
        lines.append((*text, int(token)))
      np.testing.assert_allclose(nodes.logprobs[row], want[1:], atol=1e-3)
      checked.append(len(want))
    return state

  monkeypatch.setattr(Drafts, 'take', watched)
  world.generate(
    helpers.make_requests((6,)),
    drafter=_drafter(10, branching=3, depth=3, self_draft=True),
    min_capacity=32,
    segment_forwards=1,
    control=dict(compact=False),
  )
  assert checked == [22, 22, 22]


def _watch_arms(monkeypatch, arms, seed):
  """Random arms and segment lengths; returns (arm, row forwards) of each."""
  rng, seen = random.Random(seed), []
  monkeypatch.setattr(
    CostModel,
    'choose',
    lambda self, occupancy, forwards: Choice(
      rng.choice(arms), rng.randint(1, 3), True
    ),
  )
  observe = CostModel.observe

  def watched(self, occupancy, arm, spent):
    seen.append((arm, spent.row_forwards))
    return observe(self, occupancy, arm, spent)

  monkeypatch.setattr(CostModel, 'observe', watched)
  return seen


@pytest.mark.parametrize('ways', [1, pytest.param(8, marks=pytest.mark.slow)])
def test_nothing_is_stale_after_segments_without_drafts(ways, monkeypatch):
  """Law: between W = 1 and W = 4 at random, with refill, compaction and growth
  meanwhile, the policy that drafts for itself stays right: a token that was not
  drafted is the last of its forward.

  Mutants: `sync` starts at the row's length; it goes on with the sample that
  left the row; it stops after one chunk.
  """
  world = _world(ways=ways) if ways > 1 else _world()
  seen = _watch_arms(monkeypatch, [PLAIN, PLAIN, Arm(4, 1, ('model',))], 3)
  got, _ = world.generate(
    helpers.make_requests(),
    learned=Learned(_self_draft(world), chunk=4),
    drafts_by='model',
    width=0,
    control=dict(widths=(1, 4)),
  )
  helpers.assert_same_tokens(_world(), _plain(), got)
  alone = 0
  for r in got:
    run = 0
    for drafted in r.drafted:
      if drafted:
        run += 1
        continue
      assert run in (0, 3)
      alone += run == 0
      run = 0
  assert alone == sum(count for arm, count in seen if arm.width == 1)
  assert sum(count for arm, count in seen if arm.width == 4) > 30


@pytest.mark.slow
@pytest.mark.parametrize('drafts_by', ['model', 'hybrid'])
def test_the_state_is_a_function_of_the_text(monkeypatch, drafts_by):
  """Law: at every boundary the drafter's keys, values and feature are those
  that are computed from the rows' texts alone; where the hybrid's sources vary
  too, the corpus lacks nothing, and what was counted of a source changes in
  segments that it drafts for, and only there.

  With a network that reads features. Mutants: the feature is that of the last
  drafted node; features are not shifted; `observe` ignores the path, or passes
  over a source that is left out; all that are on draft.
  """
  world, checked, calibrations = _world(), [], []
  own = world.draft_params()
  config = drafting.ModelDrafterConfig(
    world.model, world.draft_model, world.sampling
  )
  sync = jax.jit(functools.partial(drafting.sync, config=config))
  copy_rows = jax.jit(corpora.copy_rows, static_argnums=2)
  take, hybrid = Drafts.take, drafts_by == 'hybrid'
  rollout = freeze(RolloutConfig(drafter=drafts_by, width=0, branching=2))
  control = dict(widths=(1, 4, 6))
  arms = list_arms(rollout, freeze(ControlConfig(**control)))
  assert len(arms) == (7 if hybrid else 3)

  def watched(self, width, slots):
    state = take(self, width, slots)
    if width > 1:
      draft = state.draft if hybrid else state
      clean = jax.tree.map(jnp.zeros_like, draft)
      want, draft, held = jax.device_get(
        (sync(self._params, clean, slots), draft, slots)
      )
      rows = np.flatnonzero(~held.done)
      for row in rows:
        end = held.length[row] - 1
        assert draft.cache.length[row] == end
        for a, b in (
          (
            draft.cache.keys[0][row, ..., :end],
            want.cache.keys[0][row, ..., :end],
          ),
          (
            draft.cache.values[0][row, :, :end],
            want.cache.values[0][row, :, :end],
          ),
          (draft.feature[row], want.feature[row]),
        ):
          np.testing.assert_allclose(a, b, atol=2e-5)
        checked.append(end)
      if hybrid:
        whole, corpus = jax.device_get(
          (copy_rows(state.corpus, slots, self._drafter.corpus), state.corpus)
        )
        for row in rows:
          at = held.prompt[row], 8 + held.index[row]
          end = held.length[row]
          assert corpus.length[at] == whole.length[at]
          np.testing.assert_array_equal(
            corpus.texts[at][:end], whole.texts[at][:end]
          )
        calibrations.append((len(seen), np.asarray(state.calibration.expected)))
    return state

  monkeypatch.setattr(Drafts, 'take', watched)
  seen = _watch_arms(monkeypatch, arms, 1)
  store = RolloutStore(history=8, megabytes=1, tokenizer='')
  store.add(_plain()[1:20:2])
  got, _ = world.generate(
    helpers.make_requests(),
    learned=Learned(world.draft_model),
    own=own,
    store=store,
    drafts_by=drafts_by,
    samples_per_prompt=20,  # Nobody shares a text.
    branching=2,
    width=0,
    control=control,
  )
  helpers.assert_same_tokens(world, _plain(), got)
  assert len(checked) > 50 and max(checked) > 16
  changes = set()
  for (i, before), (j, after) in zip(calibrations, calibrations[1:]):
    drafted = {s for arm, _ in seen[i:j] for s in arm.sources}
    assert j > i
    for name, old, new in zip(('tree_cache', 'model'), before, after):
      assert np.array_equal(old, new) == (name not in drafted)
      changes.add((name, name in drafted))
  assert len(changes) == (4 if hybrid else 0)


# --- It changes no token.


@pytest.mark.parametrize(
  'name, width, options',
  [
    ('chain', 4, dict()),
    ('short chain', 6, dict(depth=3)),
    ('tree', 7, dict(branching=3, depth=3)),
  ],
)
def test_drafts_change_no_token(name, width, options):
  """Law: tokens are those of plain sampling, whatever the network says."""
  world = _world()
  got, engine = world.generate(
    helpers.make_requests(),
    drafter=_drafter(width, **options),
    own=world.draft_params(),
    min_capacity=32,
    control=dict(compact=False),
  )
  helpers.assert_same_tokens(world, _plain(), got)
  assert engine.stats.tokens > 1.1 * engine.stats.row_forwards, name


@pytest.mark.parametrize(
  'branching, temperature, top_p',
  [(1, 1.0, 1.0), pytest.param(2, 0.7, 0.9, marks=pytest.mark.slow)],
)
def test_law(branching, temperature, top_p):
  """Law: completions are distributed as the product of the policy's laws."""
  world = _world(
    vocabulary=4, eos=3, sampling=Sampling(temperature, top_p=top_p)
  )
  prompt = np.asarray([1, 2, 1, 0, 1])
  requests = [Request(prompt, 1024, TRAIN, 0, i) for i in range(12)]
  got, engine = world.generate(
    requests,
    drafter=_drafter(5, branching=branching, world=world),
    own=world.draft_params(),
    slots=1024,
    samples_per_prompt=1024,
    max_new_tokens=3,
    control=dict(refill_threshold=0.5, compact=False),
  )
  helpers.assert_law(world, prompt, 3, got)
  assert engine.stats.tokens > 1.02 * engine.stats.row_forwards


@pytest.mark.slow
def test_devices_change_no_token():
  """Law: rows over eight devices give the tokens of one device."""
  world = _world(ways=8)
  got, _ = world.generate(
    helpers.make_requests(),
    drafter=_drafter(4, world=world),
    own=world.draft_params(),
  )
  helpers.assert_same_tokens(_world(), _plain(), got)


# --- Trees.


def test_select_keeps_the_most_probable_nodes_and_their_lines():
  """By hand: five candidates, three kept; equal ones keep their order.

  Mutant: parents are not renumbered.
  """
  log = lambda *p: jnp.log(jnp.asarray(p))
  tokens, parents, chosen = trees.select(
    jnp.asarray([7, 8, 9, 5, 6]),
    jnp.asarray([0, 0, 2, 3, 1]),
    log(0.3, 0.6, 0.6, 0.2, 0.1),
    3,
  )
  assert chosen.tolist() == [1, 2, 0]
  assert tokens.tolist() == [8, 9, 7]
  assert parents.tolist() == [0, 1, 0]
  tokens, parents, _ = trees.select(
    jnp.asarray([7, 8]), jnp.asarray([0, 1]), log(0.5, 0.0), 3
  )
  assert parents.tolist() == [0, UNUSED, UNUSED]


def test_merge_keeps_one_node_of_each_line():
  """By hand: two chains that part at depth 2, and one node twice.

  Mutants: nodes of one token and depth are merged; a moved node keeps its
  parent; the estimate of a node is the first source's.
  """
  # Source 0: 7 -> 8 -> 9. Source 1: 7 -> 5, and 8 -> 8.
  tokens = jnp.asarray([7, 8, 9, 7, 5, 8, 8])
  parents = jnp.asarray([0, 1, 2, 0, 4, 0, 6])
  conditional = jnp.asarray(
    [[0.5, 0.4, 0.3, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9, 0.6, 0.1, 0.2]]
  )
  merged = trees.merge(tokens, parents, conditional, 3)
  assert merged.depth.tolist() == [1, 2, 3, 1, 2, 1, 2]
  np.testing.assert_allclose(
    merged.conditional,
    [[0.5, 0.4, 0.3, 0.0, 0.0, 0.0, 0.0], [0.9, 0.0, 0.0, 0.0, 0.6, 0.1, 0.2]],
  )
  assert merged.parents[4] == 1  # below the first 7
  own = jnp.log(jnp.max(merged.conditional, axis=0))
  line = trees.fold(lambda above: above + own, merged.parents, jnp.zeros(()), 3)
  np.testing.assert_allclose(
    jnp.exp(line), [0.9, 0.36, 0.108, 0.0, 0.54, 0.1, 0.02], rtol=1e-5
  )


# --- The hybrid.


@pytest.mark.slow
@pytest.mark.parametrize(
  'sources',
  [('tree_cache', 'model'), ('model',), ('tree_cache',)],
  ids='+'.join,
)
def test_the_hybrid_changes_no_token(sources):
  """Law: merged drafts, or those of either source, change no token."""
  world = _world()
  store = RolloutStore(history=8, megabytes=1, tokenizer='')
  store.add(_plain()[1:20:2])
  got, engine = world.generate(
    helpers.make_requests(),
    learned=Learned(world.draft_model, depth=3, sources=sources),
    own=world.draft_params(),
    store=store,
    drafts_by='hybrid',
    width=6,
    branching=2,
  )
  helpers.assert_same_tokens(world, _plain(), got)
  assert engine.stats.tokens > 1.2 * engine.stats.row_forwards


def test_the_hybrid_drafts_with_whoever_is_right():
  """Law: beside a source that is always right, another one that is always sure
  and always wrong takes hardly any nodes, once counted.

  The policy drafts for itself; the cache holds rollouts in which what comes
  next is always something else. Mutant: estimates are not calibrated.
  """
  world = _world()
  store = RolloutStore(history=8, megabytes=1, tokenizer='')
  rng = np.random.default_rng(0)
  for rollout in _plain():
    wrong = (rollout.tokens + rng.integers(1, 6, rollout.length)) % 7
    store.add([dataclasses.replace(rollout, tokens=wrong.astype(np.int32))])
  accept = []
  for sources in (('tree_cache', 'model'), ('model',)):
    _, engine = world.generate(
      helpers.make_requests((20, 20, 20)),
      learned=Learned(_self_draft(world), sources=sources),
      store=store,
      drafts_by='hybrid',
      width=5,
      min_capacity=32,
      control=dict(compact=False),
    )
    accept.append(engine.stats.tokens / engine.stats.row_forwards)
  both, alone = accept
  # There are ten forwards to find it out.
  assert both > 0.8 * alone > 2.8


def test_calibration_counts_what_was_tried():
  """By hand: a node counts if its parent was taken, at its depth.

  Root -> a (0.5) -> b (0.4), and root -> c (0.8) -> d (0.7); the target took a
  and then something else. Mutants: nodes whose parent was not taken count;
  nodes that a source does not have count as its hits.
  """
  calibration = hybrids.Calibration(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  proposed = hybrids.Proposed(
    parents=jnp.asarray([[0, 1, 0, 3]]),
    depth=jnp.asarray([[1, 2, 1, 2]]),
    conditional=jnp.asarray([[[0.5, 0.4, 0.0, 0.0], [0.0, 0.0, 0.8, 0.7]]]),
  )
  path = Path(
    nodes=jnp.asarray([[0, 1, 0, 0, 0]]),
    tokens=jnp.zeros((1, 5), jnp.int32),
    length=jnp.asarray([2]),
  )
  slots = types.SimpleNamespace(done=jnp.asarray([False]))
  got = hybrids.learn(calibration, proposed, slots, path)
  np.testing.assert_allclose(got.accepted, [[1, 0, 0], [0, 0, 0]])
  np.testing.assert_allclose(got.expected, [[0.5, 0.4, 0], [0.8, 0, 0]])
  ratio = got.ratio(jnp.asarray([1, 2]))
  np.testing.assert_allclose(
    ratio, [[17 / 16.5, 16 / 16.4], [16 / 16.8, 1.0]], rtol=1e-6
  )
