"""One step of RL: rollout -> reward -> batch -> update."""

import dataclasses
from typing import Any, Sequence

import numpy as np

from rlax_llm import credit
from rlax_llm import executables
from rlax_llm import metric_names
from rlax_llm.drafter_training import DrafterTraining
from rlax_llm.experience import Collector
from rlax_llm.groups import Group
from rlax_llm.leaps import Leaps
from rlax_llm.learner import Learner
from rlax_llm.progression import Progression
from rlax_llm.progression import Stopwatch
from rlax_llm.run import Run
from rlax_llm.states import drafter_params
from rlax_llm.types import Params
from rlax_llm.types import TrainState


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
  groups = loop.collector.collect(params, step, watch, **drafts)
  rewards = credit.group_rewards(run, groups, step)
  advantages = credit.advantages(run, groups, rewards)
  trained = credit.trained_samples(run, groups, rewards,
                                   loop.collector.solved_at_first(groups))
  watch.lap('reward')
  progress = loop.collector.progress(params,
                                     step,
                                     groups,
                                     watch,
                                     drafter_params=drafter_params(states))
  samples = credit.training_samples(groups, advantages, trained, progress)
  critic = states['critic'].params if 'critic' in states else None
  prepared, padding = loop.learner.prepare(
      params,
      samples,
      loop.reference,
      critic=critic,
      rehearsed=loop.collector.rehearsed(step))
  watch.lap('score')
  run.on_boundary()  # the last time: `learn_all` takes the states
  states, values = loop.learner.learn_all(states, prepared, step)
  loop.collector.learned()
  watch.lap('update')
  rollouts = [r for group in groups for r in group.rollouts]
  if loop.drafter:
    drafter, more = loop.drafter.after_step(states['drafter'],
                                            states['policy'].params,
                                            step, rollouts,
                                            sum(watch.seconds.values()))
    states = states | {'drafter': drafter}
    values |= more
    watch.lap('drafter')

  loop.progression.add_tokens(rollouts)
  loop.progression.add_reward(float(np.mean(np.concatenate(rewards))))
  seconds = watch.seconds
  after = executables.compile_totals()
  numbers: dict[str, Any] = {
      **values,
      **leaped,
      **group_metrics(groups, rewards, step),
      **credit.label_metrics(run, groups, rewards),
      'learning/trained_fraction':
          np.mean(np.concatenate(trained)),
      'learning/learning_rate':
          run.states.learning_rate(step),
      'learning/padding_fraction':
          padding,
      **loop.collector.metrics(),
      **seconds,
      'time/step':
          sum(seconds.values()),
      'compile/count':
          after[0] - compiled[0],
      'compile/seconds':
          after[1] - compiled[1],
      'memory/update':
          run.pool.memory_bytes('update'),
      'memory/segment':
          run.pool.memory_bytes('segment'),
  }
  rows = sample_rows(groups, rewards, advantages)
  return states, numbers, rows


def group_metrics(groups: Sequence[Group], rewards: Sequence[np.ndarray],
                  step: int) -> dict[str, Any]:
  """Returns what groups and their rewards tell, under the fixed names.

  Args:
    groups: of one step.
    rewards: float32[G] of each group, those that are learned from.
    step: from 0.
  """
  rollouts = [rollout for group in groups for rollout in group.rollouts]
  lengths = [rollout.length for rollout in rollouts]
  parts = {
      f'reward/{name}':
          np.mean(np.concatenate([group.parts[name] for group in groups]))
      for name in groups[0].parts
  }
  own = metric_names.user_means(m for group in groups for m in group.metrics)
  return parts | own | {
      'reward/mean':
          np.mean(np.concatenate(rewards)),
      'reward/std':
          np.std(np.concatenate(rewards)),
      'reward/unscorable':
          sum(int(np.sum(group.unscorable)) for group in groups),
      'reward/groups_with_signal':
          np.mean([np.ptp(group) > 0 for group in rewards]),
      'rollout/tokens':
          sum(lengths),
      'rollout/length_mean':
          np.mean(lengths),
      'rollout/length_p50':
          np.percentile(lengths, 50),
      'rollout/length_p95':
          np.percentile(lengths, 95),
      'rollout/length_max':
          np.max(lengths),
      'rollout/truncated_fraction':
          np.mean([not r.finished for r in rollouts]),
      'rollout/drafted_fraction':
          np.mean(np.concatenate([r.drafted for r in rollouts])),
      'policy/staleness_mean':
          np.mean([step - np.mean(r.token_version) for r in rollouts]),
      'policy/staleness_max':
          max(step - int(np.min(r.token_version)) for r in rollouts),
  }


def sample_rows(groups: Sequence[Group], rewards: Sequence[np.ndarray],
                advantages: Sequence[np.ndarray]) -> list[dict]:
  """Returns the rows of samples.jsonl."""
  return [{
      'prompt': group.problem.prompt,
      'completion': text,
      'reward': float(reward),
      'advantage': float(advantage),
  }
          for group, *of_group in zip(groups, rewards, advantages)
          for text, reward, advantage in zip(group.texts, *of_group)]
