# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""The vocabulary of metrics: each name with its unit, kind and meaning."""

from collections.abc import Iterable
from collections.abc import Mapping
import math
import re
from typing import NamedTuple


class Metric(NamedTuple):
  """One entry of the vocabulary."""

  unit: str  # '1' where it has none
  kind: str  # training | evaluation | speed
  meaning: str


TRAINING, EVALUATION, SPEED = 'training', 'evaluation', 'speed'
_T, _E, _S = TRAINING, EVALUATION, SPEED
METRICS: dict[str, Metric] = {
  'reward/mean': Metric('1', _T, 'mean known reward of the step'),
  'reward/correct': Metric(
    '1', _T, "mean of the task's own reward, before its weight"
  ),
  'reward/format': Metric(
    'fraction', _T, 'completions with an answer in its place'
  ),
  'reward/length': Metric(
    '1', _T, 'mean punishment of length, before its weight'
  ),
  'reward/std': Metric('1', _T, 'standard deviation of the reward'),
  'reward/unscorable': Metric(
    'samples', _T, 'samples the verifier could not judge'
  ),
  'reward/groups_with_signal': Metric(
    'fraction', _T, 'groups whose correctness differs'
  ),
  'reward/forced': Metric(
    '1', _T, 'mean score of answers forced in the middle'
  ),
  'reward/label_accuracy': Metric(
    'fraction', _T, 'prompts whose majority answer is right'
  ),
  'reward/label_agreement': Metric(
    'fraction', _T, "pseudo-rewards that are the verifier's"
  ),
  'learning/skipped': Metric(
    'fraction', _T, 'optimizer steps skipped: not finite'
  ),
  'rollout/rehearsal_samples': Metric(
    'samples', _T, 'of the initial policy, kept for rehearsal'
  ),
  'rollout/tokens': Metric('tokens', _T, 'completion tokens of the step'),
  'rollout/sampled_tokens': Metric(
    'tokens', _T, 'sampled in the step, up to the cut'
  ),
  'rollout/trained_tokens': Metric(
    'tokens', _T, 'trained on for the first time'
  ),
  'rollout/buffered_tokens': Metric(
    'tokens', _T, 'sampled, and kept for coming steps'
  ),
  'rollout/dropped_tokens': Metric(
    'tokens', _T, 'of groups that are never trained on'
  ),
  'rollout/left_out_prompts': Metric(
    'prompts', _T, 'too long or not encodable, hence not sampled'
  ),
  'rollout/pending_groups': Metric(
    'groups', _T, 'put off, to be continued in the next step'
  ),
  'rollout/extra_samples': Metric(
    'samples', _T, 'asked for beyond samples_per_prompt'
  ),
  'rollout/length_tau': Metric(
    '1', _T, "Kendall's tau of predicted and mean group lengths"
  ),
  'prune/head_loss': Metric(
    'nats', _T, 'of the head that predicts success, as it prunes'
  ),
  'prune/success': Metric(
    '1', _T, 'mean success in [0, 1], as if nothing were pruned'
  ),
  'prune/kept_success': Metric(
    '1', _T, 'mean success in [0, 1] of those that went on'
  ),
  'prune/effective_share': Metric(
    'fraction', _T, 'effective samples of the weighted ones'
  ),
  'rollout/refills': Metric('1', _T, 'times that more groups were asked for'),
  'rollout/length_mean': Metric('tokens', _T, 'mean completion length'),
  'rollout/length_p50': Metric('tokens', _T, 'median completion length'),
  'rollout/length_p95': Metric(
    'tokens', _T, '95th percentile of the completion length'
  ),
  'rollout/length_max': Metric('tokens', _T, 'longest completion'),
  'rollout/truncated_fraction': Metric(
    'fraction', _T, 'completions that did not emit EOS'
  ),
  'policy/kl_reference': Metric(
    'nats', _T, "KL from the reference, by the loss's estimator"
  ),
  'policy/kl_reference_k3': Metric(
    'nats', _T, 'KL from the reference by k3, in the loss or not'
  ),
  'policy/entropy': Metric(
    'nats', _T, 'entropy of the policy before the update, per token'
  ),
  'policy/clip_fraction': Metric(
    'fraction', _T, 'tokens that the loss clips after the update'
  ),
  'policy/ratio_max': Metric(
    '1', _T, 'largest probability ratio, after to before the update'
  ),
  'policy/ratio_mean': Metric(
    '1', _T, 'mean probability ratio, after to before the update'
  ),
  'policy/ratio_min': Metric(
    '1', _T, 'least probability ratio, after to before the update'
  ),
  'policy/effective_tokens': Metric(
    'fraction', _T, 'tokens left by weights new / sampling policy'
  ),
  'policy/rehearsal_divergence': Metric(
    'nats', _T, "of what is rehearsed, by the loss's divergence"
  ),
  'policy/rejected_fraction': Metric(
    'fraction', _T, 'tokens dropped for a stale sampler'
  ),
  'policy/behaviour_gap_max': Metric(
    'nats', _S, 'largest |behaviour - recomputed| log-probability'
  ),
  'policy/approximate_kl': Metric(
    'nats', _T, 'mean of old - new log-probability over the update'
  ),
  'policy/staleness_mean': Metric(
    'steps', _T, 'age of the policy that sampled a token'
  ),
  'policy/staleness_max': Metric(
    'steps', _T, 'age of the oldest policy that sampled a token'
  ),
  'learning/loss': Metric('1', _T, 'the loss'),
  'learning/grad_norm': Metric(
    '1', _T, 'global norm of the gradient, before clipping'
  ),
  'learning/learning_rate': Metric('1', _T, 'learning rate of the step'),
  'learning/leap': Metric(
    '1', _T, 'how far a leap went, by what led to it; 0: none'
  ),
  'learning/leap_accuracy': Metric(
    'fraction', _T, "a leap's training problems solved, after it"
  ),
  'learning/step_scale': Metric('1', _T, "factor of the optimizer's step"),
  'learning/trained_fraction': Metric(
    'fraction', _T, 'samples that are trained on: filter, reward known'
  ),
  'critic/loss': Metric('1', _T, 'value loss, mean over tokens'),
  'critic/grad_norm': Metric(
    '1', _T, "norm of the critic's gradient, before clipping"
  ),
  'critic/clip_fraction': Metric(
    'fraction', _T, 'tokens whose value was clipped'
  ),
  'critic/value_mean': Metric('1', _T, 'mean value before the update'),
  'critic/explained_variance': Metric(
    '1', _T, '1 - Var(returns - values) / Var(returns)'
  ),
  'learning/padding_fraction': Metric(
    'fraction', _T, 'positions of the packed batch with no token'
  ),
  'sft/loss': Metric('nats', _T, 'warm start: cross-entropy per token'),
  'evaluate/accuracy': Metric(
    'fraction', _E, 'held-out problems solved, mean over samples'
  ),
  'evaluate/unscorable': Metric(
    'samples', _E, 'that the verifier could not judge: wrong'
  ),
  'evaluate/tokens_mean': Metric('tokens', _E, 'of an answer, without probes'),
  'evaluate/probe_tokens_mean': Metric(
    'tokens', _E, 'of the probes of an answer'
  ),
  'evaluate/stopped_fraction': Metric(
    'fraction', _E, 'answers that ended because probes agreed'
  ),
  'rollout/tokens_per_second': Metric(
    'tokens/s', _S, 'completion tokens per second of rollout'
  ),
  'rollout/accept_length': Metric(
    'tokens', _S, 'tokens committed per sequence and forward'
  ),
  'rollout/drafted_fraction': Metric(
    'fraction', _S, 'tokens that were accepted drafts'
  ),
  'rollout/forwards': Metric('forwards', _S, 'forwards of the rollout'),
  'rollout/width_mean': Metric(
    'nodes', _S, 'nodes verified in one forward, mean'
  ),
  'rollout/ahead_tokens': Metric(
    'tokens', _S, 'sampled for a coming step, as hints to drafts'
  ),
  'rollout/discarded_tokens': Metric(
    'tokens', _S, 'beyond the cut, as hints to drafts'
  ),
  'rollout/cache_bytes': Metric(
    'bytes', _S, 'host memory of the earlier rollouts'
  ),
  'rollout/cached_prompts': Metric(
    'prompts', _S, 'prompts with earlier rollouts'
  ),
  'drafter/loss': Metric('1', _S, "the drafter's loss, mean over its updates"),
  'drafter/updates': Metric('updates', _S, 'of the drafter, in the step'),
  'drafter/idle_updates': Metric(
    'updates', _S, 'of them, on replicas that had no sample'
  ),
  'time/drafter': Metric('s', _S, 'training the drafter'),
  'rollout/segments': Metric(
    'segments', _S, 'segments, each with one read of the device'
  ),
  'rollout/executables': Metric(
    '1', _S, 'segments compiled so far, by rows, capacity and arm'
  ),
  'rollout/nonfinite_samples': Metric(
    'samples', _S, 'drawn from logits that are not finite'
  ),
  'rollout/occupancy': Metric(
    'fraction', _S, 'slots that hold an unfinished sample'
  ),
  'time/rollout': Metric('s', _S, 'sampling the completions'),
  'time/reshard': Metric(
    's', _S, "parameters to the rollout's places; in time/rollout"
  ),
  'time/reward': Metric('s', _S, 'verifying the answers'),
  'time/score': Metric('s', _S, 'log-probabilities: old and reference policy'),
  'time/progress': Metric('s', _S, 'answers forced in the middle of samples'),
  'time/leap': Metric('s', _S, 'leaps and what judges them'),
  'time/diagnose': Metric(
    's', _S, 'scoring a random subset of samples for metrics'
  ),
  'time/update': Metric('s', _S, 'optimizer step'),
  'time/step': Metric('s', _S, 'the whole step'),
  'time/evaluate': Metric('s', _S, 'evaluation, outside of time/step'),
  'time/checkpoint': Metric('s', _S, 'saving, outside of time/step'),
  'memory/update': Metric('bytes', _S, 'of one device, for the largest update'),
  'memory/segment': Metric(
    'bytes', _S, 'of one device, for the largest segment'
  ),
  'compile/count': Metric('1', _S, 'compilations in the step'),
  'compile/seconds': Metric('s', _S, 'time spent compiling in the step'),
  'memory/device_bytes': Metric('bytes', _S, 'peak device memory in use'),
}
_PASS_AT = re.compile(r'evaluate/pass_at_[1-9]\d*')
_OWN_REWARD = re.compile(r'reward/[\w.]+:\w+')
LONGEST_NAME = 100  # characters of a metric of the user's own
_USER_NAME = re.compile(r'[\w.-]+(/[\w.-]+)*', re.ASCII)
_USER, _EVALUATED = 'user/', 'evaluate/user/'  # before its name


def is_user_name(name: str) -> bool:
  """Returns whether a metric of the user's own may be called so."""
  return len(name) <= LONGEST_NAME and _USER_NAME.fullmatch(name) is not None


def user_means(
  samples: Iterable[Mapping[str, float]], *, evaluated: bool = False
) -> dict[str, float]:
  """Returns the mean of each of the user's metrics, under its logged name.

  Sums are rounded once: they do not depend on the order of the samples.

  Args:
    samples: metrics by name, some of them in each sample.
    evaluated: whether the samples are those of an evaluation.

  Returns:
    By name, the mean over the samples that have the metric.
  """
  values: dict[str, list[float]] = {}
  for sample in samples:
    for name, value in sample.items():
      values.setdefault(name, []).append(value)
  prefix = _EVALUATED if evaluated else _USER
  return {
    prefix + name: math.fsum(found) / len(found)
    for name, found in sorted(values.items())
  }


def describe(name: str) -> Metric:
  """Returns the vocabulary's entry for a metric name.

  Args:
    name: a key of `METRICS`, evaluate/pass_at_K for a positive integer K,
      reward/module:function for a reward of the user's own, user/NAME or
      evaluate/user/NAME for a metric of the user's own.

  Returns:
    Its unit, kind and meaning.

  Raises:
    ValueError: the vocabulary has no such name.
  """
  if name in METRICS:
    return METRICS[name]
  if _PASS_AT.fullmatch(name):
    count = name.rsplit('_', 1)[1]
    return Metric('fraction', _E, f'solved by at least one of {count} samples')
  if _OWN_REWARD.fullmatch(name):
    own = name.partition('/')[2]
    return Metric('1', _T, f'mean of the reward {own}, before its weight')
  for prefix, like in (
    (_USER, 'reward/mean'),
    (_EVALUATED, 'evaluate/accuracy'),
  ):
    own = name.removeprefix(prefix)
    if own != name and is_user_name(own):
      return Metric('1', METRICS[like].kind, f"mean of the user's own {own}")
  raise ValueError(
    f'{name!r} is not in the vocabulary; add it to '
    'rlax_llm.workdir.metric_names.METRICS with its unit and kind'
  )
