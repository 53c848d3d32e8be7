"""One step of RL: rollout -> reward -> batch -> update."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from rlax_llm.components import Run
from rlax_llm.experience import advantages as credit
from rlax_llm.experience.collector import Collector
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import mean_known
from rlax_llm.learning import diagnostics
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.learning.extrapolation import Leaps
from rlax_llm.learning.learner import Diagnosis
from rlax_llm.learning.learner import Learner
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.runtime import executables
from rlax_llm.types import Params
from rlax_llm.types import TrainState
from rlax_llm.workdir import metric_names
from rlax_llm.workdir.run_statistics import Progression
from rlax_llm.workdir.run_statistics import Stopwatch


@dataclasses.dataclass(frozen=True)
class Loop:
  """What every step of a run needs."""

  run: Run
  collector: Collector
  learner: Learner
  reference: Params | None  # for the KL term
  progression: Progression  # updated in place
  drafter: DrafterTraining | None = None  # None: no network drafts
  leaps: Leaps | None = None  # None: the objective takes none


def train_step(
  loop: Loop, step: int, states: dict[str, TrainState]
) -> tuple[dict[str, TrainState], dict[str, Any], list[dict]]:
  """Runs one step: rollout -> reward -> batch -> update.

  Args:
    loop: the run's parts.
    step: from 0.
    states: by name, 'policy' among them; donated.

  Returns:
    (states, metrics of the step, sample rows for samples.jsonl).
  """
  run = loop.run
  watch = Stopwatch(run.clock)
  compiled = executables.compile_totals()
  leaped: dict[str, float] = {}
  if loop.leaps:
    states, leaped = loop.leaps.before_step(step, states)
    watch.lap('leap')
  params = states['policy'].params
  drafts: dict[str, Any] = {'drafter_params': drafter_params(states)}
  if loop.drafter:
    drafts['idle'] = loop.drafter.idle_work(states['drafter'], params, step)
  groups = credit.learned_groups(
    run, loop.collector.collect(params, step, watch, **drafts), step
  )
  advantages = credit.advantages(run, groups)
  trained = credit.trained_samples(
    run, groups, loop.collector.solved_at_first(groups)
  )
  watch.lap('reward')
  progress = loop.collector.progress(
    params, step, groups, watch, drafter_params=drafter_params(states)
  )
  samples = credit.training_samples(groups, advantages, trained, progress)
  critic = states['critic'].params if 'critic' in states else None
  prepared, padding = loop.learner.prepare(
    params,
    samples,
    loop.reference,
    critic=critic,
    rehearsed=loop.collector.rehearsed(step),
  )
  watch.lap('score')
  rollouts = [r for group in groups for r in group.rollouts]
  diagnosis = loop.learner.diagnose(
    params, samples, [r.token_version == step for r in rollouts], step
  )
  gap = sampling_gap(loop, params, diagnosis, step)
  watch.lap('diagnose')
  run.on_boundary()  # the last time: `learn_all` takes the states
  states, values = loop.learner.learn_all(states, prepared, step)
  loop.collector.learned()
  watch.lap('update')
  # The update's own sums leave out samples without an advantage.
  values = (
    {
      name: value
      for name, value in values.items()
      if name not in diagnostics.names(run.algorithm)
    }
    | loop.learner.diagnose_update(
      states['policy'].params, diagnosis, loop.reference
    )
    | gap
  )
  watch.lap('diagnose')
  if loop.drafter:
    drafter, more = loop.drafter.after_step(
      states['drafter'],
      states['policy'].params,
      step,
      rollouts,
      sum(watch.seconds.values()),
    )
    states = states | {'drafter': drafter}
    values |= more
    watch.lap('drafter')

  loop.progression.add_tokens(rollouts)
  told = group_metrics(groups, step)
  loop.progression.add_reward(told['reward/mean'])
  seconds = watch.seconds
  after = executables.compile_totals()
  numbers: dict[str, Any] = {
    **values,
    **leaped,
    **told,
    **credit.label_metrics(run, groups),
    'learning/trained_fraction': np.mean(np.concatenate(trained)),
    'learning/learning_rate': run.states.learning_rate(step),
    'learning/padding_fraction': padding,
    **loop.collector.metrics(),
    **seconds,
    'time/step': sum(seconds.values()),
    'compile/count': after[0] - compiled[0],
    'compile/seconds': after[1] - compiled[1],
    'memory/update': run.pool.memory_bytes('update'),
    'memory/segment': run.pool.memory_bytes('segment'),
  }
  rows = sample_rows(groups, advantages)
  return states, numbers, rows


def sampling_gap(
  loop: Loop, params: Params, diagnosis: Diagnosis, step: int
) -> dict[str, float]:
  """Returns the behaviour gap of what a step sampled but does not learn from.

  With `control.staleness` a step learns from the samples of earlier policies,
  which its own policy cannot judge.

  Args:
    loop: the run's parts.
    params: the policy's, before the update.
    diagnosis: of the samples that the step learns from.
    step: from 0.

  Returns:
    {} where the diagnosis has a gap, or nothing was sampled.
  """
  name = 'policy/behaviour_gap_max'
  sampled = [r for group in loop.collector.sampled for r in group.rollouts]
  if name in diagnosis.values or not sampled:
    return {}
  found = loop.learner.diagnose(
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
