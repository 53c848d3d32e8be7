"""Advantages of a batch of groups, by name.

An estimator is (rewards float32[B, G], lengths int32[B, G], trained tokens) ->
float32[B, G]. To add one, write its maths in `ops/` and enter it here.
"""

from typing import Callable

import jax

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


ESTIMATORS: dict[str, Estimator] = {
    'length_weighted': jax.vmap(advantages.length_weighted),
    'best_minus_second': _by_group(advantages.best_minus_second),
    'batch_scaled': _batch_scaled,
    'signal_scaled': _signal_scaled,
    'whitened': batch_advantages.whitened_by_length,
}
ESTIMATORS |= {
    name: _by_group(estimate)
    for name, estimate in advantages.ADVANTAGES.items()
}
