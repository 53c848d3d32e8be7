"""Advantages that look at the whole batch: whitening and its relatives.

Statistics are those of the global optimizer batch. Taken over a microbatch or
a device they would change the objective with the layout. `known` is that of
`ops/advantages.py`: statistics are those of the samples whose reward is known.
"""

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import masking
from rlax_llm.types import Array


def whiten(advantages: Array, mask: Array, *, epsilon: float = 1e-8) -> Array:
  """Returns (A - mean) / sqrt(var + epsilon) over all masked tokens.

  Bessel's variance. Long samples weigh more, and a group of zero advantage
  gets the batch's mean subtracted.

  Args:
    advantages: float[...], arbitrary where the mask is False.
    mask: bool[...].
    epsilon: added to the variance.

  Returns:
    float[...], 0 where the mask is False; 0 everywhere if fewer than two
    tokens are left.
  """
  chex.assert_equal_shape([advantages, mask])
  count = jnp.sum(mask)
  centred = advantages - masking.masked_mean(mask, advantages)
  centred = masking.select_masked(mask, centred)
  variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
  return centred / jnp.sqrt(variance + epsilon)


def whitened_by_length(
  rewards: Array,
  lengths: Array,
  known: Array | None = None,
  *,
  epsilon: float = 1e-8,
) -> Array:
  """Returns `whiten` over all tokens, where a sample's tokens share its reward.

  (R - mean) / sqrt(var + epsilon) with samples weighted by their lengths, and
  Bessel's correction over tokens: `reinforce_plus_plus` without a discount, a
  value for each sample.

  Args:
    rewards: float[...], of samples.
    lengths: int[...], trained tokens of each.
    known: bool[...] or None.
    epsilon: added to the variance.
  """
  chex.assert_equal_shape([rewards, lengths])
  rewards = masking.select_known(known, rewards)
  lengths = masking.select_known(known, lengths)
  tokens = jnp.maximum(jnp.sum(lengths), 1)
  centred = rewards - jnp.sum(lengths * rewards) / tokens
  squares = jnp.sum(lengths * centred**2)
  variance = squares / jnp.maximum(tokens - 1, 1)
  # Rounding of the mean must not give equal rewards a signal.
  signal = masking.spread(rewards, known) > 0
  return masking.select_known(
    known, jnp.where(signal, centred * jax.lax.rsqrt(variance + epsilon), 0.0)
  )


def batch_normalised(
  advantages: Array, mask: Array | None = None, *, epsilon: float = 1e-4
) -> Array:
  """Returns (A - mean) / (std + epsilon) over samples, ddof = 1.

  The last step of GDPO, https://arxiv.org/abs/2601.05242, as TRL takes it.

  Args:
    advantages: float[...], one per sample.
    mask: bool[...], the samples that count; None: all.
    epsilon: added to the standard deviation.

  Returns:
    float[...], 0 where the mask is False.
  """
  if mask is None:
    mask = jnp.ones(advantages.shape, bool)
  count = jnp.sum(mask)
  centred = advantages - masking.masked_mean(mask, advantages)
  centred = masking.select_masked(mask, centred)
  variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + epsilon)


def batch_scaled(
  centred: Array,
  rewards: Array,
  known: Array | None = None,
  *,
  epsilon: float = 1e-4,
) -> Array:
  """Returns centred / (std(all rewards) + epsilon), ddof = 1.

  The group gives the baseline and the batch the scale, so that very easy and
  very hard prompts are not weighed up. "Tricks or Traps?",
  https://arxiv.org/abs/2508.08221; `scale_rewards='batch'` in TRL.

  Args:
    centred: float[...], rewards less their group's mean.
    rewards: float[...], of the batch.
    known: bool[...] or None.
    epsilon: added to the standard deviation.
  """
  chex.assert_equal_shape([centred, rewards])
  return centred / (masking.deviation(rewards, known) + epsilon)


def signal_scaled(
  centred: Array, correctness: Array, known: Array | None = None
) -> Array:
  """Returns centred * (samples / samples of nonzero correctness).

  "GPG: A Simple and Strong Reinforcement Learning Baseline for Model
  Reasoning", https://arxiv.org/abs/2504.02546, with its f_norm of 1.

  Args:
    centred: float[...], rewards less their group's mean.
    correctness: float[...], of the batch; without shaping, the rewards.
    known: bool[...] or None.
  """
  chex.assert_equal_shape([centred, correctness])
  correctness = masking.select_known(known, correctness)
  samples = masking.count_known(correctness, known)
  return centred * (samples / jnp.maximum(jnp.count_nonzero(correctness), 1))


def turn_advantages(
  rewards: Array,
  active: Array,
  multiplier: Array,
  *,
  largest: float = 3.0,
  least_std: float = 1e-6,
) -> Array:
  """Returns the advantages of one turn of a sequential multi-turn update.

  SeeUPO, https://arxiv.org/abs/2602.06554: turns are updated last to first.
  The rewards of the samples that have this turn, less their group's mean, are
  z-scored over the batch (ddof = 1; only centred where there is no spread),
  clipped, and multiplied by how later turns have moved.

  Args:
    rewards: float[P, G], outcomes of P groups.
    active: bool[P, G]: the sample has this turn.
    multiplier: float[P, G], `turn_multiplier` of the turns already updated.
    largest: the clip, static.
    least_std: a deviation up to here is not divided by.

  Returns:
    float[P, G], 0 for inactive samples.
  """
  chex.assert_equal_shape([rewards, active, multiplier])
  centred = rewards - masking.sample_mean(active, rewards)
  centred = masking.select_masked(active, centred)
  count = jnp.sum(active)
  centred = centred - jnp.sum(centred) / jnp.maximum(count, 1)
  centred = masking.select_masked(active, centred)
  variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
  std = jnp.sqrt(variance)
  scores = centred / jnp.where(std > least_std, std, 1.0)
  return jnp.clip(scores, -largest, largest) * multiplier


def turn_multiplier(
  multiplier: Array,
  log_ratios: Array,
  active: Array,
  *,
  low: float = 0.8,
  high: float = 1.2,
) -> Array:
  """Returns clip(M clip(exp(log_ratio), low, high), low, high).

  SeeUPO, https://arxiv.org/abs/2602.06554.

  Args:
    multiplier: float[...], M; 1 before the last turn.
    log_ratios: float[...], nats: the mean over the turn's tokens of new less
      old log-probabilities, after its update.
    active: bool[...]; the multiplier of others stays.
    low: static.
    high: static.
  """
  ratio = jnp.exp(jnp.clip(masking.select_masked(active, log_ratios), -10, 10))
  moved = jnp.clip(multiplier * jnp.clip(ratio, low, high), low, high)
  return jnp.where(active, moved, multiplier)
