"""From scored groups to training samples: who is praised, and for what."""

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


def permuted(rewards: np.ndarray, seed: int, step: int) -> np.ndarray:
  """Returns the rewards shuffled among all samples of the step.

  The control experiment: with it, nothing must be learned.
  """
  rng = np.random.default_rng([seed, step])
  return rng.permutation(rewards.reshape(-1)).reshape(rewards.shape)


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


def group_rewards(run: Run, groups: Sequence[Group], step: int) -> np.ndarray:
  """Returns float32[B, G]: the rewards that are learned from.

  Args:
    run: says whose labels they are from, and whether they are permuted.
    groups: of one step.
    step: from 0.
  """
  rewards = np.stack([group.rewards for group in groups])
  rewards = LABELS[run.algorithm.labels](answers(run, groups), rewards)
  if run.config.task.permute_rewards:
    rewards = permuted(rewards, run.config.seed, step)
  return rewards


def label_metrics(run: Run, groups: Sequence[Group],
                  rewards: np.ndarray) -> dict[str, float]:
  """Returns how the rewards compare with the verifier's; {} if they are its.

  Args:
    run: says whose labels the rewards are from.
    groups: of one step.
    rewards: float32[B, G], those that are learned from.
  """
  if run.algorithm.labels == 'verifier':
    return {}
  truth = np.stack([group.parts['correct'] for group in groups]) == 1
  voted = rewards == 1
  return {
      'reward/label_accuracy': float(np.mean(np.any(voted & truth, axis=-1))),
      'reward/label_agreement': float(np.mean(voted == truth)),
  }


def advantages(run: Run, groups: Sequence[Group],
               rewards: np.ndarray) -> np.ndarray:
  """Returns float32[B, G]: what the samples of a step are worth.

  Args:
    run: names the estimator.
    groups: of one step.
    rewards: float32[B, G], those that are learned from.
  """
  lengths = np.stack([group.lengths for group in groups])
  unscorable = np.stack([group.unscorable for group in groups])
  name = run.algorithm.advantage
  if name not in PART_ESTIMATORS:
    return group_advantages(run, rewards, lengths, unscorable)
  weights = run.config.task.rewards
  parts = np.stack([[group.parts[part] for group in groups] for part in weights
                   ]).astype(np.float32)
  estimate = PART_ESTIMATORS[name]
  found = run.pool(('advantages', name, parts.shape), estimate, parts,
                   np.array(list(weights.values()), np.float32))
  return np.where(unscorable, 0.0, jax.device_get(found)).astype(np.float32)


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


def trained_samples(run: Run, groups: Sequence[Group], rewards: np.ndarray,
                    rehearsed: np.ndarray) -> np.ndarray:
  """Returns bool[B, G]: the samples that the preset's filter keeps.

  Args:
    run: names the filter.
    groups: of one step.
    rewards: float32[B, G], those that are learned from.
    rehearsed: bool[B]: problems that the initial policy solved.
  """
  finished = [[r.finished for r in group.rollouts] for group in groups]
  unscorable = np.stack([group.unscorable for group in groups])
  solved = np.broadcast_to(rehearsed[:, None], rewards.shape)
  return FILTERS[run.algorithm.filter](Outcomes(rewards, unscorable,
                                                np.array(finished), solved))


def training_samples(
    groups: Sequence[Group],
    worth: np.ndarray,
    trained: np.ndarray,
    extra: Sequence[Mapping[str, np.ndarray]] = ()
) -> list[Sample]:
  """Returns a training sample for each rollout, in order.

  Args:
    groups: of one step.
    worth: float32[B, G], advantages.
    trained: bool[B, G].
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
           rollout), advantage, keep, more in zip(rollouts, worth.reshape(
               -1), trained.reshape(-1), extra or [{}] * len(rollouts))
  ]
