"""Draft trees of candidate nodes. One row; callers vmap."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlax_llm.types import Array
from rlax_llm.types import UNUSED


def select(
  tokens: Array, parents: Array, logprobs: Array, nodes: int
) -> tuple[Array, Array, Array]:
  """Keeps the most probable of the candidate nodes: a tree of their lines.

  A line is never more probable than its beginning, so the most probable nodes
  hold the ancestors of one another, and by expected accepted tokens no tree of
  as many nodes is better.

  Args:
    tokens: int32[M].
    parents: int32[M]: 0 is the root, i + 1 is candidate i; parents come before
      their children.
    logprobs: float32[M], of the whole line to the node, nats; -inf: no node.
    nodes: how many are kept; static.

  Returns:
    (tokens int32[nodes], parents int32[nodes], chosen int32[nodes]): parents
    count the root as 0 and these nodes from 1; UNUSED where there are fewer
    candidates. `chosen` says which candidate each is.
  """
  size = min(nodes, tokens.shape[0])
  # Among equals the first, hence a parent before its child.
  best, chosen = jax.lax.top_k(logprobs, size)
  real = best > -jnp.inf
  is_parent = (chosen[None] + 1 == parents[chosen][:, None]) & real[None]
  place = jnp.argmax(is_parent, axis=-1) + 1
  found = jnp.where(jnp.any(is_parent, axis=-1), place, UNUSED)
  found = jnp.where(parents[chosen] == 0, 0, found)
  found = jnp.where(real, found, UNUSED).astype(jnp.int32)
  pad = (0, nodes - size)
  return (
    jnp.pad(tokens[chosen], pad),
    jnp.pad(found, pad, constant_values=UNUSED),
    jnp.pad(chosen, pad),
  )


def fold(
  step: Callable[[Array], Array], parents: Array, root: Array, depth: int
) -> Array:
  """Computes values of nodes from those of their parents, down every line.

  Args:
    step: [M] values of the nodes' parents -> [M] values of the nodes.
    parents: int32[M], as for `select`.
    root: [], the root's value.
    depth: of the deepest node, at least; static.

  Returns:
    [M], the nodes' values.
  """
  above = jnp.maximum(parents - 1, 0)
  value = jnp.broadcast_to(root, parents.shape)
  for _ in range(depth):
    value = step(jnp.where(parents > 0, value[above], root))
  return value


class Merged(NamedTuple):
  """The nodes of several trees, each once; see `merge`."""

  parents: Array  # int32[M]
  depth: Array  # int32[M], 1 below the root
  conditional: Array  # float32[Q, M] by source; 0 for all: not a node


def merge(
  tokens: Array, parents: Array, conditional: Array, depth: int
) -> Merged:
  """Makes one tree of several: nodes of equal lines become the first of them.

  Args:
    tokens: int32[M], those of all trees.
    parents: int32[M], as for `select`.
    conditional: float32[Q, M], of a node given its parent, by source; 0 where
      the source has no such node.
    depth: of the deepest node; static.
  """
  real = jnp.any(conditional > 0, axis=0)
  zero = jnp.zeros((), jnp.int32)
  level = fold(lambda above: above + 1, parents, zero, depth)
  # Lines agree where their hashes do. Should different ones, a draft is worse.
  line = fold(
    lambda above: (above ^ tokens) * HASH_FACTOR + HASH_STEP,
    parents,
    zero,
    depth,
  )
  same = (line[:, None] == line[None]) & (level[:, None] == level[None])
  same = same & real[:, None] & real[None]
  first = jnp.argmax(same, axis=-1)
  kept = real & (first == jnp.arange(tokens.shape[0]))
  best = jnp.max(jnp.where(same[None], conditional[:, None], 0.0), axis=-1)
  moved = first[jnp.maximum(parents - 1, 0)] + 1
  return Merged(
    parents=jnp.where(parents > 0, moved, parents).astype(jnp.int32),
    depth=level,
    conditional=jnp.where(kept[None], best, 0.0),
  )


HASH_FACTOR, HASH_STEP = 0x01000193, 0x2545F491  # any odd numbers do
