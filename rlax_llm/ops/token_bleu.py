"""BLEU on token ids with static shapes, as a dense reward."""

import chex
import jax.numpy as jnp

from rlax_llm.ops import masking
from rlax_llm.types import Array


def clipped_matches(
  candidate: Array,
  candidate_length: Array,
  reference: Array,
  reference_length: Array,
  *,
  orders: int,
) -> tuple[Array, Array]:
  """Counts n-grams by comparing all pairs: no table of n-grams is built.

  A kind that occurs c times in the candidate and r times in the reference
  adds min(c, r): each of its c places adds min(c, r) / c.

  Args:
    candidate: int[C].
    candidate_length: int[], tokens of it that count.
    reference: int[R].
    reference_length: int[].
    orders: n = 1 ... orders, static.

  Returns:
    (clipped matches float[orders], candidate n-grams float[orders]).
  """
  chex.assert_rank([candidate, reference], 1)
  own = candidate[:, None] == candidate[None, :]
  other = candidate[:, None] == reference[None, :]
  same_own, same_other = own, other
  matches, totals = [], []
  for n in range(1, orders + 1):
    if n > 1:
      same_own = same_own & _shifted(own, n - 1)
      same_other = same_other & _shifted(other, n - 1)
    # The n-grams that lie wholly inside.
    mine = masking.length_mask(candidate_length - n + 1, candidate.size)
    theirs = masking.length_mask(reference_length - n + 1, reference.size)
    count = jnp.sum(same_own & mine[None, :], axis=1)
    found = jnp.sum(same_other & theirs[None, :], axis=1)
    share = jnp.minimum(count, found) / jnp.maximum(count, 1)
    matches.append(jnp.sum(masking.select_masked(mine, share)))
    totals.append(jnp.sum(mine))
  return jnp.stack(matches), jnp.stack(totals).astype(matches[0].dtype)


def _shifted(equal: Array, by: int) -> Array:
  """Returns equal[i + by, j + by], False beyond the end."""
  inside = equal[by:, by:]
  rows = equal.shape[0] - inside.shape[0]
  columns = equal.shape[1] - inside.shape[1]
  return jnp.pad(inside, ((0, rows), (0, columns)))


def token_bleu(
  candidate: Array,
  candidate_length: Array,
  reference: Array,
  reference_length: Array,
  *,
  orders: int = 4,
  smooth: bool = False,
) -> Array:
  """Returns bp exp(mean_n log(matches_n / total_n)), in [0, 1].

  bp = exp(min(0, 1 - R / C)). BLEU, https://aclanthology.org/P02-1040, as a
  reward on ids: TensorBLEU, https://arxiv.org/abs/2510.05485.

  Args:
    candidate: int[C], one sentence; callers vmap.
    candidate_length: int[].
    reference: int[R].
    reference_length: int[].
    orders: static.
    smooth: adds 1 to both counts of the orders from 2 on, without which a
      sentence with no n-gram of some order scores 0; static.

  Returns:
    float[].
  """
  matches, totals = clipped_matches(
    candidate, candidate_length, reference, reference_length, orders=orders
  )
  if smooth:
    extra = (jnp.arange(orders) > 0).astype(matches.dtype)
    matches, totals = matches + extra, totals + extra
  hit = jnp.all(matches > 0)
  precision = jnp.where(matches > 0, matches, 1) / jnp.maximum(totals, 1)
  brevity = jnp.minimum(
    0.0, 1 - reference_length / jnp.maximum(candidate_length, 1)
  )
  score = jnp.exp(jnp.mean(jnp.log(precision)) + brevity)
  return jnp.where(hit, score, 0.0)
