"""TLT's learned drafter: it runs the target's race with its own law.

"Taming the Long Tail: Efficient Reasoning RL Training with Adaptive Drafter",
https://arxiv.org/abs/2511.16665; the network is models/draft_model.py. A
token of the target is the winner of a race, argmin_v(E_v / p_v), whose clocks E
are known before the target runs. The drafter proposes argmin_v(E_v / q_v): it
hits with probability at least (1 - TV(p, q)) / (1 + TV(p, q)), and more often
than its most probable token would ("Coupling without Communication and
Drafter-Invariant Speculative Decoding", https://arxiv.org/abs/2408.07978).

The state holds, for each row, the drafter's keys and values of all tokens but
the last, and the target's hidden state at the last of those. Every path into it
is `append`: what verification accepted, what a prompt brought, what was missed
in segments of W = 1. Drafts leave no trace in it.
"""

import functools
from typing import Any
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rlax_llm.drafting import corpus as corpora
from rlax_llm.drafting.drafter import chain_parents
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.drafter import last_tokens
from rlax_llm.drafting.drafter import RowOperations
from rlax_llm.models import kv_cache
from rlax_llm.models.draft_model import DraftModel
from rlax_llm.models.kv_cache import KVCache
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.ops import trees
from rlax_llm.ops.sampling import Sampling
from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import DraftTree
from rlax_llm.types import Path
from rlax_llm.types import Slots
from rlax_llm.types import UNUSED


class ModelDrafterConfig(NamedTuple):
  """The static facts of drafting with a network.

  Attributes:
    model: the target.
    draft_model: the network.
    sampling: the law that the target is sampled from.
    branching: children of a node at most; 1 drafts a chain.
    depth: tokens of the longest line; 0: W - 1.
    chunk: tokens of a row that are taken up in one forward of the target,
      where drafting begins after segments without it.
  """

  model: LanguageModel
  draft_model: DraftModel
  sampling: Sampling
  branching: int = 1
  depth: int = 0
  chunk: int = 32


class DraftState(flax.struct.PyTreeNode):
  """What the drafter knows of N rows."""

  cache: KVCache  # the drafter's own, of all committed tokens but the last
  feature: Array  # [N, D] the target's hidden state at the last of those
  key: Array  # uint32[N, 2] of the sample that the row holds


def init_state(slots: Slots, draft_model: DraftModel) -> DraftState:
  """Returns a state that knows of no token."""
  rows, capacity = slots.text.shape
  return DraftState(
    cache=draft_model.init_cache(rows, capacity),
    feature=draft_model.init_features(rows),
    key=jnp.zeros_like(slots.key),
  )


def _shift(first: Array, hidden: Array) -> Array:
  """Returns the features [N, C, D] of tokens whose hidden states are given."""
  first = first[:, None].astype(hidden.dtype)
  return jnp.concatenate([first, hidden[:, :-1]], axis=1)


def _causal(width: int) -> Array:
  order = jnp.arange(width)
  return order[:, None] >= order[None]


def append(
  params: DraftParams,
  state: DraftState,
  tokens: Array,
  hidden: Array,
  count: Array,
  draft_model: DraftModel,
) -> DraftState:
  """Takes up the tokens that follow those the state knows.

  Args:
    params: the policy's and the drafter's.
    state: of N rows.
    tokens: int32[N, C].
    hidden: [N, C, D], the target's at these tokens.
    count: int32[N], how many of them count.
    draft_model: static.
  """
  length, width = state.cache.length, tokens.shape[1]
  order = jnp.arange(width, dtype=jnp.int32)
  # Of the forward only keys and values are used: with one layer they need no
  # attention, and XLA drops it.
  _, nodes = draft_model.extend(
    params,
    tokens,
    _shift(state.feature, hidden),
    length[:, None] + order[None],
    _causal(width),
    state.cache,
    None,
  )
  path = Path(
    nodes=jnp.broadcast_to(order, tokens.shape), tokens=tokens, length=count
  )
  last = jnp.maximum(count - 1, 0)[:, None, None]
  last_hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
  feature = jnp.where((count > 0)[:, None], last_hidden, state.feature)
  return state.replace(
    cache=kv_cache.commit(state.cache, nodes, path),
    feature=feature.astype(state.feature.dtype),
  )


def observe(
  params: DraftParams,
  state: DraftState,
  slots: Slots,
  path: Path,
  hidden: Array,
  draft_model: DraftModel,
) -> DraftState:
  """Takes up what a forward committed: the root, and all but its last token."""
  width = path.tokens.shape[1]
  tokens = corpora.window(slots, slots.length - path.length - 1, width)
  along = jnp.take_along_axis(hidden, path.nodes[..., None], axis=1)
  return append(params, state, tokens, along, path.length, draft_model)


def sync(
  params: DraftParams,
  state: DraftState,
  slots: Slots,
  config: ModelDrafterConfig,
) -> DraftState:
  """Takes up what rows sampled without the drafter.

  The target's hidden states of the missed tokens are computed again, a chunk of
  every row at a time: TLT, too, runs the texts once more where drafting begins.

  Args:
    params: the policy's and the drafter's.
    state: of N rows.
    slots: N rows.
    config: static.
  """
  model, width = config.model, config.chunk
  # A key belongs to one sample: rows with another one hold a new sample.
  same = jnp.all(state.key == slots.key, axis=-1)
  have = jnp.where(same, state.cache.length, 0)
  state = DraftState(
    cache=state.cache.replace(length=have),
    feature=jnp.where(same[:, None], state.feature, 0),
    key=slots.key,
  )
  goal = jnp.where(slots.done, have, slots.length - 1)
  order = jnp.arange(width, dtype=jnp.int32)[None]

  def lags(state: DraftState) -> Array:
    return jnp.any(state.cache.length < goal)

  def advance(state: DraftState) -> DraftState:
    have = state.cache.length
    tokens = corpora.window(slots, have, width)
    hidden, _ = model.extend(
      params.policy,
      tokens,
      have[:, None] + order,
      _causal(width),
      slots.cache.replace(length=have),
    )
    count = jnp.clip(goal - have, 0, width)
    return append(params, state, tokens, hidden, count, config.draft_model)

  return jax.lax.while_loop(lags, advance, state)


def admit(
  params: DraftParams,
  state: DraftState,
  slots: Slots,
  tokens: Array,
  length: Array,
  hidden: Array,
  take: Array,
  source: Array,
  *,
  draft_model: DraftModel,
) -> DraftState:
  """Gives rows the states of prefilled prompts; see `RowOperations.admit`."""
  rows, capacity = tokens.shape
  order = jnp.arange(capacity, dtype=jnp.int32)
  features = _shift(draft_model.init_features(rows), hidden)
  _, nodes = draft_model.extend(
    params,
    tokens,
    features,
    jnp.broadcast_to(order, tokens.shape),
    _causal(capacity),
    draft_model.init_cache(rows, 0),
    None,
  )
  # That of the last token is the feature of what follows it.
  last = jnp.take_along_axis(features, (length - 1)[:, None, None], axis=1)
  feature = last[source, 0].astype(state.feature.dtype)
  return DraftState(
    cache=kv_cache.admit(state.cache, nodes, take, source, length[source] - 1),
    feature=jnp.where(take[:, None], feature, state.feature),
    key=jnp.where(take[:, None], slots.key, state.key),
  )


class Nodes(flax.struct.PyTreeNode):
  """M candidate nodes of each row; see `trees.select`."""

  tokens: Array  # int32[N, M]
  parents: Array  # int32[N, M]
  logprobs: Array  # float32[N, M] of the line to the node


# How sure the drafter is of log q: the target's law is taken to be q times
# exp(noise), the noise Gumbel of this scale, in nats.
_DOUBT = 0.5


def draft_nodes(
  params: DraftParams,
  state: DraftState,
  slots: Slots,
  config: ModelDrafterConfig,
  depth: int,
) -> Nodes:
  """Drafts level by level; level d holds the tokens of place d + 1.

  Of the race at a node those `branching` tokens become its children that arrive
  first by the drafter's law. How probable it is that the target's winner is v
  follows from the lead of v in that race: with the target's log-law that of the
  drafter plus independent Gumbel noise of scale s,

    P(v wins) = (q_v / E_v)^(1/s) / sum_u (q_u / E_u)^(1/s).

  The `branching` most probable nodes of a level are evaluated for the next (as
  in EAGLE-2, https://arxiv.org/abs/2406.16858).

  Args:
    params: the policy's and the drafter's.
    state: of N rows, up to date.
    slots: N rows.
    config: static.
    depth: levels; static.

  Returns:
    Nodes, levels in order.
  """
  tokens = last_tokens(slots)[:, None]  # the nodes that are evaluated: [N, B]
  features = state.feature[:, None]
  rows = tokens.shape[0]
  identity = jnp.zeros((rows, 1), jnp.int32)  # 0 is the root, else 1 + place
  scores = jnp.zeros((rows, 1), jnp.float32)
  line = jnp.ones((1, 1), bool)  # [.., B, E]: ancestors among those evaluated
  earlier, levels, first = None, [], 1
  race = jax.vmap(jax.vmap(sampling_ops.race_scores, (None, None, 0)))
  for level in range(depth):
    place = slots.length - slots.prompt_length + level
    position = slots.length[:, None] - 1 + level
    features, nodes = config.draft_model.extend(
      params,
      tokens,
      features,
      jnp.broadcast_to(position, tokens.shape),
      line,
      state.cache,
      earlier,
    )
    logits = config.model.logits(params.policy, features)
    law = sampling_ops.log_law(logits, config.sampling)
    arrival = race(slots.key, place, law)  # [N, B, V]
    winning = jax.nn.log_softmax(-jnp.log(arrival) / _DOUBT, axis=-1)
    if config.branching == 1:
      child = sampling_ops.first(arrival)[..., None]
      lead = jnp.take_along_axis(winning, child, axis=-1)
    else:
      lead, child = jax.lax.top_k(winning, config.branching)
    size = tokens.shape[1] * config.branching
    lead = (scores[..., None] + jnp.minimum(lead, 0.0)).reshape(rows, size)
    child = child.reshape(rows, size)
    levels.append(
      Nodes(child, jnp.repeat(identity, config.branching, axis=1), lead)
    )
    if level + 1 == depth:
      break
    earlier = kv_cache.join_nodes(earlier, nodes)
    width = min(config.branching, size)
    if width == size == 1:
      # A chain sees all that was evaluated; its mask is a constant.
      line = jnp.ones((1, level + 2), bool)
      tokens, scores, identity = child, lead, jnp.full_like(child, first)
    else:
      scores, chosen = jax.lax.top_k(lead, width)
      parent = chosen // config.branching
      pick = lambda x: jnp.take_along_axis(x, parent[..., None], axis=1)
      own = jnp.broadcast_to(jnp.eye(width, dtype=bool), (rows, width, width))
      wide = jnp.broadcast_to(line, (rows, *line.shape[-2:]))
      line = jnp.concatenate([pick(wide), own], axis=-1)
      features = pick(features)
      tokens = jnp.take_along_axis(child, chosen, axis=1)
      identity = first + chosen
    first += size
  join = lambda *parts: jnp.concatenate(parts, axis=1)
  return jax.tree.map(join, *levels)


def propose(
  params: DraftParams,
  state: DraftState,
  slots: Slots,
  config: ModelDrafterConfig,
  width: int,
) -> DraftTree:
  """Returns a chain, or the most probable tree of W nodes, for every row."""
  depth = min(config.depth or width - 1, width - 1)
  nodes = draft_nodes(params, state, slots, config, depth)
  root = last_tokens(slots)[:, None]
  if config.branching == 1 and depth == width - 1:
    tokens = jnp.concatenate([root, nodes.tokens], axis=1)
    return DraftTree(tokens, chain_parents(width))
  tokens, parents, _ = jax.vmap(
    functools.partial(trees.select, nodes=width - 1)
  )(nodes.tokens, nodes.parents, nodes.logprobs)
  return DraftTree(
    jnp.concatenate([root, tokens], axis=1),
    jnp.concatenate([jnp.full_like(root, UNUSED), parents], axis=1),
  )


def gather(state: DraftState, rows: Array) -> DraftState:
  """Returns the named rows, in that order."""
  return jax.tree.map(lambda x: x[rows], state)


def grow(state: DraftState, capacity: int) -> DraftState:
  """Returns the state with a larger S."""
  return state.replace(cache=kv_cache.grow(state.cache, capacity))


def axes(state: DraftState) -> Any:
  """Returns logical axes: rows, and the cache's heads."""
  rows = jax.tree.map(lambda x: ('rows',), state)
  heads = lambda x: ('rows', 'kv_heads')
  return rows.replace(
    cache=rows.cache.replace(
      keys=jax.tree.map(heads, state.cache.keys),
      values=jax.tree.map(heads, state.cache.values),
    )
  )


@functools.cache
def row_operations(draft_model: DraftModel) -> RowOperations:
  """Returns what boundaries do to a DraftState."""
  return RowOperations(
    admit=functools.partial(admit, draft_model=draft_model),
    gather=gather,
    grow=grow,
  )


@functools.cache
def model_drafter(width: int, config: ModelDrafterConfig) -> Drafter:
  """Returns the learned drafter; its state is a DraftState.

  Args:
    width: W >= 2.
    config: static; the same for every width.
  """
  draft_model = config.draft_model
  return Drafter(
    init=lambda params, slots: init_state(slots, draft_model),
    load=lambda params, state, places, texts, length: state,
    propose=lambda params, state, slots: (
      propose(params, state, slots, config, width),
      state,
    ),
    observe=lambda params, state, slots, path, hidden: observe(
      params, state, slots, path, hidden, draft_model
    ),
    sync=lambda params, state, slots: sync(params, state, slots, config),
    width=width,
    rows=row_operations(draft_model),
    axes=axes,
  )
