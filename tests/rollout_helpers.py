"""Shared by the tests of the model, the segment and the engine."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from rlax_llm import testing
from rlax_llm.config import ControlConfig
from rlax_llm.config import freeze
from rlax_llm.config import MeshConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting import tree_cache as trees
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.models.draft_model import make_draft_model
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import DraftTree
from rlax_llm.types import Request
from rlax_llm.types import TRAIN
from rlax_llm.types import UNUSED

NEAR_TIE = 1e-4  # a race won by less is excused, if shown


def _noise(slots, salt):
  """A key per row that is unrelated to the sample's own noise."""
  key = jax.random.key(salt)
  return jax.vmap(
    lambda k, n: jax.random.fold_in(
      jax.random.fold_in(jax.random.fold_in(key, k[0]), k[1]), n
    )
  )(slots.key, slots.length)


@functools.cache
def hostile_chain(width, vocabulary):
  """A chain of random tokens, some outside of the vocabulary."""

  def propose(slots):
    draft = jax.vmap(
      lambda key: jax.random.randint(key, (width,), 0, vocabulary)
    )(_noise(slots, 1))
    return DraftTree(
      draft.at[:, 0].set(drafting.last_tokens(slots)),
      drafting.chain_parents(width),
    )

  return drafting.stateless(propose, width)


@functools.cache
def random_tree(width, vocabulary):
  """Another random tree in every forward: branches, twins and padding."""

  def one(key):
    token_key, parent_key, unused_key = jax.random.split(key, 3)
    tokens = jax.random.randint(token_key, (width,), 0, vocabulary)
    node = jnp.arange(width)
    parents = jnp.floor(jax.random.uniform(parent_key, (width,)) * node)
    unused = jax.random.bernoulli(unused_key, 0.1, (width,)) | (node == 0)
    return tokens, jnp.where(unused, UNUSED, parents.astype(jnp.int32))

  def propose(slots):
    tokens, parents = jax.vmap(one)(_noise(slots, 2))
    return DraftTree(tokens.at[:, 0].set(drafting.last_tokens(slots)), parents)

  return drafting.stateless(propose, width)


def tree_cache(width, *, branching=1, history=2, group=4, places=20):
  """The tree cache of a World: prompts of 6 and 18 new tokens."""
  shape = drafting.CorpusShape(
    prompts=places, capacity=40, history=history, group=group
  )
  return trees.tree_cache(width, trees.TreeCacheConfig(shape, branching))


def oracle(width, rollouts, seed, longest, *, tree=False):
  """Drafts the true continuation, known from another run's rollouts.

  Args:
    width: W.
    rollouts: that run's.
    seed: of the runs.
    longest: T.
    tree: hide the line among padding and wrong siblings; half of the nodes.
  """
  keys = np.stack([key_of(r, seed) for r in rollouts])
  known = np.zeros((len(rollouts), longest + width), np.int32)
  for row, rollout in zip(known, rollouts):
    row[: rollout.length] = rollout.tokens
  line = np.arange(1, width, 2 if tree else 1)  # nodes that hold the truth
  parents = np.full(width, UNUSED)
  for before, node in zip([0, *line], line):
    parents[node] = before
    if tree and node + 1 < width:
      parents[node + 1] = before  # a wrong sibling of the true child

  def propose(slots):
    same = jnp.all(slots.key[:, None] == jnp.asarray(keys)[None], axis=-1)
    row = jnp.argmax(same, axis=-1)
    place = slots.length - slots.prompt_length
    truth = jnp.asarray(known)[
      row[:, None], place[:, None] + jnp.arange(len(line))[None]
    ]
    tokens = jnp.full((row.shape[0], width), 10**6, jnp.int32)
    tokens = tokens.at[:, 0].set(drafting.last_tokens(slots))
    return DraftTree(
      tokens.at[:, jnp.asarray(line)].set(truth),
      jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape),
    )

  return drafting.stateless(propose, width)


def key_of(rollout, seed):
  """Returns uint32[2], the noise key of a rollout's sample."""
  r = rollout.request
  fields = (r.domain, r.step, r.request, rollout.index)
  fields = [jnp.asarray([f], jnp.int32) for f in fields]
  return np.asarray(sampling_ops.sample_keys(seed, *fields))[0]


def random_choices(rng, arms):
  """Returns a `choose` that draws arms and lengths of segments."""

  def choose(*unused):
    arm = arms[int(rng.integers(len(arms)))]
    return Choice(arm, int(rng.integers(1, 9)), bool(rng.integers(2)))

  return choose


class World:
  """A model with parameters, and engines that share executables."""

  def __init__(self, *, ways=1, seed=3, sampling=Sampling(), eos=5, **model):
    config = testing.tiny_model_config(**(dict(layers=1) | model))
    self.model = make_transformer(config, freeze(PrecisionConfig()))
    self.draft_model = make_draft_model(
      config, freeze(PrecisionConfig()), model=self.model
    )
    self.mesh = sharding.make_mesh(MeshConfig(data=ways))
    self.params = jax.device_put(
      jax.jit(self.model.init)(jax.random.key(0)),
      sharding.replicated(self.mesh),
    )
    self.seed = seed
    self.sampling = sampling
    self.eos_ids = (eos,)
    self.pool = ExecutablePool(lambda: 0.0)

  def engine(
    self,
    *,
    drafter=None,
    learned=None,
    control=None,
    pool=None,
    strategy=None,
    replicas=1,
    **rollout,
  ):
    """Returns an engine; keywords override RolloutConfig.

    `drafts_by` is its field `drafter`, the name of one.
    """
    fields = dict(
      slots=16,
      width=1,
      prompt_length=6,
      max_new_tokens=18,
      min_capacity=16,
      segment_forwards=7,
      samples_per_prompt=4,
    )
    clock = rollout.pop('clock', lambda: 0.0)
    if 'drafts_by' in rollout:
      fields['drafter'] = rollout.pop('drafts_by')
    return RolloutEngine(
      self.model,
      rollout=freeze(RolloutConfig(**(fields | rollout))),
      control=freeze(ControlConfig(**(dict(min_slots=8) | (control or {})))),
      sampling=self.sampling,
      eos_ids=self.eos_ids,
      seed=self.seed,
      mesh=self.mesh,
      clock=clock,
      drafter=drafter,
      learned=learned,
      strategy=strategy,
      pool=pool or self.pool,
      replicas=replicas,
    )

  def generate(
    self, requests, *, store=None, ahead=(), params=None, own=(), **options
  ):
    """Returns (rollouts, engine)."""
    engine = self.engine(**options)
    rollouts, _ = engine.generate(
      params or self.params,
      requests,
      RolloutState(store=store),
      ahead=ahead,
      drafter_params=own,
    )
    return rollouts, engine

  def draft_params(self, seed=1):
    """Returns parameters for `self.draft_model`, on the mesh."""
    return jax.device_put(
      jax.jit(self.draft_model.init)(jax.random.key(seed)),
      sharding.replicated(self.mesh),
    )

  @functools.cached_property
  def _law_at(self):

    def law(params, tokens, last):
      order = jnp.arange(tokens.shape[0])[None]
      segments = (order <= last).astype(jnp.int32)
      hidden = self.model.hidden(params, tokens[None], order, segments)
      return sampling_ops.log_law(
        self.model.logits(params, hidden[0, last]), self.sampling
      )

    return jax.jit(law)

  def law_after(self, tokens):
    """Returns float32[V], the law of the next token, without a cache."""
    padded = np.zeros(40, np.int32)
    padded[: len(tokens)] = tokens
    return self._law_at(self.params, padded, np.int32(len(tokens) - 1))

  def margin(self, rollout, place):
    """Returns log(second / first) of the race for one token, nats."""
    text = np.r_[rollout.request.prompt, rollout.tokens[:place]]
    scores = np.sort(
      sampling_ops.race_scores(
        key_of(rollout, self.seed), jnp.int32(place), self.law_after(text)
      )
    )
    return float(np.log(scores[1] / scores[0]))


def make_requests(samples=(3, 20, 1, 8, 5), *, step=0, vocabulary=6, seed=0):
  """Returns prompts of lengths 1 to 6; 37 samples, unless told."""
  rng = np.random.default_rng(seed)
  return [
    Request(
      prompt=rng.integers(0, vocabulary, 1 + (5 * i) % 6),
      samples=count,
      domain=TRAIN,
      step=step,
      request=i,
    )
    for i, count in enumerate(samples)
  ]


def by_sample(rollouts):
  """Returns the rollouts by (request, index)."""
  return {(r.request.request, r.index): r for r in rollouts}


def assert_same_tokens(world, want, got):
  """Token-for-token equality; a difference must be a shown near tie."""
  want, got = by_sample(want), by_sample(got)
  assert want.keys() == got.keys()
  for name, a in want.items():
    b = got[name]
    if np.array_equal(a.tokens, b.tokens):
      assert a.finished == b.finished
      continue
    both = min(a.length, b.length)
    places = np.flatnonzero(a.tokens[:both] != b.tokens[:both])
    assert places.size, f'{name}: {a.length} and {b.length} tokens'
    margin = world.margin(a, int(places[0]))
    print(f'sample {name} parts at token {places[0]}; margin {margin:.1e}')
    assert margin < NEAR_TIE, f'{name} parts at {places[0]}: {margin:.1e}'


def enumerate_sequences(world, prompt, longest):
  """Returns {completion: probability} of every completion, by definition."""
  law = {(): 1.0}
  result = {}
  for _ in range(longest):
    after = {}
    for tokens, p in law.items():
      step = np.exp(np.asarray(world.law_after([*prompt, *tokens]), np.float64))
      for token, q in enumerate(step / step.sum()):
        ended = token in world.eos_ids or len(tokens) + 1 == longest
        (result if ended else after)[(*tokens, token)] = p * q
    law = after
  assert abs(sum(result.values()) - 1) < 1e-6
  return result


def assert_law(world, prompt, longest, rollouts):
  """Chi-square of whole completions against the enumeration of all of them."""
  law = enumerate_sequences(world, prompt, longest)
  counts = dict.fromkeys(law, 0)
  for rollout in rollouts:
    counts[tuple(rollout.tokens.tolist())] += 1
  observed = np.asarray(list(counts.values()))
  expected = np.asarray(list(law.values())) * len(rollouts)
  assert (observed[expected == 0] == 0).all()
  rare = expected < 8
  observed = np.append(observed[~rare], observed[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  observed, expected = observed[expected > 0], expected[expected > 0]
  expected *= observed.sum() / expected.sum()
  assert len(observed) > 5
  assert stats.chisquare(observed, expected).pvalue > 1e-4


def all_equations(jaxpr):
  """Yields all equations of a jaxpr, nested ones included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from all_equations(inner)


def all_primitives(jaxpr):
  """Yields the names of all primitives of a jaxpr, nested ones included."""
  for equation in all_equations(jaxpr):
    yield equation.primitive.name


def rounded_products(jaxpr):
  """Returns the float32 products whose factors a device may round."""
  return [
    equation
    for equation in all_equations(jaxpr)
    if equation.primitive.name == 'dot_general'
    and equation.invars[0].aval.dtype == jnp.float32
    and equation.params['precision'] != (jax.lax.Precision.HIGHEST,) * 2
  ]


def sequence_grid(vocabulary, length):
  """Returns int32[vocabulary ** length, length], every sequence."""
  return np.asarray(
    list(itertools.product(range(vocabulary), repeat=length)), np.int32
  )
