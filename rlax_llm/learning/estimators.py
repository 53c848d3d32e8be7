"""Advantages of a batch of groups, by name.

An estimator is (rewards float32[B, G], lengths int32[B, G] in trained tokens,
correctness float32[B, G], known bool[B, G] or None) -> float32[B, G]. `known`
marks the samples whose reward is known; None: all of them. Statistics are those
of the known samples, and the others have advantage 0. To add an estimator,
write its maths in `ops/` and enter it here. Those of `PART_ESTIMATORS` look at
each reward by itself: (parts float32[K, B, G], weights float32[K], known) ->
float32[B, G].
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from rlax_llm.ops import advantages
from rlax_llm.ops import batch_advantages
from rlax_llm.ops import masking
from rlax_llm.types import Array

Estimator = Callable[[Array, Array, Array, Array | None], Array]
PartEstimator = Callable[[Array, Array, Array | None], Array]


def _by_group(estimate: Callable[[Array, Array | None], Array]) -> Estimator:
  """Returns an estimator that looks at the rewards of each group alone."""

  def by_group(
    rewards: Array, lengths: Array, correctness: Array, known: Array | None
  ) -> Array:
    del lengths, correctness
    return jax.vmap(estimate)(rewards, known)

  return by_group


_centred = _by_group(advantages.group_centred)


def _outcome(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  del lengths, correctness
  return masking.select_known(known, rewards)


def _none(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  del lengths, correctness, known
  return jnp.zeros_like(rewards)


def _length_weighted(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  del correctness
  return jax.vmap(advantages.length_weighted)(rewards, lengths, known)


def _whitened(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  del correctness
  return batch_advantages.whitened_by_length(rewards, lengths, known)


def _batch_scaled(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  centred = _centred(rewards, lengths, correctness, known)
  return batch_advantages.batch_scaled(centred, rewards, known)


def _signal_scaled(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  centred = _centred(rewards, lengths, correctness, known)
  return batch_advantages.signal_scaled(centred, correctness, known)


def _hardness_weighted(
  rewards: Array, lengths: Array, correctness: Array, known: Array | None
) -> Array:
  del lengths
  # The weight is defined for +1 and -1, and R - mean scales with it.
  return jax.vmap(advantages.hardness_weighted)(
    2 * rewards - 1, 2 * correctness - 1, known
  )


ESTIMATORS: dict[str, Estimator] = {
  'outcome': _outcome,
  'none': _none,
  'length_weighted': _length_weighted,
  'best_minus_second': _by_group(advantages.best_minus_second),
  'batch_scaled': _batch_scaled,
  'signal_scaled': _signal_scaled,
  'whitened': _whitened,
  'group_population': _by_group(
    functools.partial(advantages.group, epsilon=0.0, ddof=0)
  ),
  'hardness_weighted': _hardness_weighted,
}
ESTIMATORS |= {
  name: _by_group(estimate) for name, estimate in advantages.ADVANTAGES.items()
}


def _decoupled(
  epsilon: float, ddof: int, parts: Array, weights: Array, known: Array | None
) -> Array:
  estimate = functools.partial(
    advantages.reward_decoupled, epsilon=epsilon, ddof=ddof
  )
  summed = jax.vmap(estimate, in_axes=(1, None, 0))(parts, weights, known)
  # Without any signal both deviations are 0.
  return jnp.where(
    masking.spread(summed, known) > 0,
    batch_advantages.batch_normalised(summed, known, epsilon=epsilon),
    0.0,
  )


# Those of `ESTIMATORS` that compare groups: all of them must be of one size.
OF_BATCH = ('batch_scaled', 'signal_scaled', 'whitened')

PART_ESTIMATORS: dict[str, PartEstimator] = {
  'reward_decoupled': functools.partial(_decoupled, 1e-4, 1),
  'reward_decoupled_population': functools.partial(_decoupled, 0.0, 0),
}
