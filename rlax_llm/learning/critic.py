"""The critic's passes: values of packed rows, and its optimizer step."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlax_llm.config.algorithm import Algorithm
from rlax_llm.learning import update as updates
from rlax_llm.models import heads
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops import values as value_ops
from rlax_llm.ops.masking import select_masked
from rlax_llm.types import Array
from rlax_llm.types import Batch
from rlax_llm.types import Metrics
from rlax_llm.types import Params
from rlax_llm.types import TrainState


class _Totals(flax.struct.PyTreeNode):
  """Sums over target tokens."""

  loss: Array
  clipped: Array
  returns: Array
  returns_squared: Array
  errors: Array
  errors_squared: Array


def _no_totals() -> _Totals:
  return _Totals(*(jnp.zeros(()) for _ in dataclasses.fields(_Totals)))


def value_batch(params: Params, batch: Batch, *, model: LanguageModel) -> Array:
  """Returns the value of the state before each token, float32[M, R, L].

  Args:
    params: the critic's.
    batch: packed samples.
    model: of `heads.make_critic`; static.
  """

  def one(i: Array, out: Array) -> Array:
    values = heads.token_values(
      params,
      batch.tokens[i],
      batch.positions[i],
      batch.segments[i],
      model=model,
    )
    return out.at[i].set(values)

  return jax.lax.fori_loop(
    0, batch.count, one, jnp.zeros(batch.tokens.shape, jnp.float32)
  )


def update(
  state: TrainState,
  batch: Batch,
  *,
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
  algorithm: Algorithm,
) -> tuple[TrainState, Metrics]:
  """Takes one optimizer step towards the returns of a batch.

  The loss is the mean over all target tokens of `values.value_loss`, whatever
  the policy's reduction is.

  Args:
    state: the critic's; donated by the caller.
    batch: with `values` and `returns` from before the first step on it.
    model: of `heads.make_critic`; static.
    optimizer: static.
    algorithm: static; its value_clip is read.

  Returns:
    (state, metrics under their fixed names; training values).
  """
  count = jnp.maximum(jnp.sum(batch.targets, dtype=jnp.float32), 1.0)

  def share(params: Params, part: Batch) -> tuple[Array, _Totals]:
    mask = part.targets
    values = heads.token_values(
      params, part.tokens, part.positions, part.segments, model=model
    )
    old = select_masked(mask, part.extra['values'])
    returns = select_masked(mask, part.extra['returns'])
    token = value_ops.value_loss(
      select_masked(mask, values),
      old,
      returns,
      clip=algorithm.value_clip or None,
    )
    loss = jnp.sum(select_masked(mask, token.loss)) / count
    total = lambda x: jnp.sum(select_masked(mask, x.astype(jnp.float32)))
    errors = returns - old
    totals = _Totals(
      loss=loss,
      clipped=total(token.clipped),
      returns=total(returns),
      returns_squared=total(jnp.square(returns)),
      errors=total(errors),
      errors_squared=total(jnp.square(errors)),
    )
    return loss, jax.lax.stop_gradient(totals)

  gradients, totals = updates.accumulate(
    state.params,
    batch,
    share,
    _no_totals(),
    lambda a, b: jax.tree.map(jnp.add, a, b),
    model=model,
  )
  state, norm, is_finite = updates.apply(
    state, gradients, totals.loss, model=model, optimizer=optimizer
  )
  spread = lambda total, squares: squares / count - jnp.square(total / count)
  variance = spread(totals.returns, totals.returns_squared)
  residual = spread(totals.errors, totals.errors_squared)
  explained = 1 - residual / jnp.where(variance > 1e-8, variance, 1.0)
  return state, {
    'critic/loss': totals.loss,
    'critic/grad_norm': norm,
    'critic/skipped': 1.0 - is_finite,
    'critic/clip_fraction': totals.clipped / count,
    'critic/value_mean': (totals.returns - totals.errors) / count,
    'critic/explained_variance': jnp.where(variance > 1e-8, explained, 0.0),
  }
