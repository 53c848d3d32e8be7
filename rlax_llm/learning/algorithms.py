"""Algorithms as data: a preset names its advantage, loss and reduction.

To add a loss: write it in `ops/losses.py`, enter it in `LOSSES`, and name it
in a preset.
"""

import dataclasses
from typing import Callable, NamedTuple

from rlax_llm.config import AlgorithmConfig
from rlax_llm.config import ConfigError
from rlax_llm.config import nearest
from rlax_llm.learning.estimators import ESTIMATORS
from rlax_llm.ops import losses
from rlax_llm.ops.divergences import DIVERGENCES
from rlax_llm.ops.losses import TokenLoss
from rlax_llm.ops.masking import REDUCTIONS
from rlax_llm.types import Array


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """An objective; every field holds a value. Hashable, static."""
  advantage: str = 'group'
  loss: str = 'clipped'
  reduction: str = 'token_mean'
  divergence: str = 'k3'
  kl_coefficient: float = 0.0
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  entropy_coefficient: float = 0.0

  @property
  def linear_in_advantage(self) -> bool:
    """Whether a token of advantage 0 adds nothing to the gradient."""
    return (self.loss != 'negative_log_likelihood' and
            self.kl_coefficient == 0 and self.entropy_coefficient == 0)


PRESETS: dict[str, Algorithm] = {
    # DeepSeekMath, https://arxiv.org/abs/2402.03300
    'grpo':
        Algorithm(reduction='sequence_mean'),
    # Understanding R1-Zero-Like Training, https://arxiv.org/abs/2503.20783
    'dr_grpo':
        Algorithm(advantage='group_centred',
                  reduction='sequence_sum_token_mean_constant'),
    # Back to Basics, https://arxiv.org/abs/2402.14740
    'rloo':
        Algorithm(advantage='leave_one_out',
                  loss='reinforce',
                  reduction='sequence_mean_token_sum'),
    # DAPO, https://arxiv.org/abs/2503.14476: clip-higher and token mean; its
    # overlong punishment is `task.rewards['length']`.
    'dapo':
        Algorithm(clip_high=0.28),
    # Group Sequence Policy Optimization, https://arxiv.org/abs/2507.18071
    'gspo':
        Algorithm(loss='sequence_clipped',
                  reduction='sequence_mean',
                  clip_low=3e-4,
                  clip_high=4e-4),
    # MiniMax-M1, https://arxiv.org/abs/2506.13585; the bound is ScaleRL's,
    # https://arxiv.org/abs/2510.13786.
    'cispo':
        Algorithm(loss='truncated', clip_high=4.0),
    # REINFORCE++, https://arxiv.org/abs/2501.03262, without a discount; its
    # penalty for leaving the reference is kl_coefficient with k2.
    'reinforce_plus_plus':
        Algorithm(advantage='whitened', divergence='k2'),
    # OPO, https://arxiv.org/abs/2505.23585: exactly on-policy.
    'opo':
        Algorithm(advantage='length_weighted', loss='reinforce'),
    # GPG, https://arxiv.org/abs/2504.02546
    'gpg':
        Algorithm(advantage='signal_scaled', loss='reinforce'),
    # Tricks or Traps? (Lite PPO), https://arxiv.org/abs/2508.08221
    'lite_ppo':
        Algorithm(advantage='batch_scaled'),
    # Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347
    'sapo':
        Algorithm(loss='soft_gated', reduction='sequence_mean'),
    # Optimizing Language Models for Inference Time Objectives,
    # https://arxiv.org/abs/2503.19595: pass@G.
    'best_of_group':
        Algorithm(advantage='best_minus_second', reduction='sequence_mean'),
}

# The warm start, through the same update as everything else.
SUPERVISED = Algorithm(loss='negative_log_likelihood')


class Tokens(NamedTuple):
  """What a loss is made of, by token; 0 where nothing is trained on."""
  logprobs: Array  # float32[R, L], nats, of the current policy
  old_logprobs: Array  # float32[R, L], nats, of the policy before the update
  advantages: Array  # float32[R, L]
  mask: Array  # bool[R, L]: tokens that are trained on
  segments: Array  # int32[R, L], samples of a row; see `Batch`


def _clipped(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  return losses.clipped_surrogate(tokens.logprobs,
                                  tokens.old_logprobs,
                                  tokens.advantages,
                                  clip_low=algorithm.clip_low,
                                  clip_high=algorithm.clip_high,
                                  dual_clip=algorithm.dual_clip or None)


def _sequence_clipped(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  return losses.sequence_clipped_surrogate(tokens.logprobs,
                                           tokens.old_logprobs,
                                           tokens.advantages,
                                           tokens.mask,
                                           clip_low=algorithm.clip_low,
                                           clip_high=algorithm.clip_high,
                                           segments=tokens.segments)


def _truncated(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  return losses.truncated_reinforce(tokens.logprobs,
                                    tokens.old_logprobs,
                                    tokens.advantages,
                                    ratio_high=1 + algorithm.clip_high)


LOSSES: dict[str, Callable[[Algorithm, Tokens], TokenLoss]] = {
    'clipped':
        _clipped,
    'sequence_clipped':
        _sequence_clipped,
    'truncated':
        _truncated,
    'soft_gated':
        lambda algorithm, t: losses.soft_gated_surrogate(
            t.logprobs, t.old_logprobs, t.advantages),
    'reinforce':
        lambda algorithm, t: losses.reinforce(t.logprobs, t.old_logprobs, t.
                                              advantages),
    'negative_log_likelihood':
        lambda algorithm, t: losses.negative_log_likelihood(t.logprobs),
}
# Which losses read a field; the others refuse it.
_READ_BY = {
    'clip_low': ('clipped', 'sequence_clipped'),
    'clip_high': ('clipped', 'sequence_clipped', 'truncated'),
    'dual_clip': ('clipped',),
}

_CHOICES = {
    'advantage': tuple(ESTIMATORS),
    'loss': tuple(LOSSES),
    'reduction': tuple(REDUCTIONS),
    'divergence': tuple(DIVERGENCES),
}

_LARGEST = 1e6
_RANGES = (
    ('kl_coefficient', 0, _LARGEST),
    ('clip_low', 0, 1),
    ('clip_high', 0, _LARGEST),
    ('dual_clip', 0, _LARGEST),
    ('entropy_coefficient', -_LARGEST, _LARGEST),
)


def resolve(config: AlgorithmConfig) -> Algorithm:
  """Returns the preset with the config's overrides.

  Args:
    config: fields left at None take the preset's value.

  Raises:
    ConfigError: for an unknown name, an impossible value, or a field that the
      algorithm would ignore.
  """
  if config.name not in PRESETS:
    raise ConfigError(f'algorithm.name {config.name!r} is unknown'
                      f'{nearest(config.name, PRESETS)}; it is one of '
                      f'{", ".join(PRESETS)}')
  given = {
      field.name: getattr(config, field.name)
      for field in dataclasses.fields(Algorithm)
      if getattr(config, field.name) is not None
  }
  for field, choices in _CHOICES.items():
    if field in given and given[field] not in choices:
      raise ConfigError(f'algorithm.{field} {given[field]!r} is unknown; it is '
                        f'one of {", ".join(choices)}')
  algorithm = dataclasses.replace(PRESETS[config.name], **given)
  for field, readers in _READ_BY.items():
    if field in given and algorithm.loss not in readers:
      raise ConfigError(f'algorithm.{field} is set, but the loss '
                        f'{algorithm.loss!r} does not read it; remove it or '
                        f'use algorithm.loss={" or ".join(map(repr, readers))}')
  if 0 < algorithm.dual_clip <= 1:
    raise ConfigError(f'algorithm.dual_clip={algorithm.dual_clip} would bind '
                      'at a ratio of 1; use a value above 1, or 0 for none')
  if 'divergence' in given and not algorithm.kl_coefficient:
    raise ConfigError('algorithm.divergence is set, but '
                      'algorithm.kl_coefficient is 0; set both or neither')
  for field, least, most in _RANGES:
    value = getattr(algorithm, field)
    if not least <= value <= most:
      raise ConfigError(f'algorithm.{field}={value} must be between {least} '
                        f'and {most}')
  return algorithm
