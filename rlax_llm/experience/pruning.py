"""Online pruning: which samples of a group go on beyond their first tokens.

Every sample of a group is sampled up to `control.prune_at` tokens; a head on
the policy's hidden states there predicts its success; a fixed share of the
group goes on, drawn so that successes and failures are balanced. See
`ops/pruning.py` and `learning/quality_head.py`.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import numpy as np

from rlax_llm.components import Run
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.learning import quality_head
from rlax_llm.learning.quality_head import QualityHead
from rlax_llm.ops import pruning
from rlax_llm.runtime import processes
from rlax_llm.runtime import sharding
from rlax_llm.types import Params
from rlax_llm.types import Rollout

_SHARE = 0.5  # of those that go on, successes
_LEAST = 0.05  # probability of going on
_LABEL = 0x5052  # tells the draws from other uses of the seed


class Pruner:
  """Prunes new groups, and teaches the head."""

  def __init__(self, run: Run) -> None:
    """Makes a pruner; nothing is compiled yet."""
    self._run = run
    self._control = run.config.control

  def prune(
    self, params: Params, head: QualityHead, groups: Sequence[PartialGroup]
  ) -> list[PartialGroup]:
    """Returns groups with the survivors marked, by `Rollout.survival`.

    Args:
      params: the policy's.
      head: as it was before this step.
      groups: new ones, with their first tokens.
    """
    if not groups:
      return []
    rollouts = [r for group in groups for r in group.rollouts]
    success = head.success(self._features(params, rollouts))
    ends = np.cumsum([len(group.rollouts) for group in groups])
    return [
      dataclasses.replace(group, rollouts=self._drawn(group, chances))
      for group, chances in zip(groups, np.split(success, ends[:-1]))
    ]

  def _drawn(
    self, group: PartialGroup, success: np.ndarray
  ) -> tuple[Rollout, ...]:
    request = group.request
    keep = kept_samples(self._control.prune_keep, len(success)) / len(success)
    if request.step < self._control.prune_steps:
      success = np.full_like(success, _SHARE)  # the head knows nothing yet
    chances = pruning.survival_probabilities(
      success, keep=keep, share=_SHARE, least=min(_LEAST, keep / 2)
    )
    rng = np.random.default_rng(
      [self._run.config.seed, request.step, request.request, _LABEL]
    )
    going = pruning.draw_survivors(chances, rng.random())
    weights = (
      keep / chances if self._control.prune_weights else (np.ones_like(chances))
    )
    return tuple(
      dataclasses.replace(r, survival=float(chance), weight=float(weight))
      if goes
      else dataclasses.replace(r, survival=0.0, suspended=False)
      for r, goes, chance, weight in zip(
        group.rollouts, going, chances, weights
      )
    )

  def learn(
    self, params: Params, head: QualityHead, groups: Sequence[Group]
  ) -> tuple[QualityHead, dict[str, float]]:
    """Returns the head after the outcomes of survivors, and metrics.

    The head predicts success: correctness in [0, 1]. It learns from the samples
    whose correctness is known; from none, it stays as it is.

    Args:
      params: the policy's.
      head: before.
      groups: complete, survivors only.
    """
    rollouts = [r for group in groups for r in group.rollouts]
    known = np.concatenate([group.known for group in groups])
    labels = np.concatenate([group.success for group in groups])
    inputs = self._features(params, rollouts)[known]
    weights = np.array([1 / r.survival for r in rollouts])[known]
    used = np.array([r.weight for r in rollouts])
    share = float(used.sum() ** 2 / (len(used) * np.sum(used**2)))
    values = {'prune/effective_share': share}
    if not known.any():
      names = 'prune/head_loss', 'prune/success', 'prune/kept_success'
      return head, values | dict.fromkeys(names, math.nan)
    values |= {
      'prune/head_loss': head.loss(inputs, labels),
      'prune/success': float(np.average(labels, weights=weights)),
      'prune/kept_success': float(np.mean(labels)),
    }
    return head.learn(inputs, labels, weights, self._run.config.seed), values

  def _features(
    self, params: Params, rollouts: Sequence[Rollout]
  ) -> np.ndarray:
    """Returns float32[n, D], of the first tokens of each rollout."""
    config = self._run.config
    most = config.control.prune_at
    packed = quality_head.pack_beginnings(
      [r.request.prompt for r in rollouts],
      [r.tokens[:most] for r in rollouts],
      length=config.rollout.prompt_length + most,
      rows=config.learning.microbatch_rows,
    )
    found = self._run.pool(
      ('quality', packed[0].shape),
      functools.partial(quality_head.features, model=self._run.model),
      params,
      *packed,
      out_shardings=sharding.replicated(self._run.mesh),
    )
    found = processes.whole(found)
    return found.reshape(-1, found.shape[-1])[: len(rollouts)]


def kept_samples(keep: float, samples: int) -> int:
  """Returns how many of a group's samples go on: at least two."""
  return min(max(round(keep * samples), 2), samples)
