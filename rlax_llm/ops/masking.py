"""Masks from lengths, and named reductions with global denominators."""

from typing import Callable

import chex
import jax.numpy as jnp
import numpy as np

from rlax_llm.types import Array


def length_mask(length: Array, capacity: int) -> Array:
  """Returns bool[capacity], True below `length`: the only source of masks."""
  return jnp.arange(capacity) < length


def select_masked(mask: Array, values: Array, fill: float = 0.0) -> Array:
  """Replaces what the mask hides, so that NaN there reaches no gradient.

  A product with the mask would not do: 0 * NaN is NaN, in the value and in
  the gradient.

  Args:
    mask: bool[...].
    values: float[...], arbitrary where the mask is False.
    fill: what hidden entries become.

  Returns:
    float[...] of the same shape.
  """
  chex.assert_equal_shape([mask, values])
  return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def masked_mean(mask: Array, values: Array) -> Array:
  """Returns sum(mask * values) / max(sum(mask), 1)."""
  count = jnp.maximum(jnp.sum(mask), 1)
  return jnp.sum(select_masked(mask, values)) / count


def _token_mean(lengths: np.ndarray, constant: int) -> np.ndarray:
  del constant
  return np.full(lengths.shape, 1.0 / max(lengths.sum(), 1))


def _sequence_mean(lengths: np.ndarray, constant: int) -> np.ndarray:
  del constant
  sequences = max(int(np.count_nonzero(lengths)), 1)
  return 1.0 / (sequences * np.maximum(lengths, 1))


def _sequence_mean_token_sum(lengths: np.ndarray, constant: int) -> np.ndarray:
  del constant
  sequences = max(int(np.count_nonzero(lengths)), 1)
  return np.full(lengths.shape, 1.0 / sequences)


def _sequence_sum_token_mean_constant(lengths: np.ndarray,
                                      constant: int) -> np.ndarray:
  sequences = max(int(np.count_nonzero(lengths)), 1)
  return np.full(lengths.shape, 1.0 / (sequences * constant))


# Each maps (lengths int[samples] of the whole optimizer batch, T) to the
# weight of one token of each sample; the loss is then a plain weighted sum,
# which neither microbatches nor devices can change.
REDUCTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    'token_mean': _token_mean,
    'sequence_mean': _sequence_mean,
    'sequence_mean_token_sum': _sequence_mean_token_sum,
    'sequence_sum_token_mean_constant': _sequence_sum_token_mean_constant,
}


def token_weights(lengths: np.ndarray, *, reduction: str,
                  constant: int) -> np.ndarray:
  """Returns the loss weight of each sample's tokens.

  With L_i trained tokens in sample i, N = sum L_i, and S the number of
  samples with L_i > 0, over the whole optimizer batch:

    token_mean                        1 / N             (DAPO)
    sequence_mean                     1 / (S L_i)       (GRPO)
    sequence_mean_token_sum           1 / S             (RLOO)
    sequence_sum_token_mean_constant  1 / (S constant)  (Dr. GRPO)

  Args:
    lengths: int[samples], trained tokens per sample; 0 leaves a sample out.
    reduction: a name above.
    constant: the divisor of Dr. GRPO: the most new tokens, T, never a padded
      length, which would tie the step size to a bucket.

  Returns:
    float32[samples].
  """
  return REDUCTIONS[reduction](lengths, constant).astype(np.float32)
