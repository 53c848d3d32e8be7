"""Weights and masks for tokens that another policy sampled.

The gap between the trainer's policy before the update (`old`) and the one
that sampled (`behaviour`), log pi_old - log pi_behaviour in nats, is turned
into weights that correct the measure (`losses.weighted`) or into masks that
reject what is too far off. All results are constants.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import divergences
from rlax_llm.ops import losses
from rlax_llm.ops import masking
from rlax_llm.types import Array

LEVELS = ('token', 'sequence', 'geometric')
OVER = ('token', 'sum', 'mean', 'max')
STATISTICS = ('k1', 'k2', 'k3')


def _known(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{name} {value!r} is none of {", ".join(choices)}')


def importance_weights(
  old_logprobs: Array,
  behaviour_logprobs: Array,
  mask: Array,
  *,
  level: str,
  segments: Array | None = None,
) -> Array:
  """Returns pi_old / pi_behaviour by token, unbounded but for exp(+-20).

    token      of the token: biased, of low variance
    sequence   the product over the sample: unbiased, of high variance
    geometric  the geometric mean over the sample

  Args:
    old_logprobs: float[..., L], nats.
    behaviour_logprobs: float[..., L], nats.
    mask: bool[..., L]; the others are arbitrary where it is False.
    level: a name above.
    segments: int[..., L] as in `Batch`; None: a row is one sample.

  Returns:
    float[..., L], 0 where the mask is False.

  Raises:
    ValueError: for an unknown level.
  """
  _known('level', level, LEVELS)
  chex.assert_equal_shape([old_logprobs, behaviour_logprobs, mask])
  gap = masking.select_masked(mask, old_logprobs - behaviour_logprobs)
  if level == 'sequence':
    gap = masking.sample_sum(mask, gap, segments)
  elif level == 'geometric':
    gap = masking.sample_mean(mask, gap, segments)
  ratio = losses.importance_ratio(gap, jnp.zeros_like(gap))
  return jax.lax.stop_gradient(masking.select_masked(mask, ratio))


def truncate(weights: Array, *, upper: float, lower: float = 0.0) -> Array:
  """Returns the weights clipped to [lower, upper].

  Truncated importance sampling (TIS), "Truncated Importance Sampling",
  https://doi.org/10.1198/106186008X320456. A lower bound above 0 also lifts
  the weights behind a mask: mask again.

  Args:
    weights: float[...].
    upper: C, some 2; static.
    lower: static.
  """
  return jnp.clip(weights, lower, upper)


def zero_outside(weights: Array, *, lower: float, upper: float) -> Array:
  """Returns the weights within [lower, upper], and 0 for the others.

  IcePop, "Every Step Evolves", https://arxiv.org/abs/2510.18855; with weights
  of a sequence, the sequence mask.

  Args:
    weights: float[...].
    lower: static.
    upper: static.
  """
  inside = (weights >= lower) & (weights <= upper)
  return jnp.where(inside, weights, 0.0)


class Rejection(NamedTuple):
  """Which tokens are trained on, and what decided it."""

  keep: Array  # bool[..., L]
  statistic: Array  # float[..., L], nats


def reject(
  old_logprobs: Array,
  behaviour_logprobs: Array,
  mask: Array,
  *,
  statistic: str,
  over: str,
  upper: float,
  lower: float | None = None,
  segments: Array | None = None,
) -> Rejection:
  """Drops tokens, or whole samples, whose policies disagree too much.

  The statistic estimates KL(behaviour || old): with d = log pi_old - log
  pi_behaviour, k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1; by token, or its sum,
  mean or maximum over the sample. Several criteria are and-ed by passing one's
  `keep` as the next one's mask.

  Args:
    old_logprobs: float[..., L], nats.
    behaviour_logprobs: float[..., L], nats.
    mask: bool[..., L]; the others are arbitrary where it is False.
    statistic: k1, k2 or k3.
    over: token, sum, mean or max.
    upper: for k2 and k3 in nats. For k1 a ratio pi_behaviour / pi_old, whose
      logarithm is the bound.
    lower: for k1 only, a ratio as well; None means 1 / upper.
    segments: int[..., L] as in `Batch`; None: a row is one sample.

  Raises:
    ValueError: for an unknown statistic or `over`, or a lower bound for a
      statistic that is never negative.
  """
  _known('statistic', statistic, STATISTICS)
  _known('over', over, OVER)
  if lower is not None and statistic != 'k1':
    raise ValueError(
      f'lower={lower} bounds k1 only; {statistic} is at least 0: remove it'
    )
  old = masking.select_masked(mask, old_logprobs)
  behaviour = masking.select_masked(mask, behaviour_logprobs)
  value = divergences.DIVERGENCES[statistic](behaviour, old)
  if over == 'sum':
    value = masking.sample_sum(mask, value, segments)
  elif over == 'mean':
    value = masking.sample_mean(mask, value, segments)
  elif over == 'max':
    value = masking.sample_max(mask, value, segments)
  if statistic == 'k1':
    low = 1 / upper if lower is None else lower
    keep = (value >= jnp.log(low)) & (value <= jnp.log(upper))
  else:
    keep = value <= upper
  value = jax.lax.stop_gradient(masking.select_masked(mask, value))
  return Rejection(mask & keep, value)


def reject_stale_failures(
  logprobs: Array,
  behaviour_logprobs: Array,
  advantages: Array,
  mask: Array,
  *,
  largest_gap: float,
  segments: Array | None = None,
) -> Array:
  """Keeps samples with A >= 0, and others near the policy that sampled them.

  Off-policy sequence masking: a bad sample is kept while mean_t(log
  pi_behaviour - log pi) <= largest_gap. "DeepSeek-V3.2",
  https://arxiv.org/abs/2512.02556.

  Args:
    logprobs: float[..., L], nats, of the current policy.
    behaviour_logprobs: float[..., L], nats.
    advantages: float[..., L].
    mask: bool[..., L]; the others are arbitrary where it is False.
    largest_gap: nats per token, static.
    segments: int[..., L] as in `Batch`; None: a row is one sample.

  Returns:
    bool[..., L]: the mask to train on.
  """
  gap = masking.sample_mean(mask, behaviour_logprobs - logprobs, segments)
  good = masking.select_masked(mask, advantages) >= 0
  return mask & (good | (gap <= largest_gap))


def effective_sample_ratio(
  log_weights: Array, mask: Array | None = None
) -> Array:
  """Returns (sum w)^2 / (n sum w^2), in (0, 1]: 1 if all weights are equal.

  The share of the n samples that is left after importance weighting, from
  log-weights, whose shift it does not depend on: nothing overflows.

  Args:
    log_weights: float[...], nats.
    mask: bool[...], what counts; None: everything. For samples of a packed
      batch, `masking.tokens_left(mask, segments) == 1`.

  Returns:
    float[]; 0 if nothing counts.
  """
  if mask is None:
    mask = jnp.ones(log_weights.shape, bool)
  count = jnp.sum(mask)
  log_weights = masking.select_masked(mask, log_weights, -jnp.inf)
  log_weights = log_weights - jnp.where(count > 0, jnp.max(log_weights), 0)
  w = jnp.exp(log_weights)
  squares = jnp.sum(jnp.square(w)) * count
  return jnp.square(jnp.sum(w)) / jnp.where(count > 0, squares, 1)
