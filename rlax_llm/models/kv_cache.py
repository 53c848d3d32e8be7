"""Keys and values of committed tokens: admit, commit and grow.

Slots at or beyond `length` are garbage and are never attended. A forward
reads the cache and returns the keys and values of its own nodes apart; only
those of the accepted path are ever written, by `commit`. So a rejected draft
leaves nothing to roll back, and chains and trees are committed the same way.

Keys are kept with S as the last axis and values with HD as the last axis:
each is then the right-hand side of a plain matrix product (queries x keys,
weights x values). On CPU the score product is 2x faster so, which outweighs
the strided write of one token.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlax_llm.types import Array
from rlax_llm.types import Path

_SCATTER: dict[str, Any] = dict(
  mode='drop', unique_indices=True, indices_are_sorted=True
)


class KVNodes(flax.struct.PyTreeNode):
  """Keys and values of the W nodes of one forward, by layer."""

  keys: tuple[Array, ...]  # each [N, KH, W, HD], rotated
  values: tuple[Array, ...]  # each [N, KH, W, HD]


class KVCache(flax.struct.PyTreeNode):
  """Keys and values of the committed tokens, by layer."""

  keys: tuple[Array, ...]  # each [N, KH, HD, S], rotated
  values: tuple[Array, ...]  # each [N, KH, S, HD]
  length: Array  # int32[N]

  @property
  def capacity(self) -> int:
    return self.values[0].shape[2]


def join_nodes(earlier: KVNodes | None, nodes: KVNodes) -> KVNodes:
  """Returns the nodes of two forwards over one tree; None: there is one."""
  if earlier is None:
    return nodes
  join = lambda a, b: jnp.concatenate([a, b], axis=2)
  return jax.tree.map(join, earlier, nodes)


def empty(
  rows: int,
  capacity: int,
  *,
  layers: int,
  kv_heads: int,
  head_dim: int,
  dtype: jnp.dtype,
) -> KVCache:
  """Returns a cache of zeros that holds nothing."""
  keys, values = (
    tuple(jnp.zeros((rows, kv_heads, *axes), dtype) for _ in range(layers))
    for axes in ((head_dim, capacity), (capacity, head_dim))
  )
  return KVCache(keys, values, jnp.zeros(rows, jnp.int32))


def commit(cache: KVCache, nodes: KVNodes, path: Path) -> KVCache:
  """Appends the keys and values of the accepted path of every row.

  Args:
    cache: of N rows, with capacity for W more tokens in each row that commits
      any; rows without it must have `path.length == 0`.
    nodes: what the forward returned.
    path: N rows; `length` may be 0 for rows that commit nothing.

  Returns:
    The cache, longer by `path.length`.
  """
  count, width = path.nodes.shape
  _, kv_heads, head_dim, capacity = cache.keys[0].shape
  # Index arrays for [N, KH, HD, W]; values leave the HD axis whole.
  row = jnp.arange(count)[:, None, None, None]
  head = jnp.arange(kv_heads)[None, :, None, None]
  dim = jnp.arange(head_dim)[None, None, :, None]
  order = jnp.arange(width)[None]
  # What is not accepted goes beyond the capacity, where writes are dropped.
  # This also makes every write depend on the outcome of the forward, so that
  # XLA knows that attention has read the cache and updates it in place.
  slot = jnp.where(
    order < path.length[:, None],
    cache.length[:, None] + order,
    capacity + order,
  )[:, None, None]

  def accepted(new: Array) -> Array:
    if width == 1:
      return new
    return jnp.take_along_axis(new, path.nodes[:, None, :, None], axis=2)

  def write_keys(old: Array, new: Array) -> Array:
    new = accepted(new).swapaxes(2, 3).astype(old.dtype)
    return old.at[row, head, dim, slot].set(new, **_SCATTER)

  def write_values(old: Array, new: Array) -> Array:
    new = accepted(new).astype(old.dtype)
    return old.at[row[..., 0], head[..., 0], slot[:, :, 0]].set(new, **_SCATTER)

  return KVCache(
    keys=jax.tree.map(write_keys, cache.keys, nodes.keys),
    values=jax.tree.map(write_values, cache.values, nodes.values),
    length=cache.length + path.length,
  )


def admit(
  cache: KVCache, nodes: KVNodes, take: Array, source: Array, length: Array
) -> KVCache:
  """Gives rows the keys and values of prefilled prompts.

  Args:
    cache: of N rows, of capacity S >= P.
    nodes: of K prompts of capacity P.
    take: bool[N]; the other rows keep theirs.
    source: int32[N], the row's prompt.
    length: int32[N], tokens of the prompt that count.
  """

  def share(old: Array, new: Array) -> Array:
    new = new[source].astype(old.dtype)
    head = old[tuple(slice(n) for n in new.shape)]
    new = jnp.where(take[:, None, None, None], new, head)
    return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

  share_keys = lambda old, new: share(old, new.swapaxes(2, 3))
  return KVCache(
    keys=jax.tree.map(share_keys, cache.keys, nodes.keys),
    values=jax.tree.map(share, cache.values, nodes.values),
    length=jnp.where(take, length, cache.length),
  )


def grow(cache: KVCache, capacity: int) -> KVCache:
  """Returns the cache with a larger capacity; the new slots hold nothing."""
  more, none = (0, capacity - cache.capacity), (0, 0)
  pad = lambda *widths: lambda x: jnp.pad(x, widths)
  return cache.replace(
    keys=jax.tree.map(pad(none, none, none, more), cache.keys),
    values=jax.tree.map(pad(none, none, more, none), cache.values),
  )
