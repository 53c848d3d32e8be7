"""Per-token estimators of KL(policy || reference) from sampled tokens.

With d = log pi - log pi_ref at a token sampled from pi. John Schulman,
"Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlax_llm.types import Array

# exp of a larger gap overflows float32 sums; verl clamps at the same place.
LARGEST_GAP = 20.0


def k1(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns d: unbiased. In a loss its expected gradient is 0 on-policy."""
  return logprobs - reference_logprobs


def k2(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns d^2 / 2: biased, and its gradient is that of KL(pi || ref)."""
  return jnp.square(logprobs - reference_logprobs) / 2


def k3(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns exp(-d) + d - 1 >= 0: unbiased, low variance.

  As a term of the loss its gradient is that of KL(ref || pi). GRPO's choice.
  """
  gap = jnp.clip(reference_logprobs - logprobs, -LARGEST_GAP, LARGEST_GAP)
  return jnp.exp(gap) - gap - 1


def absolute(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns |d|: a distance, of no divergence in particular.

  Its gradient at d = 0, where on-policy training starts, is 0.
  """
  gap = logprobs - reference_logprobs
  return gap * jax.lax.stop_gradient(jnp.sign(gap))


def k3_straight_through(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns k3 with the gradient of k2: that of KL(pi || ref), on-policy.

  The value to report and the direction to follow, "A Comedy of Estimators",
  https://arxiv.org/abs/2512.21852. verl names it with a trailing +.
  """
  value = k3(logprobs, reference_logprobs)
  guide = k2(logprobs, reference_logprobs)
  return guide + jax.lax.stop_gradient(value - guide)


def k3_ratio_weighted(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns (pi / sg(pi)) k3: its gradient is d, that of KL(pi || ref).

  The ratio, 1 in value, differentiates the law that is sampled from, which
  k3 in a loss forgets. Same gradient as `k3_straight_through`, reached as the
  derivative of an expectation. https://arxiv.org/abs/2512.21852.
  """
  ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
  return ratio * k3(logprobs, reference_logprobs)


DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
  'k1': k1,
  'k2': k2,
  'k3': k3,
  'absolute': absolute,
  'k3_straight_through': k3_straight_through,
  'k3_ratio_weighted': k3_ratio_weighted,
}
