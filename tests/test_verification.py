"""Sample-and-follow on draft trees, against tables and a plain walker."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm.drafting import drafter
from rlax_llm.ops import verification
from rlax_llm.types import DraftTree
from rlax_llm.types import UNUSED


def walk(tokens, parents, target):
  """Follows the target by hand; returns (nodes, tokens)."""
  nodes = [0]
  while True:
    here = nodes[-1]
    children = [
      i
      for i in range(1, len(tokens))
      if parents[i] == here and tokens[i] == target[here]
    ]
    if not children:
      return nodes, [target[n] for n in nodes]
    nodes.append(children[0])


def climb(parents, node):
  """Returns the node and its ancestors, upwards."""
  line = []
  while node != UNUSED:
    line.append(node)
    node = parents[node]
  return line


def follow(tokens, parents, target):
  """Returns (nodes, tokens) that `verification.follow` keeps of one row."""
  path = jax.jit(verification.follow)(
    DraftTree(jnp.asarray(tokens, jnp.int32), jnp.asarray(parents, jnp.int32)),
    jnp.asarray(target, jnp.int32),
  )
  length = int(path.length)
  return path.nodes[:length].tolist(), path.tokens[:length].tolist()


# name: (tree tokens, parents, target after each node, nodes, tokens)
TABLE = {
  'width one': ([5], [-1], [3], [0], [3]),
  'perfect chain': (
    [5, 1, 2, 3],
    [-1, 0, 1, 2],
    [1, 2, 3, 4],
    [0, 1, 2, 3],
    [1, 2, 3, 4],
  ),
  'mismatch at once': ([5, 1, 2, 3], [-1, 0, 1, 2], [9, 2, 3, 4], [0], [9]),
  'mismatch in the middle': (
    [5, 1, 2, 3],
    [-1, 0, 1, 2],
    [1, 7, 3, 4],
    [0, 1],
    [1, 7],
  ),
  # Node 3 would match the token behind node 2, but node 2 was not taken.
  'no skipping': ([5, 1, 2, 3], [-1, 0, 1, 2], [1, 9, 3, 4], [0, 1], [1, 9]),
  'all padding': ([5, 1, 1, 1], [-1, -1, -1, -1], [1, 1, 1, 1], [0], [1]),
  'padding between': (
    [5, 1, 1, 2],
    [-1, -1, 0, 2],
    [1, 2, 2, 6],
    [0, 2, 3],
    [1, 2, 6],
  ),
  'child of padding': ([5, 1, 1], [-1, -1, 1], [1, 1, 1], [0], [1]),
  # Twins: the first is followed, and the child of the second is lost.
  'twins': ([5, 1, 1, 2], [-1, 0, 0, 2], [1, 2, 2, 2], [0, 1], [1, 2]),
  'twins, child of the first': (
    [5, 1, 1, 2],
    [-1, 0, 0, 1],
    [1, 2, 8, 4],
    [0, 1, 3],
    [1, 2, 4],
  ),
  'branches': (
    [5, 1, 2, 3, 3, 4],
    [-1, 0, 0, 1, 2, 4],
    [2, 0, 3, 0, 4, 6],
    [0, 2, 4, 5],
    [2, 3, 4, 6],
  ),
  # The same token under two parents is no twin.
  'cousins': (
    [5, 1, 2, 3, 3],
    [-1, 0, 0, 1, 2],
    [2, 0, 3, 0, 4],
    [0, 2, 4],
    [2, 3, 4],
  ),
  # The root's own token in the draft is a child like any other.
  'repeat of the root': (
    [5, 5, 5],
    [-1, 0, 1],
    [5, 5, 5],
    [0, 1, 2],
    [5, 5, 5],
  ),
  'token equal to UNUSED': ([5, 0, 0], [-1, -1, 0], [0, 0, 3], [0, 2], [0, 3]),
}


@pytest.mark.parametrize('name', TABLE)
def test_table(name):
  """The cases above, by hand, for `follow` and for the walker of this file.

  Mutants: the last twin is followed; padding is taken for a child of the
  root; a node is reached without its ancestors being taken.
  """
  tokens, parents, target, nodes, taken = TABLE[name]
  assert follow(tokens, parents, target) == (nodes, taken)
  assert walk(tokens, parents, target) == (nodes, taken)


def random_trees(count, width, seed):
  """Trees with branches, twins, padding and children of padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 3, (count, width))
  parents = np.stack(
    [
      np.full(count, UNUSED),
      *(rng.integers(0, i, count) for i in range(1, width)),
    ],
    1,
  )
  # Half of the trees are mostly chains, so that long paths occur.
  chain = rng.random((count, width)) < rng.choice([0, 0.9], count)[:, None]
  parents = np.where(chain, np.arange(width) - 1, parents)
  unused = rng.random((count, width)) < rng.choice([0, 0.2], count)[:, None]
  parents = np.where(unused, UNUSED, parents)
  parents[:, 0] = UNUSED
  target = rng.integers(0, 3, (count, width))
  # In half of the trees the target agrees with the first child.
  for i in np.flatnonzero(rng.random(count) < 0.5):
    for node in range(width - 1, 0, -1):
      if parents[i, node] != UNUSED and rng.random() < 0.9:
        target[i, parents[i, node]] = tokens[i, node]
  return tokens, parents, target


@pytest.mark.parametrize('width', [1, 2, 3, 5, 9, 16, 17])
def test_random_trees(width):
  """`follow`, `ancestors` and `depths` equal plain Python on 1500 trees.

  Mutants: ancestors with one squaring less; depth of a node off by one; the
  path ordered by node index instead of depth.
  """
  tokens, parents, target = random_trees(1500, width, width)
  as_array = lambda x: jnp.asarray(x, jnp.int32)
  path = jax.jit(jax.vmap(verification.follow))(
    DraftTree(as_array(tokens), as_array(parents)), as_array(target)
  )
  lines = np.asarray(
    jax.jit(jax.vmap(verification.ancestors))(as_array(parents))
  )
  depth = np.asarray(
    verification.depths(
      jax.jit(jax.vmap(verification.ancestors))(as_array(parents))
    )
  )
  nodes, taken, length = map(np.asarray, (path.nodes, path.tokens, path.length))
  for i in range(len(tokens)):
    kept = length[i]
    assert (nodes[i, :kept].tolist(), taken[i, :kept].tolist()) == walk(
      tokens[i], parents[i], target[i]
    ), i
    for node in range(width):
      line = climb(parents[i], node)
      assert np.flatnonzero(lines[i, node]).tolist() == sorted(line)
      assert depth[i, node] == len(line) - 1
  if width > 4:
    assert length.max() == width and length.min() == 1


@pytest.mark.parametrize('width', [1, 2, 4, 9])
def test_chain_is_the_tree_of_predecessors(width):
  """A chain keeps its longest agreeing prefix and one token more.

  Mutants: chain_parents starts at 0; the bonus token is left out.
  """
  parents = np.asarray(drafter.chain_parents(width))
  np.testing.assert_array_equal(parents, np.arange(width) - 1)
  rng = np.random.default_rng(width)
  for _ in range(40):
    tokens, target = rng.integers(0, 2, (2, width))
    agree = np.cumprod(np.append(tokens[1:] == target[:-1], False)).sum()
    nodes, taken = follow(tokens, parents, target)
    assert nodes == list(range(agree + 1))
    assert taken == target[: agree + 1].tolist()
