"""Per-token losses, before masking and reduction. Elementwise on arrays.

Log-probabilities are in nats. What a mask hides is replaced by the caller
(`masking.select_masked`) before it comes here, except where a function takes
the mask itself. Advantages, old and behaviour log-probabilities are constants.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import masking
from rlax_llm.ops.divergences import LARGEST_GAP
from rlax_llm.types import Array

# A mean over a sequence is never that large by right: GSPO clamps above.
_LARGEST_MEAN_LOG_RATIO = 10.0


class TokenLoss(NamedTuple):
  """A loss and what it did, by token."""

  loss: Array  # float[...]
  ratio: Array  # float[...], pi / pi_old
  clipped: Array  # bool[...]: the clip was active


def importance_ratio(logprobs: Array, old_logprobs: Array) -> Array:
  """Returns exp(logprobs - old_logprobs), clamped to exp(+-20)."""
  return jnp.exp(jnp.clip(logprobs - old_logprobs, -LARGEST_GAP, LARGEST_GAP))


def _clip_ratio(
  ratio: Array,
  advantages: Array,
  clip_low: Array | float,
  clip_high: Array | float,
  dual_clip: float | None,
) -> TokenLoss:
  clipped_ratio = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  free, held = ratio * advantages, clipped_ratio * advantages
  loss, clipped = -jnp.minimum(free, held), held < free
  if dual_clip is not None:
    # The minimum leaves bad tokens that have become likely unbounded.
    most = -dual_clip * advantages
    dual = (advantages < 0) & (loss > most)
    loss, clipped = jnp.where(dual, most, loss), clipped | dual
  return TokenLoss(loss, ratio, clipped)


def clipped_surrogate(
  logprobs: Array,
  old_logprobs: Array,
  advantages: Array,
  *,
  clip_low: Array | float,
  clip_high: Array | float,
  dual_clip: float | None = None,
) -> TokenLoss:
  """Returns -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

  PPO, https://arxiv.org/abs/1707.06347; clip_high > clip_low is DAPO's
  clip-higher, https://arxiv.org/abs/2503.14476. With dual_clip = c the loss
  of a token with A < 0 is at most -c A, "Mastering Complex Control in MOBA
  Games", https://arxiv.org/abs/1912.09729.

  Args:
    logprobs: float[...], nats, of the current policy.
    old_logprobs: float[...], nats, of the policy that the batch is about.
    advantages: float[...].
    clip_low: static, or float[...] by token.
    clip_high: static, or float[...] by token.
    dual_clip: c > 1, static; None leaves the loss unbounded.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  return _clip_ratio(
    importance_ratio(logprobs, old_logprobs),
    advantages,
    clip_low,
    clip_high,
    dual_clip,
  )


def sequence_clipped_surrogate(
  logprobs: Array,
  old_logprobs: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float,
  clip_high: float,
  segments: Array | None = None,
) -> TokenLoss:
  """Returns the clipped surrogate of the sequence's geometric-mean ratio.

  GSPO, "Group Sequence Policy Optimization",
  https://arxiv.org/abs/2507.18071: s_i = exp(mean_t(log pi - log pi_old)), in
  its token form s_it = sg(s_i) pi / sg(pi), whose sequence mean has the value
  and the gradient of -min(s_i A, clip(s_i) A). Meant for the reductions that
  average over a sequence's tokens; others weigh a sequence by its length.

  Args:
    logprobs: float[..., L], nats.
    old_logprobs: float[..., L], nats.
    advantages: float[..., L], the same at every token of a sample.
    mask: bool[..., L]; the other arrays are arbitrary where it is False.
    clip_low: static; some 3e-4, since a mean of log-ratios is small.
    clip_high: static.
    segments: int[..., L] as in `Batch`; None: a row is one sample.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
  logprobs = masking.select_masked(mask, logprobs)
  old_logprobs = masking.select_masked(mask, old_logprobs)
  advantages = masking.select_masked(mask, advantages)
  held = jax.lax.stop_gradient(logprobs)
  mean = masking.sample_mean(mask, held - old_logprobs, segments)
  ratio = jnp.exp(logprobs - held + jnp.minimum(mean, _LARGEST_MEAN_LOG_RATIO))
  return _clip_ratio(ratio, advantages, clip_low, clip_high, None)


def surrogate(
  logprobs: Array, old_logprobs: Array, advantages: Array
) -> TokenLoss:
  """Returns -r A: the importance-weighted objective, without a clip.

  Args:
    logprobs: float[...], nats.
    old_logprobs: float[...], nats.
    advantages: float[...].
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = importance_ratio(logprobs, old_logprobs)
  return TokenLoss(-ratio * advantages, ratio, jnp.zeros(ratio.shape, bool))


def reinforce(
  logprobs: Array, old_logprobs: Array, advantages: Array
) -> TokenLoss:
  """Returns -sg(r) A log pi: the policy gradient, importance weighted.

  On-policy r is 1 and this is REINFORCE,
  https://doi.org/10.1007/BF00992696. Its value says nothing; its gradient
  does.

  Args:
    logprobs: float[...], nats.
    old_logprobs: float[...], nats.
    advantages: float[...].
  """
  return truncated_reinforce(logprobs, old_logprobs, advantages)


def truncated_reinforce(
  logprobs: Array,
  old_logprobs: Array,
  advantages: Array,
  *,
  ratio_low: float | None = None,
  ratio_high: float | None = None,
) -> TokenLoss:
  """Returns -sg(clip(r, ratio_low, ratio_high)) A log pi.

  CISPO, "MiniMax-M1", https://arxiv.org/abs/2506.13585: the weight is clipped
  and not the update, so every token keeps a gradient. The bounds are those of
  the ratio itself, since code bases disagree on offsets from 1: MiniMax and
  ScaleRL bound above only (ScaleRL by 5), Tinker by 0.8 and 1.2.

  Args:
    logprobs: float[...], nats.
    old_logprobs: float[...], nats.
    advantages: float[...].
    ratio_low: static; None leaves the ratio free below.
    ratio_high: static; None leaves it free above.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = jax.lax.stop_gradient(importance_ratio(logprobs, old_logprobs))
  weight = jnp.clip(ratio, ratio_low, ratio_high)
  return TokenLoss(-weight * advantages * logprobs, ratio, weight != ratio)


def weighted(token: TokenLoss, weights: Array) -> TokenLoss:
  """Returns the loss times constant weights, as of truncated sampling.

  Args:
    token: a loss.
    weights: float[...], of `importance`; 0 drops a token.
  """
  return token._replace(loss=jax.lax.stop_gradient(weights) * token.loss)


def quadratic_regularised(
  logprobs: Array, old_logprobs: Array, advantages: Array, *, beta: float
) -> TokenLoss:
  """Returns -(A log pi - beta / 2 (log pi - log pi_old)^2).

  DRO, "Offline Regularised Reinforcement Learning",
  https://arxiv.org/abs/2405.19107, by token and with the advantage given.

  Args:
    logprobs: float[...], nats.
    old_logprobs: float[...], nats.
    advantages: float[...].
    beta: static.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = importance_ratio(logprobs, old_logprobs)
  penalty = beta / 2 * jnp.square(logprobs - old_logprobs)
  return TokenLoss(
    penalty - advantages * logprobs, ratio, jnp.zeros(ratio.shape, bool)
  )


def soft_gated_surrogate(
  logprobs: Array,
  old_logprobs: Array,
  advantages: Array,
  *,
  temperature_positive: float = 1.0,
  temperature_negative: float = 1.05,
) -> TokenLoss:
  """Returns -(4 / tau) sigmoid(tau (r - 1)) A.

  SAPO, "Soft Adaptive Policy Optimization",
  https://arxiv.org/abs/2511.20347: a smooth gate in place of the clip, of
  slope 1 at r = 1, tighter for tokens with A <= 0.

  Args:
    logprobs: float[...], nats.
    old_logprobs: float[...], nats.
    advantages: float[...].
    temperature_positive: tau where A > 0, static.
    temperature_negative: tau elsewhere, static.
  """
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = importance_ratio(logprobs, old_logprobs)
  tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
  gate = jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau
  return TokenLoss(-gate * advantages, ratio, jnp.zeros(ratio.shape, bool))


def negative_log_likelihood(logprobs: Array) -> TokenLoss:
  """Returns -log pi: supervised learning as a loss of the same kind."""
  return TokenLoss(
    -logprobs, jnp.ones_like(logprobs), jnp.zeros(logprobs.shape, bool)
  )
