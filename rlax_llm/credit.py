"""From scored groups to training samples: who is praised, and for what.

What stands for each sample is a list with one array for each group: groups may
differ in size.
"""

from typing import Mapping, Sequence

import jax
import numpy as np

from rlax_llm.groups import Group
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.estimators import ESTIMATORS
from rlax_llm.learning.estimators import PART_ESTIMATORS
from rlax_llm.learning.filters import FILTERS
from rlax_llm.learning.filters import LABELS
from rlax_llm.learning.filters import Outcomes
from rlax_llm.run import Run
from rlax_llm.tasks import extract


def permuted(rewards: Sequence[np.ndarray], seed: int,
             step: int) -> list[np.ndarray]:
  """Returns the rewards shuffled among all samples of the step.

  The control experiment: with it, nothing must be learned.
  """
  rng = np.random.default_rng([seed, step])
  ends = np.cumsum([len(group) for group in rewards])
  return np.split(rng.permutation(np.concatenate(rewards)), ends[:-1])


def answers(run: Run, groups: Sequence[Group]) -> list[list[str | None]]:
  """Returns what each completion gives as its answer; None: nothing.

  Args:
    run: says where answers stand.
    groups: of one step.
  """
  place = run.config.task.answer_format
  return [[extract.extract_answer(text, place)
           for text in group.texts]
          for group in groups]


def group_rewards(run: Run, groups: Sequence[Group],
                  step: int) -> list[np.ndarray]:
  """Returns float32[G] of each group: the rewards that are learned from.

  Args:
    run: says whose labels they are from, and whether they are permuted.
    groups: of one step.
    step: from 0.
  """
  label = LABELS[run.algorithm.labels]
  rewards = [
      label(texts, group.rewards)
      for texts, group in zip(answers(run, groups), groups)
  ]
  if run.config.task.permute_rewards:
    rewards = permuted(rewards, run.config.seed, step)
  return rewards


def label_metrics(run: Run, groups: Sequence[Group],
                  rewards: Sequence[np.ndarray]) -> dict[str, float]:
  """Returns how the rewards compare with the verifier's; {} if they are its.

  Args:
    run: says whose labels the rewards are from.
    groups: of one step.
    rewards: float32[G] of each group, those that are learned from.
  """
  if run.algorithm.labels == 'verifier':
    return {}
  truth = [group.parts['correct'] == 1 for group in groups]
  voted = [group == 1 for group in rewards]
  right = [np.any(v & t) for v, t in zip(voted, truth)]
  agree = np.concatenate(voted) == np.concatenate(truth)
  return {
      'reward/label_accuracy': float(np.mean(right)),
      'reward/label_agreement': float(np.mean(agree)),
  }


def advantages(run: Run, groups: Sequence[Group],
               rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Returns float32[G] of each group: what its samples are worth.

  Args:
    run: names the estimator.
    groups: of one step.
    rewards: float32[G] of each group, those that are learned from.
  """
  name = run.algorithm.advantage
  if name not in PART_ESTIMATORS:
    return _by_size(run, groups, rewards)
  unscorable = np.stack([group.unscorable for group in groups])
  weights = run.config.task.rewards
  parts = np.stack([[group.parts[part] for group in groups] for part in weights
                   ]).astype(np.float32)
  estimate = PART_ESTIMATORS[name]
  found = run.pool(('advantages', name, parts.shape), estimate, parts,
                   np.array(list(weights.values()), np.float32))
  return list(
      np.where(unscorable, 0.0, jax.device_get(found)).astype(np.float32))


def _by_size(run: Run, groups: Sequence[Group],
             rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Returns advantages, estimated for the groups of each size together.

  Groups of several sizes come with estimators that look at each alone (see
  `algorithms.check`), so that empty groups beside them, which make the shapes
  few, change nothing.
  """
  columns = [
      (r, group.lengths, group.unscorable) for r, group in zip(rewards, groups)
  ]
  found: dict[int, np.ndarray] = {}
  for size in {len(r) for r in rewards}:
    members = [i for i, r in enumerate(rewards) if len(r) == size]
    stacked = [np.stack(x) for x in zip(*(columns[i] for i in members))]
    empty = ((0, len(groups) - len(members)), (0, 0))
    worth = group_advantages(run, *(np.pad(x, empty) for x in stacked))
    found |= dict(zip(members, worth))
  return [found[i] for i in range(len(groups))]


def group_advantages(run: Run, rewards: np.ndarray, lengths: np.ndarray,
                     unscorable: np.ndarray) -> np.ndarray:
  """Returns float32[B, G]: advantages of a batch of groups.

  Args:
    run: names the estimator.
    rewards: float32[B, G].
    lengths: int32[B, G], trained tokens.
    unscorable: bool[B, G]: their advantage is 0, whatever the rest says.
  """
  estimate = ESTIMATORS[run.algorithm.advantage]
  found = run.pool(
      ('advantages', run.algorithm.advantage, rewards.shape), estimate,
      rewards.astype(np.float32), lengths.astype(np.int32))
  return np.where(unscorable, 0.0, jax.device_get(found)).astype(np.float32)


def trained_samples(run: Run, groups: Sequence[Group],
                    rewards: Sequence[np.ndarray],
                    rehearsed: np.ndarray) -> list[np.ndarray]:
  """Returns bool[G] of each group: the samples that the preset's filter keeps.

  Args:
    run: names the filter.
    groups: of one step.
    rewards: float32[G] of each group, those that are learned from.
    rehearsed: bool[B]: problems that the initial policy solved.
  """
  keep = FILTERS[run.algorithm.filter]
  return [
      keep(
          Outcomes(found, group.unscorable,
                   np.array([r.finished
                             for r in group.rollouts]),
                   np.full(found.shape, solved)))
      for group, found, solved in zip(groups, rewards, rehearsed)
  ]


def training_samples(
    groups: Sequence[Group],
    worth: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    extra: Sequence[Mapping[str, np.ndarray]] = ()
) -> list[Sample]:
  """Returns a training sample for each rollout, in order.

  Args:
    groups: of one step.
    worth: float32[G] of each group, advantages.
    trained: bool[G] of each group.
    extra: by sample, what the objective reads of its tokens; (): nothing.
  """
  rollouts = [(i, rollout)
              for i, group in enumerate(groups)
              for rollout in group.rollouts]
  return [
      Sample(prompt=rollout.request.prompt,
             completion=rollout.tokens,
             advantage=float(advantage),
             behaviour_logprobs=rollout.behaviour_logprobs,
             scored_logprobs=rollout.scored_logprobs,
             weight=rollout.weight,
             group=i,
             trained=bool(keep),
             extra=more)
      for (i,
           rollout), advantage, keep, more in zip(rollouts, np.concatenate(
               worth), np.concatenate(trained), extra or [{}] * len(rollouts))
  ]
