"""From scored groups to training samples: labels, advantages and filters.

What stands for each sample is a list with one array for each group: groups may
differ in size.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np

from rlax_llm.components import Run
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import Labels
from rlax_llm.experience.labels import LABELS
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.estimators import ESTIMATORS
from rlax_llm.learning.estimators import PART_ESTIMATORS
from rlax_llm.learning.filters import FILTERS
from rlax_llm.learning.filters import Outcomes
from rlax_llm.tasks import extract


def judge(
  run: Run,
  texts: Sequence[str],
  rewards: np.ndarray,
  unscorable: np.ndarray,
  parts: Mapping[str, np.ndarray],
) -> Labels:
  """Returns what is learned from the samples of a group.

  Correctness is the reward `correct`. Where that has no weight in
  `task.rewards`, the weighted sum is all the correctness there is. With voted
  labels both reward and correctness are the vote: the verifier is not asked, so
  nothing is missing where it failed, and a sample without an answer is wrong.

  Args:
    run: names the labels and weighs the rewards.
    texts: G completions.
    rewards: float32[G], the verifier's weighted sums.
    unscorable: bool[G], samples without a reward from the verifier.
    parts: float32[G] by name, the verifier's rewards; `correct` among them.
  """
  place = run.config.task.answer_format
  answers = [extract.extract_answer(text, place) for text in texts]
  labels = LABELS[run.algorithm.labels](answers, rewards)
  if run.algorithm.labels != 'verifier':
    return Labels(labels, labels, np.ones(len(texts), bool))
  weight = dict(run.config.task.rewards).get('correct', 0)
  return Labels(labels, parts['correct'] if weight else labels, ~unscorable)


def learned_groups(run: Run, groups: Sequence[Group], step: int) -> list[Group]:
  """Returns the groups of a step with the labels that it learns from.

  Args:
    run: says whether labels are permuted.
    groups: of the step.
    step: from 0.
  """
  if run.config.task.permute_rewards:
    return permuted(groups, run.config.seed, step)
  return list(groups)


def permuted(groups: Sequence[Group], seed: int, step: int) -> list[Group]:
  """Returns the groups with labels shuffled among all samples of the step.

  The control experiment: with it, nothing must be learned. A missing reward
  moves as any other does. What was decided before the step had its groups
  (dynamic sampling, replay, extra samples, pruning) went by the labels as they
  were.
  """
  ends = np.cumsum([len(group.known) for group in groups])
  order = np.random.default_rng([seed, step]).permutation(ends[-1])
  shuffled = [
    np.split(np.concatenate(column)[order], ends[:-1])
    for column in zip(*((g.rewards, g.correctness, g.known) for g in groups))
  ]
  return [
    dataclasses.replace(group, **Labels(*labels)._asdict())
    for group, *labels in zip(groups, *shuffled)
  ]


def label_metrics(run: Run, groups: Sequence[Group]) -> dict[str, float]:
  """Returns how voted labels compare with the verifier's; {} without votes.

  Samples that the verifier could not judge are left out, and so are prompts
  whose voters it could not judge.

  Args:
    run: says whose labels the rewards are.
    groups: of one step.
  """
  if run.algorithm.labels == 'verifier':
    return {}
  right, agree = [], []
  for group in groups:
    voted, truth = group.rewards == 1, group.parts['correct'] == 1
    judged = ~group.unscorable
    if (voted & judged).any() or not voted.any():
      right.append(np.any(voted & judged & truth))
    agree.append((voted == truth)[judged])
  mean = lambda found: float(np.mean(found)) if len(found) else math.nan
  return {
    'reward/label_accuracy': mean(right),
    'reward/label_agreement': mean(np.concatenate(agree)),
  }


def advantages(run: Run, groups: Sequence[Group]) -> list[np.ndarray]:
  """Returns float32[G] of each group: what its samples are worth.

  Args:
    run: names the estimator.
    groups: of one step.
  """
  name = run.algorithm.advantage
  if name not in PART_ESTIMATORS:
    return _by_size(run, groups)
  known = _some_missing(np.stack([group.known for group in groups]))
  weights = run.config.task.rewards
  parts = np.stack(
    [[group.parts[part] for group in groups] for part in weights]
  ).astype(np.float32)
  found = run.pool(
    ('advantages', name, parts.shape, known is None),
    PART_ESTIMATORS[name],
    parts,
    np.array(list(weights.values()), np.float32),
    known,
  )
  return list(jax.device_get(found))


def _some_missing(known: np.ndarray) -> np.ndarray | None:
  """Returns the mask, or None if all are known: that is another program."""
  return None if known.all() else known


def _by_size(run: Run, groups: Sequence[Group]) -> list[np.ndarray]:
  """Returns advantages, estimated for the groups of each size together.

  Groups of several sizes come with estimators that look at each alone (see
  `algorithms.check`), so that empty groups beside them, which make the shapes
  few, change nothing.
  """
  columns = [(g.rewards, g.lengths, g.correctness, g.known) for g in groups]
  sizes = [len(group.known) for group in groups]
  found: dict[int, np.ndarray] = {}
  for size in set(sizes):
    members = [i for i, other in enumerate(sizes) if other == size]
    rewards, lengths, correctness, known = (
      np.stack(x) for x in zip(*(columns[i] for i in members))
    )
    empty = ((0, len(groups) - len(members)), (0, 0))
    pad = lambda x: np.pad(x, empty)
    missing = _some_missing(known)
    worth = group_advantages(
      run,
      pad(rewards),
      pad(lengths),
      pad(correctness),
      None if missing is None else pad(missing),
    )
    found |= dict(zip(members, worth))
  return [found[i] for i in range(len(groups))]


def group_advantages(
  run: Run,
  rewards: np.ndarray,
  lengths: np.ndarray,
  correctness: np.ndarray,
  known: np.ndarray | None,
) -> np.ndarray:
  """Returns float32[B, G]: advantages of a batch of groups.

  Args:
    run: names the estimator.
    rewards: float32[B, G].
    lengths: int32[B, G], trained tokens.
    correctness: float32[B, G].
    known: bool[B, G], samples whose reward is known; the advantage of the
      others is 0. None: all of them.
  """
  name = run.algorithm.advantage
  found = run.pool(
    ('advantages', name, rewards.shape, known is None),
    ESTIMATORS[name],
    rewards.astype(np.float32),
    lengths.astype(np.int32),
    correctness.astype(np.float32),
    known,
  )
  return jax.device_get(found)


def trained_samples(
  run: Run, groups: Sequence[Group], rehearsed: np.ndarray
) -> list[np.ndarray]:
  """Returns bool[G] of each group: the samples that are trained on.

  A filter drops samples, and so does a missing reward, whatever the filter is:
  the loss would learn from a value that was never measured. Where the objective
  reads no reward, none is missing.

  Args:
    run: names the filter.
    groups: of one step.
    rehearsed: bool[B]: problems that the initial policy solved.
  """
  keep = FILTERS[run.algorithm.filter]
  trained = []
  for group, solved in zip(groups, rehearsed):
    finished = np.array([r.finished for r in group.rollouts])
    kept = keep(
      Outcomes(
        group.correctness,
        group.known,
        finished,
        np.full(group.known.shape, solved),
      )
    )
    trained.append(kept & group.known if run.algorithm.reads_rewards else kept)
  return trained


def training_samples(
  groups: Sequence[Group],
  worth: Sequence[np.ndarray],
  trained: Sequence[np.ndarray],
  extra: Sequence[Mapping[str, np.ndarray]] = (),
) -> list[Sample]:
  """Returns a training sample for each rollout, in order.

  Args:
    groups: of one step.
    worth: float32[G] of each group, advantages.
    trained: bool[G] of each group.
    extra: by sample, what the objective reads of its tokens; (): nothing.
  """
  rollouts = [
    (i, rollout) for i, group in enumerate(groups) for rollout in group.rollouts
  ]
  return [
    Sample(
      prompt=rollout.request.prompt,
      completion=rollout.tokens,
      advantage=float(advantage),
      behaviour_logprobs=rollout.behaviour_logprobs,
      scored_logprobs=rollout.scored_logprobs,
      weight=rollout.weight,
      group=i,
      trained=bool(keep),
      extra=more,
    )
    for (i, rollout), advantage, keep, more in zip(
      rollouts,
      np.concatenate(worth),
      np.concatenate(trained),
      extra or [{}] * len(rollouts),
    )
  ]
