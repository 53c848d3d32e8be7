"""Metrics of a step and the rows of its samples."""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from rlax_llm.components import Run
from rlax_llm.experience import advantages as credit
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import mean_known
from rlax_llm.learning import diagnostics
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.learner import Diagnosis
from rlax_llm.learning.learner import Learner
from rlax_llm.types import Params
from rlax_llm.types import Rollout
from rlax_llm.workdir import metric_names
from rlax_llm.workdir.run_statistics import Stopwatch


def step_metrics(
  run: Run,
  step: int,
  groups: Sequence[Group],
  trained: Sequence[np.ndarray],
  watch: Stopwatch,
) -> dict[str, Any]:
  """Returns the metrics of a step but for those of sampling and update.

  Args:
    run: names the labels and knows the sizes of the compiled steps.
    step: from 0.
    groups: of the step, with the labels that it learns from.
    trained: bool[G] of each group.
    watch: started with the step.
  """
  compilations, seconds = watch.compiled()
  return {
    **group_metrics(groups, step),
    **credit.label_metrics(run, groups),
    'learning/trained_fraction': np.mean(np.concatenate(trained)),
    'learning/learning_rate': run.states.learning_rate(step),
    **watch.seconds,
    'time/step': sum(watch.seconds.values()),
    'compile/count': compilations,
    'compile/seconds': seconds,
    'memory/update': run.pool.memory_bytes('update'),
    'memory/segment': run.pool.memory_bytes('segment'),
  }


def update_metrics(run: Run, values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns metrics of the updates without those that a diagnosis replaces.

  The sums of an update leave out samples without an advantage.

  Args:
    run: names the objective.
    values: from `Learner.learn_all`.
  """
  replaced = diagnostics.names(run.algorithm)
  return {name: v for name, v in values.items() if name not in replaced}


def diagnose(
  learner: Learner,
  params: Params,
  samples: Sequence[Sample],
  rollouts: Sequence[Rollout],
  sampled: Sequence[Group],
  step: int,
) -> Diagnosis:
  """Scores a random subset of a step's samples, before the update.

  With `control.staleness` a step learns from the samples of earlier policies,
  which its own policy cannot judge: its behaviour gap is then that of the
  groups that it sampled and does not learn from.

  Args:
    learner: scores.
    params: the policy's, before the update.
    samples: that the step learns from.
    rollouts: of which they are made.
    sampled: every complete group that the step sampled.
    step: from 0.
  """
  name = 'policy/behaviour_gap_max'
  found = learner.diagnose(
    params, samples, [r.token_version == step for r in rollouts], step
  )
  fresh = [r for group in sampled for r in group.rollouts]
  if name in found.values or not fresh:
    return found
  own = learner.diagnose(
    params,
    [
      Sample(
        r.request.prompt, r.tokens, behaviour_logprobs=r.behaviour_logprobs
      )
      for r in fresh
    ],
    [r.token_version == step for r in fresh],
    step,
  ).values
  gap = {name: own[name]} if name in own else {}
  return found._replace(values=found.values | gap)


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
