"""Draft trees out of a drafter's law: best tokens, races, independent draws.

The shape of a tree is static: `branching[d]` children for every node of depth
d. (1, 1, 1) is a chain, (3, 1) are three paths, (1, 1, 3, 1) branches late: a
delayed tree. A tree grows by one level for each evaluation of the drafter:

  tree = plant(root, branching)
  for depth in range(len(branching)):
    tree = grow_race(tree, law(tree), key, position, depth, branching=branching)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlax_llm.ops import sampling
from rlax_llm.ops import verification
from rlax_llm.types import Array
from rlax_llm.types import DraftTree
from rlax_llm.types import UNUSED

Branching = tuple[int, ...]


def width(branching: Branching) -> int:
  """Returns W, the nodes of a tree with its root."""
  return 1 + sum(math.prod(branching[: d + 1]) for d in range(len(branching)))


def _layout(branching: Branching) -> np.ndarray:
  """Returns int32[3, W]: parent, rank among siblings and depth, by level."""
  nodes = [(UNUSED, 0, 0)]
  level = [0]
  for depth, children in enumerate(branching):
    first = len(nodes)
    nodes += [
      (parent, rank, depth + 1) for parent in level for rank in range(children)
    ]
    level = list(range(first, len(nodes)))
  return np.asarray(nodes, np.int32).T


def plant(root: Array, branching: Branching) -> DraftTree:
  """Returns a tree of which only the root has its token.

  Args:
    root: int32[], the last committed token.
    branching: static.
  """
  parents = jnp.asarray(_layout(branching)[0])
  return DraftTree(jnp.full(parents.shape, root, jnp.int32), parents)


def _set_level(
  tree: DraftTree, tokens: Array, depth: Array, branching: Branching
) -> DraftTree:
  """Sets the tokens of depth + 1; only a first twin keeps its children."""
  parent, _, at = _layout(branching)
  tree = tree.replace(tokens=jnp.where(at == depth + 1, tokens, tree.tokens))
  first = verification.first_twins(tree)[np.maximum(parent, 0)]
  return tree.replace(parents=jnp.where(at == depth + 2, first, tree.parents))


def grow_best(
  tree: DraftTree, scores: Array, depth: Array, *, branching: Branching
) -> DraftTree:
  """Grows the next level: the children of a node are its best tokens in turn.

  A draft that depends on more than the past, as this one may, can be verified
  by `verification.follow` only.

  Args:
    tree: one row, with tokens down to `depth`.
    scores: float32[W, V], after each node; read at `depth`. With log q it is
      the tree of the most probable tokens.
    depth: int32[], in [0, len(branching)).
    branching: static.

  Returns:
    The tree with tokens down to `depth` + 1.
  """
  _, rank, _ = _layout(branching)
  _, best = jax.lax.top_k(scores, max(branching, default=1))
  return _set_level(
    tree, best[jnp.maximum(tree.parents, 0), rank], depth, branching
  )


def grow_race(
  tree: DraftTree,
  law: Array,
  key: Array,
  position: Array,
  depth: Array,
  *,
  branching: Branching,
) -> DraftTree:
  """Grows the next level by the race that the target will run.

  The children of a node are the first arrivals in argmin_v(E_v / q_v), with
  the clocks E of the target's own race at that place. The winner is the
  target's token with probability at least (1 - TV) / (1 + TV), see
  `rejection.race_agreement`; those behind it are the likeliest to win under a
  law close to q. "Coupling without Communication and Drafter-Invariant
  Speculative Decoding", https://arxiv.org/abs/2408.07978.

  Args:
    tree: one row, with tokens down to `depth`.
    law: float32[W, V], log q after each node; read at `depth`.
    key: uint32[2], the sample's.
    position: int32[], in the completion, of the token after the root.
    depth: int32[], in [0, len(branching)).
    branching: static.

  Returns:
    The tree with tokens down to `depth` + 1.
  """
  race = jax.vmap(sampling.race_scores, (None, None, 0))
  return grow_best(
    tree, -race(key, position + depth, law), depth, branching=branching
  )


def grow_independent(
  tree: DraftTree,
  law: Array,
  key: Array,
  position: Array,
  depth: Array,
  *,
  branching: Branching,
) -> DraftTree:
  """Grows the next level: every token is a draw of q, with its own noise.

  What multi-round and traversal verification ask for. Siblings may be twins;
  the children of all twins hang on the first.

  Args:
    tree: one row, with tokens down to `depth`.
    law: float32[W, V], log q after each node; read at `depth`.
    key: uint32[2], used for nothing else than this row's drafts.
    position: int32[], in the completion, of the token after the root.
    depth: int32[], in [0, len(branching)).
    branching: static.

  Returns:
    The tree with tokens down to `depth` + 1.
  """
  nodes = law.shape[0]
  place = position * nodes + jnp.arange(nodes, dtype=jnp.int32)
  draw = jax.vmap(sampling.race, (None, 0, 0))
  tokens = draw(key, place, law[jnp.maximum(tree.parents, 0)])
  return _set_level(tree, tokens, depth, branching)
