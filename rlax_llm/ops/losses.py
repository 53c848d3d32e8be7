"""Per-token losses, before masking and reduction. Elementwise on arrays."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlax_llm.types import Array

# exp of a larger log-ratio overflows; verl clamps at the same place.
_LARGEST_LOG_RATIO = 20.0


class TokenLoss(NamedTuple):
  """A loss and what it did, by token."""
  loss: Array  # float[...]
  ratio: Array  # float[...], pi / pi_old
  clipped: Array  # bool[...]: the clip took the gradient away


def importance_ratio(logprobs: Array, old_logprobs: Array) -> Array:
  """Returns exp(logprobs - old_logprobs), clamped to exp(+-20)."""
  return jnp.exp(
      jnp.clip(logprobs - old_logprobs, -_LARGEST_LOG_RATIO,
               _LARGEST_LOG_RATIO))


def clipped_surrogate(logprobs: Array, old_logprobs: Array, advantages: Array,
                      *, clip_low: float, clip_high: float) -> TokenLoss:
  """Returns -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

  PPO, https://arxiv.org/abs/1707.06347; clip_high > clip_low is DAPO's
  clip-higher, https://arxiv.org/abs/2503.14476.

  Args:
    logprobs: float[...], nats, of the current policy.
    old_logprobs: float[...], nats, of the policy that the batch is about.
    advantages: float[...].
    clip_low: static.
    clip_high: static.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = importance_ratio(logprobs, old_logprobs)
  clipped_ratio = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  free, held = ratio * advantages, clipped_ratio * advantages
  return TokenLoss(-jnp.minimum(free, held), ratio, held < free)


def reinforce(logprobs: Array, old_logprobs: Array,
              advantages: Array) -> TokenLoss:
  """Returns -sg(r) A log pi: the policy gradient, importance weighted.

  On-policy r is 1 and this is REINFORCE,
  https://doi.org/10.1007/BF00992696. Its value says nothing; its gradient
  does.

  Args:
    logprobs: float[...], nats.
    old_logprobs: float[...], nats.
    advantages: float[...].
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = jax.lax.stop_gradient(importance_ratio(logprobs, old_logprobs))
  return TokenLoss(-ratio * advantages * logprobs, ratio,
                   jnp.zeros(ratio.shape, bool))


def negative_log_likelihood(logprobs: Array) -> TokenLoss:
  """Returns -log pi: supervised learning as a loss of the same kind."""
  return TokenLoss(-logprobs, jnp.ones_like(logprobs),
                   jnp.zeros(logprobs.shape, bool))
