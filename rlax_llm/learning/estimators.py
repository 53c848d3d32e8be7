"""Advantages of a batch of groups, by name.

An estimator is (rewards float32[B, G], lengths int32[B, G], trained tokens) ->
float32[B, G]. To add one, write its maths in `ops/` and enter it here. Those of
`PART_ESTIMATORS` look at each reward by itself: (parts float32[K, B, G],
weights float32[K]) -> float32[B, G].
"""

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from rlax_llm.ops import advantages
from rlax_llm.ops import batch_advantages
from rlax_llm.types import Array

Estimator = Callable[[Array, Array], Array]


def _by_group(estimate: Callable[[Array], Array]) -> Estimator:
  """Returns an estimator that looks at each group alone."""
  return lambda rewards, lengths: jax.vmap(estimate)(rewards)


def _batch_scaled(rewards: Array, lengths: Array) -> Array:
  del lengths
  centred = jax.vmap(advantages.group_centred)(rewards)
  return batch_advantages.batch_scaled(centred, rewards)


def _signal_scaled(rewards: Array, lengths: Array) -> Array:
  del lengths
  centred = jax.vmap(advantages.group_centred)(rewards)
  return batch_advantages.signal_scaled(centred, rewards)


def _hardness_weighted(rewards: Array) -> Array:
  # The weight is defined for rewards of +1 and -1.
  return advantages.hardness_weighted(2 * rewards - 1)


ESTIMATORS: dict[str, Estimator] = {
    'outcome':
        lambda rewards, lengths: rewards,
    'none':
        lambda rewards, lengths: jnp.zeros_like(rewards),
    'length_weighted':
        jax.vmap(advantages.length_weighted),
    'best_minus_second':
        _by_group(advantages.best_minus_second),
    'batch_scaled':
        _batch_scaled,
    'signal_scaled':
        _signal_scaled,
    'whitened':
        batch_advantages.whitened_by_length,
    'group_population':
        _by_group(functools.partial(advantages.group, epsilon=0.0, ddof=0)),
    'hardness_weighted':
        _by_group(_hardness_weighted),
}
ESTIMATORS |= {
    name: _by_group(estimate)
    for name, estimate in advantages.ADVANTAGES.items()
}


def _decoupled(epsilon: float, ddof: int, parts: Array,
               weights: Array) -> Array:
  estimate = functools.partial(advantages.reward_decoupled,
                               epsilon=epsilon,
                               ddof=ddof)
  summed = jax.vmap(estimate, in_axes=(1, None))(parts, weights)
  # Without any signal both deviations are 0.
  return jnp.where(
      jnp.ptp(summed) > 0,
      batch_advantages.batch_normalised(summed, epsilon=epsilon), 0.0)


# Those of `ESTIMATORS` that compare groups: all of them must be of one size.
OF_BATCH = ('batch_scaled', 'signal_scaled', 'whitened')

PART_ESTIMATORS: dict[str, Estimator] = {
    'reward_decoupled': functools.partial(_decoupled, 1e-4, 1),
    'reward_decoupled_population': functools.partial(_decoupled, 0.0, 0),
}
