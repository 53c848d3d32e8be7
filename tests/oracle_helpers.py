"""Oracles in float64: loading, comparing, reducing, packing."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm.ops import masking

ORACLES = pathlib.Path(__file__).parent / 'oracles'


@pytest.fixture(autouse=True)
def float64():
  """Runs a test in float64: the oracles hold 12 digits."""
  with jax.enable_x64(True):
    yield


def load(name):
  return json.loads((ORACLES / f'{name}.json').read_text())


def array(values):
  return jnp.asarray(values, jnp.float64)


def check(actual, expected):
  """Compares to 1e-6, absolute."""
  np.testing.assert_allclose(
    np.asarray(actual, np.float64),
    np.asarray(expected, np.float64),
    rtol=0,
    atol=1e-6,
  )


def tokens(inputs):
  """Returns (mask, A by token) of an oracle with A by sample."""
  mask = jnp.asarray(np.array(inputs['mask']) > 0)
  advantages = array(inputs['advantages'])[:, None]
  return mask, jnp.broadcast_to(advantages, mask.shape)


def reduce_loss(per_token, logprobs, mask, reduction='token_mean', constant=0):
  """Returns the reduced loss and its gradient, the way `update` does it.

  The log-probabilities are NaN outside the mask, and the gradient must be 0
  there.
  """
  weights = masking.token_weights(
    np.asarray(mask).sum(axis=-1).reshape(-1),
    reduction=reduction,
    constant=constant,
  )
  weights = weights.reshape(*mask.shape[:-1], 1) * np.asarray(mask)

  def loss(logprobs):
    return jnp.sum(weights * per_token(masking.select_masked(mask, logprobs)))

  poisoned = jnp.where(mask, logprobs, jnp.nan)
  value, gradient = jax.jit(jax.value_and_grad(loss))(poisoned)
  assert np.all(np.asarray(gradient)[~np.asarray(mask)] == 0)
  return value, gradient


class Packing:
  """Lays samples [B, T] behind one another in two rows, a prompt before each.

  Token t of sample b goes to place (row[b], start[b] + 1 + t).
  """

  def __init__(self, mask):
    self.valid = np.asarray(mask)
    samples, capacity = self.valid.shape
    self.shape = (2, samples // 2 * (capacity + 1) + 3)
    self.segments = np.zeros(self.shape, np.int32)
    self.mask = np.zeros(self.shape, bool)
    self.places = []
    for b in range(samples):
      row, number = b % 2, b // 2 + 1
      start = int(np.count_nonzero(self.segments[row]))
      length = int(np.flatnonzero(self.valid[b]).max()) + 1
      self.segments[row, start : start + length + 1] = number
      self.places.append((row, start + 1, length))
      self.mask[row, start + 1 : start + 1 + length] = self.valid[b, :length]

  def pack(self, values, fill=np.nan):
    """Returns float[2, L], the fill wherever no token is trained on."""
    packed = np.full(self.shape, fill)
    for b, (row, start, length) in enumerate(self.places):
      packed[row, start : start + length] = np.asarray(values)[b, :length]
    return jnp.asarray(np.where(self.mask, packed, fill))

  def unpack(self, packed):
    """Returns [B, T], 0 outside the mask."""
    out = np.zeros(self.valid.shape)
    for b, (row, start, length) in enumerate(self.places):
      out[b, :length] = np.asarray(packed)[row, start : start + length]
    return np.where(self.valid, out, 0)
