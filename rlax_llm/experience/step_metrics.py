"""Metrics of a step and the rows of its samples."""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import jax
import numpy as np

from rlax_llm.components import Run
from rlax_llm.experience import advantages as credit
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import mean_known
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.learner import Diagnosis
from rlax_llm.learning.learner import Learner
from rlax_llm.types import Params
from rlax_llm.workdir import metric_names


def step_metrics(
  run: Run,
  step: int,
  groups: Sequence[Group],
  trained: Sequence[np.ndarray],
  updates: Mapping[str, Any],
  sampling: Mapping[str, Any],
  padding: float,
  seconds: Mapping[str, float],
  compiled: tuple[int, float],
) -> dict[str, Any]:
  """Returns the metrics of a step, under the fixed names.

  Args:
    run: names the labels and knows the sizes of the compiled steps.
    step: from 0.
    groups: of the step, with the labels that it learns from.
    trained: bool[G] of each group.
    updates: metrics of the update and of a leap before it.
    sampling: metrics of the collector.
    padding: the share of the batch that is padding.
    seconds: of each part of the step, by metric name.
    compiled: number of programs compiled in the step, and seconds.
  """
  return {
    **updates,
    **group_metrics(groups, step),
    **credit.label_metrics(run, groups),
    'learning/trained_fraction': np.mean(np.concatenate(trained)),
    'learning/learning_rate': run.states.learning_rate(step),
    'learning/padding_fraction': padding,
    **sampling,
    **seconds,
    'time/step': sum(seconds.values()),
    'compile/count': compiled[0],
    'compile/seconds': compiled[1],
    'memory/update': run.pool.memory_bytes('update'),
    'memory/segment': run.pool.memory_bytes('segment'),
  }


def sampling_gap(
  learner: Learner,
  groups: Sequence[Group],
  params: Params,
  diagnosis: Diagnosis,
  step: int,
) -> dict[str, float]:
  """Returns the behaviour gap of what a step sampled but does not learn from.

  With `control.staleness` a step learns from the samples of earlier policies,
  which its own policy cannot judge.

  Args:
    learner: computes the gap.
    groups: every complete group that the step sampled.
    params: the policy's, before the update.
    diagnosis: of the samples that the step learns from.
    step: from 0.

  Returns:
    {} where the diagnosis has a gap, or nothing was sampled.
  """
  name = 'policy/behaviour_gap_max'
  sampled = [r for group in groups for r in group.rollouts]
  if name in diagnosis.values or not sampled:
    return {}
  found = learner.diagnose(
    params,
    [
      Sample(
        r.request.prompt, r.tokens, behaviour_logprobs=r.behaviour_logprobs
      )
      for r in sampled
    ],
    [r.token_version == step for r in sampled],
    step,
  ).values
  return {name: float(jax.device_get(found[name]))} if name in found else {}


def group_metrics(groups: Sequence[Group], step: int) -> dict[str, Any]:
  """Returns what groups and their rewards tell, under the fixed names.

  Missing rewards enter no mean; the mean of none is NaN.

  Args:
    groups: of one step, with the labels that it learns from.
    step: from 0.
  """
  rollouts = [rollout for group in groups for rollout in group.rollouts]
  lengths = [rollout.length for rollout in rollouts]
  judged = [~group.unscorable for group in groups]
  parts = {
    f'reward/{name}': mean_known(
      [group.parts[name] for group in groups], judged
    )
    for name in groups[0].parts
  }
  rewards = np.concatenate([group.rewards[group.known] for group in groups])
  own = metric_names.user_means(m for group in groups for m in group.metrics)
  return (
    parts
    | own
    | {
      'reward/mean': float(np.mean(rewards)) if rewards.size else math.nan,
      'reward/std': float(np.std(rewards)) if rewards.size else math.nan,
      'reward/unscorable': sum(
        int(np.sum(group.unscorable)) for group in groups
      ),
      'reward/groups_with_signal': np.mean(
        [group.has_signal for group in groups]
      ),
      'rollout/tokens': sum(lengths),
      'rollout/length_mean': np.mean(lengths),
      'rollout/length_p50': np.percentile(lengths, 50),
      'rollout/length_p95': np.percentile(lengths, 95),
      'rollout/length_max': np.max(lengths),
      'rollout/truncated_fraction': np.mean([not r.finished for r in rollouts]),
      'rollout/drafted_fraction': np.mean(
        np.concatenate([r.drafted for r in rollouts])
      ),
      'policy/staleness_mean': np.mean(
        [step - np.mean(r.token_version) for r in rollouts]
      ),
      'policy/staleness_max': max(
        step - int(np.min(r.token_version)) for r in rollouts
      ),
    }
  )


def sample_rows(
  groups: Sequence[Group], advantages: Sequence[np.ndarray]
) -> list[dict]:
  """Returns the rows of samples.jsonl; a missing reward is None."""
  return [
    {
      'prompt': group.problem.prompt,
      'completion': text,
      'reward': float(reward) if known else None,
      'advantage': float(advantage),
    }
    for group, worth in zip(groups, advantages)
    for text, reward, known, advantage in zip(
      group.texts, group.rewards, group.known, worth
    )
  ]
