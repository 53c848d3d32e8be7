"""Verification of a draft tree by sample-and-follow."""

import chex
import jax.numpy as jnp

from rlax_llm.types import Array
from rlax_llm.types import DraftTree
from rlax_llm.types import Path


def ancestors(parents: Array) -> Array:
  """Returns bool[W, W]: [i, j] is True where j is i or an ancestor of i.

  Reachability by repeated squaring: log2(W) products of a W x W matrix.

  Args:
    parents: int32[W], parents[i] < i, UNUSED for none.
  """
  width = parents.shape[0]
  node = jnp.arange(width)
  reach = (node[None] == parents[:, None]) | (node[None] == node[:, None])
  steps = 1
  while steps < width - 1:
    reach = jnp.any(reach[:, :, None] & reach[None], axis=1)
    steps *= 2
  return reach


def depths(line: Array) -> Array:
  """Returns int32[..., W]: edges from the root; 0 if unreachable.

  Args:
    line: bool[..., W, W], from `ancestors`.
  """
  return jnp.sum(line, axis=-1, dtype=jnp.int32) - 1


def first_twins(tree: DraftTree) -> Array:
  """Returns int32[W]: the first node with each node's parent and token.

  Args:
    tree: one row.
  """
  same = tree.parents[:, None] == tree.parents[None]
  same = same & (tree.tokens[:, None] == tree.tokens[None])
  return jnp.argmax(same, axis=-1).astype(jnp.int32)


def by_depth(kept: Array, line: Array) -> Array:
  """Returns int32[W]: the kept node of each depth; 0 where there is none.

  Args:
    kept: bool[W], at most one node of each depth.
    line: bool[W, W], from `ancestors`.
  """
  node = jnp.arange(kept.shape[0])
  at_depth = kept[None] & (depths(line)[None] == node[:, None])
  return jnp.sum(jnp.where(at_depth, node[None], 0), axis=-1, dtype=jnp.int32)


def follow(tree: DraftTree, target_tokens: Array) -> Path:
  """Follows the target's own tokens down a draft tree.

  Start at the root. Take the target's token at the node; if some child
  carries it, move there and repeat, else stop. Every token taken is
  committed. A draft only decides how far one forward gets: the tokens are
  those of plain sampling whatever the tree holds, hence there is no residual
  distribution. For a draft that is a function of the past (q one-hot) no
  lossless rule keeps more; see "SRT", https://arxiv.org/abs/2601.09083, and
  "Accelerating Large Language Model Decoding with Speculative Sampling",
  https://arxiv.org/abs/2302.01318, for the rejection rule it replaces.

  Args:
    tree: one row: tokens int32[W], parents int32[W].
    target_tokens: int32[W], the target's token *after* each node.

  Returns:
    Path of one row; its tokens are `target_tokens[nodes]`.

  Raises:
    AssertionError: while tracing, if the shapes disagree.
  """
  chex.assert_equal_shape([tree.tokens, tree.parents, target_tokens])
  width = tree.tokens.shape[0]
  node = jnp.arange(width)
  wanted = target_tokens[jnp.maximum(tree.parents, 0)]
  # A node without a parent is not on a line to the root: see `reached`.
  first = first_twins(tree) == node
  taken = ((tree.tokens == wanted) & first) | (node == 0)
  line = ancestors(tree.parents)
  # A node is reached if it and all its ancestors are taken and one is node 0.
  reached = jnp.all(taken[None] | ~line, axis=-1) & line[:, 0]
  nodes = by_depth(reached, line)
  return Path(
    nodes=nodes,
    tokens=target_tokens[nodes],
    length=jnp.sum(reached, dtype=jnp.int32),
  )
