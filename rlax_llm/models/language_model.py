"""LanguageModel: a tuple of pure functions; and `score`, its log-probs."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlax_llm.models import lora
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.ops.sampling import Sampling
from rlax_llm.types import Array
from rlax_llm.types import Params


def _no_axes(params: Params) -> Any:
  """Every device holds every parameter."""
  return jax.tree.map(lambda leaf: (), params)


def _anywhere(tree: Params) -> Params:
  return tree


class LanguageModel(NamedTuple):
  """A model as data: functions of explicit parameters. Hashable, static.

  Attributes:
    init: (key) -> params.
    init_cache: (rows, capacity) -> empty KVCache.
    hidden: (params, tokens int32[R, L], positions int32[R, L],
      segments int32[R, L]) -> [R, L, D]; no cache, packed rows.
    extend: (params, tokens int32[N, W], positions int32[N, W],
      node_mask bool[N, W, E] or bool[W, E], cache, earlier=None) -> (hidden
      [N, W, D], KVNodes); the cache is read and not changed:
      `kv_cache.commit` writes what verification kept. `earlier` are the
      KVNodes of nodes of the same trees that a forward before this one
      evaluated; they come first in the mask, E = W without them.
    logits: (params, hidden [..., D]) -> float32[..., V]; apart, so that
      nobody materialises [rows, L, V].
    embed: (params, tokens int32[...]) -> [..., D], what the first layer reads.
    vocabulary: V.
    max_positions: positions the model can address.
    axes: (params or their shapes) -> the same tree, a tuple of logical axis
      names for each leaf; see `sharding.TABLE`.
    place: (tree like params) -> the same values, placed like the parameters;
      for gradients, while tracing.
    trainable: (params) -> the same tree of bools: what is trained.
    rounded: (params) -> the same tree, in the dtypes to which a forward rounds
      them anyway: whoever runs many forwards reads less.
  """

  init: Callable
  init_cache: Callable
  hidden: Callable
  extend: Callable
  logits: Callable
  embed: Callable
  vocabulary: int
  max_positions: int
  axes: Callable = _no_axes
  place: Callable = _anywhere
  trainable: Callable = lora.trainable
  rounded: Callable = _anywhere


class TokenScores(NamedTuple):
  """What `score_tokens` says of each token; nats; 0 where not a target."""

  logprobs: Array  # float32[R, L]
  entropy: Array  # float32[R, L] of the law the token was drawn from
  # float32[R, L], mean probability of the likeliest tokens; None: not wanted.
  confidence: Array | None = None


_LIKELIEST = 5  # tokens that confidence is the mean of; ECHO


def predictable(segments: Array) -> Array:
  """Returns bool[R, L - 1]: the next token is of the same segment."""
  return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def score_tokens(
  params: Params,
  tokens: Array,
  positions: Array,
  segments: Array,
  *,
  model: LanguageModel,
  sampling: Sampling,
  chunk: int,
  confidence: bool = False,
) -> TokenScores:
  """Scores every token of packed rows given the earlier ones of its segment.

  The value at (r, l) belongs to `tokens[r, l]`; it is 0 where no token of the
  same segment stands before it. Logits exist for `chunk` positions at a time
  and are recomputed in the backward pass, so that peak memory does not grow
  with L * V.

  Args:
    params: the model's.
    tokens: int32[R, L].
    positions: int32[R, L].
    segments: int32[R, L], 0 where there is no token.
    model: the model; static.
    sampling: the law whose log-probabilities are wanted; static.
    chunk: positions whose logits exist at one time; static.
    confidence: whether it is wanted; static.

  Returns:
    TokenScores.

  Raises:
    AssertionError: while tracing, if shapes or dtypes disagree.
  """
  chex.assert_equal_shape([tokens, positions, segments])
  chex.assert_type([tokens, positions, segments], jnp.int32)
  hidden = model.hidden(params, tokens, positions, segments)
  inside = predictable(segments)

  def scores(params: Params, hidden: Array, token: Array) -> TokenScores:
    law = sampling_ops.log_law(model.logits(params, hidden), sampling)
    logprobs = jnp.take_along_axis(law, token[:, None], axis=-1)[:, 0]
    sure = None
    if confidence:
      sure = sampling_ops.confidence(law, min(_LIKELIEST, model.vocabulary))
    return TokenScores(logprobs, sampling_ops.entropy(law), sure)

  result = map_chunks(
    scores, params, (hidden[:, :-1], tokens[:, 1:]), chunk=chunk
  )
  place = lambda x: jnp.pad(jnp.where(inside, x, 0.0), ((0, 0), (1, 0)))
  return jax.tree.map(place, result)


def map_chunks(
  function: Callable, params: Params, arrays: Sequence[Array], *, chunk: int
) -> Any:
  """Applies a function of positions to `chunk` of them at a time.

  What it makes for its result, logits for instance, exists for one chunk only
  and is computed again in the backward pass.

  Args:
    function: (params, *arrays [chunk, ...]) -> tree of arrays [chunk].
    params: a pytree.
    arrays: each [R, L, ...].
    chunk: positions; static.

  Returns:
    The tree, its arrays [R, L].
  """
  rows, length = arrays[0].shape[:2]
  count = rows * length
  chunk = min(chunk, count)
  chunks = -(-count // chunk)

  def cut(x: Array) -> Array:
    flat = x.reshape(count, *x.shape[2:])
    pad = [(0, chunks * chunk - count)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, pad).reshape(chunks, chunk, *x.shape[2:])

  one = jax.checkpoint(function)
  if chunks == 1:
    result = one(params, *(cut(x)[0] for x in arrays))
  else:
    result = jax.lax.map(
      lambda xs: one(params, *xs), tuple(cut(x) for x in arrays)
    )
  return jax.tree.map(
    lambda x: x.reshape(-1)[:count].reshape(rows, length), result
  )


def score(
  params: Params,
  tokens: Array,
  positions: Array,
  segments: Array,
  *,
  model: LanguageModel,
  sampling: Sampling,
  chunk: int,
) -> Array:
  """Returns the log-probabilities of `score_tokens`, float32[R, L], nats."""
  return score_tokens(
    params,
    tokens,
    positions,
    segments,
    model=model,
    sampling=sampling,
    chunk=chunk,
  ).logprobs
