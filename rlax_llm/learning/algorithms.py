"""From the config's section to an objective, with every mistake named.

To add a loss: write it in `ops/losses.py`, enter it in `LOSSES`, and name it
in a preset; README.md of this folder shows it.
"""

import dataclasses

from rlax_llm.config import AlgorithmConfig
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import nearest
from rlax_llm.config.algorithm import Algorithm
from rlax_llm.config.algorithm import overrides
from rlax_llm.learning.estimators import ESTIMATORS
from rlax_llm.learning.estimators import OF_BATCH
from rlax_llm.learning.estimators import PART_ESTIMATORS
from rlax_llm.learning.filters import FILTERS
from rlax_llm.learning.filters import LABELS
from rlax_llm.learning.objectives import CORRECTIONS
from rlax_llm.learning.objectives import LOSSES
from rlax_llm.learning.objectives import REJECTIONS
from rlax_llm.learning.presets import PRESETS
from rlax_llm.learning.token_credit import CREDITS
from rlax_llm.learning.token_credit import is_shaped
from rlax_llm.learning.token_credit import STEP_SCALES
from rlax_llm.ops.divergences import DIVERGENCES
from rlax_llm.ops.f_divergences import F_DIVERGENCES
from rlax_llm.ops.masking import REDUCTIONS


def _choices() -> dict[str, tuple[str, ...]]:
  """Returns the names that each field may hold."""
  return {
    'advantage': (*ESTIMATORS, *PART_ESTIMATORS),
    'credit': tuple(CREDITS),
    'loss': tuple(LOSSES),
    'reduction': tuple(REDUCTIONS),
    'divergence': tuple(DIVERGENCES),
    'correction': tuple(CORRECTIONS),
    'rejection': tuple(REJECTIONS),
    'filter': tuple(FILTERS),
    'labels': tuple(LABELS),
    'step_scale': tuple(STEP_SCALES),
    'rehearsal': ('none', *F_DIVERGENCES),
  }


def _check_read(algorithm: Algorithm, given: dict[str, object]) -> None:
  """Refuses what is set and has no effect."""
  for field in dataclasses.fields(Algorithm):
    if field.name not in given or not field.metadata.get('read_by'):
      continue
    selector, readers = field.metadata['read_by']
    value = getattr(algorithm, selector)
    if value not in ('none', 0) if readers is None else value in readers:
      continue
    remedy = f'set algorithm.{selector}'
    if readers:
      remedy = f'use algorithm.{selector}={" or ".join(map(repr, readers))}'
    raise ConfigError(
      f'algorithm.{field.name} is set, but the {selector} {value!r} '
      f'does not read it; remove it or {remedy}'
    )
  if 'divergence' in given and not algorithm.kl_coefficient:
    raise ConfigError(
      'algorithm.divergence is set, but '
      'algorithm.kl_coefficient is 0; set both or neither'
    )
  if algorithm.entropy_target and not algorithm.entropy_coefficient:
    raise ConfigError(
      'algorithm.entropy_target is set, but '
      'algorithm.entropy_coefficient is 0; set both or neither'
    )
  if algorithm.credit == 'uncertainty' and {'clip_low', 'clip_high'} & set(
    given
  ):
    raise ConfigError(
      'algorithm.clip_low and clip_high are set, but the '
      "credit 'uncertainty' adapts the range; remove them"
    )
  if algorithm.filter == 'unrehearsed' and algorithm.rehearsal == 'none':
    raise ConfigError(
      "algorithm.filter='unrehearsed' leaves out what is "
      'rehearsed, and algorithm.rehearsal is none; set it'
    )
  if algorithm.rehearsal != 'none' and is_shaped(algorithm):
    raise ConfigError(
      f'algorithm.rehearsal={algorithm.rehearsal!r} puts samples of another '
      f'policy into the batch that credit={algorithm.credit!r}, step_scale='
      f'{algorithm.step_scale!r} or entropy_target reads as a whole; use '
      "credit='sample' and neither of the others"
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
    raise ConfigError(
      f'algorithm.name {config.name!r} is unknown'
      f'{nearest(config.name, PRESETS)}; it is one of '
      f'{", ".join(PRESETS)}'
    )
  given = overrides(config)
  for name, choices in _choices().items():
    if name in given and given[name] not in choices:
      raise ConfigError(
        f'algorithm.{name} {given[name]!r} is unknown; it is '
        f'one of {", ".join(choices)}'
      )
  algorithm = dataclasses.replace(PRESETS[config.name], **given)
  _check_read(algorithm, given)
  if 0 < algorithm.dual_clip <= 1:
    raise ConfigError(
      f'algorithm.dual_clip={algorithm.dual_clip} would bind '
      'at a ratio of 1; use a value above 1, or 0 for none'
    )
  for field in dataclasses.fields(Algorithm):
    value, limits = getattr(algorithm, field.name), field.metadata
    if limits.get('ge') is None:
      continue
    if not limits['ge'] <= value <= limits['le']:
      raise ConfigError(
        f'algorithm.{field.name}={value} must be between {limits["ge"]} '
        f'and {limits["le"]}'
      )
  return algorithm


def check(algorithm: Algorithm, config: Config) -> None:
  """Refuses an objective that the rest of the config does not fit.

  Args:
    algorithm: from `resolve`.
    config: validated.

  Raises:
    ConfigError: naming the fields that disagree.
  """
  if algorithm.credit == 'distillation' and not algorithm.teacher:
    raise ConfigError(
      "algorithm.credit='distillation' learns from a teacher; "
      'set algorithm.teacher to a folder of published weights '
      "or a run's workdir"
    )
  group = config.rollout.samples_per_prompt
  batch = group * config.task.prompts_per_step
  alone = algorithm.advantage == 'best_minus_second' or (
    algorithm.credit == 'minimum_variance'
  )
  whole = algorithm.advantage in ('batch_scaled', *PART_ESTIMATORS)
  compares = algorithm.advantage in (*OF_BATCH, *PART_ESTIMATORS)
  if config.control.extra_samples and compares:
    raise ConfigError(
      f'control.extra_samples={config.control.extra_samples} makes groups of '
      f'different sizes; algorithm.advantage={algorithm.advantage!r} '
      'compares groups of one size: use one that looks at each by itself, '
      "such as 'group_centred'"
    )
  if alone and group < 2 or whole and batch < 2:
    raise ConfigError(
      f'rollout.samples_per_prompt={group} leaves nothing to compare for '
      f'algorithm.advantage={algorithm.advantage!r}; use at least 2'
    )
  off_policy = (algorithm.correction, algorithm.rejection) != ('none', 'none')
  if off_policy and config.learning.old_logprobs != 'recompute':
    raise ConfigError(
      f'algorithm.correction={algorithm.correction!r} and rejection='
      f'{algorithm.rejection!r} compare the policy before the update with '
      'the one that sampled; learning.old_logprobs='
      f"{config.learning.old_logprobs!r} makes them one: use 'recompute'"
    )
  if algorithm.advantage in PART_ESTIMATORS and config.task.permute_rewards:
    raise ConfigError(
      f'algorithm.advantage={algorithm.advantage!r} reads each reward by '
      'itself; task.permute_rewards shuffles their sum: set it to False'
    )
  if algorithm.advantage in PART_ESTIMATORS and algorithm.labels != 'verifier':
    raise ConfigError(
      f'algorithm.advantage={algorithm.advantage!r} reads each of the '
      f"verifier's rewards by itself; algorithm.labels={algorithm.labels!r} "
      "replaces them by one vote: use labels='verifier'"
    )
  verified = [
    name
    for name, used in (
      ('credit', algorithm.credit == 'progress'),
      ('rehearsal', algorithm.rehearsal != 'none'),
      ('leaps', algorithm.leaps > 0),
    )
    if used
  ]
  if verified and (
    algorithm.labels != 'verifier' or config.task.permute_rewards
  ):
    raise ConfigError(
      f'algorithm.{verified[0]}={getattr(algorithm, verified[0])!r} asks the '
      'verifier, whom algorithm.labels and task.permute_rewards pass by; use '
      "labels='verifier' and permute_rewards=False"
    )
  if algorithm.leaps and config.model.lora.rank:
    raise ConfigError(
      f'algorithm.leaps={algorithm.leaps} goes on along a line of parameters,'
      f' and model.lora.rank={config.model.lora.rank} trains two factors '
      'whose product does not; set one of them to 0'
    )
  if algorithm.critic_warmup and algorithm.critic_warmup >= config.num_steps:
    raise ConfigError(
      f'algorithm.critic_warmup={algorithm.critic_warmup} leaves no step of '
      f'num_steps={config.num_steps} to the policy; lower it'
    )
