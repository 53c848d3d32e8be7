"""Masks from lengths, and named reductions with global denominators."""

from collections.abc import Callable

import chex
import jax
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


def select_known(known: Array | None, values: Array) -> Array:
  """Returns the values with 0 where they are not known; None: all are.

  Without a mask the values themselves, so that a program in which nothing is
  missing does not change.

  Args:
    known: bool[...] or None.
    values: [...], arbitrary where they are not known.
  """
  return values if known is None else select_masked(known, values)


def count_known(values: Array, known: Array | None) -> Array | int:
  """Returns how many values are known; None: all, a static number."""
  return values.size if known is None else jnp.sum(known)


def spread(values: Array, known: Array | None = None) -> Array:
  """Returns max - min of the known values; -inf if none is.

  Args:
    values: float[...], arbitrary where they are not known.
    known: bool[...]; None: all.
  """
  if known is None:
    return jnp.ptp(values)
  return jnp.max(select_masked(known, values, -jnp.inf)) - jnp.min(
    select_masked(known, values, jnp.inf)
  )


def deviation(values: Array, known: Array | None = None) -> Array:
  """Returns the standard deviation of the known values, ddof = 1.

  0 where fewer than two are known; without a mask that is up to the caller.

  Args:
    values: float[...], arbitrary where they are not known.
    known: bool[...]; None: all.
  """
  if known is None:
    return jnp.std(values, ddof=1)
  values = select_masked(known, values)
  centred = select_masked(known, values - masked_mean(known, values))
  freedom = jnp.maximum(jnp.sum(known) - 1, 1)
  return jnp.sqrt(jnp.sum(jnp.square(centred)) / freedom)


def _over_sample(
  reduce: Callable[..., Array], values: Array, segments: Array
) -> Array:
  """Reduces the last axis by segment; every position gets its segment's."""
  length = values.shape[-1]

  def row(values: Array, segments: Array) -> Array:
    # Segment numbers count from 1 within a row, so L + 1 is enough.
    return reduce(values, segments, num_segments=length + 1)[segments]

  flat = (-1, length)
  done = jax.vmap(row)(values.reshape(flat), segments.reshape(flat))
  return done.reshape(values.shape)


def sample_sum(
  mask: Array, values: Array, segments: Array | None = None
) -> Array:
  """Returns at each position the sum over its sample's masked tokens.

  Args:
    mask: bool[..., L].
    values: float[..., L], arbitrary where the mask is False.
    segments: int[..., L], 0 = no token, else the sample's number within the
      row, as in `Batch`. None: a row is one sample.

  Returns:
    float[..., L], the same at every position of a sample.
  """
  values = select_masked(mask, values)
  if segments is None:
    total = jnp.sum(values, axis=-1, keepdims=True)
    return jnp.broadcast_to(total, values.shape)
  return _over_sample(jax.ops.segment_sum, values, segments)


def sample_mean(
  mask: Array, values: Array, segments: Array | None = None
) -> Array:
  """Returns at each position the mean over its sample's masked tokens.

  A sample without any has mean 0.

  Args:
    mask: bool[..., L].
    values: float[..., L], arbitrary where the mask is False.
    segments: as in `sample_sum`.
  """
  ones = jnp.ones_like(values)
  count = sample_sum(mask, ones, segments)
  return sample_sum(mask, values, segments) / jnp.maximum(count, 1)


def sample_max(
  mask: Array, values: Array, segments: Array | None = None
) -> Array:
  """Returns at each position the maximum over its sample's masked tokens.

  A sample without any has maximum -inf.

  Args:
    mask: bool[..., L].
    values: float[..., L], arbitrary where the mask is False.
    segments: as in `sample_sum`.
  """
  values = select_masked(mask, values, -jnp.inf)
  if segments is None:
    most = jnp.max(values, axis=-1, keepdims=True)
    return jnp.broadcast_to(most, values.shape)
  return _over_sample(jax.ops.segment_max, values, segments)


def tokens_left(mask: Array, segments: Array | None = None) -> Array:
  """Returns how many masked tokens of the sample stand at or after each.

  1 marks one token per sample: its last. Thus a mean over samples of a packed
  batch is a mean over `tokens_left(mask, segments) == 1`.

  Args:
    mask: bool[..., L].
    segments: as in `sample_sum`.

  Returns:
    float[..., L]; 0 where the mask is False.
  """
  seen = jnp.cumsum(mask, axis=-1).astype(jnp.result_type(float))
  left = sample_max(mask, seen, segments) - seen + 1
  return select_masked(mask, left)


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


def _sequence_sum_token_mean_constant(
  lengths: np.ndarray, constant: int
) -> np.ndarray:
  sequences = max(int(np.count_nonzero(lengths)), 1)
  return np.full(lengths.shape, 1.0 / (sequences * constant))


def _token_sum(lengths: np.ndarray, constant: int) -> np.ndarray:
  del constant
  return np.ones(lengths.shape)


def _sequence_mean_over_all(lengths: np.ndarray, constant: int) -> np.ndarray:
  del constant
  return 1.0 / (max(lengths.size, 1) * np.maximum(lengths, 1))


def _sequence_sum_constant_over_all(
  lengths: np.ndarray, constant: int
) -> np.ndarray:
  return np.full(lengths.shape, 1.0 / (max(lengths.size, 1) * constant))


# Each maps (lengths int[samples] of the whole optimizer batch, T) to the
# weight of one token of each sample; the loss is then a plain weighted sum,
# which neither microbatches nor devices can change.
REDUCTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
  'token_mean': _token_mean,
  'sequence_mean': _sequence_mean,
  'sequence_mean_token_sum': _sequence_mean_token_sum,
  'sequence_sum_token_mean_constant': _sequence_sum_token_mean_constant,
  'token_sum': _token_sum,
  'sequence_mean_over_all': _sequence_mean_over_all,
  'sequence_sum_token_mean_constant_over_all': _sequence_sum_constant_over_all,
}


def token_weights(
  lengths: np.ndarray, *, reduction: str, constant: int
) -> np.ndarray:
  """Returns the loss weight of each sample's tokens.

  With L_i trained tokens in sample i, N = sum L_i, B samples, and S of them
  with L_i > 0, over the whole optimizer batch:

    token_mean                        1 / N             (DAPO)
    token_sum                         1                 (Tinker)
    sequence_mean                     1 / (S L_i)       (GRPO, GSPO)
    sequence_mean_token_sum           1 / S             (RLOO)
    sequence_sum_token_mean_constant  1 / (S constant)  (Dr. GRPO)
    sequence_mean_over_all            1 / (B L_i)       (GRPO in TRL)
    sequence_sum_token_mean_constant_over_all
                                      1 / (B constant)  (Dr. GRPO in TRL)

  The last two count samples without a trained token, so that masking a sample
  out does not raise the weight of the others.

  Args:
    lengths: int[samples], trained tokens per sample; 0 leaves a sample out.
    reduction: a name above.
    constant: the divisor of Dr. GRPO: the most new tokens, T, never a padded
      length, which would tie the step size to a bucket.

  Returns:
    float32[samples].
  """
  return REDUCTIONS[reduction](lengths, constant).astype(np.float32)
