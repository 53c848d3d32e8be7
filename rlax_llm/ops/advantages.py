"""Advantages of a group: one prompt's samples; callers vmap over prompts."""

from typing import Callable

import chex
import jax.numpy as jnp

from rlax_llm.types import Array


def group(rewards: Array, *, epsilon: float = 1e-6) -> Array:
  """Returns (R - mean) / (std + epsilon), std with ddof = 1.

  GRPO, "DeepSeekMath", https://arxiv.org/abs/2402.03300. A group of one keeps
  its reward (mean 0, std 1), as in verl; equal rewards give exactly 0.

  Args:
    rewards: float[G].
    epsilon: added to the standard deviation.

  Returns:
    float[G].
  """
  chex.assert_rank(rewards, 1)
  samples = rewards.shape[0]
  if samples == 1:
    return rewards / (1 + epsilon)
  centred = group_centred(rewards)
  std = jnp.sqrt(jnp.sum(jnp.square(centred)) / (samples - 1))
  return centred / (std + epsilon)


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


ADVANTAGES: dict[str, Callable[[Array], Array]] = {
    'group': group,
    'group_centred': group_centred,
    'leave_one_out': leave_one_out,
}
