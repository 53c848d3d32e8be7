"""Verification rules that reject: comparators of sample-and-follow.

Each keeps some path of a draft that was *sampled* from q and adds one token,
so that the tokens follow p exactly. Where a draft is turned down, the token
comes from what p has left over, the residual law; unlike `verification.follow`
these rules need the law of the drafter, and their tokens depend on the draft.
Experiments compare them; training never uses them.

A rule sees one row: the laws p and q behind every node, as probabilities after
temperature and cuts, a uniform for each node, and the exponential clocks of
the last token (`sampling.clocks`).
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import verification
from rlax_llm.types import Array
from rlax_llm.types import DraftTree
from rlax_llm.types import Path


def _draw(clocks: Array, weights: Array) -> Array:
  """Returns argmin_v(E_v / weight_v): a sample of the normalised weights."""
  return jnp.argmin(clocks / weights).astype(jnp.int32)


def _residual(target: Array, draft: Array, weight: Array) -> Array:
  """Returns (weight * p - q)_+, or p where that is 0 everywhere.

  Where it is 0, no token is drawn from it but for rounding: either nothing that
  was drafted can be turned down, or the prefix cannot be where the path ends.
  """
  left = jnp.maximum(weight * target - draft, 0)
  return jnp.where(jnp.any(left > 0), left, target)


def _check(
  tokens: Array, target: Array, draft: Array, uniforms: Array, clocks: Array
) -> None:
  chex.assert_rank([tokens, uniforms, clocks], 1)
  chex.assert_equal_shape([tokens, uniforms])
  chex.assert_shape([target, draft], (tokens.shape[0], clocks.shape[0]))
  chex.assert_type([target, draft, uniforms, clocks], float)


def _chain_path(
  tokens: Array,
  target: Array,
  draft: Array,
  clocks: Array,
  last: Array,
  weight: Array,
) -> Path:
  """Returns the path that ends at node `last` of a chain."""
  width = tokens.shape[0]
  law = jnp.where(
    last == width - 1,
    target[last],
    _residual(target[last], draft[last], weight),
  )
  node = jnp.arange(width, dtype=jnp.int32)
  token = _draw(clocks, law)
  return Path(
    nodes=node,
    tokens=jnp.where(node < last, jnp.roll(tokens, -1), token),
    length=last + 1,
  )


def chain(
  tokens: Array, target: Array, draft: Array, uniforms: Array, clocks: Array
) -> Path:
  """Accepts the tokens of a chain one by one, up to the first rejection.

  Token x behind laws p and q is accepted with probability min(1, p_x / q_x),
  on average 1 - TV(p, q), the most that any coupling reaches. The first
  rejection is replaced by a draw of norm((p - q)_+); if there is none, one
  more token is drawn from p. "Fast Inference from Transformers via Speculative
  Decoding", https://arxiv.org/abs/2211.17192.

  Args:
    tokens: int32[W], the root, then W - 1 tokens, each drawn from q.
    target: float32[W, V], p after each of them.
    draft: float32[W, V], q after each of them; the last row is not read.
    uniforms: float32[W] in (0, 1); the first is not read.
    clocks: float32[V], exponential.

  Returns:
    Path of one row.

  Raises:
    AssertionError: while tracing, if shapes or dtypes disagree.
  """
  _check(tokens, target, draft, uniforms, clocks)
  step = jnp.arange(tokens.shape[0] - 1)
  x = tokens[1:]
  accepted = uniforms[1:] * draft[step, x] < target[step, x]
  last = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32)), dtype=jnp.int32)
  return _chain_path(tokens, target, draft, clocks, last, jnp.float32(1))


def block(
  tokens: Array, target: Array, draft: Array, uniforms: Array, clocks: Array
) -> Path:
  """Accepts a prefix of a chain by its joint probability.

  With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)), the longest prefix is
  kept whose uniform is below h_i, where h_i = S_i / (S_i + 1 - w_i),
  S_i = sum_v (w_i p(v | x_1..i) - q(v | x_1..i))_+, and h_L = w_L for the whole
  draft. The token added to a prefix is drawn from norm((w_i p - q)_+), that
  behind the whole draft from p. No rule for one path keeps more: "Block
  Verification Accelerates Speculative Decoding",
  https://arxiv.org/abs/2403.10444.

  Args:
    tokens: int32[W], the root, then W - 1 tokens, each drawn from q.
    target: float32[W, V], p after each of them.
    draft: float32[W, V], q after each of them; the last row is not read.
    uniforms: float32[W] in (0, 1); the first is not read.
    clocks: float32[V], exponential.

  Returns:
    Path of one row.

  Raises:
    AssertionError: while tracing, if shapes or dtypes disagree.
  """
  _check(tokens, target, draft, uniforms, clocks)
  width = tokens.shape[0]
  step, x = jnp.arange(width - 1), tokens[1:]

  def shrink(weight: Array, ratio: Array) -> tuple[Array, Array]:
    weight = jnp.minimum(1, weight * ratio)
    return weight, weight

  one = jnp.float32(1)
  _, weights = jax.lax.scan(shrink, one, target[step, x] / draft[step, x])
  weights = jnp.concatenate([one[None], weights])
  left = jnp.maximum(weights[:, None] * target - draft, 0)
  surplus = jnp.sum(left, axis=-1)
  # u < h without its division, which is 0 / 0 where p = q.
  kept = uniforms * (surplus + 1 - weights) < surplus
  kept = kept.at[-1].set(uniforms[-1] < weights[-1]).at[0].set(True)
  last = jnp.max(jnp.where(kept, jnp.arange(width), 0)).astype(jnp.int32)
  return _chain_path(tokens, target, draft, clocks, last, weights[last])


def _tree_path(tree: DraftTree, here: Array, token: Array) -> Path:
  """Returns the path from the root to a node, and one more token."""
  line = verification.ancestors(tree.parents)
  nodes = verification.by_depth(line[here], line)
  last = verification.depths(line)[here]
  after = jnp.roll(tree.tokens[nodes], -1)
  return Path(
    nodes=nodes,
    tokens=jnp.where(jnp.arange(len(nodes)) < last, after, token),
    length=last + 1,
  )


def multi_round(
  tree: DraftTree, target: Array, draft: Array, uniforms: Array, clocks: Array
) -> Path:
  """Tries the children of a node in turn, and goes on from the one accepted.

  Child x is accepted with probability min(1, p_x / q_x); on rejection p becomes
  norm((p - q)_+) for the next one. If none is accepted, the last token is drawn
  from the p that is left. On a chain it is `chain`. "SpecInfer",
  https://arxiv.org/abs/2305.09781.

  Args:
    tree: one row; the children of a node are independent draws of q, in the
      order of their indices, twins included; only a first twin has children.
    target: float32[W, V], p after each node.
    draft: float32[W, V], q after each node; rows of leaves are not read.
    uniforms: float32[W] in (0, 1); the first is not read.
    clocks: float32[V], exponential.

  Returns:
    Path of one row.

  Raises:
    AssertionError: while tracing, if shapes or dtypes disagree.
  """
  _check(tree.tokens, target, draft, uniforms, clocks)

  # Children have larger indices than their parent: one pass sees every node
  # that matters after the node it hangs on.
  def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    here, law = state
    x, q = tree.tokens[i], draft[here]
    tried = tree.parents[i] == here
    accepted = uniforms[i] * q[x] < law[x]
    left = _residual(law, q, jnp.float32(1))
    law = jnp.where(tried & ~accepted, left / jnp.sum(left), law)
    return (
      jnp.where(tried & accepted, i, here),
      jnp.where(tried & accepted, target[i], law),
    )

  start = jnp.int32(0), target[0]
  here, law = jax.lax.fori_loop(1, tree.tokens.shape[0], visit, start)
  return _tree_path(tree, here, _draw(clocks, law))


def traversal(
  tree: DraftTree, target: Array, draft: Array, uniforms: Array, clocks: Array
) -> Path:
  """Accepts whole paths, from the first leaf upwards, by their joint weight.

  Going down, w(child) = min(1, w(a) p_a(x) / q_a(x)). A leaf is accepted, with
  its path, if its uniform is below w; then one token is drawn from its p.
  Otherwise it is deleted from its parent a: with R = (w p - q)_+ at a and
  S = sum R, p becomes R / S, w becomes S / (S + 1 - w), and q loses x. A parent
  whose children are gone is a leaf; the root is always accepted. On a chain it
  is `block`. "Traversal Verification for Speculative Tree Decoding",
  https://arxiv.org/abs/2505.12398.

  Args:
    tree: one row; the children of a node are draws of q in the order of their
      indices, independent (twins count once) or without replacement; only a
      first twin has children.
    target: float32[W, V], p after each node.
    draft: float32[W, V], q after each node; rows of leaves are not read.
    uniforms: float32[W] in (0, 1); the first is not read.
    clocks: float32[V], exponential.

  Returns:
    Path of one row.

  Raises:
    AssertionError: while tracing, if shapes or dtypes disagree.
  """
  _check(tree.tokens, target, draft, uniforms, clocks)
  width = tree.tokens.shape[0]
  weights = jnp.zeros(width).at[0].set(1)
  waiting = (
    (verification.first_twins(tree) == jnp.arange(width)).at[0].set(False)
  )

  def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
    here, _, waiting, p, q, weights = state
    children = waiting & (tree.parents == here)
    child = jnp.argmax(children)
    x = tree.tokens[child]
    ratio = p[here, x] / q[here, x]
    down = jnp.any(children)
    accepted = ~down & ((here == 0) | (uniforms[here] < weights[here]))

    # A rejected leaf: the parent's law, weight and draft without it. Its
    # siblings have not been entered yet, so no other weight depends on them.
    parent, x = jnp.maximum(tree.parents[here], 0), tree.tokens[here]
    left = _residual(p[parent], q[parent], weights[parent])
    surplus = jnp.sum(jnp.maximum(weights[parent] * p[parent] - q[parent], 0))
    rest = q[parent].at[x].set(0)
    total = jnp.sum(rest)
    # 0 / 0 where p = q on all that can be drawn: there w = 1.
    lack = 1 - weights[parent]
    weight = jnp.where(surplus + lack > 0, surplus / (surplus + lack), 1)
    up = ~down & ~accepted
    keep = lambda new, old: jnp.where(up, new, old)
    p = p.at[parent].set(keep(left / jnp.sum(left), p[parent]))
    q = q.at[parent].set(
      keep(jnp.where(total > 0, rest / total, rest), q[parent])
    )
    weights = weights.at[parent].set(keep(weight, weights[parent]))
    entered = jnp.minimum(1, weights[here] * ratio)
    weights = weights.at[child].set(jnp.where(down, entered, weights[child]))
    waiting = waiting.at[child].set(waiting[child] & ~down)
    here = jnp.where(down, child, jnp.where(accepted, here, parent))
    return here.astype(jnp.int32), accepted, waiting, p, q, weights

  here, _, _, p, _, _ = jax.lax.while_loop(
    lambda state: ~state[1],
    step,
    (jnp.int32(0), jnp.bool_(False), waiting, target, draft, weights),
  )
  return _tree_path(tree, here, _draw(clocks, p[here]))


def total_variation(target: Array, draft: Array) -> Array:
  """Returns TV(p, q) = sum_v |p_v - q_v| / 2 over the last axis."""
  return jnp.sum(jnp.abs(target - draft), axis=-1) / 2


def race_agreement(target: Array, draft: Array) -> Array:
  """Returns the probability that two races with one noise have one winner.

  sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), at least (1 - TV) / (1 + TV) and
  at most 1 - TV; no coupling without communication has a better bound.
  "Coupling without Communication and Drafter-Invariant Speculative Decoding",
  https://arxiv.org/abs/2408.07978.

  Args:
    target: float32[..., V], p.
    draft: float32[..., V], q.

  Returns:
    float32[...].
  """
  possible = (target > 0) & (draft > 0)

  def ratios(law: Array) -> Array:
    floor = jnp.where(possible, law, 1.0)
    return law[..., None, :] / floor[..., :, None]

  most = jnp.sum(jnp.maximum(ratios(target), ratios(draft)), axis=-1)
  return jnp.sum(jnp.where(possible, 1 / most, 0.0), axis=-1)
