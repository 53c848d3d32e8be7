"""Objectives for the best of N answers, by sample."""

import jax
import jax.numpy as jnp

from rlax_llm.types import Array

# Below it 1 - p is 1 in float32 and the quotient of the weight loses digits.
_SMALL = 0.1


def coverage_loss(logprobs: Array, *, samples: int) -> Array:
  """Returns -log(1 - (1 - p)^N): the surprise that one of N answers is this.

  DCO, "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting
  Confidence Improves Mathematical Reasoning",
  https://arxiv.org/abs/2502.07154. Its gradient is f(p, N) times that of
  -log p with

    f = N (1 - p)^(N - 1) p / (1 - (1 - p)^N)  in (0, 1],

  so that confident answers are left alone; N = 1 is cross-entropy. Not
  normalised by length: p is the probability of the whole answer.

  Args:
    logprobs: float[...], nats, summed over each answer's tokens.
    samples: N >= 1, static: the budget at test time.

  Returns:
    float[...], to be averaged over answers.
  """
  weight = jax.lax.stop_gradient(coverage_weight(logprobs, samples=samples))
  value = jax.lax.stop_gradient(_value(logprobs, samples))
  # Straight through: differentiating the value would divide by 1 - (1-p)^N
  # once more and lose what the series below keeps.
  guide = -weight * logprobs
  return value + guide - jax.lax.stop_gradient(guide)


def _log_miss(logprobs: Array) -> Array:
  """Returns log(1 - p), at least the smallest number for p = 1."""
  miss = -jnp.expm1(logprobs)
  return jnp.log(jnp.maximum(miss, jnp.finfo(logprobs.dtype).tiny))


def _value(logprobs: Array, samples: int) -> Array:
  if samples == 1:
    return -logprobs
  # 1 - (1 - p)^N by way of log1p for p where 1 - p would round.
  p = jnp.exp(logprobs)
  log_miss = jnp.where(
    p < _SMALL, jnp.log1p(-jnp.minimum(p, _SMALL)), _log_miss(logprobs)
  )
  all_miss = samples * log_miss
  hit = -jnp.expm1(all_miss)
  # Nearly sure: -log(1 - x) with x = (1 - p)^N. Nearly impossible: the first
  # term N p of the series, whose logarithm does not underflow.
  sure = -jnp.log1p(-jnp.exp(jnp.minimum(all_miss, -0.5)))
  rare = jnp.log(samples) + logprobs
  tiny = jnp.finfo(logprobs.dtype).tiny
  unsure = jnp.where(hit > tiny, -jnp.log(jnp.maximum(hit, tiny)), -rare)
  return jnp.where(all_miss < -0.5, sure, unsure)


def coverage_weight(logprobs: Array, *, samples: int) -> Array:
  """Returns f(p, N) = N (1 - p)^(N - 1) p / (1 - (1 - p)^N), in (0, 1].

  Args:
    logprobs: float[...], nats, of whole answers.
    samples: N, static.

  Raises:
    ValueError: for N below 1.
  """
  if samples < 1:
    raise ValueError(f'samples={samples} must be at least 1')
  if samples == 1:
    return jnp.ones_like(logprobs)
  p = jnp.exp(logprobs)
  rest = samples - 1
  # f = N p (1 - p)^(N - 1) / (1 - (1 - p)^N); for small N p both sides go to
  # 0, and their series by p is divided instead.
  small = samples * p < _SMALL
  x = jnp.where(small, p, 0.0)
  top = 1 - rest * x + rest * (samples - 2) * x * x / 2
  bottom = 1 - rest * x / 2 + rest * (samples - 2) * x * x / 6
  log_miss = _log_miss(jnp.where(small, -1.0, logprobs))
  hit = -jnp.expm1(samples * log_miss)
  exact = samples * jnp.exp(logprobs + rest * log_miss) / hit
  return jnp.where(small, top / bottom, exact)
