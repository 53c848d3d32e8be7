"""Log-probabilities of stale tokens under the parameters that sampled them."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.learning.batch import Sample
from rlax_llm.rollout.table import sample_key
from rlax_llm.types import Params
from rlax_llm.types import Rollout

# (params, samples) -> the log-probability of each token of each completion.
Score = Callable[[Params, Sequence[Sample]], list[np.ndarray]]


def score_stale(
  buffer: Buffer,
  batch: Sequence[Group],
  *,
  step: int,
  params: Params,
  score: Score,
) -> tuple[Buffer, list[Group]]:
  """Scores the tokens of this step that a later step may train on.

  They are scored under the parameters that sampled them, before the update
  changes these. In the batch of this step, scores are needed where older
  tokens stand beside new ones: a batch that is wholly on-policy needs none.

  Args:
    buffer: after the step's sampling.
    batch: that the step learns from.
    step: from 0.
    params: the policy's at this step.
    score: gives log-probabilities.

  Returns:
    (buffer, batch), with the scores.
  """
  kept: list[Group | PartialGroup] = [
    *buffer.pending,
    *buffer.surplus,
    *buffer.past,
    *(group for queued in buffer.queue for group in queued),
  ]
  rollouts = [r for group in kept for r in group.rollouts]
  rollouts += [
    r
    for group in batch
    for r in group.rollouts
    if (r.token_version < step).any()
  ]
  missing = {
    sample_key(r.request, r.index): r
    for r in rollouts
    if r.length > _scored(r) and r.survival > 0
  }
  if not missing:
    return buffer, list(batch)
  logprobs = score(
    params,
    [
      Sample(prompt=r.request.prompt, completion=r.tokens)
      for r in missing.values()
    ],
  )
  for (key, rollout), new in zip(missing.items(), logprobs):
    old, known = rollout.scored_logprobs, _scored(rollout)
    if (rollout.token_version[known:] != step).any():
      raise AssertionError(f'{key} has unscored tokens of an earlier policy')
    missing[key] = dataclasses.replace(
      rollout,
      scored_logprobs=np.concatenate(
        [new[:0] if old is None else old, new[known:]]
      ),
    )
  scored = lambda groups: tuple(_with(group, missing) for group in groups)
  buffer = dataclasses.replace(
    buffer,
    pending=scored(buffer.pending),
    surplus=scored(buffer.surplus),
    past=scored(buffer.past),
    queue=tuple(map(scored, buffer.queue)),
  )
  return buffer, list(scored(batch))


def _scored(rollout: Rollout) -> int:
  """Returns how many tokens of a rollout have been scored."""
  return 0 if rollout.scored_logprobs is None else len(rollout.scored_logprobs)


def _with(group: Any, scored: Mapping[tuple, Rollout]) -> Any:
  """Returns a group with the rollouts that were scored."""
  return dataclasses.replace(
    group,
    rollouts=tuple(
      scored.get(sample_key(r.request, r.index), r) for r in group.rollouts
    ),
  )
