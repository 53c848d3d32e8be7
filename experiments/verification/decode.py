"""Decoding with any rule: a drafter and a target, each with its cache."""

import functools
from typing import Any
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from experiments.verification import draft_trees
from experiments.verification import rules
from experiments.verification.draft_trees import Branching
from experiments.verification.rules import Noise
from rlax_llm.models import kv_cache
from rlax_llm.models.kv_cache import KVCache
from rlax_llm.models.kv_cache import KVNodes
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops import sampling
from rlax_llm.ops import verification
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import slots as slot_ops
from rlax_llm.types import Array
from rlax_llm.types import DraftTree
from rlax_llm.types import Params
from rlax_llm.types import Path


class Pair(NamedTuple):
  """Target and drafter, or what belongs to each."""

  target: Any
  draft: Any


class Rows(flax.struct.PyTreeNode):
  """N rows as they are decoded; each cache holds `length` - 1 tokens."""

  text: Array  # int32[N, S]
  length: Array  # int32[N], prompt and completion
  tokens: Array  # int32[N], completion tokens committed
  forwards: Array  # int32[N], of the target
  done: Array  # bool[N]
  caches: Pair  # of KVCache


def _laws(
  params: Params,
  tree: DraftTree,
  length: Array,
  cache: KVCache,
  temperature: Array,
  model: LanguageModel,
) -> tuple[Array, KVNodes]:
  """Returns log-laws [N, W, V] after each node, and the nodes' KV."""
  line = jax.vmap(verification.ancestors)(tree.parents)
  positions = length[:, None] - 1 + verification.depths(line)
  hidden, nodes = model.extend(params, tree.tokens, positions, line, cache)
  logits = model.logits(params, hidden) / temperature[:, None, None]
  return sampling.log_law(logits, Sampling()), nodes


def _prefill(
  params: Params,
  prompts: Array,
  length: Array,
  capacity: int,
  model: LanguageModel,
) -> KVCache:
  """Returns a cache that holds all tokens of the prompts but the last."""
  block = slot_ops.prefill(params, prompts, length, model=model)
  order = jnp.arange(prompts.shape[1], dtype=jnp.int32)
  path = Path(
    nodes=jnp.broadcast_to(order, prompts.shape),
    tokens=prompts,
    length=length - 1,
  )
  return kv_cache.commit(
    model.init_cache(len(prompts), capacity), block.nodes, path
  )


def decode(
  params: Pair,
  prompts: Array,
  prompt_length: Array,
  temperature: Array,
  noise: Noise,
  rule: Array,
  *,
  models: Pair,
  branching: Branching,
  max_new_tokens: int,
  eos_id: int,
) -> Rows:
  """Decodes every row up to EOS or its limit, round after round.

  Args:
    params: of target and drafter.
    prompts: int32[N, P].
    prompt_length: int32[N].
    temperature: float32[N], of target and drafter.
    noise: of N rows.
    rule: int32[], from `rules.number`.
    models: static.
    branching: static shape of the draft.
    max_new_tokens: T; static.
    eos_id: static.

  Returns:
    Rows; the completion is `text[n, prompt_length[n]:length[n]]`.
  """
  count, longest = prompts.shape
  width = draft_trees.width(branching)
  capacity = longest + max_new_tokens + width
  row, order = jnp.arange(count), jnp.arange(width)[None]

  def body(rows: Rows) -> Rows:
    position = rows.length - prompt_length
    laws = Pair(*(functools.partial(_laws, model=model) for model in models))
    tree, draft, draft_nodes = rules.propose(
      rule,
      rows.text[row, rows.length - 1],
      noise,
      position,
      lambda tree: laws.draft(
        params.draft, tree, rows.length, rows.caches.draft, temperature
      ),
      branching=branching,
    )
    target, target_nodes = laws.target(
      params.target, tree, rows.length, rows.caches.target, temperature
    )
    path = rules.verify(rule, tree, target, draft, noise, position)
    room = max_new_tokens - position
    kept = jnp.where(rows.done, 0, jnp.minimum(path.length, room))
    eos = (path.tokens == eos_id) & (order < kept[:, None])
    hit = jnp.any(eos, axis=-1)
    kept = jnp.where(hit, jnp.argmax(eos, axis=-1) + 1, kept)
    path = path.replace(length=kept.astype(jnp.int32))
    place = jnp.where(
      order < kept[:, None], rows.length[:, None] + order, capacity
    )
    return Rows(
      text=rows.text.at[row[:, None], place].set(path.tokens, mode='drop'),
      length=rows.length + path.length,
      tokens=rows.tokens + path.length,
      forwards=rows.forwards + ~rows.done,
      done=rows.done | hit | (kept >= room),
      caches=Pair(
        kv_cache.commit(rows.caches.target, target_nodes, path),
        kv_cache.commit(rows.caches.draft, draft_nodes, path),
      ),
    )

  zero = jnp.zeros(count, jnp.int32)
  fill = lambda params, model: _prefill(
    params, prompts, prompt_length, capacity, model
  )
  rows = Rows(
    text=jnp.pad(prompts, ((0, 0), (0, capacity - longest))),
    length=prompt_length,
    tokens=zero,
    forwards=zero,
    done=zero > 0,
    caches=Pair(*map(fill, params, models)),
  )
  return jax.lax.while_loop(lambda rows: ~jnp.all(rows.done), body, rows)


def next_law(
  params: Params,
  texts: Array,
  length: Array,
  temperature: Array,
  *,
  model: LanguageModel,
) -> Array:
  """Returns float32[N, L, V], log-laws after every token, without a cache.

  Args:
    params: the model's.
    texts: int32[N, L].
    length: int32[N]; what follows tokens beyond it is garbage.
    temperature: float32[N].
    model: static.
  """
  order = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
  segments = (order < length[:, None]).astype(jnp.int32)
  hidden = model.hidden(params, texts, order, segments)
  logits = model.logits(params, hidden) / temperature[:, None, None]
  return sampling.log_law(logits, Sampling())
