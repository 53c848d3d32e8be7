"""VCPO: the step and the baseline for off-policy batches.

"Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs",
https://arxiv.org/abs/2602.17616.
"""

import chex
import jax.numpy as jnp

from rlax_llm.types import Array


def step_scale(
  effective_ratio: Array, *, base_ratio: float = 1.0, power: float = 0.5
) -> Array:
  """Returns min(1, rho / base_ratio)^power: the factor of the learning rate.

  The noise of a gradient goes with 1 / (rho B), as if the batch had rho B
  samples; the square root is Adam's rule for batch sizes, 1 that of SGD. It
  scales the schedule's output and leaves Adam's moments alone.

  Args:
    effective_ratio: float[], rho of `importance.effective_sample_ratio`, over
      the samples of the optimizer batch and of the weights that multiply the
      loss.
    base_ratio: rho of an on-policy batch, static; below 1 where sampler and
      trainer do not agree exactly.
    power: static.
  """
  return jnp.minimum(1.0, effective_ratio / base_ratio) ** power


def minimum_variance_baseline(
  rewards: Array, weights: Array, squared_norms: Array
) -> Array:
  """Returns b = sum(w^2 n R) / sum(w^2 n), n = |grad log pi(y_i)|^2.

  The constant that minimises E |w grad log pi (R - b)|^2; on-policy with
  equal norms it is the group's mean.

  Args:
    rewards: float[G], of one group.
    weights: float[G], importance weights of the sequences.
    squared_norms: float[G], of the *unweighted* gradients. (The released
      code takes the norms of weighted ones, so that w enters to the fourth.)

  Returns:
    float[]. With all gradients zero, where any b will do: the mean weighted
    by w^2, or the plain mean if those are 0 too.
  """
  chex.assert_equal_shape([rewards, weights, squared_norms])
  squares = jnp.square(weights)
  shares = squares * squared_norms
  shares = jnp.where(jnp.sum(shares) > 0, shares, squares)
  shares = jnp.where(jnp.sum(shares) > 0, shares, jnp.ones_like(shares))
  return jnp.sum(shares * rewards) / jnp.sum(shares)


def off_policy_baselined(
  rewards: Array,
  weights: Array,
  squared_norms: Array,
  *,
  least_std: float = 1e-8,
) -> Array:
  """Returns (R - b) / std, b the baseline of minimum variance, ddof = 0.

  Args:
    rewards: float[G], of one group.
    weights: float[G].
    squared_norms: float[G].
    least_std: a deviation up to here is not divided by.

  Returns:
    float[G]; the weights are not applied.
  """
  baseline = minimum_variance_baseline(rewards, weights, squared_norms)
  std = jnp.std(rewards)
  return (rewards - baseline) / jnp.where(std > least_std, std, 1.0)


def norm_proxy(logprobs: Array, sum_of_squares: Array) -> Array:
  """Returns 1 - 2 pi(y) + sum_v pi(v)^2: |grad log pi|^2 by the logits.

  Summed over a sequence it stands in for the full gradient's norm, which
  costs one backward pass per sample.

  Args:
    logprobs: float[...], nats, of the sampled tokens.
    sum_of_squares: float[...], of the law's probabilities.
  """
  return 1 - 2 * jnp.exp(logprobs) + sum_of_squares
