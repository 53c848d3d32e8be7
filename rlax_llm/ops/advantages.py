"""Advantages of a group: one prompt's samples; callers vmap over prompts."""

import functools
from typing import Callable

import chex
import jax
import jax.numpy as jnp

from rlax_llm.types import Array


def group(rewards: Array, *, epsilon: float = 1e-6, ddof: int = 1) -> Array:
  """Returns (R - mean) / (std + epsilon).

  GRPO, "DeepSeekMath", https://arxiv.org/abs/2402.03300. A group of one keeps
  its reward (mean 0, std 1), as in verl; equal rewards give exactly 0.

  Args:
    rewards: float[G].
    epsilon: added to the standard deviation.
    ddof: 1 as in verl and TRL; 0 for the population's deviation.

  Returns:
    float[G].
  """
  chex.assert_rank(rewards, 1)
  samples = rewards.shape[0]
  if samples == 1:
    return rewards / (1 + epsilon)
  centred = group_centred(rewards)
  std = jnp.sqrt(jnp.sum(jnp.square(centred)) / (samples - ddof))
  # With epsilon = 0 equal rewards would give 0 / 0.
  return jnp.where(std > 0, centred / jnp.where(std > 0, std + epsilon, 1), 0.0)


def group_centred(rewards: Array) -> Array:
  """Returns R - mean; a group of one keeps its reward.

  Dr. GRPO, "Understanding R1-Zero-Like Training",
  https://arxiv.org/abs/2503.20783.

  Args:
    rewards: float[G].
  """
  chex.assert_rank(rewards, 1)
  if rewards.shape[0] == 1:
    return rewards
  # Rounding of the mean must not turn equal rewards into a signal that a
  # division by their tiny deviation would blow up.
  equal = jnp.all(rewards == rewards[0])
  return jnp.where(equal, 0.0, rewards - jnp.mean(rewards))


def leave_one_out(rewards: Array) -> Array:
  """Returns R - mean of the other samples = G / (G - 1) (R - mean).

  RLOO, "Back to Basics", https://arxiv.org/abs/2402.14740.

  Args:
    rewards: float[G].
  """
  samples = rewards.shape[0]
  return group_centred(rewards) * (samples / max(samples - 1, 1))


def length_weighted(rewards: Array, lengths: Array) -> Array:
  """Returns R - sum(L R) / sum(L).

  OPO, "On-Policy RL with Optimal Reward Baseline",
  https://arxiv.org/abs/2505.23585: the baseline of minimum variance if a
  gradient's squared norm goes with the length. A group of one keeps its
  reward.

  Args:
    rewards: float[G].
    lengths: int[G], trained tokens.
  """
  chex.assert_equal_shape([rewards, lengths])
  if rewards.shape[0] == 1:
    return rewards
  total = jnp.maximum(jnp.sum(lengths), 1)
  centred = rewards - jnp.sum(lengths * rewards) / total
  # Rounding of the mean must not give equal rewards a signal.
  return jnp.where(jnp.ptp(rewards) > 0, centred, 0.0)


def best_minus_second(rewards: Array,
                      *,
                      scaled: bool = True,
                      epsilon: float = 1e-6) -> Array:
  """Returns (R_best - R_second) / (std + epsilon) for the best, 0 for others.

  "Optimizing Language Models for Inference Time Objectives using
  Reinforcement Learning", https://arxiv.org/abs/2503.19595: trains the best
  of the group, pass@G, instead of the mean.

  Args:
    rewards: float[G], G >= 2.
    scaled: whether to divide by the group's deviation (ddof = 1), static.
    epsilon: added to it.

  Raises:
    ValueError: for a group of one, which has no second.
  """
  chex.assert_rank(rewards, 1)
  samples = rewards.shape[0]
  if samples < 2:
    raise ValueError(f'best_minus_second needs groups of 2, got {samples}')
  two = jnp.sort(rewards)[-2:]
  lead = two[1] - two[0]
  if scaled:
    lead = lead / (jnp.std(rewards, ddof=1) + epsilon)
  return jnp.where(jnp.arange(samples) == jnp.argmax(rewards), lead, 0.0)


def hardness_weighted(rewards: Array,
                      *,
                      slope: float = -0.256,
                      offset: float = 1.256) -> Array:
  """Returns (R - mean) D, D = slope * mean + offset: hard prompts weigh more.

  Policy-specific hardness weighting of "Confucius3-Math",
  https://arxiv.org/abs/2506.18330. D is 1.512 for a prompt that is never
  solved and 1 for one that always is.

  Args:
    rewards: float[G], +1 or -1: D means nothing on another scale.
    slope: static.
    offset: static.
  """
  return group_centred(rewards) * (slope * jnp.mean(rewards) + offset)


def reward_decoupled(rewards: Array,
                     weights: Array,
                     *,
                     epsilon: float = 1e-6,
                     ddof: int = 1) -> Array:
  """Returns sum_k weight_k group(R_k): each reward normalised by itself.

  Summed first, the reward of the largest spread would rule the group. GDPO,
  https://arxiv.org/abs/2601.05242; LightningRL,
  https://arxiv.org/abs/2603.13319 (epsilon 0, ddof 0). Both normalise the sum
  over the batch: `batch_advantages.whiten` by token, `batch_normalised` by
  sample.

  Args:
    rewards: float[K, G], K rewards of one group.
    weights: float[K].
    epsilon: added to the deviations.
    ddof: of the deviations.

  Returns:
    float[G].
  """
  chex.assert_rank(rewards, 2)
  estimate = functools.partial(group, epsilon=epsilon, ddof=ddof)
  return jnp.sum(weights[:, None] * jax.vmap(estimate)(rewards), axis=0)


ADVANTAGES: dict[str, Callable[[Array], Array]] = {
    'group': group,
    'group_centred': group_centred,
    'leave_one_out': leave_one_out,
}
