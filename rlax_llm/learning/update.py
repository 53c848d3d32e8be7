"""One optimizer step, and the scoring pass over the same packed rows."""

import dataclasses
from typing import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlax_llm.config import LearningConfig
from rlax_llm.learning.algorithms import Algorithm
from rlax_llm.learning.algorithms import LOSSES
from rlax_llm.learning.algorithms import Tokens
from rlax_llm.models import language_model
from rlax_llm.models import lora
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.divergences import DIVERGENCES
from rlax_llm.ops.masking import select_masked
from rlax_llm.ops.sampling import Sampling
from rlax_llm.types import Array
from rlax_llm.types import Batch
from rlax_llm.types import Metrics
from rlax_llm.types import Params
from rlax_llm.types import TrainState


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """The static facts of an update."""
  algorithm: Algorithm
  sampling: Sampling
  chunk: int  # positions whose logits exist at one time
  # One update per batch: old = stop_gradient(current), exactly. Otherwise
  # `Batch.old_logprobs` is read.
  old_is_current: bool
  # `Batch.old_logprobs` holds the sampler's: no yardstick for the sampler.
  old_is_behaviour: bool = False


class _Totals(flax.struct.PyTreeNode):
  """Sums over target tokens, and maxima; divided once, at the end."""
  loss: Array
  tokens: Array
  clipped: Array
  entropy: Array
  divergence: Array
  approximate_kl: Array
  ratio_max: Array
  gap_max: Array


def make_optimizer(config: LearningConfig,
                   total_steps: int) -> optax.GradientTransformation:
  """Returns AdamW behind a clip of the global gradient norm.

  Args:
    config: frozen section.
    total_steps: optimizer steps of the run, where a schedule ends.
  """
  schedule = make_schedule(config, total_steps)
  return optax.chain(
      optax.clip_by_global_norm(config.max_grad_norm),
      optax.adamw(schedule,
                  b1=config.b1,
                  b2=config.b2,
                  eps=config.epsilon,
                  weight_decay=config.weight_decay))


def make_schedule(config: LearningConfig,
                  total_steps: int) -> Callable[[Array], Array]:
  """Returns the learning rate by optimizer step: warm-up, then the schedule.

  Args:
    config: frozen section; `schedule` is constant, linear or cosine.
    total_steps: where linear and cosine reach 0.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(total_steps - warmup, 1)
  after = {
      'constant': optax.constant_schedule(peak),
      'linear': optax.linear_schedule(peak, 0.0, rest),
      'cosine': optax.cosine_decay_schedule(peak, rest),
  }[config.schedule]
  if not warmup:
    return after
  # Step 0 already learns: a first step of rate 0 would waste its rollouts.
  rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  return optax.join_schedules([rise, after], [warmup])


def init_state(params: Params, *, model: LanguageModel,
               optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step.

  The optimizer keeps a state for what is trained only.
  """
  trained, _ = lora.split(params, model.trainable(params))
  return TrainState(step=jnp.zeros((), jnp.int32),
                    params=params,
                    opt_state=optimizer.init(trained))


def _loss(params: Params, batch: Batch, model: LanguageModel,
          config: UpdateConfig) -> tuple[Array, _Totals]:
  """The share of one microbatch, [R, L], in the loss."""
  algorithm = config.algorithm
  scores = language_model.score_tokens(params,
                                       batch.tokens,
                                       batch.positions,
                                       batch.segments,
                                       model=model,
                                       sampling=config.sampling,
                                       chunk=config.chunk)
  mask = batch.targets
  # Masked before any arithmetic: garbage behind the mask, NaN included,
  # reaches neither the loss nor the gradient.
  logprobs = select_masked(mask, scores.logprobs)
  entropy = select_masked(mask, scores.entropy)
  advantages = select_masked(mask, batch.advantages)
  reference = select_masked(mask, batch.reference_logprobs)
  behaviour = select_masked(mask, batch.behaviour_logprobs)
  if config.old_is_current:
    old = jax.lax.stop_gradient(logprobs)
  else:
    old = select_masked(mask, batch.old_logprobs)
  recomputed = logprobs if config.old_is_behaviour else old
  token = LOSSES[algorithm.loss](algorithm,
                                 Tokens(logprobs, old, advantages, mask,
                                        batch.segments))
  per_token = token.loss
  divergence = jnp.zeros_like(logprobs)
  if algorithm.kl_coefficient:
    divergence = DIVERGENCES[algorithm.divergence](logprobs, reference)
    per_token = per_token + algorithm.kl_coefficient * divergence
  if algorithm.entropy_coefficient:
    per_token = per_token - algorithm.entropy_coefficient * entropy
  loss = jnp.sum(select_masked(mask, batch.weights) * per_token)
  total = lambda x: jnp.sum(select_masked(mask, x.astype(jnp.float32)))
  totals = _Totals(loss=loss,
                   tokens=jnp.sum(mask, dtype=jnp.float32),
                   clipped=total(token.clipped),
                   entropy=total(entropy),
                   divergence=total(divergence),
                   approximate_kl=total(old - logprobs),
                   ratio_max=jnp.max(select_masked(mask, token.ratio)),
                   gap_max=jnp.max(jnp.abs(behaviour - recomputed)))
  return loss, jax.lax.stop_gradient(totals)


def _merge(a: _Totals, b: _Totals) -> _Totals:
  return jax.tree.map(jnp.add, a,
                      b).replace(ratio_max=jnp.maximum(a.ratio_max,
                                                       b.ratio_max),
                                 gap_max=jnp.maximum(a.gap_max, b.gap_max))


def update(state: TrainState, batch: Batch, *, model: LanguageModel,
           optimizer: optax.GradientTransformation,
           config: UpdateConfig) -> tuple[TrainState, Metrics]:
  """Takes one optimizer step on a batch.

  Gradients are summed over the microbatches that hold anything, in a loop of
  dynamic length: shapes do not depend on how long the completions came out.
  `Batch.weights` carries global denominators, so the number of microbatches
  and of devices changes the update by rounding only.

  Args:
    state: donated by the caller.
    batch: packed samples, [M, R, L].
    model: static.
    optimizer: static.
    config: static.

  Returns:
    (state, metrics under their fixed names; training values).
  """
  trained, frozen = lora.split(state.params, model.trainable(state.params))
  zeros = model.place(
      jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained))
  none = _Totals(*(jnp.zeros(()) for _ in dataclasses.fields(_Totals)))
  arrays = {
      f.name: getattr(batch, f.name)
      for f in dataclasses.fields(Batch)
      if f.name != 'count'
  }

  def accumulate(i: Array, carry: tuple) -> tuple:
    gradients, totals = carry
    part = Batch(count=batch.count, **{k: v[i] for k, v in arrays.items()})
    share = lambda p: _loss(lora.join(p, frozen), part, model, config)
    (_, more), gradient = jax.value_and_grad(share, has_aux=True)(trained)
    gradients = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradients,
                             model.place(gradient))
    return gradients, _merge(totals, more)

  gradients, totals = jax.lax.fori_loop(0, batch.count, accumulate,
                                        (zeros, none))
  gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, trained)
  changes, opt_state = optimizer.update(gradients, state.opt_state, trained)
  norm = optax.global_norm(gradients)
  # One bad batch must not end a run: nothing but the step count moves then.
  sound = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(sound, n, o), new,
                                       old)
  params = lora.join(keep(optax.apply_updates(trained, changes), trained),
                     frozen)
  opt_state = keep(opt_state, state.opt_state)
  mean = lambda x: x / jnp.maximum(totals.tokens, 1.0)
  metrics = {
      'learning/loss': totals.loss,
      'learning/grad_norm': norm,
      'learning/skipped': 1.0 - sound,
      'policy/entropy': mean(totals.entropy),
      'policy/clip_fraction': mean(totals.clipped),
      'policy/ratio_max': totals.ratio_max,
      'policy/approximate_kl': mean(totals.approximate_kl),
      'policy/behaviour_gap_max': totals.gap_max,
  }
  if config.algorithm.kl_coefficient:
    metrics['policy/kl_reference'] = mean(totals.divergence)
  return TrainState(step=state.step + 1, params=params,
                    opt_state=opt_state), metrics


def score_batch(params: Params, batch: Batch, *, model: LanguageModel,
                config: UpdateConfig) -> Array:
  """Returns the log-probabilities of every token, float32[M, R, L], nats.

  The pass that gives `old` and reference log-probabilities: of fixed shape,
  hence free of speed values.
  """

  def one(i: Array, out: Array) -> Array:
    logprobs = language_model.score(params,
                                    batch.tokens[i],
                                    batch.positions[i],
                                    batch.segments[i],
                                    model=model,
                                    sampling=config.sampling,
                                    chunk=config.chunk)
    return out.at[i].set(logprobs)

  return jax.lax.fori_loop(0, batch.count, one,
                           jnp.zeros(batch.tokens.shape, jnp.float32))
