"""Rules under comparison: how a draft is drawn, and what is kept of it."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.verification import draft_trees
from experiments.verification import rejection
from experiments.verification.draft_trees import Branching
from rlax_llm.ops import sampling
from rlax_llm.ops import verification
from rlax_llm.types import Array
from rlax_llm.types import DraftTree
from rlax_llm.types import Path


class Noise(NamedTuple):
  """Noise of one row. The three keys are used for nothing else."""

  target: Array  # uint32[2]: the target's tokens, or the last token of a round
  draft: Array  # uint32[2]: independent drafts
  accept: Array  # uint32[2]: acceptance tests


# (tree, log p [W, V], log q [W, V], noise, position) -> Path; one row.
Verify = Callable[[DraftTree, Array, Array, Noise, Array], Path]


class Rule(NamedTuple):
  """A rule.

  Attributes:
    draft: race | best | independent; see `draft_trees`.
    verify: what is kept of a draft; the position is that of the token after
      the root, in the completion.
    works_on: chain | tree | any; a tree's rule works on a chain, and is there
      the same as a chain's.
  """

  draft: str
  verify: Verify
  works_on: str = 'any'


def _follow(
  tree: DraftTree, target: Array, draft: Array, noise: Noise, position: Array
) -> Path:
  """Sample-and-follow; whatever the draft, these are the tokens of W = 1."""
  del draft
  depth = verification.depths(verification.ancestors(tree.parents))
  race = jax.vmap(sampling.race, (None, 0, 0))
  return verification.follow(tree, race(noise.target, position + depth, target))


def _rejecting(rule: Callable[..., Path], *, chain: bool) -> Verify:
  """Returns a rule of `rejection` with its noise drawn."""

  def verify(
    tree: DraftTree, target: Array, draft: Array, noise: Noise, position: Array
  ) -> Path:
    nodes, vocabulary = target.shape
    uniforms = -jnp.expm1(-sampling.clocks(noise.accept, position, nodes))
    clocks = sampling.clocks(noise.target, position, vocabulary)
    return rule(
      tree.tokens if chain else tree,
      jnp.exp(target),
      jnp.exp(draft),
      uniforms,
      clocks,
    )

  return verify


def _restart(
  tokens: Array, target: Array, draft: Array, uniforms: Array, clocks: Array
) -> Path:
  """The planted bias: after a rejection a draw of p, not of the residual.

  What is drawn again may be what was rejected, so that tokens which q
  overrates come out too often.
  """
  path = rejection.chain(tokens, target, draft, uniforms, clocks)
  last = path.length - 1
  token = jnp.argmin(clocks / target[last]).astype(jnp.int32)
  return path.replace(tokens=path.tokens.at[last].set(token))


RULES: Mapping[str, Rule] = {
  'follow, race': Rule('race', _follow),
  'follow, best': Rule('best', _follow),
  'follow, independent': Rule('independent', _follow),
  'chain rejection': Rule(
    'independent', _rejecting(rejection.chain, chain=True), 'chain'
  ),
  'block': Rule(
    'independent', _rejecting(rejection.block, chain=True), 'chain'
  ),
  'multi-round': Rule(
    'independent', _rejecting(rejection.multi_round, chain=False), 'tree'
  ),
  'traversal': Rule(
    'independent', _rejecting(rejection.traversal, chain=False), 'tree'
  ),
}
PLANTED = 'planted bias'
# With the planted one: an executable holds them all and is told which, because
# compiling takes longer than running.
_ALL: Mapping[str, Rule] = {
  **RULES,
  PLANTED: Rule('independent', _rejecting(_restart, chain=True), 'chain'),
}


def number(name: str) -> Array:
  """Returns int32[], what `propose` and `verify` call a rule."""
  return jnp.int32(list(_ALL).index(name))


def verify(
  rule: Array,
  tree: DraftTree,
  target: Array,
  draft: Array,
  noise: Noise,
  position: Array,
) -> Path:
  """Returns what a rule keeps of N rows.

  Args:
    rule: int32[], from `number`.
    tree: of N rows.
    target: float32[N, W, V], log p after each node.
    draft: float32[N, W, V], log q after each node.
    noise: of N rows.
    position: int32[N], in the completion, of the token after the root.
  """
  return jax.lax.switch(
    rule,
    [jax.vmap(rule.verify) for rule in _ALL.values()],
    tree,
    target,
    draft,
    noise,
    position,
  )


def propose(
  rule: Array,
  root: Array,
  noise: Noise,
  position: Array,
  laws: Callable[[DraftTree], tuple[Array, Any]],
  *,
  branching: Branching,
) -> tuple[DraftTree, Array, Any]:
  """Draws the drafts of N rows, a level for each evaluation of the drafter.

  Args:
    rule: int32[], from `number`.
    root: int32[N], last committed tokens.
    noise: of N rows.
    position: int32[N], in the completion, of the token after the root.
    laws: the drafter: trees of N rows -> (log q float32[N, W, V] after each
      node, anything).
    branching: static shape of the trees.

  Returns:
    (trees, log q, what `laws` returned beside it for the whole trees).
  """

  grow: Mapping[str, Callable[..., DraftTree]] = {
    'best': lambda tree, law, noise, position, depth: draft_trees.grow_best(
      tree, law, depth, branching=branching
    ),
    'race': lambda tree, law, noise, position, depth: draft_trees.grow_race(
      tree, law, noise.target, position, depth, branching=branching
    ),
    'independent': lambda tree, law, noise, position, depth: (
      draft_trees.grow_independent(
        tree, law, noise.draft, position, depth, branching=branching
      )
    ),
  }
  kinds = list(grow)
  kind = jnp.asarray([kinds.index(r.draft) for r in _ALL.values()])[rule]
  branches = [jax.vmap(g, (0, 0, 0, 0, None)) for g in grow.values()]

  def level(depth: Array, tree: DraftTree) -> DraftTree:
    law, _ = laws(tree)
    return jax.lax.switch(kind, branches, tree, law, noise, position, depth)

  plant = lambda token: draft_trees.plant(token, branching)
  tree = jax.lax.fori_loop(0, len(branching), level, jax.vmap(plant)(root))
  return tree, *laws(tree)
