"""The engine: the law, the equality of tokens, and the host's duties."""

import dataclasses
import functools

import jax
from jax._src import array as jax_array
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_helpers as helpers
from rollout_helpers import World

from rlax_llm.config import ConfigError
from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.drafting.strategy.cost_model import CostModel
from rlax_llm.models.language_model import score
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import executor
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables
from rlax_llm.types import EVALUATE
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

LONGEST = 18  # T of helpers.World.engine


@functools.cache
def _world(**options):
  return World(**options)


@functools.cache
def _plain():
  """Rollouts of plain sampling: 37 samples in 16 slots."""
  return _world().generate(helpers.make_requests())[0]


def _drafter(name):
  vocabulary = 7
  return {
    'chain': lambda: drafting.prompt_lookup(4),
    'hostile': lambda: helpers.hostile_chain(4, vocabulary),
    'tree': lambda: helpers.random_tree(6, vocabulary),
    'cache': lambda: helpers.tree_cache(4),
    'cache tree': lambda: helpers.tree_cache(6, branching=3),
    'oracle': lambda: _oracle(False),
    'oracle tree': lambda: _oracle(True),
  }[name]()


@functools.cache
def _oracle(tree):
  return helpers.oracle(
    7 if tree else 4, _plain(), _world().seed, LONGEST, tree=tree
  )


# --- The law.


def _stale_rollouts(world, request):
  """Completions that the law nearly excludes, and likely ones."""
  tokens = lambda *t: np.asarray(t, np.int32)
  plain, _ = world.generate(
    [dataclasses.replace(request, samples=1, step=99)],
    slots=16,
    max_new_tokens=3,
  )
  wrong = dataclasses.replace(plain[0], tokens=tokens(2, 3, 1), length=3)
  return [plain[0], wrong]


LAW_CASES = [
  pytest.param(
    drafter, width, temperature, top_p, marks=() if fast else pytest.mark.slow
  )
  for drafter, widths in (
    ('none', (1,)),
    ('lookup', (5, 9)),
    ('hostile', (5, 9)),
    ('tree', (5, 9)),
    ('cache', (5, 9)),
    ('cache tree', (5, 9)),
  )
  for width in widths
  for temperature in (0.7, 1.0, 1.5)
  for top_p in (1.0, 0.9)
  for fast in [
    (drafter, width, temperature, top_p)
    in (
      ('none', 1, 1.0, 1.0),
      ('lookup', 5, 0.7, 1.0),
      ('tree', 9, 1.5, 1.0),
      ('tree', 5, 1.0, 0.9),
      ('cache tree', 5, 1.0, 1.0),
    )
  ]
]


@pytest.mark.parametrize('drafter,width,temperature,top_p', LAW_CASES)
def test_law(drafter, width, temperature, top_p):
  """Whole completions are distributed as the product of the policy's laws.

  12288 samples against the enumeration of all 40 completions (vocabulary 4,
  EOS 3, up to 3 tokens). Mutants: a rejected draft's token is masked out of
  the next draw; the token of the draft is committed in place of the target's;
  noise of position t used at t + 1 of the same forward.
  """
  world = _world(
    vocabulary=4, eos=3, sampling=Sampling(temperature, top_p=top_p)
  )
  draft = {
    'none': drafting.no_drafter,
    'lookup': lambda: drafting.prompt_lookup(width),
    'hostile': lambda: helpers.hostile_chain(width, 4),
    'tree': lambda: helpers.random_tree(width, 4),
    'cache': lambda: helpers.tree_cache(width, places=1040),
    'cache tree': lambda: helpers.tree_cache(width, branching=2, places=1040),
  }[drafter]()
  prompt = np.asarray([1, 2, 1, 0, 1])
  requests = [Request(prompt, 1024, TRAIN, width, i) for i in range(12)]
  store = None
  if 'cache' in drafter:  # warm, of another policy: stale
    store = RolloutStore(history=2, megabytes=1, tokenizer='')
    store.add(_stale_rollouts(world, requests[0]))
  rollouts, engine = world.generate(
    requests,
    drafter=draft,
    store=store,
    slots=1024,
    samples_per_prompt=1024,
    max_new_tokens=3,
    control=dict(refill_threshold=0.5, compact=False),
  )
  helpers.assert_law(world, prompt, 3, rollouts)
  if width > 1:  # drafts were accepted: the test is about them
    assert engine.stats.tokens > 1.02 * engine.stats.row_forwards


# --- Equality of tokens.


def test_plain_rollouts_are_varied():
  """The reference of the equality tests holds every case they are about.

  EOS and truncation, one-token completions and long ones. Mutant: EOS is
  never recognised.
  """
  rollouts = _plain()
  assert {r.finished for r in rollouts} == {True, False}
  assert len({tuple(r.tokens) for r in rollouts}) > 20
  for r in rollouts:
    assert r.length == len(r.tokens) <= LONGEST
    assert (r.tokens[:-1] != 5).all() and (r.tokens[-1] == 5) == r.finished
    assert r.finished or r.length == LONGEST
    assert r.forwards == r.length and not r.drafted.any()
    assert (r.token_version == 0).all()
  assert [(r.request.request, r.index) for r in rollouts] == [
    (q.request, i) for q in helpers.make_requests() for i in range(q.samples)
  ]


def test_plain_rollouts_equal_an_uncached_loop():
  """Plain sampling by the engine is the race over uncached logits.

  No engine, cache or segment on the other side: this anchors the tests
  below. Mutants: place starts at 1; the prompt's last token is skipped; rows
  of a block are mixed up.
  """
  world = _world()
  for rollout in _plain()[::3]:
    for place in range(min(rollout.length, 8)):
      law = world.law_after(
        np.r_[rollout.request.prompt, rollout.tokens[:place]]
      )
      token = helpers.sampling_ops.race(
        jnp.asarray(helpers.key_of(rollout, world.seed)), jnp.int32(place), law
      )
      assert (
        token == rollout.tokens[place]
        or world.margin(rollout, place) < helpers.NEAR_TIE
      )


@pytest.mark.parametrize(
  'name',
  ['chain', 'hostile', 'tree', 'oracle', 'oracle tree', 'cache', 'cache tree'],
)
def test_drafters_change_no_token(name):
  """Tokens, ends and log-probabilities are those of plain sampling.

  Mutants: verification takes the draft's token; EOS inside an accepted draft
  is passed over; tokens beyond the limit are kept; the bonus token's noise is
  that of the last accepted one.
  """
  world, want = _world(), _plain()
  # Growth and compaction with trees, one executable for each other drafter.
  few = (
    {} if name == 'tree' else dict(min_capacity=32, control=dict(compact=False))
  )
  got, engine = world.generate(
    helpers.make_requests(), drafter=_drafter(name), **few
  )
  helpers.assert_same_tokens(world, want, got)
  for a, b in zip(want, got):
    if np.array_equal(a.tokens, b.tokens):
      np.testing.assert_allclose(
        a.behaviour_logprobs, b.behaviour_logprobs, atol=1e-5
      )
    # One token of every forward is the target's own; the last forward's may
    # lie behind EOS or the limit.
    assert b.length - b.drafted.sum() in (b.forwards, b.forwards - 1)
  assert engine.stats.tokens == sum(r.length for r in got)
  assert engine.stats.row_forwards == sum(r.forwards for r in got)
  accept = engine.stats.tokens / engine.stats.row_forwards
  if name == 'hostile':
    assert 1 <= accept < 1.6
  if name in ('oracle', 'oracle tree'):
    for r in got:  # accept length W up to the end
      assert r.forwards == -(-r.length // 4)


VARIATIONS = {
  'N = 4': dict(slots=4, control=dict(min_slots=2)),
  'N = 64': dict(slots=64),
  'segments of 1': dict(segment_forwards=1),
  'segments of 64': dict(segment_forwards=64),
  'refill at once': dict(control=dict(refill_threshold=0.01)),
  'refill late': dict(control=dict(refill_threshold=1.0)),
  'no compaction': dict(control=dict(compact=False)),
  'compaction to 1': dict(control=dict(min_slots=1)),
  'one capacity': dict(min_capacity=64),
  'other blocks': dict(samples_per_prompt=16),
}

SLOW = ('N = 64', 'compaction to 1')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in VARIATIONS
  ],
)
def test_speed_values_change_no_token(name):
  """Slots, segment length, refill, compaction and growth change no token.

  With prompt lookup (W = 4), against plain sampling. Mutants: compaction
  leaves the keys behind; owners and rows are compacted in other orders; growth
  shifts the cache; a slot's stale `forwards` survives admission; a prompt is
  the next row of its block.
  """
  world = _world()
  got, _ = world.generate(
    helpers.make_requests(),
    drafter=drafting.prompt_lookup(4),
    **VARIATIONS[name],
  )
  helpers.assert_same_tokens(world, _plain(), got)
  for r in got:
    assert r.length - r.drafted.sum() in (r.forwards, r.forwards - 1)


@pytest.mark.parametrize(
  'drafter', ['chain', 'tree', pytest.param('cache', marks=pytest.mark.slow)]
)
def test_order_and_company_change_no_token(drafter):
  """Shuffled, reversed, repeated and lonely requests give the same tokens.

  Mutant: the key is that of the slot or of the place in the queue.
  """
  world, requests = _world(), helpers.make_requests()
  drafter = _drafter(drafter)
  rng = np.random.default_rng(0)
  for order in ([4, 3, 2, 1, 0], list(rng.permutation(5))):
    got, _ = world.generate([requests[i] for i in order], drafter=drafter)
    helpers.assert_same_tokens(world, _plain(), got)
  alone, _ = world.generate(requests[3:4], drafter=drafter)
  of_three = [r for r in _plain() if r.request.request == 3]
  helpers.assert_same_tokens(world, of_three, alone)
  twice, _ = world.generate(
    [requests[0], requests[2], requests[0]],
    drafter=drafter,
    slots=4,
    samples_per_prompt=4,
  )
  assert len(twice) == 7
  for a, b in zip(twice[:3], twice[4:]):
    np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.slow
@pytest.mark.parametrize('drafter', [None, 'chain', 'tree', 'cache'])
def test_devices_change_no_token(drafter):
  """Rows over eight devices give the tokens of one device.

  Mutant: compaction leaves the keys behind.
  """
  world = _world(ways=8)
  got, engine = world.generate(
    helpers.make_requests(), drafter=drafter and _drafter(drafter)
  )
  helpers.assert_same_tokens(_world(), _plain(), got)
  assert min(n for n, _, _ in engine.reachable_keys()) == 8


def test_a_random_clock_changes_no_token():
  """The clock is read for statistics only.

  Mutant: a late sample is given one token less.
  """
  world, rng = _world(), np.random.default_rng(0)
  got, _ = world.generate(
    helpers.make_requests(),
    drafter=drafting.prompt_lookup(4),
    clock=lambda: float(rng.normal() * 1e3),
  )
  helpers.assert_same_tokens(world, _plain(), got)


# --- Drafts from a cache.


def _stale_world():
  """Another policy of the same shape."""
  params = jax.jit(_world().model.init)(jax.random.key(9))
  return jax.tree.map(lambda x: x * 3, params)


def _filled(kind, *, history=2):
  """A store whose rollouts are right, of another policy, or adversarial."""
  store = RolloutStore(history=history, megabytes=1, tokenizer='')
  if kind == 'warm':
    store.add(_plain())
  elif kind == 'stale':
    rollouts, _ = _world().generate(
      helpers.make_requests(step=7), params=_stale_world()
    )
    store.add(rollouts)
  else:
    rng = np.random.default_rng(0)
    for rollout in _plain():
      # What comes next is always something else; EOS and strangers included.
      wrong = (rollout.tokens + rng.integers(1, 6, rollout.length)) % 7
      store.add([dataclasses.replace(rollout, tokens=wrong.astype(np.int32))])
  return store


@pytest.mark.parametrize(
  'name, kind',
  [
    ('cache', 'warm'),
    ('cache', 'stale'),
    ('cache', 'adversarial'),
    ('cache tree', 'warm'),
    ('cache tree', 'adversarial'),
  ],
)
def test_no_cache_changes_a_token(name, kind):
  """Right, stale and adversarial rollouts in the cache: the same tokens.

  And a cache that holds these very rollouts is drafted from with success.
  Mutants: the text of another prompt is loaded; a place is given away before
  its last sample has ended.
  """
  world, store = _world(), _filled(kind, history=64)
  drafter = helpers.tree_cache(
    4 if name == 'cache' else 6,
    branching=1 if name == 'cache' else 3,
    history=24,
  )
  got, engine = world.generate(
    helpers.make_requests(),
    drafter=drafter,
    store=store,
    slots=4,
    control=dict(min_slots=2),
    min_capacity=32,
  )
  helpers.assert_same_tokens(world, _plain(), got)
  accept = engine.stats.tokens / engine.stats.row_forwards
  if kind == 'warm':
    assert accept > 1.4
  newest = store.history(helpers.make_requests()[1])[-20:]
  assert [n.tolist() for n in newest] == [
    r.tokens.tolist() for r in got if r.request.request == 1
  ]


AHEAD = dict(drafter=None, width=4, history=4, segment_forwards=4, slots=8)


def _steps(world, run_ahead_rows):
  """Two steps of one engine; returns (rollouts of both, stats of both)."""
  store = RolloutStore(history=4, megabytes=1, tokenizer='')
  control = dict(min_slots=2, run_ahead_rows=run_ahead_rows)
  engine = world.engine(**AHEAD, control=control)
  state = RolloutState(store=store)
  # One long straggler leaves seven slots to run ahead.
  first = helpers.make_requests((3, 3, 2))
  second = helpers.make_requests((4, 4, 4), step=1, seed=5)
  got, stats = [], []
  for requests, ahead in ((first, second), (second, ())):
    rollouts, _ = engine.generate(world.params, requests, state, ahead=ahead)
    got.append(rollouts)
    stats.append(engine.stats)
  return got, stats, store


def test_running_ahead_changes_no_token():
  """Run-ahead fills idle slots; what it samples is a hint, nearly always right.

  Tokens of both steps are those without it; with unchanged parameters every
  hint is the beginning of the very sample it foretells. Mutants: a row that
  runs ahead counts as a result; the hint is sampled with another key; hints
  of one sample are drafted for its neighbour; a segment waits for rows that
  run ahead.
  """
  world = _world()
  plain, plain_stats, _ = _steps(world, 0)
  got, stats, store = _steps(world, 8)
  for want, have in zip(plain, got):
    helpers.assert_same_tokens(world, want, have)
    assert len(want) == len(have)
  assert plain_stats[0].ahead_tokens == 0 < stats[0].ahead_tokens
  assert stats[1].ahead_tokens == 0
  for a, b in zip(plain_stats, stats):
    assert a.tokens == b.tokens
  # What runs ahead holds nobody up.
  assert stats[0].forwards <= plain_stats[0].forwards
  accept = lambda s: s.tokens / s.row_forwards
  assert accept(stats[1]) > accept(plain_stats[1]) + 0.1
  hints = 0
  for rollout in got[1]:
    hint = store.hint(rollout.request, rollout.index)
    if hint is not None and len(hint):
      hints += 1
      np.testing.assert_array_equal(hint, rollout.tokens[: len(hint)])
      if len(hint) == rollout.length:  # it foretells all but the last node
        assert rollout.forwards <= -(-rollout.length // 4) + 1
  assert hints >= 4
  # Hints are no rollouts: the history holds what was sampled for its step.
  for request in helpers.make_requests((4, 4, 4), step=1, seed=5):
    known = [
      r.tokens.tolist() for r in got[1] if r.request.request == request.request
    ]
    assert [h.tolist() for h in store.history(request)] == known


@pytest.mark.slow
def test_running_ahead_does_not_keep_the_batch_wide():
  """Above `run_ahead_rows` the batch is compacted as without run-ahead.

  And what it would say of requests that do not fit is left to their own step.
  Mutants: free slots run ahead at every N; rows that run ahead are held to be
  busy when the batch is compacted.
  """
  world = _world()
  requests = helpers.make_requests((20, 8, 8))
  coming = helpers.make_requests((20, 8, 8), step=1)
  coming[1] = dataclasses.replace(coming[1], prompt=np.zeros(9, np.int32))
  spent = []
  for rows in (0, 4):
    store = RolloutStore(history=4, megabytes=1, tokenizer='')
    got, engine = world.generate(
      requests,
      ahead=coming,
      store=store,
      width=4,
      history=4,
      slots=16,
      segment_forwards=3,
      control=dict(min_slots=2, run_ahead_rows=rows),
    )
    spent.append(engine.stats.slot_forwards)
    assert (engine.stats.ahead_tokens > 0) == (rows > 0)
    assert len(got) == 36
  assert spent[1] <= 1.25 * spent[0]


def test_any_arm_at_any_boundary_changes_no_token(monkeypatch):
  """A strategy that draws arms and lengths of segments at random.

  Mutant: at W = 1 the group's texts are not kept up, so that they differ from
  the rows afterwards (a hint only: this one must pass too).
  """
  rng = np.random.default_rng(0)
  world = _world()
  arms = [PLAIN] + [
    Arm(w, b, ('tree_cache',)) for w, b in ((3, 1), (4, 1), (3, 2), (4, 2))
  ]
  monkeypatch.setattr(CostModel, 'choose', helpers.random_choices(rng, arms))
  got, engine = world.generate(
    helpers.make_requests(),
    width=0,
    branching=0,
    store=_filled('stale'),
    control=dict(widths=(1, 3, 4)),
    clock=lambda: float(rng.normal()),
  )
  helpers.assert_same_tokens(world, _plain(), got)
  assert 1 < engine.stats.node_forwards / engine.stats.forwards < 4


def test_noise_follows_the_request():
  """Another domain, step, request or seed gives other tokens.

  And two requests of one prompt in one step are other samples. Mutants: the
  step or the domain is left out of the key; the index restarts by block.
  """
  world = _world()
  prompt = np.asarray([1, 2, 3])
  text = lambda rollouts: [tuple(r.tokens) for r in rollouts]
  make = lambda domain, step, request: [
    Request(prompt, 8, domain, step, request)
  ]
  base = text(world.generate(make(TRAIN, 0, 0))[0])
  assert base == text(world.generate(make(TRAIN, 0, 0))[0])
  others = [(EVALUATE, 0, 0), (TRAIN, 1, 0), (TRAIN, 0, 1), (TRAIN, 1, 1)]
  for where in others:
    assert base != text(world.generate(make(*where))[0]), where
  assert len(set(base)) > 4


# --- Log-probabilities.


@pytest.mark.parametrize(
  'drafter,temperature',
  [
    ('none', 1.0),
    ('chain', 1.0),
    ('tree', 1.0),
    ('chain', 0.7),
    pytest.param('none', 0.7, marks=pytest.mark.slow),
    pytest.param('tree', 0.7, marks=pytest.mark.slow),
  ],
)
def test_behaviour_logprobs_equal_a_fresh_score(drafter, temperature):
  """What the sampler recorded is what `score` says, on every token, to 1e-5.

  EOS included. Mutants: log-probabilities of the untempered law; those of the
  node before; those of the draft's token.
  """
  world = (
    _world() if temperature == 1 else _world(sampling=Sampling(temperature))
  )
  draft = None if drafter == 'none' else _drafter(drafter)
  few = (
    {}
    if temperature == 1
    else dict(min_capacity=32, control=dict(compact=False))
  )
  rollouts, _ = world.generate(helpers.make_requests(), drafter=draft, **few)
  tokens = np.zeros((len(rollouts), 32), np.int32)
  segments = np.zeros_like(tokens)
  recorded = np.zeros(tokens.shape, np.float32)
  completion = np.zeros(tokens.shape, bool)
  for row, r in enumerate(rollouts):
    first, last = len(r.request.prompt), len(r.request.prompt) + r.length
    tokens[row, :last] = np.r_[r.request.prompt, r.tokens]
    segments[row, :last] = 1
    recorded[row, first:last] = r.behaviour_logprobs
    completion[row, first:last] = True
  positions = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
  fresh = score(
    world.params,
    jnp.asarray(tokens),
    jnp.asarray(positions),
    jnp.asarray(segments),
    model=world.model,
    sampling=world.sampling,
    chunk=200,
  )
  assert any(r.finished for r in rollouts)
  gap = np.abs(np.asarray(fresh) - recorded)[completion]
  assert gap.max() < 1e-5
  assert (recorded[completion] < 0).mean() > 0.9


# --- The host's duties.


def test_one_read_for_each_segment(monkeypatch):
  """A segment costs one device-to-host read, and that is explicit.

  Every way by which a jax array turns into host values is counted, because
  the CPU's transfer guard misses float() and np.asarray. Mutants: a bool() of
  `done` between segments; two device_get calls.
  """
  world, requests = _world(), helpers.make_requests()
  chain = drafting.prompt_lookup(4)
  world.generate(requests, drafter=chain)  # compiles
  counts = {'explicit': 0, 'implicit': 0}
  inside = []
  device_get = jax.device_get

  def counted_get(x):
    counts['explicit'] += 1
    inside.append(True)
    try:
      return device_get(x)
    finally:
      inside.pop()

  monkeypatch.setattr(jax, 'device_get', counted_get)

  def watch(name):
    method = getattr(jax_array.ArrayImpl, name)

    def watched(self, *args, **kwargs):
      counts['implicit'] += not inside
      return method(self, *args, **kwargs)

    monkeypatch.setattr(jax_array.ArrayImpl, name, watched)

  for name in (
    '__array__',
    '__float__',
    '__int__',
    '__index__',
    '__bool__',
    'item',
    'tolist',
  ):
    watch(name)
  with jax.transfer_guard_device_to_host('disallow'):
    _, engine = world.generate(requests, drafter=chain)
  assert engine.stats.reads == engine.stats.segments == counts['explicit'] > 5
  assert counts['implicit'] == 0
  assert bool(jnp.ones(())) and counts['implicit'] == 1  # the watch works


def test_a_key_seen_once_never_compiles_again():
  """Other prompts, lengths, counts and limits reuse every executable.

  XLA's own count of compilations, eager operations included. Mutants: limits
  are static; an eager operation of another shape at the boundary.
  """
  world, state = _world(), helpers.RolloutState()
  draft = drafting.prompt_lookup(4)

  def generate(seed, **options):
    samples = np.random.default_rng(seed).integers(1, 19, 2 + seed % 5)
    requests = helpers.make_requests(samples, seed=seed, step=seed)
    engine = world.engine(drafter=draft, **options)
    engine.generate(world.params, requests, state)

  one_shape = dict(min_capacity=32, control=dict(compact=False))
  generate(0, **one_shape)
  before = executables.compile_totals()[0]
  for seed in range(1, 6):
    generate(seed, **one_shape)
  generate(
    7,
    min_capacity=32,
    segment_forwards=5,
    control=dict(compact=False, refill_threshold=0.6),
  )
  assert executables.compile_totals()[0] == before
  # With growth and compaction: one compilation for each new key, no more.
  keys = len(world.pool.keys())
  for seed in range(6):
    generate(seed)
  new = len(world.pool.keys()) - keys
  assert executables.compile_totals()[0] - before == new


def test_used_keys_are_reachable_keys():
  """Every segment asked for in randomised runs was listed at the start.

  Mutants: reachable_keys leaves out the last capacity or the compacted N.
  """
  world, rng = _world(), np.random.default_rng(1)
  for control in (dict(), dict(min_slots=4), dict(compact=False)):
    pool = _Recorder(world.pool)
    engine = world.engine(
      drafter=drafting.prompt_lookup(4), control=control, pool=pool
    )
    for step in range(4):
      samples = rng.integers(1, 25, rng.integers(1, 5))
      requests = helpers.make_requests(samples, step=step)
      engine.generate(world.params, requests, helpers.RolloutState())
    used = {
      (key[1], key[2], key[3].width) for key in pool.used if key[0] == 'segment'
    }
    assert len(used) > 1
    assert used <= {(n, s, arm.width) for n, s, arm in engine.reachable_keys()}


class _Recorder:
  """A pool that notes which keys are asked for."""

  def __init__(self, pool):
    self._pool = pool
    self.used = set()

  def __getattr__(self, name):
    return getattr(self._pool, name)

  def __call__(self, key, *args, **options):
    self.used.add(key)
    return self._pool(key, *args, **options)

  def compile(self, key, *args, **options):
    self.used.add(key)
    return self._pool.compile(key, *args, **options)


@pytest.mark.parametrize('slots', [4, 16])
def test_prompts_are_prefilled_once(slots, monkeypatch):
  """Each prompt is prefilled once for its whole group, in order.

  Mutants: a block is prefilled again when the queue returns to it; a prefill
  for every sample.
  """
  seen, prefill = [], executor.Executor.prefill

  def counted(self, params, prompts, *args):
    seen.append(list(prompts))
    return prefill(self, params, prompts, *args)

  monkeypatch.setattr(executor.Executor, 'prefill', counted)
  requests = helpers.make_requests((3, 20, 1, 0, 8, 5))
  got, _ = _world().generate(requests, slots=slots)
  flat = [prompt for block in seen for prompt in block]
  # A request of no samples needs none.
  asked = [request for request in requests if request.samples]
  assert [id(p) for p in flat] == [id(q.prompt) for q in asked]
  assert len(seen) == -(-len(asked) // (slots // 4))
  assert len(got) == 37


def test_more_samples_than_slots_and_nothing_at_all():
  """One request fills the slots many times over; no requests give nothing.

  Mutant: a block is left as soon as it was admitted from.
  """
  world = _world()
  request = helpers.make_requests((50,))
  few, _ = world.generate(request, slots=4)
  many, _ = world.generate(request, slots=64)
  helpers.assert_same_tokens(world, few, many)
  assert [r.index for r in few] == list(range(50))
  assert world.generate([])[0] == []


def test_mistakes_are_refused():
  """Prompts that do not fit and slots that do not divide name the numbers.

  Mutants: no lower bound on the prompt; the check leaves out W.
  """
  world = _world()
  for length in (0, 7):
    request = Request(np.zeros(length, np.int32), 1, TRAIN, 4, 9)
    with pytest.raises(ConfigError, match=f'request 9 of step 4.*{length}'):
      world.generate([request])
  with pytest.raises(ConfigError, match='12.*8 devices'):
    _world(ways=8).engine(slots=12)
  with pytest.raises(ConfigError, match='16 slots need 20 places'):
    world.engine(drafter=helpers.tree_cache(4, places=19))
  with pytest.raises(ConfigError, match='257.*256'):
    world.engine(max_new_tokens=247, drafter=drafting.prompt_lookup(4))
