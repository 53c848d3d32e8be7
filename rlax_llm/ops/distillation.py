"""Learning from a teacher's log-probabilities."""

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import masking
from rlax_llm.ops import values
from rlax_llm.types import Array


def distillation_advantages(
  sampled_logprobs: Array,
  teacher_logprobs: Array,
  mask: Array,
  *,
  coefficient: float = 1.0,
  discount: float = 0.0,
  segments: Array | None = None,
) -> Array:
  """Returns -coefficient (log pi_sampled - log pi_teacher), by token.

  On-policy distillation, "On-Policy Distillation of Language Models",
  https://arxiv.org/abs/2306.13649, as a policy gradient on KL(student ||
  teacher): with `losses.surrogate`, each token is credited for its own
  log-ratio. A discount above 0 credits it with the later ones as well.

  Args:
    sampled_logprobs: float[..., L], nats, of the student when it sampled.
    teacher_logprobs: float[..., L], nats, of the same tokens.
    mask: bool[..., L]; the others are arbitrary where it is False.
    coefficient: static.
    discount: of future log-ratios, in [0, 1]; static.
    segments: int[..., L] as in `Batch`; None: a row is one sample.

  Returns:
    float[..., L], constant, 0 where the mask is False.
  """
  chex.assert_equal_shape([sampled_logprobs, teacher_logprobs, mask])
  gain = masking.select_masked(mask, teacher_logprobs - sampled_logprobs)
  gain = coefficient * jax.lax.stop_gradient(gain)
  if not discount:
    return gain
  return values.returns_to_go(gain, mask, discount=discount, segments=segments)


def centred_kl_advantages(
  sampled_logprobs: Array,
  reference_logprobs: Array,
  mask: Array,
  *,
  coefficient: float,
) -> Array:
  """Returns coefficient (mean(d) - d), d = log pi_sampled - log pi_ref.

  A penalty on KL(policy || reference) to add to advantages; the mean over the
  batch's tokens is its baseline. Tinker cookbook,
  https://github.com/thinking-machines-lab/tinker-cookbook.

  Args:
    sampled_logprobs: float[...], nats.
    reference_logprobs: float[...], nats.
    mask: bool[...], of the whole optimizer batch.
    coefficient: static.

  Returns:
    float[...], constant, 0 where the mask is False.
  """
  chex.assert_equal_shape([sampled_logprobs, reference_logprobs, mask])
  gap = jax.lax.stop_gradient(sampled_logprobs - reference_logprobs)
  centred = masking.masked_mean(mask, gap) - gap
  return coefficient * masking.select_masked(mask, centred)


def generalised_jensen_shannon(
  student_logits: Array, teacher_logits: Array, *, beta: float
) -> Array:
  """Returns beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1-beta) S.

  GKD, https://arxiv.org/abs/2306.13649. beta = 0 means KL(T || S) and 1 means
  KL(S || T), the limits once divided by beta or 1 - beta.

  Args:
    student_logits: float[..., V].
    teacher_logits: float[..., V], constant.
    beta: in [0, 1], static.

  Returns:
    float[...], nats.

  Raises:
    ValueError: for beta outside [0, 1].
  """
  if not 0 <= beta <= 1:
    raise ValueError(f'beta={beta} must be in [0, 1]')
  chex.assert_equal_shape([student_logits, teacher_logits])
  student = jax.nn.log_softmax(student_logits)
  teacher = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits))
  if beta == 0:
    return _kl(teacher, student)
  if beta == 1:
    return _kl(student, teacher)
  mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
  return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(logprobs: Array, other: Array) -> Array:
  """Returns KL over the last axis; a token of probability 0 adds 0."""
  p = jnp.exp(logprobs)
  gap = jnp.where(p > 0, logprobs - jnp.where(p > 0, other, 0), 0.0)
  return jnp.sum(p * gap, axis=-1)


def extrapolated(now: Array, previous: Array, *, power: int) -> Array:
  """Returns now + 2^power (now - previous): a leap along the last direction.

  EffOPD, "Learning to Foresee", https://arxiv.org/abs/2605.11739, tries
  power = 1 ... 5, all from the same base, and takes the best that a small
  validation set does not find worse. Not for the factors of a low-rank
  update: their product is not linear in them.

  Args:
    now: float[...], a parameter.
    previous: float[...], the same some steps before.
    power: static.
  """
  chex.assert_equal_shape([now, previous])
  return now + 2.0**power * (now - previous)
