"""Per-token estimators of KL(policy || reference) from sampled tokens.

With d = log pi - log pi_ref at a token sampled from pi. John Schulman,
"Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
"""

from typing import Callable

import jax.numpy as jnp

from rlax_llm.types import Array

# exp of a larger gap overflows float32 sums; verl clamps at the same place.
_LARGEST_GAP = 20.0


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
  gap = jnp.clip(reference_logprobs - logprobs, -_LARGEST_GAP, _LARGEST_GAP)
  return jnp.exp(gap) - gap - 1


DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    'k1': k1,
    'k2': k2,
    'k3': k3,
}
