"""Draft trees of candidate nodes. One row; callers vmap."""

import jax
import jax.numpy as jnp

from rlax_llm.types import Array
from rlax_llm.types import UNUSED


def select(tokens: Array, parents: Array, logprobs: Array,
           nodes: int) -> tuple[Array, Array, Array]:
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
  return (jnp.pad(tokens[chosen],
                  pad), jnp.pad(found, pad,
                                constant_values=UNUSED), jnp.pad(chosen, pad))
