"""How the tokens of a sample share what it is worth.

Whatever needs a whole optimizer batch (whitening, baselines, mean entropies)
is computed here, between the passes that score a batch and the update that is
split into microbatches. Functions of packed arrays [M, R, L].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlax_llm.config.algorithm import Algorithm
from rlax_llm.ops import batch_advantages
from rlax_llm.ops import distillation
from rlax_llm.ops import entropy_terms
from rlax_llm.ops import importance
from rlax_llm.ops import masking
from rlax_llm.ops import values
from rlax_llm.ops import variance_control
from rlax_llm.types import Array
from rlax_llm.types import Batch


def behaviour_logprobs(batch: Batch, old_logprobs: Array) -> Array:
  """Returns the log-probabilities under the policy that sampled, nats.

  Args:
    batch: says which tokens were scored under another policy.
    old_logprobs: float32, of the policy before the update: those of the rest.
  """
  return jnp.where(batch.scored, batch.scored_logprobs, old_logprobs)


def _sample_gap(batch: Batch) -> Array:
  """Returns log(pi_old / pi_behaviour) of whole samples, at their tokens."""
  gap = batch.old_logprobs - behaviour_logprobs(batch, batch.old_logprobs)
  return masking.sample_sum(batch.targets, gap, batch.segments)


def _last(batch: Batch) -> Array:
  """Returns bool: one token for each sample, its last."""
  return masking.tokens_left(batch.targets, batch.segments) == 1


def _sample(algorithm: Algorithm, batch: Batch) -> Batch:
  """Every token has its sample's advantage."""
  del algorithm
  return batch


def _gae(algorithm: Algorithm, batch: Batch) -> Batch:
  """Generalised advantages of a critic, whitened; its targets before that."""
  rewards = masking.select_masked(_last(batch), batch.advantages)
  found = values.generalised_advantages(
    rewards,
    batch.extra['values'],
    batch.targets,
    discount=algorithm.discount,
    trace=algorithm.trace,
    segments=batch.segments,
  )
  whitened = batch_advantages.whiten(found.advantages, batch.targets)
  return batch.replace(
    advantages=whitened, extra=batch.extra | {'returns': found.returns}
  )


def _minimum_variance(algorithm: Algorithm, batch: Batch) -> Batch:
  """Less b = sum(w^2 n A) / sum(w^2 n) of the group; VCPO.

  The constant that minimises E |w grad log pi (A - b)|^2, with n the squared
  norm of grad log pi, for groups that lie packed. A baseline moves with a shift
  of the rewards, so that A may be centred.
  """
  del algorithm
  last, groups = _last(batch), batch.groups
  total = lambda x: jax.ops.segment_sum(
    masking.select_masked(last, x).ravel(),
    groups.ravel(),
    num_segments=groups.size + 1,
  )[groups]
  gap = _sample_gap(batch)
  # Weights of a group count up to a factor; with its largest 1 nothing
  # overflows.
  largest = jax.ops.segment_max(
    masking.select_masked(last, gap, -jnp.inf).ravel(),
    groups.ravel(),
    num_segments=groups.size + 1,
  )[groups]
  reached = jnp.isfinite(largest)
  squares = jnp.exp(2 * (gap - jnp.where(reached, largest, 0)))
  shares = squares * batch.extra['squared_norms']
  shares = jnp.where(total(shares) > 0, shares, squares)
  baseline = total(shares * batch.advantages) / jnp.maximum(
    total(shares), jnp.finfo(jnp.float32).tiny
  )
  advantages = masking.select_masked(batch.targets, batch.advantages - baseline)
  return batch.replace(advantages=advantages)


def _distillation(algorithm: Algorithm, batch: Batch) -> Batch:
  """Plus the teacher's log-ratio."""
  gain = distillation.distillation_advantages(
    behaviour_logprobs(batch, batch.old_logprobs),
    batch.extra['teacher_logprobs'],
    batch.targets,
    coefficient=algorithm.distillation_coefficient,
    discount=algorithm.distillation_discount,
    segments=batch.segments,
  )
  return batch.replace(advantages=batch.advantages + gain)


def _uncertainty(algorithm: Algorithm, batch: Batch) -> Batch:
  """ECHO: uncertain tokens earn more, sure endings move less."""
  del algorithm
  confidence = batch.extra['confidence']
  shaped = entropy_terms.shaped_advantages(
    batch.advantages, batch.extra['entropy'], confidence, batch.targets
  )
  tail = entropy_terms.tail_confidence(
    confidence, batch.targets, segments=batch.segments
  )
  return batch.replace(
    advantages=shaped,
    extra=batch.extra | {'clip': entropy_terms.confidence_clip(tail)},
  )


def _progress(algorithm: Algorithm, batch: Batch) -> Batch:
  """MRT: plus what the token's episode added to the success."""
  gain = masking.select_masked(batch.targets, batch.extra['progress'])
  return batch.replace(
    advantages=batch.advantages + algorithm.progress_coefficient * gain
  )


CREDITS: dict[str, Callable[[Algorithm, Batch], Batch]] = {
  'sample': _sample,
  'gae': _gae,
  'minimum_variance': _minimum_variance,
  'distillation': _distillation,
  'uncertainty': _uncertainty,
  'progress': _progress,
}
# What a credit reads besides the samples; each is a pass over the batch.
_READS: dict[str, tuple[str, ...]] = {
  'sample': (),
  'gae': ('values',),
  'minimum_variance': ('old_logprobs', 'squared_norms'),
  'distillation': ('old_logprobs', 'teacher_logprobs'),
  'uncertainty': ('entropy', 'confidence'),
  'progress': (),
}


def _effective_samples(batch: Batch) -> Array:
  """Returns min(1, rho)^(1/2), rho the effective share of the samples."""
  ratio = importance.effective_sample_ratio(_sample_gap(batch), _last(batch))
  return variance_control.step_scale(ratio)


# What an optimizer step is multiplied by.
STEP_SCALES: dict[str, Callable[[Batch], Array] | None] = {
  'none': None,
  'effective_samples': _effective_samples,
}


def reads(algorithm: Algorithm) -> frozenset[str]:
  """Returns what has to be scored ahead of the update, by name.

  Args:
    algorithm: with its credit, step scale and target entropy.
  """
  names = set(_READS[algorithm.credit])
  if algorithm.step_scale != 'none':
    names.add('old_logprobs')
  if algorithm.entropy_target:
    names.add('entropy')
  return frozenset(names)


def reads_sampler(algorithm: Algorithm) -> bool:
  """Returns whether the policy that sampled a stale token is read."""
  return (
    algorithm.credit in ('minimum_variance', 'distillation')
    or algorithm.step_scale != 'none'
    or (algorithm.correction, algorithm.rejection) != ('none', 'none')
  )


def carried(algorithm: Algorithm) -> tuple[str, ...]:
  """Returns what samples bring along, by the names of `Sample.extra`."""
  names = []
  if algorithm.credit == 'progress':
    names.append('progress')
  if algorithm.rehearsal != 'none':
    names.append('rehearsed')
  return tuple(names)


def is_shaped(algorithm: Algorithm) -> bool:
  """Returns whether `shape` does anything."""
  return algorithm.credit != 'sample' or bool(reads(algorithm))


def shape(batch: Batch, *, algorithm: Algorithm) -> Batch:
  """Returns the optimizer batch with what its update reads.

  Args:
    batch: with what `reads` names in `extra`, and old log-probabilities.
    algorithm: static.
  """
  batch = CREDITS[algorithm.credit](algorithm, batch)
  more: dict[str, Array] = {}
  if algorithm.entropy_target:
    # The sign is that of the whole batch, before the first step on it.
    mean = masking.masked_mean(batch.targets, batch.extra['entropy'])
    tokens = jnp.maximum(jnp.sum(batch.targets), 1)
    more['entropy_slope'] = jnp.sign(mean - algorithm.entropy_target) / tokens
  scale = STEP_SCALES[algorithm.step_scale]
  if scale is not None:
    more['step_scale'] = scale(batch)
  return batch.replace(extra=batch.extra | more)
