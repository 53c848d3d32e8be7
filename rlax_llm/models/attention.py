"""Attention: over a cache plus the nodes of one forward, and over packs."""

import jax.numpy as jnp

from rlax_llm.models import precision
from rlax_llm.types import Array

# Finite, so that a row that may attend to nothing (padding) gives a mean of
# garbage instead of NaN; float32 is safe with it and so is bfloat16.
_MASKED = -1e30


def _group(queries: Array, kv_heads: int) -> Array:
  """Scales queries and lays them out by KV head.

  [N, Q, H, HD] -> [N, KH, G * Q, HD]: all queries that share keys are one
  matrix, so that scores are one matrix product per row and KV head.
  """
  rows, length, heads, head_dim = queries.shape
  queries = queries * jnp.asarray(head_dim**-0.5, queries.dtype)
  queries = queries.reshape(rows, length, kv_heads, -1, head_dim)
  queries = queries.transpose(0, 2, 3, 1, 4)
  return queries.reshape(rows, kv_heads, -1, head_dim)


def _ungroup(out: Array, length: int, dtype: jnp.dtype) -> Array:
  """Undoes `_group`: [N, KH, G * Q, HD] -> [N, Q, H * HD]."""
  rows, kv_heads, _, head_dim = out.shape
  out = out.reshape(rows, kv_heads, -1, length, head_dim)
  out = out.transpose(0, 3, 1, 2, 4)
  return out.reshape(rows, length, -1).astype(dtype)


def _scores(queries: Array, keys: Array, mask: Array) -> Array:
  """Returns float32[N, KH, G * Q, S]; keys [N, KH, HD, S], mask [N, Q|1, S]."""
  scores = jnp.einsum(
    'nkqd,nkds->nkqs',
    queries,
    keys,
    precision=precision.of_products(queries.dtype),
    preferred_element_type=jnp.float32,
  )
  mask = jnp.tile(mask, (1, scores.shape[2] // mask.shape[1], 1))
  return jnp.where(mask[:, None], scores, _MASKED)


def _mix(weights: Array, values: Array) -> Array:
  """Returns float32[N, KH, G * Q, HD]: sums of values by weight."""
  return jnp.einsum(
    'nkqs,nksd->nkqd',
    weights.astype(values.dtype),
    values,
    precision=precision.of_products(values.dtype),
    preferred_element_type=jnp.float32,
  )


def packed_attention(
  queries: Array, keys: Array, values: Array, mask: Array
) -> Array:
  """Attention of every position over the positions that `mask` allows.

  Args:
    queries: [R, L, H, HD].
    keys: [R, KH, L, HD]; H is a multiple of KH (grouped-query attention).
    values: [R, KH, L, HD].
    mask: bool[R, L, L], [r, i, j]: i attends to j.

  Returns:
    [R, L, H * HD].
  """
  scores = _scores(_group(queries, keys.shape[1]), keys.swapaxes(2, 3), mask)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return _ungroup(_mix(weights, values) / total, mask.shape[1], queries.dtype)


def cached_attention(
  queries: Array,
  keys: Array,
  values: Array,
  cached_keys: Array,
  cached_values: Array,
  length: Array,
  node_mask: Array,
) -> Array:
  """Attention of W nodes over the committed tokens and their own ancestors.

  The two parts are merged by their maxima and sums, so that the cache is read
  where it lies and never copied together with the nodes.

  Args:
    queries: [N, W, H, HD].
    keys: [N, KH, E, HD], of the nodes: these W and, before them, those of the
      same tree that an earlier forward evaluated.
    values: [N, KH, E, HD], of the nodes.
    cached_keys: [N, KH, HD, S].
    cached_values: [N, KH, S, HD].
    length: int32[N], committed tokens; slots beyond are never attended.
    node_mask: bool[N, W, E] or bool[W, E], [i, j]: node i attends to node j.
      Every node attends to itself.

  Returns:
    [N, W, H * HD].
  """
  rows, width = queries.shape[:2]
  capacity = cached_keys.shape[3]
  node_mask = jnp.broadcast_to(node_mask, (rows, width, keys.shape[2]))
  if capacity == 0:  # A prefill: there is nothing but the nodes.
    return packed_attention(queries, keys, values, node_mask)
  queries_by_head = _group(queries, keys.shape[1])
  seen = (jnp.arange(capacity)[None] < length[:, None])[:, None]
  past = _scores(queries_by_head, cached_keys, seen)
  own = _scores(queries_by_head, keys.swapaxes(2, 3), node_mask)
  peak = jnp.maximum(
    jnp.max(own, -1, keepdims=True), jnp.max(past, -1, keepdims=True)
  )
  own, past = jnp.exp(own - peak), jnp.exp(past - peak)
  total = jnp.sum(own, axis=-1, keepdims=True) + jnp.sum(
    past, axis=-1, keepdims=True
  )
  out = _mix(own, values) + _mix(past, cached_values)
  return _ungroup(out / total, width, queries.dtype)
