"""Algorithms as data: a preset names its advantage, loss and reduction.

To add a loss: write it in `ops/losses.py`, enter it in `LOSSES`, and name it
in a preset.
"""

import dataclasses
from typing import Callable

from rlax_llm.config import AlgorithmConfig
from rlax_llm.config import ConfigError
from rlax_llm.config import nearest
from rlax_llm.ops import losses
from rlax_llm.ops.advantages import ADVANTAGES
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
  entropy_coefficient: float = 0.0

  @property
  def linear_in_advantage(self) -> bool:
    """Whether a token of advantage 0 adds nothing to the gradient."""
    return (self.loss in ('clipped', 'reinforce') and
            self.kl_coefficient == 0 and self.entropy_coefficient == 0)


PRESETS: dict[str, Algorithm] = {
    # https://arxiv.org/abs/2402.03300
    'grpo':
        Algorithm(reduction='sequence_mean'),
    # https://arxiv.org/abs/2503.20783
    'dr_grpo':
        Algorithm(advantage='group_centred',
                  reduction='sequence_sum_token_mean_constant'),
    # https://arxiv.org/abs/2402.14740
    'rloo':
        Algorithm(advantage='leave_one_out',
                  loss='reinforce',
                  reduction='sequence_mean_token_sum'),
}

# The warm start, through the same update as everything else.
SUPERVISED = Algorithm(loss='negative_log_likelihood')

LOSSES: dict[str, Callable[[Algorithm, Array, Array, Array], TokenLoss]] = {
    'clipped':
        lambda algorithm, logprobs, old, advantages: losses.clipped_surrogate(
            logprobs,
            old,
            advantages,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high),
    'reinforce':
        lambda algorithm, logprobs, old, advantages: losses.reinforce(
            logprobs, old, advantages),
    'negative_log_likelihood':
        lambda algorithm, logprobs, old, advantages: losses.
        negative_log_likelihood(logprobs),
}

_CHOICES = {
    'advantage': tuple(ADVANTAGES),
    'loss': tuple(LOSSES),
    'reduction': tuple(REDUCTIONS),
    'divergence': tuple(DIVERGENCES),
}

_LARGEST = 1e6
_RANGES = (
    ('kl_coefficient', 0, _LARGEST),
    ('clip_low', 0, 1),
    ('clip_high', 0, _LARGEST),
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
  for field in ('clip_low', 'clip_high'):
    if field in given and algorithm.loss != 'clipped':
      raise ConfigError(f'algorithm.{field} is set, but the loss '
                        f'{algorithm.loss!r} does not clip; remove it or use '
                        "algorithm.loss='clipped'")
  if 'divergence' in given and not algorithm.kl_coefficient:
    raise ConfigError('algorithm.divergence is set, but '
                      'algorithm.kl_coefficient is 0; set both or neither')
  for field, least, most in _RANGES:
    value = getattr(algorithm, field)
    if not least <= value <= most:
      raise ConfigError(f'algorithm.{field}={value} must be between {least} '
                        f'and {most}')
  return algorithm
