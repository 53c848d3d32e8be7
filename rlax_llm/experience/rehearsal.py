"""Rehearsal: the initial policy's right samples, kept and trained on again."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import Group
from rlax_llm.experience.stale_scores import Score
from rlax_llm.learning.batch import Sample
from rlax_llm.types import Params
from rlax_llm.types import REHEARSE
from rlax_llm.types import Rollout


def rollouts(buffer: Buffer) -> list[Rollout]:
  """Returns the samples that steps rehearse."""
  return [r for group in buffer.rehearsal for r in group.rollouts]


def is_solved(buffer: Buffer, groups: Sequence[Group]) -> np.ndarray:
  """Returns bool[B]: the initial policy solved the problem of the group."""
  known = {group.problem.prompt_id for group in buffer.rehearsal}
  return np.array([group.problem.prompt_id in known for group in groups])


def samples(run: Run, buffer: Buffer, step: int) -> list[Sample]:
  """Returns what a step rehearses, drawn anew in each step.

  Args:
    run: its algorithm says how much.
    buffer: holds the rehearsal.
    step: from 0.
  """
  kept, config = rollouts(buffer), run.config
  count = math.ceil(
    run.algorithm.rehearsal_share
    * config.task.prompts_per_step
    * config.rollout.samples_per_prompt
  )
  rng = np.random.default_rng([config.seed, REHEARSE, step])
  return [
    Sample(
      prompt=rollout.request.prompt,
      completion=rollout.tokens,
      scored_logprobs=rollout.scored_logprobs,
      extra={'rehearsed': 1.0},
    )
    for rollout in (kept[i] for i in rng.permutation(len(kept))[:count])
  ]


def solved(
  run: Run, groups: Sequence[Group], score: Score, params: Params
) -> tuple[Group, ...]:
  """Returns the right samples of what the initial policy solves, scored.

  Args:
    run: its algorithm says when a problem counts as solved.
    groups: the initial policy's.
    score: gives log-probabilities.
    params: the initial policy's.

  Raises:
    ConfigError: it solves nothing.
  """
  algorithm = run.algorithm
  found = []
  for group in groups:
    right = group.known & (group.correctness >= 1)
    if right.any() and (
      group.correctness[group.known].mean() >= algorithm.rehearsal_least
    ):
      found.append(group.only(right))
  if not found:
    raise ConfigError(
      f'the policy before RL solves none of {algorithm.rehearsal_prompts} '
      f'problems with a mean score of {algorithm.rehearsal_least}, so that '
      'there is nothing to rehearse; lower algorithm.rehearsal_least or '
      'raise algorithm.rehearsal_prompts'
    )
  logprobs = iter(
    score(
      params,
      [
        Sample(prompt=r.request.prompt, completion=r.tokens)
        for group in found
        for r in group.rollouts
      ],
    )
  )
  return tuple(
    dataclasses.replace(
      group,
      rollouts=tuple(
        dataclasses.replace(r, scored_logprobs=next(logprobs))
        for r in group.rollouts
      ),
    )
    for group in found
  )
