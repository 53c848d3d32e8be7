"""One optimizer step, and the scoring passes over the same packed rows."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlax_llm.config import LearningConfig
from rlax_llm.config.algorithm import Algorithm
from rlax_llm.learning import objectives
from rlax_llm.learning import token_credit
from rlax_llm.learning.objectives import Tokens
from rlax_llm.models import language_model
from rlax_llm.models import lora
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops import divergences
from rlax_llm.ops import f_divergences
from rlax_llm.ops import losses
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
  # recompute | scored | sampler: see LearningConfig.
  old_logprobs: str = 'recompute'


class _Totals(flax.struct.PyTreeNode):
  """Sums over target tokens, and extremes; divided once, at the end."""

  loss: Array
  tokens: Array
  clipped: Array
  rejected: Array
  entropy: Array
  divergence: Array
  divergence_k3: Array
  approximate_kl: Array
  ratio: Array
  ratio_max: Array
  ratio_min: Array
  weight: Array  # pi / pi_behaviour
  weight_squared: Array
  gap_max: Array
  rehearsed: Array  # tokens of the initial policy
  rehearsal: Array  # divergence on them


def _no_totals() -> _Totals:
  zeros = {f.name: jnp.zeros(()) for f in dataclasses.fields(_Totals)}
  return _Totals(**(zeros | {'ratio_min': jnp.full((), jnp.inf)}))


# The last name of every parameter that is a matrix of a linear map: those of
# the trunk and of the critic's value, the untied head, A and B of an adapter.
# Norms, biases and the embedding have other names. Shapes do not tell: the bias
# of the joint projection has three axes, the critic's value one.
MATRICES = ('kernel', 'head', 'a', 'b')


def is_decayed(params: Params) -> Any:
  """Returns the tree with True for what weight decay applies to: matrices.

  Norms, biases and the embedding are not decayed, nor is a head that is tied to
  the embedding.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) in MATRICES,
    params,
  )


def _decay_matrices(rate: float) -> optax.GradientTransformation:
  """Returns weight decay of matrices, of stateless form.

  `optax.add_decayed_weights` with a mask nests its state: checkpoints with and
  without weight decay would differ in structure.
  """

  def decay(changes: Params, params: Params) -> Params:
    if not rate:
      return changes
    return jax.tree.map(
      lambda g, p, decayed: g + rate * p if decayed else g,
      changes,
      params,
      is_decayed(params),
    )

  return optax.stateless(decay)


def make_optimizer(
  config: LearningConfig, total_steps: int
) -> optax.GradientTransformation:
  """Returns AdamW after a clip of the global gradient norm.

  "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101;
  the decay is that of `is_decayed`.

  Args:
    config: frozen section.
    total_steps: optimizer steps of the run, where a schedule ends.
  """
  # What `optax.adamw` is made of, with a decay of its own.
  adamw = optax.chain(
    optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
    _decay_matrices(config.weight_decay),
    optax.scale_by_learning_rate(make_schedule(config, total_steps)),
  )
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def make_schedule(
  config: LearningConfig, total_steps: int
) -> Callable[[Array], Array]:
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


def init_state(
  params: Params,
  *,
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """Returns the state before the first step.

  The optimizer keeps a state for what is trained only.
  """
  trained, _ = lora.split(params, model.trainable(params))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trained),
  )


def _loss(
  params: Params, batch: Batch, model: LanguageModel, config: UpdateConfig
) -> tuple[Array, _Totals]:
  """The share of one microbatch, [R, L], in the loss."""
  algorithm = config.algorithm
  scores = language_model.score_tokens(
    params,
    batch.tokens,
    batch.positions,
    batch.segments,
    model=model,
    sampling=config.sampling,
    chunk=config.chunk,
  )
  mask, rehearsed = batch.targets, jnp.zeros_like(batch.targets)
  if algorithm.rehearsal != 'none':
    rehearsed = mask & (batch.extra['rehearsed'] > 0)
    mask = mask & ~rehearsed
  # Masked before any arithmetic: garbage behind the mask, NaN included,
  # reaches neither the loss nor the gradient.
  logprobs = select_masked(mask, scores.logprobs)
  entropy = select_masked(mask, scores.entropy)
  reference = select_masked(mask, batch.reference_logprobs)
  now = jax.lax.stop_gradient(logprobs)
  old = select_masked(mask, batch.old_logprobs)
  if config.old_is_current:
    old = now
  behaviour = select_masked(mask, token_credit.behaviour_logprobs(batch, old))
  if config.old_logprobs == 'scored':
    old = behaviour
  tokens = Tokens(
    logprobs,
    old,
    behaviour,
    select_masked(mask, batch.advantages),
    mask,
    batch.segments,
    {
      name: select_masked(mask, value)
      for name, value in batch.extra.items()
      if value.ndim
    },
  )
  corrected = objectives.token_loss(algorithm, tokens)
  token = corrected.token
  per_token = token.loss
  divergence = jnp.zeros_like(logprobs)
  if algorithm.kl_coefficient:
    divergence = divergences.DIVERGENCES[algorithm.divergence](
      logprobs, reference
    )
    per_token = per_token + algorithm.kl_coefficient * divergence
  if algorithm.entropy_coefficient and not algorithm.entropy_target:
    per_token = per_token - algorithm.entropy_coefficient * entropy
  loss = jnp.sum(select_masked(mask, batch.weights) * per_token)
  if algorithm.entropy_target:
    # Sums to coefficient * |mean entropy - target| over the whole batch.
    above = select_masked(mask, entropy - algorithm.entropy_target)
    loss = loss + (
      algorithm.entropy_coefficient
      * batch.extra['entropy_slope']
      * jnp.sum(above)
    )
  rehearsal = jnp.zeros_like(logprobs)
  if algorithm.rehearsal != 'none':
    apart = f_divergences.F_DIVERGENCES[algorithm.rehearsal]
    initial = select_masked(rehearsed, batch.scored_logprobs)
    rehearsal = apart(select_masked(rehearsed, scores.logprobs), initial)
    loss = loss + algorithm.rehearsal_coefficient * jnp.sum(
      select_masked(rehearsed, batch.weights) * rehearsal
    )
  total = lambda x: jnp.sum(select_masked(mask, x.astype(jnp.float32)))
  k3 = jnp.zeros_like(logprobs)
  if algorithm.kl_coefficient:
    k3 = divergences.k3(now, reference)
  sampler = select_masked(mask, batch.behaviour_logprobs)
  # No yardstick for itself.
  trainer = now if config.old_logprobs == 'sampler' else behaviour
  weight = losses.importance_ratio(now, behaviour)
  totals = _Totals(
    loss=loss,
    tokens=jnp.sum(mask, dtype=jnp.float32),
    clipped=total(token.clipped),
    rejected=total(corrected.rejected),
    entropy=total(entropy),
    divergence=total(divergence),
    divergence_k3=total(k3),
    approximate_kl=total(old - logprobs),
    ratio=total(token.ratio),
    ratio_max=jnp.max(select_masked(mask, token.ratio)),
    ratio_min=jnp.min(select_masked(mask, token.ratio, jnp.inf)),
    weight=total(weight),
    weight_squared=total(jnp.square(weight)),
    gap_max=jnp.max(jnp.abs(sampler - trainer)),
    rehearsed=jnp.sum(rehearsed, dtype=jnp.float32),
    rehearsal=jnp.sum(rehearsal),
  )
  return loss, jax.lax.stop_gradient(totals)


def _merge(a: _Totals, b: _Totals) -> _Totals:
  return jax.tree.map(jnp.add, a, b).replace(
    ratio_max=jnp.maximum(a.ratio_max, b.ratio_max),
    ratio_min=jnp.minimum(a.ratio_min, b.ratio_min),
    gap_max=jnp.maximum(a.gap_max, b.gap_max),
  )


def microbatch(batch: Batch, i: Array | int) -> Batch:
  """Returns one microbatch, arrays [R, L]; scalars stay."""
  return jax.tree.map(lambda x: x[i] if x.ndim else x, batch)


def accumulate(
  params: Params,
  batch: Batch,
  share: Callable[[Params, Batch], tuple[Array, Any]],
  empty: Any,
  merge: Callable[[Any, Any], Any],
  *,
  model: LanguageModel,
) -> tuple[Params, Any]:
  """Sums gradients over the microbatches of a batch.

  The loop has a dynamic length, that of the microbatches that hold anything:
  shapes do not depend on how long the completions came out. Sums over several
  batches may be added before `apply`.

  Args:
    params: the policy's or the critic's.
    batch: packed samples, [M, R, L].
    share: (params, microbatch) -> (its share of the loss, totals).
    empty: the totals of no microbatch.
    merge: (totals, totals) -> totals.
    model: static; says which parameters are trained.

  Returns:
    (gradients of the trained parameters, float32; totals).
  """
  trained, frozen = lora.split(params, model.trainable(params))
  zeros = model.place(
    jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
  )

  def add(i: Array, carry: tuple) -> tuple:
    gradients, totals = carry
    part = microbatch(batch, i)
    (_, more), gradient = jax.value_and_grad(
      lambda p: share(lora.join(p, frozen), part), has_aux=True
    )(trained)
    gradients = jax.tree.map(
      lambda a, b: a + b.astype(a.dtype), gradients, model.place(gradient)
    )
    return gradients, merge(totals, more)

  return jax.lax.fori_loop(0, batch.count, add, (zeros, empty))


def apply(
  state: TrainState,
  gradients: Params,
  loss: Array,
  *,
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
  scale: Array | None = None,
) -> tuple[TrainState, Array, Array]:
  """Takes one optimizer step on accumulated gradients.

  Args:
    state: donated by the caller.
    gradients: from `accumulate`.
    loss: float32[]; a loss that is not finite moves nothing.
    model: static.
    optimizer: static.
    scale: float32[], of the step that the optimizer asks for; None: 1.

  Returns:
    (state, global norm of the gradient, whether loss and norm are finite: if
    not, only the step count moves).
  """
  trained, frozen = lora.split(state.params, model.trainable(state.params))
  gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, trained)
  changes, opt_state = optimizer.update(gradients, state.opt_state, trained)
  norm = optax.global_norm(gradients)
  # One bad batch must not end a run.
  is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  keep = lambda new, old: jax.tree.map(
    lambda n, o: jnp.where(is_finite, n, o), new, old
  )
  if scale is not None:
    changes = jax.tree.map(lambda x: (scale * x).astype(x.dtype), changes)
  params = lora.join(
    keep(optax.apply_updates(trained, changes), trained), frozen
  )
  state = TrainState(
    step=state.step + 1,
    params=params,
    opt_state=keep(opt_state, state.opt_state),
  )
  return state, norm, is_finite


def update(
  state: TrainState,
  batch: Batch,
  *,
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
  config: UpdateConfig,
) -> tuple[TrainState, Metrics]:
  """Takes one optimizer step on a batch.

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
  scale = batch.extra.get('step_scale')
  gradients, totals = accumulate(
    state.params,
    batch,
    lambda params, part: _loss(params, part, model, config),
    _no_totals(),
    _merge,
    model=model,
  )
  state, norm, is_finite = apply(
    state, gradients, totals.loss, model=model, optimizer=optimizer, scale=scale
  )
  mean = lambda x: x / jnp.maximum(totals.tokens, 1.0)
  metrics = {
    'learning/loss': totals.loss,
    'learning/grad_norm': norm,
    'learning/skipped': 1.0 - is_finite,
    'policy/entropy': mean(totals.entropy),
    'policy/clip_fraction': mean(totals.clipped),
    'policy/ratio_mean': mean(totals.ratio),
    'policy/ratio_max': totals.ratio_max,
    'policy/ratio_min': jnp.where(totals.tokens > 0, totals.ratio_min, 0.0),
    'policy/effective_tokens': (
      jnp.square(totals.weight)
      / jnp.maximum(totals.tokens * totals.weight_squared, 1e-30)
    ),
    'policy/approximate_kl': mean(totals.approximate_kl),
    'policy/behaviour_gap_max': totals.gap_max,
  }
  algorithm = config.algorithm
  if (algorithm.correction, algorithm.rejection) != ('none', 'none'):
    metrics['policy/rejected_fraction'] = mean(totals.rejected)
  if algorithm.kl_coefficient:
    metrics['policy/kl_reference'] = mean(totals.divergence)
  if algorithm.kl_coefficient:
    metrics['policy/kl_reference_k3'] = mean(totals.divergence_k3)
  if algorithm.rehearsal != 'none':
    metrics['policy/rehearsal_divergence'] = totals.rehearsal / jnp.maximum(
      totals.rehearsed, 1.0
    )
  if scale is not None:
    metrics['learning/step_scale'] = scale
  return state, metrics


def score_pass(
  params: Params,
  batch: Batch,
  *,
  model: LanguageModel,
  config: UpdateConfig,
  names: tuple[str, ...],
) -> dict[str, Array]:
  """Returns what a policy says of every token, float32[M, R, L] by name.

  The pass that gives `old` and reference log-probabilities: of fixed shape,
  hence free of speed values.

  Args:
    params: the policy's.
    batch: packed samples.
    model: static.
    config: static.
    names: of logprobs, entropy and confidence; static.
  """

  def one(i: Array, out: dict[str, Array]) -> dict[str, Array]:
    scores = language_model.score_tokens(
      params,
      batch.tokens[i],
      batch.positions[i],
      batch.segments[i],
      model=model,
      sampling=config.sampling,
      chunk=config.chunk,
      confidence='confidence' in names,
    )
    return {
      name: array.at[i].set(getattr(scores, name))
      for name, array in out.items()
    }

  empty = jnp.zeros(batch.tokens.shape, jnp.float32)
  return jax.lax.fori_loop(0, batch.count, one, {name: empty for name in names})


def score_batch(
  params: Params, batch: Batch, *, model: LanguageModel, config: UpdateConfig
) -> Array:
  """Returns the log-probabilities of `score_pass`, float32[M, R, L], nats."""
  return score_pass(
    params, batch, model=model, config=config, names=('logprobs',)
  )['logprobs']
