"""VCPO: the step size for off-policy batches.

"Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs",
https://arxiv.org/abs/2602.17616.
"""

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
