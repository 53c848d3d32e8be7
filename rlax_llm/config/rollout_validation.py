"""What spans the config's sections of rollout, control and drafter."""

from collections.abc import Sequence
import dataclasses

from rlax_llm.config import BRANCHING
from rlax_llm.config import check_positions
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import ControlConfig
from rlax_llm.config import DrafterConfig
from rlax_llm.config import freeze
from rlax_llm.config import FROM_ROLLOUTS
from rlax_llm.config import largest_group
from rlax_llm.config import LEARNED
from rlax_llm.config import list_widths
from rlax_llm.config import nearest
from rlax_llm.config import RolloutConfig
from rlax_llm.config import SOURCES
from rlax_llm.config.draft_configs import arms_of_width

# Nodes verified in one forward: the mask alone takes W^2 per row.
_WIDEST = 64
_LARGEST_CORPUS = 8192  # MiB


def validate_rollout(config: Config) -> None:
  """Checks how samples are drafted, generated and scheduled.

  Raises:
    ConfigError: one line that names the value, the limit and the way out.
  """
  _validate_drafter(config)
  _validate_rollout(config)
  _validate_control(
    config.control, config.task.prompts_per_step, config.rollout
  )


def _validate_rollout(config: Config) -> None:
  rollout = config.rollout
  width = _check_widths(rollout, config.control, config.drafter.sources)
  if not rollout.temperature > 0:
    raise ConfigError(
      f'rollout.temperature={rollout.temperature} cannot train: a greedy '
      'law has no gradient; use a value above 0 (evaluate.temperature may '
      'be 0)'
    )
  if rollout.top_p != 1 or rollout.top_k != 0 or rollout.min_p != 0:
    raise ConfigError(
      f'rollout.top_p={rollout.top_p}, top_k={rollout.top_k}, '
      f'min_p={rollout.min_p}: training needs 1, 0, 0, because a truncated '
      'law gives tokens outside of it log-probability -inf as soon as the '
      'policy moves; use evaluate.top_p for evaluation'
    )
  check_positions(rollout, width, config.model.max_positions)


def _validate_control(
  control: ControlConfig, prompts: int, rollout: RolloutConfig
) -> None:
  default = ControlConfig()
  readers = {
    'max_staleness': ('over_provision', control.over_provision > 1),
    'stop_policy': ('over_provision', control.over_provision > 1),
    'logical_slots': ('over_provision', control.over_provision > 1),
    'replay_steps': ('replay', control.replay > 0),
    'prune_keep': ('prune_at', control.prune_at > 0),
    'prune_steps': ('prune_at', control.prune_at > 0),
    'prune_weights': ('prune_at', control.prune_at > 0),
    'extra_by_hardness': ('extra_samples', control.extra_samples > 0),
  }
  for name, (reader, on) in readers.items():
    if not on and getattr(control, name) != getattr(default, name):
      raise ConfigError(
        f'control.{name}={getattr(control, name)!r} has no effect with '
        f'control.{reader}={getattr(control, reader)}; set that too, or '
        f'leave it at {getattr(default, name)!r}'
      )
  if control.prune_at >= rollout.max_new_tokens:
    raise ConfigError(
      f'control.prune_at={control.prune_at} is behind the last of '
      f'rollout.max_new_tokens={rollout.max_new_tokens}; use less'
    )
  if control.prune_at and rollout.samples_per_prompt < 3:
    raise ConfigError(
      f'control.prune_at={control.prune_at} keeps two samples of a group at '
      f'least; rollout.samples_per_prompt={rollout.samples_per_prompt} '
      'leaves none to prune: use at least 3'
    )
  if control.replay >= prompts:
    raise ConfigError(
      f'control.replay={control.replay} leaves no new group to a step of '
      f'task.prompts_per_step={prompts}; use at most {prompts - 1}'
    )
  # What is put off must fit into the next step, or its age has no bound.
  most = 2 - control.replay / prompts
  if control.over_provision > most:
    raise ConfigError(
      f'control.over_provision={control.over_provision} may put off more '
      f'groups than the next step takes; use at most {most:g}'
    )
  if control.run_ahead_rows and control.dynamic_sampling:
    raise ConfigError(
      f'control.run_ahead_rows={control.run_ahead_rows} cannot foretell the '
      'requests of a step whose number control.dynamic_sampling='
      f'{control.dynamic_sampling} leaves open; set one of them to 0'
    )


def _validate_drafter(config: Config) -> None:
  drafter, name = config.drafter, config.rollout.drafter
  if name not in LEARNED:
    for field in dataclasses.fields(drafter):
      value = freeze(getattr(drafter, field.name))
      if value != getattr(DrafterConfig(), field.name):
        raise ConfigError(
          f'drafter.{field.name}={value!r} has no effect with rollout.drafter'
          f'={name!r}; set that to {" or ".join(map(repr, LEARNED))}, or '
          'leave it'
        )
    return
  unknown = sorted(set(drafter.sources) - set(SOURCES))
  if unknown or not drafter.sources:
    raise ConfigError(
      f'drafter.sources={tuple(drafter.sources)}'
      f'{nearest(unknown[0], SOURCES) if unknown else ""}; name some of '
      f'{", ".join(SOURCES)}'
    )
  if name != 'hybrid' and tuple(drafter.sources) != SOURCES:
    raise ConfigError(
      f'drafter.sources={tuple(drafter.sources)} is for rollout.drafter='
      f"'hybrid', not {name!r}; leave it"
    )
  if drafter.warmup_updates and not config.sft.steps:
    raise ConfigError(
      f'drafter.warmup_updates={drafter.warmup_updates} imitates the traces '
      'of the warm start, and sft.steps=0; set it to 0 or give steps'
    )
  if drafter.every and not drafter.share:
    raise ConfigError(
      f'drafter.share=0 leaves no time for drafter.every={drafter.every}; '
      'set every to 0 to keep the drafter as it is'
    )


def _check_strategy(
  rollout: RolloutConfig, control: ControlConfig, sources: Sequence[str]
) -> None:
  """Refuses choices that cannot be made, and fields that nothing would read."""
  for name in ('widths', 'branchings'):
    for value in getattr(control, name):
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
          f'control.{name}={tuple(getattr(control, name))}: '
          f'{value!r} is none; give whole numbers from 1'
        )
  default = ControlConfig()
  unread = {
    'cost_model': ('buckets', 'bandit_epsilon', 'bandit_window'),
    'table': ('widths', 'bandit_epsilon', 'bandit_window'),
    'bandit': ('widths',),
  }[control.strategy]
  for name in unread:
    if freeze(getattr(control, name)) != getattr(default, name):
      raise ConfigError(
        f'control.{name}={getattr(control, name)} has no effect with '
        f'control.strategy={control.strategy!r}; name another strategy, or '
        f'leave it at {getattr(default, name)}'
      )
  if rollout.branching and freeze(control.branchings) != default.branchings:
    raise ConfigError(
      f'control.branchings={tuple(control.branchings)} has no effect with '
      f'rollout.branching={rollout.branching}; set that to 0'
    )
  if rollout.width or rollout.drafter == 'none':
    if control.strategy != default.strategy or not rollout.branching:
      raise ConfigError(
        f'control.strategy={control.strategy!r} and rollout.branching='
        f'{rollout.branching}: nothing is chosen with rollout.drafter='
        f'{rollout.drafter!r} and rollout.width={rollout.width}; set the '
        f'width to 0 and a drafter, or leave them at {default.strategy!r} '
        'and 1'
      )
    return
  if not rollout.branching and not control.branchings:
    raise ConfigError(
      'rollout.branching=0 leaves the choice to the engine, '
      'but control.branchings is empty; list some, for '
      'instance (1, 2)'
    )
  if control.strategy != 'cost_model':
    _check_buckets(rollout, control, sources)
  elif not control.widths:
    raise ConfigError(
      'rollout.width=0 leaves the choice to the engine, but '
      'control.widths is empty; list some, for instance (1, 4)'
    )


def _check_buckets(
  rollout: RolloutConfig, control: ControlConfig, sources: Sequence[str]
) -> None:
  buckets = control.buckets
  example = (
    '((4, 1, 8), (32, 1, 4))'
    if control.strategy == 'bandit'
    else '((4, 8), (32, 4))'
  )
  remedy = f'; give (rows, W) ascending by rows, for instance {example}'
  limits = []
  for bucket in buckets:
    if (
      not isinstance(bucket, (tuple, list))
      or len(bucket) < 2
      or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in bucket
      )
    ):
      raise ConfigError(
        f'control.buckets={buckets}: {bucket!r} is no bucket of '
        f'whole numbers from 1{remedy}'
      )
    limits.append(bucket[0])
    # A table takes all sources.
    arms = {
      arm._replace(sources=()) if control.strategy == 'table' else arm
      for width in bucket[1:]
      for arm in arms_of_width(rollout, control, width, sources)
    }
    if (len(arms) == 1) != (control.strategy == 'table'):
      wants = (
        'one width and one shape'
        if control.strategy == 'table'
        else 'two arms or more'
      )
      raise ConfigError(
        f'control.strategy={control.strategy!r} takes {wants} for a bucket; '
        f'{bucket!r} in control.buckets with rollout.branching='
        f'{rollout.branching} gives {len(arms)}{remedy}'
      )
  if not limits or limits != sorted(set(limits)):
    raise ConfigError(
      f'control.buckets={buckets} has no ascending numbers of rows{remedy}'
    )


def _check_widths(
  rollout: RolloutConfig, control: ControlConfig, sources: Sequence[str]
) -> int:
  """Returns the largest W; refuses what cannot be drafted or held."""
  _check_strategy(rollout, control, sources)
  width = max(list_widths(rollout, control))
  chosen = 'widths' if control.strategy == 'cost_model' else 'buckets'
  name = 'rollout.width' if rollout.width else f'control.{chosen}'
  if width > _WIDEST:
    raise ConfigError(
      f'{name} asks for {width} nodes in one forward; at most '
      f'{_WIDEST} are verified'
    )
  if rollout.drafter == 'none' and rollout.width > 1:
    raise ConfigError(
      f"rollout.drafter='none' drafts nothing for rollout.width"
      f'={rollout.width}; set the width to 1, or name a drafter'
    )
  for name, value, unset, users in (
    ('control.run_ahead_rows', control.run_ahead_rows, 0, FROM_ROLLOUTS),
    ('rollout.branching', rollout.branching, 1, BRANCHING),
  ):
    if value != unset and rollout.drafter not in users:
      raise ConfigError(
        f'{name}={value} is for rollout.drafter '
        f'{" or ".join(map(repr, users))}, not {rollout.drafter!r}; set it '
        f'to {unset}'
      )
  if width > 1 and rollout.drafter in FROM_ROLLOUTS:
    group = largest_group(rollout, control)
    capacity = rollout.prompt_length + rollout.max_new_tokens + width + 7
    texts = rollout.history + group * (2 if control.run_ahead_rows else 1)
    places = rollout.slots + -(-rollout.slots // group)
    size = 8 * places * texts * capacity / 2**20
    if size > _LARGEST_CORPUS:
      raise ConfigError(
        f'rollout.history={rollout.history} and groups of {group} samples '
        f'for {rollout.slots} slots of {capacity} tokens take {size:.0f} MiB '
        f'on the device, above {_LARGEST_CORPUS}; lower rollout.history, '
        'rollout.slots or control.extra_samples'
      )
  return width
