"""Heads on the trunk of a language model: the critic's value."""

from typing import Any

import jax
import jax.numpy as jnp

from rlax_llm.models import language_model
from rlax_llm.models import precision as precisions
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.types import Array
from rlax_llm.types import Params


def make_critic(model: LanguageModel) -> LanguageModel:
  """Returns a model whose `logits` are values, float32[...].

  The trunk is that of `model`, with parameters of its own, and one linear map
  of the hidden state, without a bias and zero at first, takes the place of the
  head: a new critic says 0. Its parameters are {'trunk', 'value'}; the trunk's
  embedding is read as an input only, and a head of the trunk's not at all.

  Args:
    model: the policy's.
  """

  def init(key: Array) -> Params:
    trunk = model.init(key)
    row = jnp.zeros((1, 1), jnp.int32)
    state = jax.eval_shape(model.hidden, trunk, row, row, row + 1)
    return {
      'trunk': trunk,
      'value': {'kernel': jnp.zeros(state.shape[-1], jnp.float32)},
    }

  def hidden(params: Params, *rows: Array) -> Array:
    return model.hidden(params['trunk'], *rows)

  def logits(params: Params, hidden: Array) -> Array:
    return jnp.dot(
      hidden.astype(jnp.float32),
      params['value']['kernel'],
      precision=precisions.of_products(jnp.float32),
    )

  def each(of_trunk: Any, head: Any) -> Any:
    return lambda params: {
      'trunk': of_trunk(params['trunk']),
      'value': {'kernel': head(params['value']['kernel'])},
    }

  return model._replace(
    init=init,
    hidden=hidden,
    logits=logits,
    axes=each(model.axes, lambda leaf: (None,)),
    place=each(model.place, lambda leaf: leaf),
    trainable=each(model.trainable, lambda leaf: True),
    rounded=each(model.rounded, lambda leaf: leaf),
  )


def with_value(critic: LanguageModel, trunk: Params) -> Params:
  """Returns the parameters of a new critic on a trunk.

  Args:
    critic: from `make_critic`.
    trunk: the policy's parameters.
  """
  shapes = jax.eval_shape(critic.init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes['value'])
  return {'trunk': jax.tree.map(jnp.copy, trunk), 'value': zeros}


def token_values(
  params: Params,
  tokens: Array,
  positions: Array,
  segments: Array,
  *,
  model: LanguageModel,
) -> Array:
  """Returns the value of the state before each token, float32[R, L].

  The hidden state from which a token is predicted gives the value that stands
  at that token: it never sees the token itself. 0 where no token of the same
  segment stands before it.

  Args:
    params: the critic's.
    tokens: int32[R, L].
    positions: int32[R, L].
    segments: int32[R, L], 0 where there is no token.
    model: from `make_critic`; static.
  """
  values = model.logits(
    params, model.hidden(params, tokens, positions, segments)
  )
  inside = language_model.predictable(segments)
  return jnp.pad(jnp.where(inside, values[:, :-1], 0.0), ((0, 0), (1, 0)))
