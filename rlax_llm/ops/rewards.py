"""Rewards made from outcomes: shaping, progress, improvement, filters."""

import math

import chex
import jax.numpy as jnp

from rlax_llm.types import Array


def progress_bonus(success: Array) -> Array:
  """Returns J_j - J_{j-1}: what each episode of thought added.

  MRT, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning",
  https://arxiv.org/abs/2503.07572. The objective adds alpha times it to the
  outcome, on the tokens of the episode.

  Args:
    success: float[..., k + 1], J: the success rate when forced to answer after
      episode j.

  Returns:
    float[..., k].
  """
  return jnp.diff(success, axis=-1)


def improvement_reward(new: Array, previous: Array) -> Array:
  """Returns max(0, (new - previous) / (1 - previous)), in [0, 1].

  The share of what was left to gain, for one step of self-improvement. ExIt,
  "Bootstrapping Task Spaces for Self-Improvement",
  https://arxiv.org/abs/2509.04575.

  Args:
    new: float[...], the score now, in [0, 1].
    previous: float[...], the score of the attempt that was improved.

  Returns:
    float[...]; 0 where nothing was left to gain.
  """
  chex.assert_equal_shape([new, previous])
  room = 1 - previous
  gain = (new - previous) / jnp.where(room > 0, room, 1.0)
  return jnp.where(room > 0, jnp.maximum(gain, 0.0), 0.0)


def replay_probabilities(returns: Array, *, temperature: float = 1.0) -> Array:
  """Returns softmax(kappa v / max v), v the variance of a group's returns.

  ExIt's choice of the history to continue, https://arxiv.org/abs/2509.04575:
  what is learned from most.

  Args:
    returns: float[H, G], of H stored groups.
    temperature: kappa, static; an inverse temperature, 0 is uniform.

  Returns:
    float[H].
  """
  variance = jnp.var(returns, axis=-1)
  most = jnp.max(variance)
  priority = jnp.exp(temperature * variance / jnp.where(most > 0, most, 1.0))
  return priority / jnp.sum(priority)


def parallel_reward(correct: Array, well_formed: Array, blocks: Array) -> Array:
  """Returns the reward of an answer that may think in parallel blocks.

  +-1 for correctness, +-0.3 for the format, and 0.6 log(1 + blocks) if both
  are right, -0.1 log(1 + blocks) if the answer is wrong. "Parallel-R1",
  https://arxiv.org/abs/2509.07980.

  Args:
    correct: bool[...].
    well_formed: bool[...].
    blocks: int[...], parallel blocks of the completion.
  """
  outcome = jnp.where(correct, 1.0, -1.0)
  form = jnp.where(well_formed, 0.3, -0.3)
  effort = jnp.log1p(blocks)
  bonus = jnp.where(
    correct & well_formed, 0.6 * effort, jnp.where(correct, 0.0, -0.1 * effort)
  )
  return outcome + form + bonus


def extra_rollouts(
  accuracy: float,
  *,
  samples: int,
  most: int,
  hardness_weighted: bool,
  scaled: bool = False,
) -> int:
  """Returns how many more samples a hard prompt gets after the first.

  A prompt of accuracy a weighs N S(a) in a group's gradient, S = 2 a (1 - a),
  or 2 sqrt(a (1 - a)) with rewards divided by their deviation: least for the
  hard ones. Extra samples lift it to the weight of a = 1/2 (equal treatment),
  or to 2 (1 - a) of that (hardness weighted). DARS, "Depth-Breadth Synergy in
  RLVR", https://arxiv.org/abs/2508.13755.

  Args:
    accuracy: a in [0, 1], of the first N; 0 is taken as 0.5 / N.
    samples: N.
    most: cap of N and the extra ones together; 32 (equal), 64 (weighted).
    hardness_weighted: which of the two.
    scaled: whether advantages are divided by the deviation.

  Returns:
    At least 0; 0 from accuracy 1/2 on.
  """
  if accuracy >= 0.5:
    return 0
  a = accuracy if accuracy > 0 else 0.5 / samples
  weight = 2 * math.sqrt(a * (1 - a)) if scaled else 2 * a * (1 - a)
  goal = samples * (1.0 if scaled else 0.5)
  if hardness_weighted:
    goal *= 2 * (1 - a)
  return max(
    0, min(math.ceil((goal - samples * weight) / weight), most - samples)
  )
