"""From scored groups to training samples: who is praised, and for what."""

from typing import Sequence

import numpy as np

from rlax_llm.experience import Group
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.estimators import ESTIMATORS
from rlax_llm.run import Run


def permuted(rewards: np.ndarray, seed: int, step: int) -> np.ndarray:
  """Returns the rewards shuffled among all samples of the step.

  The control experiment: with it, nothing must be learned.
  """
  rng = np.random.default_rng([seed, step])
  return rng.permutation(rewards.reshape(-1)).reshape(rewards.shape)


def group_rewards(run: Run, groups: Sequence[Group], step: int) -> np.ndarray:
  """Returns float32[B, G]: the rewards that are learned from.

  Args:
    run: says whether they are permuted.
    groups: of one step.
    step: from 0.
  """
  rewards = np.stack([group.rewards for group in groups])
  if run.config.task.permute_rewards:
    rewards = permuted(rewards, run.config.seed, step)
  return rewards


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
  advantages = run.pool(('advantages', run.algorithm.advantage, rewards.shape),
                        estimate, rewards.astype(np.float32),
                        lengths.astype(np.int32))
  return np.where(unscorable, 0.0, np.asarray(advantages)).astype(np.float32)


def training_samples(groups: Sequence[Group],
                     advantages: np.ndarray) -> list[Sample]:
  """Returns a training sample for each rollout, in order.

  Args:
    groups: of one step.
    advantages: float32[B, G].
  """
  rollouts = [rollout for group in groups for rollout in group.rollouts]
  return [
      Sample(prompt=rollout.request.prompt,
             completion=rollout.tokens,
             advantage=float(advantage),
             behaviour_logprobs=rollout.behaviour_logprobs)
      for rollout, advantage in zip(rollouts, advantages.reshape(-1))
  ]
