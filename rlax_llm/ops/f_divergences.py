"""Mass-covering f-divergences, estimated on samples of the reference.

With u = pi / pi_ref at a token sampled from pi_ref (not from pi, as in
`divergences`), D_f = E_ref[f(u)]. Each f below has f(1) = f'(1) = 0 and is
convex, so every token's term is at least 0. They keep what the initial policy
could solve alive: "The Choice of Divergence" (DPH-RL),
https://arxiv.org/abs/2509.07430. The samples carry their stored
log-probabilities: no reference model runs.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops.divergences import LARGEST_GAP
from rlax_llm.types import Array


def _gap(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns log u, clamped: beyond it the gradient is 0."""
  chex.assert_equal_shape([logprobs, reference_logprobs])
  return jnp.clip(logprobs - reference_logprobs, -LARGEST_GAP, LARGEST_GAP)


def forward_kl(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns u - 1 - log u, whose mean is KL(ref || pi).

  Gradient u - 1 by log pi: bounded where pi is below the reference.

  Args:
    logprobs: float[...], nats, of tokens sampled from the reference.
    reference_logprobs: float[...], nats, as stored with the samples.
  """
  gap = _gap(logprobs, reference_logprobs)
  return jnp.expm1(gap) - gap


def jensen_shannon(logprobs: Array, reference_logprobs: Array) -> Array:
  """Returns u log u - (u + 1) log((u + 1) / 2), whose mean is 2 JS(pi, ref).

  Gradient u log(2 u / (u + 1)) by log pi.

  Args:
    logprobs: float[...], nats, of tokens sampled from the reference.
    reference_logprobs: float[...], nats.
  """
  gap = _gap(logprobs, reference_logprobs)
  u = jnp.exp(gap)
  return u * gap - (u + 1) * (jax.nn.softplus(gap) - jnp.log(2.0))


def alpha_divergence(
  logprobs: Array, reference_logprobs: Array, *, alpha: float = 0.2
) -> Array:
  """Returns (u^(1 - a) - (1 - a) u - a) / (a (a - 1)).

  Between the two Kullback-Leibler divergences: a -> 1 gives forward_kl, a -> 0
  the reverse. Gradient (u - u^(1 - a)) / a by log pi.

  Args:
    logprobs: float[...], nats, of tokens sampled from the reference.
    reference_logprobs: float[...], nats.
    alpha: a, in (0, 1); static.
  """
  gap = _gap(logprobs, reference_logprobs)
  rest = 1 - alpha
  # expm1 twice: near u = 1 the terms cancel to second order.
  return (jnp.expm1(rest * gap) - rest * jnp.expm1(gap)) / (-alpha * rest)


F_DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
  'forward_kl': forward_kl,
  'jensen_shannon': jensen_shannon,
  'alpha': alpha_divergence,
}
