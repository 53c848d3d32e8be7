"""The one law that tokens are sampled from, and the noise that samples it.

A token is the winner of a race (Gumbel-max with one logarithm): every token v
has an exponential clock E_v, and argmin_v(E_v / p_v) is distributed as p. The
clocks are a function of (sample key, position, token) and of nothing else, so
a sample's tokens do not depend on what else is in the batch, on how many
positions one forward verifies, or on when the sample is continued.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlax_llm.types import Array

_NEGATIVE_INFINITY = float('-inf')


class Sampling(NamedTuple):
  """A sampling law: temperature, then top-k, then top-p, then min-p.

  Attributes:
    temperature: logits are divided by it; 0 is greedy.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of most probable tokens whose probability
      reaches it; 1 keeps all.
    min_p: drop tokens less probable than min_p times the most probable one.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0


def log_law(logits: Array, sampling: Sampling) -> Array:
  """Returns the log-probabilities of the law that is sampled from.

  Plain sampling, verification, behaviour log-probabilities and training
  scores all call this function, so they cannot disagree on the law.

  Args:
    logits: float32[..., V].
    sampling: the law; static.

  Returns:
    float32[..., V], nats, normalised; -inf for excluded tokens. NaN where
    logits are NaN or +inf.
  """
  chex.assert_type(logits, float)
  if sampling.temperature == 0:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = token == best
    # 0, but NaN where no logit is the greatest, as at other temperatures.
    greatest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(hit, greatest - greatest, _NEGATIVE_INFINITY)
  if sampling.temperature != 1:
    logits = logits / sampling.temperature
  logits = _exclude(logits, sampling)
  return jax.nn.log_softmax(logits, axis=-1)


def _exclude(logits: Array, sampling: Sampling) -> Array:
  """Sets the logits that top-k, top-p and min-p drop to -inf."""
  vocabulary = logits.shape[-1]
  if 0 < sampling.top_k < vocabulary:
    kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, _NEGATIVE_INFINITY, logits)
  if sampling.top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # A token stays if the ones before it do not yet reach top_p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    cut = jnp.where(before < sampling.top_p, ranked, jnp.inf)
    least = jnp.min(cut, axis=-1, keepdims=True)
    logits = jnp.where(logits < least, _NEGATIVE_INFINITY, logits)
  if sampling.min_p > 0:
    best = jnp.max(logits, axis=-1, keepdims=True)
    floor = best + jnp.log(sampling.min_p)
    logits = jnp.where(logits < floor, _NEGATIVE_INFINITY, logits)
  return logits


def entropy(log_probabilities: Array) -> Array:
  """Returns -sum_v p_v log p_v in nats; excluded tokens count 0.

  Args:
    log_probabilities: float32[..., V], may hold -inf.
  """
  p = jnp.exp(log_probabilities)
  # The double where keeps 0 * inf out of the value and of the gradient.
  safe = jnp.where(p > 0, log_probabilities, 0.0)
  return -jnp.sum(p * safe, axis=-1)


def confidence(log_probabilities: Array, count: int) -> Array:
  """Returns the mean probability of the `count` likeliest tokens.

  Args:
    log_probabilities: float32[..., V].
    count: at most V, static.
  """
  return jnp.mean(jnp.exp(jax.lax.top_k(log_probabilities, count)[0]), axis=-1)


def sample_keys(
  seed: int, domain: Array, step: Array, request: Array, index: Array
) -> Array:
  """Returns the noise keys of samples: one key for each, used nowhere else.

  The key is `fold_in` of (seed, domain, step, request, index), so that no two
  samples of a run share one and a sample keeps its noise wherever it is
  continued.

  Args:
    seed: the run's seed.
    domain: int32[n], TRAIN or EVALUATE.
    step: int32[n], the step in which the sample was requested.
    request: int32[n], index of the request within the step.
    index: int32[n], index of the sample within the request's group.

  Returns:
    uint32[n, 2].
  """

  def one(domain: Array, step: Array, request: Array, index: Array) -> Array:
    key = jax.random.key(seed, impl='threefry2x32')
    for value in (domain, step, request, index):
      key = jax.random.fold_in(key, value)
    return jax.random.key_data(key)

  return jax.vmap(one)(domain, step, request, index)


def _mix(x: Array) -> Array:
  """A 32-bit bijection with good avalanche (two multiply-xorshift rounds).

  The constants are Chris Wellons' lowest-bias pair for this form
  (https://github.com/skeeto/hash-prospector).
  """
  x = x ^ (x >> 16)
  x = x * jnp.uint32(0x7FEB352D)
  x = x ^ (x >> 15)
  x = x * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def clocks(key: Array, position: Array, vocabulary: int) -> Array:
  """Returns the exponential clocks E_v of one position of one sample.

  E_v = -log(1 - u_v) with u_v uniform, from a counter-based hash of (key,
  position, v). Threefry for every verified position would dominate a decode
  step on CPU. Two words are derived per position and enter before and
  between the per-token rounds, so that two positions are not shifts of one
  another. Small clocks decide races; u is used near 0, where float32 resolves
  it to 2^-32, instead of near 1, where it would not.

  Args:
    key: uint32[2].
    position: int32[], of the token within the completion.
    vocabulary: V.

  Returns:
    float32[V], in (0, 17].
  """
  chex.assert_shape(key, (2,))
  counter = position.astype(jnp.uint32)
  first = _mix(_mix(key[0] + counter * jnp.uint32(0x9E3779B9)) ^ key[1])
  second = _mix(_mix(key[1] ^ first) + counter * jnp.uint32(0x85EBCA6B))
  token = jax.lax.iota(jnp.uint32, vocabulary)
  bits = _mix(_mix(token * jnp.uint32(0x9E3779B9) + first) ^ second)
  u = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
  # float32 rounds the largest values to 1, whose clock would be infinite.
  return -jnp.log1p(-jnp.minimum(u, jnp.float32(1.0 - 2.0**-24)))


def race(key: Array, position: Array, log_probabilities: Array) -> Array:
  """Returns the token that wins argmin_v(E_v / p_v): a sample of p.

  "Gumbel-max" with one logarithm; a drafter that runs the same race with its
  own law q picks the same token with probability at least
  (1 - TV(p, q)) / (1 + TV(p, q)).

  Args:
    key: uint32[2], the sample's key.
    position: int32[], of the token within the completion.
    log_probabilities: float32[V], nats; a log-law, or any shift of it.

  Returns:
    int32[].
  """
  return first(race_scores(key, position, log_probabilities))


def first(scores: Array) -> Array:
  """Returns int32[...]: who has the least of float32[..., V] scores."""
  # A minimum and a comparison vectorise on CPU; argmin does not, and takes
  # the hash and the logarithm down with it (3x slower).
  best = jnp.min(scores, axis=-1, keepdims=True)
  last = scores.shape[-1] - 1
  token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
  return jnp.min(jnp.where(scores == best, token, last), axis=-1)


def race_scores(key: Array, position: Array, log_probabilities: Array) -> Array:
  """Returns float32[V]: E_v / p_v, inf where p_v = 0. The least one wins."""
  e = clocks(key, position, log_probabilities.shape[-1])
  return e * jnp.exp(-log_probabilities)
