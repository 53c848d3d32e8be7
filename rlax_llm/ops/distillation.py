"""Learning from a teacher's log-probabilities."""

import chex
import jax

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
