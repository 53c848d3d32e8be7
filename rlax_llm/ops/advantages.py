"""Advantages of a group: one prompt's samples; callers vmap over prompts.

`known` marks the samples whose reward is known; None: all of them. Statistics
are those of the known samples. The others have advantage 0, whatever their
entries hold. A group of which one sample of several is known has nothing to
compare it with: 0. A group that has one sample keeps its reward.
"""

from collections.abc import Callable
import functools

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import masking
from rlax_llm.types import Array


def group(
  rewards: Array,
  known: Array | None = None,
  *,
  epsilon: float = 1e-6,
  ddof: int = 1,
) -> Array:
  """Returns (R - mean) / (std + epsilon).

  GRPO, "DeepSeekMath", https://arxiv.org/abs/2402.03300. A group of one keeps
  its reward (mean 0, std 1), as in verl; equal rewards give exactly 0.

  Args:
    rewards: float[G].
    known: bool[G] or None.
    epsilon: added to the standard deviation.
    ddof: 1 as in verl and TRL; 0 for the population's deviation.

  Returns:
    float[G].
  """
  chex.assert_rank(rewards, 1)
  centred = group_centred(rewards, known)
  if rewards.shape[0] == 1:
    return centred / (1 + epsilon)
  freedom = masking.count_known(rewards, known) - ddof
  if known is not None:
    freedom = jnp.maximum(freedom, 1)
  std = jnp.sqrt(jnp.sum(jnp.square(centred)) / freedom)
  # With epsilon = 0 equal rewards would give 0 / 0.
  return jnp.where(std > 0, centred / jnp.where(std > 0, std + epsilon, 1), 0.0)


def group_centred(rewards: Array, known: Array | None = None) -> Array:
  """Returns R - mean; a group of one keeps its reward.

  Dr. GRPO, "Understanding R1-Zero-Like Training",
  https://arxiv.org/abs/2503.20783.

  Args:
    rewards: float[G].
    known: bool[G] or None.
  """
  chex.assert_rank(rewards, 1)
  rewards = masking.select_known(known, rewards)
  if rewards.shape[0] == 1:
    return rewards
  # Rounding of the mean must not turn equal rewards into a signal that a
  # division by their tiny deviation would blow up.
  if known is None:
    equal = jnp.all(rewards == rewards[0])
    return jnp.where(equal, 0.0, rewards - jnp.mean(rewards))
  centred = rewards - masking.masked_mean(known, rewards)
  return jnp.where(known & (masking.spread(rewards, known) > 0), centred, 0.0)


def leave_one_out(rewards: Array, known: Array | None = None) -> Array:
  """Returns R - mean of the other samples = G / (G - 1) (R - mean).

  RLOO, "Back to Basics", https://arxiv.org/abs/2402.14740.

  Args:
    rewards: float[G].
    known: bool[G] or None.
  """
  centred = group_centred(rewards, known)
  samples = masking.count_known(rewards, known)
  if known is None:
    return centred * (samples / max(samples - 1, 1))
  return centred * (samples / jnp.maximum(samples - 1, 1))


def length_weighted(
  rewards: Array, lengths: Array, known: Array | None = None
) -> Array:
  """Returns R - sum(L R) / sum(L).

  OPO, "On-Policy RL with Optimal Reward Baseline",
  https://arxiv.org/abs/2505.23585: the baseline of minimum variance if a
  gradient's squared norm goes with the length. A group of one keeps its
  reward.

  Args:
    rewards: float[G].
    lengths: int[G], trained tokens.
    known: bool[G] or None.
  """
  chex.assert_equal_shape([rewards, lengths])
  rewards = masking.select_known(known, rewards)
  if rewards.shape[0] == 1:
    return rewards
  lengths = masking.select_known(known, lengths)
  total = jnp.maximum(jnp.sum(lengths), 1)
  centred = rewards - jnp.sum(lengths * rewards) / total
  # Rounding of the mean must not give equal rewards a signal.
  signal = masking.spread(rewards, known) > 0
  return masking.select_known(known, jnp.where(signal, centred, 0.0))


def best_minus_second(
  rewards: Array,
  known: Array | None = None,
  *,
  scaled: bool = True,
  epsilon: float = 1e-6,
) -> Array:
  """Returns (R_best - R_second) / (std + epsilon) for the best, 0 for others.

  "Optimizing Language Models for Inference Time Objectives using
  Reinforcement Learning", https://arxiv.org/abs/2503.19595: trains the best
  of the group, pass@G, instead of the mean.

  Args:
    rewards: float[G], G >= 2.
    known: bool[G] or None.
    scaled: whether to divide by the group's deviation (ddof = 1), static.
    epsilon: added to it.

  Raises:
    ValueError: for a group of one, which has no second.
  """
  chex.assert_rank(rewards, 1)
  samples = rewards.shape[0]
  if samples < 2:
    raise ValueError(f'best_minus_second needs groups of 2, got {samples}')
  if known is not None:
    rewards = masking.select_masked(known, rewards, -jnp.inf)
  two = jnp.sort(rewards)[-2:]
  lead = two[1] - two[0]
  if scaled:
    lead = lead / (masking.deviation(rewards, known) + epsilon)
  best = jnp.arange(samples) == jnp.argmax(rewards)
  if known is not None:
    best = best & (jnp.sum(known) > 1)
  return jnp.where(best, lead, 0.0)


def hardness_weighted(
  rewards: Array,
  correctness: Array,
  known: Array | None = None,
  *,
  slope: float = -0.256,
  offset: float = 1.256,
) -> Array:
  """Returns (R - mean) D, D = slope * mean(C) + offset.

  Hard prompts weigh more: the
  policy-specific hardness weighting of "Confucius3-Math",
  https://arxiv.org/abs/2506.18330. D is 1.512 for a prompt that is never
  solved and 1 for one that always is. Without shaping R is C.

  Args:
    rewards: float[G], R.
    correctness: float[G], C, +1 or -1: D means nothing on another scale.
    known: bool[G] or None.
    slope: static.
    offset: static.
  """
  mean = (
    jnp.mean(correctness)
    if known is None
    else masking.masked_mean(known, correctness)
  )
  return group_centred(rewards, known) * (slope * mean + offset)


def reward_decoupled(
  rewards: Array,
  weights: Array,
  known: Array | None = None,
  *,
  epsilon: float = 1e-6,
  ddof: int = 1,
) -> Array:
  """Returns sum_k weight_k group(R_k): each reward normalised by itself.

  Summed first, the reward of the largest spread would rule the group. GDPO,
  https://arxiv.org/abs/2601.05242; LightningRL,
  https://arxiv.org/abs/2603.13319 (epsilon 0, ddof 0). Both normalise the sum
  over the batch: `batch_advantages.whiten` by token, `batch_normalised` by
  sample.

  Args:
    rewards: float[K, G], K rewards of one group.
    weights: float[K].
    known: bool[G] or None.
    epsilon: added to the deviations.
    ddof: of the deviations.

  Returns:
    float[G].
  """
  chex.assert_rank(rewards, 2)
  estimate = functools.partial(group, known=known, epsilon=epsilon, ddof=ddof)
  return jnp.sum(weights[:, None] * jax.vmap(estimate)(rewards), axis=0)


# (rewards float[G], known bool[G] or None) -> float[G].
ADVANTAGES: dict[str, Callable[[Array, Array | None], Array]] = {
  'group': group,
  'group_centred': group_centred,
  'leave_one_out': leave_one_out,
}
