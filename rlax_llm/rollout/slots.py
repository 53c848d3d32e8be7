"""Slots at segment boundaries: make, admit, grow, gather. Pure functions."""

import flax.struct
import jax
import jax.numpy as jnp

from rlax_llm.models import kv_cache
from rlax_llm.models.kv_cache import KVNodes
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.types import Array
from rlax_llm.types import Params
from rlax_llm.types import Slots


class PromptBlock(flax.struct.PyTreeNode):
  """Prefilled texts: prompts, shared by all samples of their groups, and
  prompts with what a sample came to in an earlier step.
  """

  tokens: Array  # int32[K, P]
  length: Array  # int32[K]
  nodes: KVNodes  # [K, KH, P, HD] by layer
  # [K, P, D], the policy's at the tokens; None: nobody wants them.
  hidden: Array | None = None


class Admission(flax.struct.PyTreeNode):
  """What each slot is given at a boundary; rows with ~take keep theirs."""

  take: Array  # bool[N]
  source: Array  # int32[N], row of the PromptBlock
  prompt_length: Array  # int32[N], of the text
  limit: Array  # int32[N], most new tokens
  domain: Array  # int32[N]
  step: Array  # int32[N]
  request: Array  # int32[N]
  index: Array  # int32[N]
  prompt: Array  # int32[N], see Slots


def empty_slots(model: LanguageModel, rows: int, capacity: int) -> Slots:
  """Returns N slots that hold nothing and are done."""
  return Slots(
    text=jnp.zeros((rows, capacity), jnp.int32),
    logprobs=jnp.zeros((rows, capacity), jnp.float32),
    drafted=jnp.zeros((rows, capacity), bool),
    prompt_length=jnp.zeros(rows, jnp.int32),
    length=jnp.ones(rows, jnp.int32),
    limit=jnp.zeros(rows, jnp.int32),
    key=jnp.zeros((rows, 2), jnp.uint32),
    prompt=jnp.zeros(rows, jnp.int32),
    index=jnp.zeros(rows, jnp.int32),
    done=jnp.ones(rows, bool),
    finished=jnp.zeros(rows, bool),
    forwards=jnp.zeros(rows, jnp.int32),
    cache=model.init_cache(rows, capacity),
  )


def prefill(
  params: Params,
  tokens: Array,
  length: Array,
  *,
  model: LanguageModel,
  keep_hidden: bool = False,
) -> PromptBlock:
  """Computes the keys and values of K prompts, once for each group.

  Args:
    params: the policy's.
    tokens: int32[K, P].
    length: int32[K]; tokens at or beyond it are garbage.
    model: static.
    keep_hidden: whether the hidden states are wanted; static.
  """
  rows, capacity = tokens.shape
  order = jnp.arange(capacity, dtype=jnp.int32)
  hidden, nodes = model.extend(
    params,
    tokens,
    jnp.broadcast_to(order, (rows, capacity)),
    order[:, None] >= order[None],
    model.init_cache(rows, 0),
  )
  return PromptBlock(tokens, length, nodes, hidden if keep_hidden else None)


def admit(
  slots: Slots, block: PromptBlock, admission: Admission, *, seed: int
) -> Slots:
  """Puts samples of prefilled prompts into slots.

  Args:
    slots: N rows of capacity S >= P.
    block: prefilled prompts.
    admission: which slot takes which sample.
    seed: the run's seed; static.
  """
  a = admission

  def choose(old: Array, new: Array) -> Array:
    """Takes `new`, which may be shorter than `old`, in the rows that take."""
    where = a.take.reshape((-1,) + (1,) * (old.ndim - 1))
    head = old[tuple(slice(n) for n in new.shape)]
    return jax.lax.dynamic_update_slice(
      old, jnp.where(where, new, head), (0,) * old.ndim
    )

  share = lambda old, new: choose(old, new[a.source].astype(old.dtype))
  length = block.length[a.source]
  keys = sampling_ops.sample_keys(seed, a.domain, a.step, a.request, a.index)
  # The last prompt token is the root of the first tree: its keys and values
  # are computed again by the forward that verifies that tree.
  cache = kv_cache.admit(slots.cache, block.nodes, a.take, a.source, length - 1)
  return slots.replace(
    text=share(slots.text, block.tokens),
    prompt_length=choose(slots.prompt_length, a.prompt_length),
    length=choose(slots.length, length),
    limit=choose(slots.limit, length + a.limit),
    key=choose(slots.key, keys),
    prompt=choose(slots.prompt, a.prompt),
    index=choose(slots.index, a.index),
    done=choose(slots.done, jnp.zeros_like(a.take)),
    finished=choose(slots.finished, jnp.zeros_like(a.take)),
    forwards=choose(slots.forwards, jnp.zeros_like(slots.forwards)),
    cache=cache,
  )


def grow(slots: Slots, capacity: int) -> Slots:
  """Returns the slots with capacity S enlarged."""
  more = capacity - slots.text.shape[1]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, more)))
  return slots.replace(
    text=pad(slots.text),
    logprobs=pad(slots.logprobs),
    drafted=pad(slots.drafted),
    cache=kv_cache.grow(slots.cache, capacity),
  )


def gather(slots: Slots, rows: Array) -> Slots:
  """Returns the named rows, in that order."""
  return jax.tree.map(lambda x: x[rows], slots)
