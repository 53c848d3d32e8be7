"""Controllers of a loss coefficient, one step each. Host or device."""

import jax.numpy as jnp

from rlax_llm.types import Array


def adapted_kl_coefficient(
  coefficient: Array,
  divergence: Array,
  *,
  target: float,
  samples: int,
  horizon: int,
) -> Array:
  """Returns beta (1 + clip(KL / target - 1, -0.2, 0.2) samples / horizon).

  "Fine-Tuning Language Models from Human Preferences",
  https://arxiv.org/abs/1909.08593.

  Args:
    coefficient: float[], beta.
    divergence: float[], nats, measured on the step's batch.
    target: nats, static.
    samples: of the step, static.
    horizon: samples over which beta may change by about a fifth, static.
  """
  error = jnp.clip(divergence / target - 1, -0.2, 0.2)
  return coefficient * (1 + error * samples / horizon)


def adapted_entropy_coefficient(
  coefficient: Array,
  entropy: Array,
  *,
  target: float = 0.2,
  delta: float = 0.005,
) -> Array:
  """Returns the coefficient moved by delta towards the target, in [0, 1].

  "Skywork Open Reasoner 1", https://arxiv.org/abs/2505.22312.

  Args:
    coefficient: float[], of the entropy bonus.
    entropy: float[], nats, mean over the batch's tokens.
    target: nats, static.
    delta: static.
  """
  return jnp.clip(coefficient + delta * jnp.sign(target - entropy), 0.0, 1.0)
