"""`validate`: every fact that one config can be checked for."""

import dataclasses
import types
import typing
from typing import Any, Mapping

from rlax_llm.config import BRANCHING
from rlax_llm.config import check_positions
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import ControlConfig
from rlax_llm.config import DrafterConfig
from rlax_llm.config import DRAFTERS
from rlax_llm.config import freeze
from rlax_llm.config import FROM_ROLLOUTS
from rlax_llm.config import LEARNED
from rlax_llm.config import list_widths
from rlax_llm.config import LORA_TARGETS
from rlax_llm.config import ModelConfig
from rlax_llm.config import nearest
from rlax_llm.config import RolloutConfig
from rlax_llm.config import Section
from rlax_llm.config import SOURCES
from rlax_llm.config import TaskConfig

# What the string fields may hold; the modules that implement them are tested
# against these.
_CHOICES = {
    'task.prompt_format': ('question', 'short'),
    'task.answer_format': ('tag', 'scratchpad', 'last_line', 'after_equals',
                           'boxed', 'hashes', 'all'),
    'task.match': ('numeric', 'exact', 'math'),
    'model.rope_scaling': ('none', 'linear', 'llama3'),
    'rollout.drafter': DRAFTERS,
    'control.order': ('arrival', 'longest_first', 'shortest_first'),
    'control.strategy': ('cost_model', 'table', 'bandit'),
    'learning.schedule': ('constant', 'linear', 'cosine'),
    'learning.old_logprobs': ('recompute', 'scored', 'sampler'),
    'learning.precision.parameters': ('float32', 'bfloat16'),
    'learning.precision.compute': ('float32', 'bfloat16'),
    'learning.precision.head': ('float32', 'bfloat16'),
}
_AT_LEAST: dict[str, float] = {
    'seed': 0,
    'num_steps': 0,
    'task.prompts_per_step': 1,
    'task.epoch_prompts': 0,
    'task.trace_unfinished': 0,
    'task.length_limit': 0,
    'task.length_cache': 0,
    'task.verifier_processes': 1,
    'model.layers': 1,
    'model.width': 1,
    'model.heads': 1,
    'model.kv_heads': 1,
    'model.head_dim': 0,
    'model.mlp_width': 1,
    'model.vocabulary': 0,
    'model.rope_original': 1,
    'sft.steps': 0,
    'sft.sequences_per_step': 1,
    'sft.warmup_steps': 0,
    'rollout.samples_per_prompt': 1,
    'rollout.max_new_tokens': 1,
    'rollout.prompt_length': 1,
    'rollout.slots': 1,
    'rollout.width': 0,
    'rollout.branching': 0,
    'rollout.draft_least': 0,
    'rollout.history': 0,
    'rollout.cache_megabytes': 1,
    'rollout.segment_forwards': 1,
    'rollout.min_capacity': 1,
    'control.over_provision': 1,
    'control.max_staleness': 1,
    'control.dynamic_sampling': 0,
    'control.staleness': 0,
    'control.replay': 0,
    'control.replay_steps': 1,
    'control.logical_slots': 0,
    'control.prune_at': 0,
    'control.prune_steps': 0,
    'control.min_slots': 1,
    'control.run_ahead_rows': 0,
    'drafter.depth': 0,
    'drafter.every': 0,
    'drafter.share': 0,
    'drafter.warmup_updates': 0,
    'drafter.microbatch_rows': 1,
    'drafter.passes': 1,
    'drafter.buffer_tokens': 1,
    'control.bandit_epsilon': 0,
    'control.bandit_window': 1,
    'learning.warmup_steps': 0,
    'learning.minibatches': 1,
    'learning.row_length': 0,
    'learning.microbatch_rows': 1,
    'learning.score_chunk': 1,
    'learning.weight_decay': 0,
    'model.lora.rank': 0,
    'mesh.data': 0,
    'mesh.fsdp': 1,
    'mesh.tensor': 1,
    'checkpoint.every': 0,
    'checkpoint.keep': 1,
    'checkpoint.keep_every': 0,
    'learning.most_skipped': 1,
    'learning.gap_alarm': 0,
    'evaluate.every': 0,
    'evaluate.problems': 1,
    'evaluate.samples': 1,
    'evaluate.temperature': 0,
    'evaluate.early_stop': 0,
    'evaluate.probe_every': 1,
    'evaluate.probe_tokens': 1,
}
_ABOVE_ZERO = ('learning.learning_rate', 'sft.learning_rate',
               'drafter.learning_rate', 'learning.max_grad_norm',
               'learning.epsilon', 'task.verifier_seconds', 'model.rope_theta',
               'model.rope_factor', 'model.rope_low', 'model.rope_high',
               'model.norm_epsilon', 'model.lora.alpha', 'model.init_scale',
               'control.refill_threshold', 'control.prune_keep')

_AT_MOST: dict[str, float] = {
    'task.verifier_processes': 1024,
    'task.verifier_seconds': 3600,
    'control.refill_threshold': 1,
    'control.prune_keep': 1,
    'control.bandit_epsilon': 1,
    'task.trace_unfinished': 1,
    'rollout.draft_least': 1,
    'drafter.share': 1,
}


def _get(config: Config, path: str) -> Any:
  value: Any = config
  for name in path.split('.'):
    value = getattr(value, name)
  return value


def validate(config: Config) -> Config:
  """Checks every fact that one config can be checked for.

  Args:
    config: as a config file returned it.

  Returns:
    A frozen, hashable copy.

  Raises:
    ConfigError: one line that names the value, the limit and the way out.
  """
  _check_types(config)
  for path, choices in _CHOICES.items():
    if _get(config, path) not in choices:
      raise ConfigError(
          f'{path}={_get(config, path)!r} is unknown'
          f'{nearest(str(_get(config, path)), choices)}; it is one of '
          f'{", ".join(choices)}')
  for path, least in _AT_LEAST.items():
    if not _get(config, path) >= least:
      raise ConfigError(f'{path}={_get(config, path)} must be at least {least}')
  for path, most in _AT_MOST.items():
    if _get(config, path) > most:
      raise ConfigError(f'{path}={_get(config, path)} must be at most {most}')
  for path in _ABOVE_ZERO:
    if not _get(config, path) > 0:
      raise ConfigError(f'{path}={_get(config, path)} must be above 0')
  _validate_model(config.model)
  _validate_rollout(config.rollout, config.control, config.model)
  _validate_control(config.control, config.task.prompts_per_step,
                    config.rollout)
  _validate_drafter(config)
  if not 0 < config.evaluate.top_p <= 1:
    raise ConfigError(
        f'evaluate.top_p={config.evaluate.top_p} must be in (0, 1]')
  if config.evaluate.early_stop and not config.evaluate.probe:
    raise ConfigError(
        f'evaluate.early_stop={config.evaluate.early_stop} needs '
        "evaluate.probe, the text that asks for the answer, for instance '='")
  for name in ('b1', 'b2'):
    value = getattr(config.learning, name)
    if not 0 <= value < 1:
      raise ConfigError(f'learning.{name}={value} must be in [0, 1)')
  if config.task.prompts_per_step % config.learning.minibatches:
    raise ConfigError(
        f'task.prompts_per_step={config.task.prompts_per_step} is not '
        f'divisible by learning.minibatches={config.learning.minibatches}; '
        'every optimizer step takes whole groups')
  _check_unused(config.task)
  for path in ('task.system_prompt', 'task.chat_variables'):
    if _get(config, path) and not config.task.chat_template:
      raise ConfigError(f'{path} is read by the chat template only; set '
                        'task.chat_template=True or leave it empty')
  free = config.task.length_limit - config.task.length_cache
  if free >= config.rollout.max_new_tokens:
    raise ConfigError(
        f'task.length_limit={config.task.length_limit} less task.length_cache='
        f'{config.task.length_cache} leaves {free} tokens unpunished, all of '
        f'rollout.max_new_tokens={config.rollout.max_new_tokens}; lower the '
        'limit or raise the cache')
  longest = config.rollout.prompt_length + config.rollout.max_new_tokens
  if 0 < config.learning.row_length < longest:
    raise ConfigError(
        f'learning.row_length={config.learning.row_length} cannot hold a '
        f'prompt of {config.rollout.prompt_length} and '
        f'{config.rollout.max_new_tokens} new tokens; use at least {longest}, '
        'or 0 to have it chosen')
  return freeze(config)


def _check_unused(task: TaskConfig) -> None:
  """Refuses data that the task does not read; one of your own may."""
  for path, readers in (('mixture', ('mixture',)),
                        ('path', ('jsonl', 'mixture')), ('held_out_path',
                                                         ('jsonl', 'mixture'))):
    if (getattr(task, path) and ':' not in task.name and
        task.name not in readers):
      raise ConfigError(
          f'task.{path} is set, but task.name={task.name!r} does not read it; '
          f'set task.name={" or ".join(map(repr, readers))}, or leave it empty')


def _check_types(section: Section, prefix: str = '') -> None:
  """Refuses values of another type: a config file may assign anything."""
  for field in dataclasses.fields(section):  # type: ignore[arg-type]
    value, kind = getattr(section, field.name), field.type
    if isinstance(value, Section) and value.__class__ is kind:
      _check_types(value, f'{prefix}{field.name}.')
    else:
      _check_value(value, kind, f'{prefix}{field.name}')


# What `Any` stands for: the types of JSON, so that the manifest can hold them.
_JSON = (type(None), bool, int, float, str, tuple, Mapping)
_DEEPEST = 32  # brackets in one another
_LARGEST_INT = 2**31 - 1  # counters and shapes are int32
# Magnitudes that float32 holds, with room to compute.
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1e-30, 1e30


def _check_value(value: Any, kind: Any, path: str, depth: int = 0) -> None:
  """Refuses a value that is not of a type, or an element of it.

  Args:
    value: of a field, or in one.
    kind: its annotation.
    path: names it.
    depth: brackets around it.
  """
  if depth > _DEEPEST:
    raise ConfigError(f'{path[:80]}... lies in more than {_DEEPEST} brackets; '
                      'flatten it')
  union = isinstance(kind, types.UnionType)
  kinds = _JSON if kind is Any else typing.get_args(kind) if union else (kind,)
  kinds = tuple(typing.get_origin(k) or k for k in kinds)
  if float in kinds:
    kinds += (int,)
  if tuple in kinds:
    kinds += (list,)  # freezing makes it one
  if not isinstance(value, kinds) or (isinstance(value, bool) and
                                      bool not in kinds):
    names = ' or '.join(dict.fromkeys(k.__name__ for k in kinds))
    raise ConfigError(f'{path}={_show(value)} is of type '
                      f'{type(value).__name__}; give it as {names}')
  items = typing.get_args(kind)
  if isinstance(value, Mapping):
    for name, item in value.items():
      _check_value(name, str, f'a key of {path}')
      _check_value(item, items[1] if items else Any, f'{path}[{name!r}]',
                   depth + 1)
  elif isinstance(value, (list, tuple)):
    for i, item in enumerate(value):
      _check_value(item, items[0] if items else Any, f'{path}[{i}]', depth + 1)
  elif isinstance(value, str):
    _check_text(value, path)
  elif value:
    _check_number(value, path)


def _check_text(value: str, path: str) -> None:
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ConfigError(f'{path}={_show(value)} is no Unicode text at character '
                      f'{error.start}; write it in UTF-8') from None


def _check_number(value: int | float, path: str) -> None:
  if isinstance(value, int):
    if abs(value) > _LARGEST_INT:
      raise ConfigError(f'{path}={_show(value)} must be at most {_LARGEST_INT}')
  elif not _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT:
    raise ConfigError(
        f'{path}={value} is no finite number of float32; give 0, or a '
        f'magnitude from {_SMALLEST_FLOAT} to {_LARGEST_FLOAT}')


def _show(value: Any) -> str:
  """Returns a value for a message: one short line."""
  try:
    text = ' '.join(repr(value).split())
  except ValueError:  # Python writes no integer of thousands of digits.
    text = 'a number of thousands of digits'
  return text if len(text) <= 80 else f'{text[:80]}...'


def _validate_model(model: ModelConfig) -> None:
  if model.heads % model.kv_heads:
    raise ConfigError(f'model.heads={model.heads} is not divisible by '
                      f'model.kv_heads={model.kv_heads}')
  if not model.head_dim and model.width % model.heads:
    raise ConfigError(
        f'model.width={model.width} is not divisible by '
        f'model.heads={model.heads}; change one or set model.head_dim')
  unknown = sorted(set(model.lora.targets) - set(LORA_TARGETS))
  if unknown or (model.lora.rank and not model.lora.targets):
    raise ConfigError(
        f'model.lora.targets={tuple(model.lora.targets)}'
        f'{nearest(unknown[0], LORA_TARGETS) if unknown else ""}; name some '
        f'of {", ".join(LORA_TARGETS)}')
  head_dim = model.head_dim or model.width // model.heads
  if head_dim % 2:
    raise ConfigError(f'the head dimension is {head_dim}; rotary positions '
                      'need an even one')
  _check_rope(model)


def _check_rope(model: ModelConfig) -> None:
  default = ModelConfig()
  unused = {
      'none': ('rope_factor', 'rope_low', 'rope_high', 'rope_original'),
      'linear': ('rope_low', 'rope_high', 'rope_original'),
      'llama3': (),
  }[model.rope_scaling]
  for name in unused:
    if getattr(model, name) != getattr(default, name):
      raise ConfigError(
          f'model.{name}={getattr(model, name)} has no effect with '
          f'model.rope_scaling={model.rope_scaling!r}; set the kind of scaling '
          'too, or leave it')
  if model.rope_low >= model.rope_high:
    raise ConfigError(f'model.rope_low={model.rope_low} must be below '
                      f'model.rope_high={model.rope_high}')


def _validate_rollout(rollout: RolloutConfig, control: ControlConfig,
                      model: ModelConfig) -> None:
  width = _check_widths(rollout, control)
  if not rollout.temperature > 0:
    raise ConfigError(
        f'rollout.temperature={rollout.temperature} cannot train: a greedy '
        'law has no gradient; use a value above 0 (evaluate.temperature may '
        'be 0)')
  if rollout.top_p != 1 or rollout.top_k != 0 or rollout.min_p != 0:
    raise ConfigError(
        f'rollout.top_p={rollout.top_p}, top_k={rollout.top_k}, '
        f'min_p={rollout.min_p}: training needs 1, 0, 0, because a truncated '
        'law gives tokens outside of it log-probability -inf as soon as the '
        'policy moves; use evaluate.top_p for evaluation')
  check_positions(rollout, width, model.max_positions)


def _validate_control(control: ControlConfig, prompts: int,
                      rollout: RolloutConfig) -> None:
  default = ControlConfig()
  readers = {
      'max_staleness': ('over_provision', control.over_provision > 1),
      'logical_slots': ('over_provision', control.over_provision > 1),
      'replay_steps': ('replay', control.replay > 0),
      'prune_keep': ('prune_at', control.prune_at > 0),
      'prune_steps': ('prune_at', control.prune_at > 0),
      'prune_weights': ('prune_at', control.prune_at > 0),
  }
  for name, (reader, on) in readers.items():
    if not on and getattr(control, name) != getattr(default, name):
      raise ConfigError(
          f'control.{name}={getattr(control, name)} has no effect with '
          f'control.{reader}={getattr(control, reader)}; set that too, or '
          f'leave it at {getattr(default, name)}')
  if control.prune_at >= rollout.max_new_tokens:
    raise ConfigError(
        f'control.prune_at={control.prune_at} is behind the last of '
        f'rollout.max_new_tokens={rollout.max_new_tokens}; use less')
  if control.prune_at and rollout.samples_per_prompt < 3:
    raise ConfigError(
        f'control.prune_at={control.prune_at} keeps two samples of a group at '
        f'least; rollout.samples_per_prompt={rollout.samples_per_prompt} '
        'leaves none to prune: use at least 3')
  if control.replay >= prompts:
    raise ConfigError(
        f'control.replay={control.replay} leaves no new group to a step of '
        f'task.prompts_per_step={prompts}; use at most {prompts - 1}')
  # What is put off must fit into the next step, or its age has no bound.
  most = 2 - control.replay / prompts
  if control.over_provision > most:
    raise ConfigError(
        f'control.over_provision={control.over_provision} may put off more '
        f'groups than the next step takes; use at most {most:g}')
  if control.run_ahead_rows and control.dynamic_sampling:
    raise ConfigError(
        f'control.run_ahead_rows={control.run_ahead_rows} cannot foretell the '
        'requests of a step whose number control.dynamic_sampling='
        f'{control.dynamic_sampling} leaves open; set one of them to 0')


def _validate_drafter(config: Config) -> None:
  drafter, name = config.drafter, config.rollout.drafter
  if name not in LEARNED:
    for field in dataclasses.fields(drafter):
      value = freeze(getattr(drafter, field.name))
      if value != getattr(DrafterConfig(), field.name):
        raise ConfigError(
            f'drafter.{field.name}={value!r} has no effect with rollout.drafter'
            f'={name!r}; set that to {" or ".join(map(repr, LEARNED))}, or '
            'leave it')
    return
  unknown = sorted(set(drafter.sources) - set(SOURCES))
  if unknown or not drafter.sources:
    raise ConfigError(
        f'drafter.sources={tuple(drafter.sources)}'
        f'{nearest(unknown[0], SOURCES) if unknown else ""}; name some of '
        f'{", ".join(SOURCES)}')
  if name != 'hybrid' and tuple(drafter.sources) != SOURCES:
    raise ConfigError(
        f'drafter.sources={tuple(drafter.sources)} is for rollout.drafter='
        f"'hybrid', not {name!r}; leave it")
  if drafter.warmup_updates and not config.sft.steps:
    raise ConfigError(
        f'drafter.warmup_updates={drafter.warmup_updates} imitates the traces '
        'of the warm start, and sft.steps=0; set it to 0 or give steps')
  if drafter.every and not drafter.share:
    raise ConfigError(
        f'drafter.share=0 leaves no time for drafter.every={drafter.every}; '
        'set every to 0 to keep the drafter as it is')


def _check_strategy(rollout: RolloutConfig, control: ControlConfig) -> None:
  """Refuses choices that cannot be made, and fields that nothing would read."""
  for name in ('widths', 'branchings'):
    for value in getattr(control, name):
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f'control.{name}={tuple(getattr(control, name))}: '
                          f'{value!r} is none; give whole numbers from 1')
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
          f'leave it at {getattr(default, name)}')
  if rollout.branching and freeze(control.branchings) != default.branchings:
    raise ConfigError(
        f'control.branchings={tuple(control.branchings)} has no effect with '
        f'rollout.branching={rollout.branching}; set that to 0')
  if rollout.width or rollout.drafter == 'none':
    if control.strategy != default.strategy or not rollout.branching:
      raise ConfigError(
          f'control.strategy={control.strategy!r} and rollout.branching='
          f'{rollout.branching}: nothing is chosen with rollout.drafter='
          f'{rollout.drafter!r} and rollout.width={rollout.width}; set the '
          f'width to 0 and a drafter, or leave them at {default.strategy!r} '
          'and 1')
    return
  if not rollout.branching and not control.branchings:
    raise ConfigError('rollout.branching=0 leaves the choice to the engine, '
                      'but control.branchings is empty; list some, for '
                      'instance (1, 2)')
  if control.strategy != 'cost_model':
    _check_buckets(rollout, control)
  elif not control.widths:
    raise ConfigError('rollout.width=0 leaves the choice to the engine, but '
                      'control.widths is empty; list some, for instance (1, 4)')


def _check_buckets(rollout: RolloutConfig, control: ControlConfig) -> None:
  buckets = control.buckets
  example = ('((4, 1, 8), (32, 1, 4))'
             if control.strategy == 'bandit' else '((4, 8), (32, 4))')
  remedy = f'; give (rows, W) ascending by rows, for instance {example}'
  limits = []
  for bucket in buckets:
    if (not isinstance(bucket, (tuple, list)) or len(bucket) < 2 or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 1
        for n in bucket)):
      raise ConfigError(
          f'control.buckets={buckets}: {bucket!r} is no bucket of '
          f'whole numbers from 1{remedy}')
    limits.append(bucket[0])
    shapes = (rollout.branching,) if rollout.branching else control.branchings
    # As `arms_of_width` makes them.
    arms = {(width, min(shape, width - 1))
            for width in bucket[1:]
            for shape in shapes}
    if (len(arms) == 1) != (control.strategy == 'table'):
      wants = ('one width and one shape'
               if control.strategy == 'table' else 'two arms or more')
      raise ConfigError(
          f'control.strategy={control.strategy!r} takes {wants} for a bucket; '
          f'{bucket!r} in control.buckets with rollout.branching='
          f'{rollout.branching} gives {len(arms)}{remedy}')
  if not limits or limits != sorted(set(limits)):
    raise ConfigError(f'control.buckets={buckets} has no ascending numbers of '
                      f'rows{remedy}')


# Nodes verified in one forward: the mask alone takes W^2 per row.
_WIDEST = 64


def _check_widths(rollout: RolloutConfig, control: ControlConfig) -> int:
  """Returns the largest W; refuses what cannot be drafted or held."""
  _check_strategy(rollout, control)
  width = max(list_widths(rollout, control))
  chosen = 'widths' if control.strategy == 'cost_model' else 'buckets'
  name = 'rollout.width' if rollout.width else f'control.{chosen}'
  if width > _WIDEST:
    raise ConfigError(f'{name} asks for {width} nodes in one forward; at most '
                      f'{_WIDEST} are verified')
  if rollout.drafter == 'none' and rollout.width > 1:
    raise ConfigError(
        f"rollout.drafter='none' drafts nothing for rollout.width"
        f'={rollout.width}; set the width to 1, or name a drafter')
  for name, value, unset, users in (('control.run_ahead_rows',
                                     control.run_ahead_rows, 0, FROM_ROLLOUTS),
                                    ('rollout.branching', rollout.branching, 1,
                                     BRANCHING)):
    if value != unset and rollout.drafter not in users:
      raise ConfigError(
          f'{name}={value} is for rollout.drafter '
          f'{" or ".join(map(repr, users))}, not {rollout.drafter!r}; set it '
          f'to {unset}')
  if width > 1 and rollout.drafter in FROM_ROLLOUTS:
    group = rollout.samples_per_prompt
    capacity = rollout.prompt_length + rollout.max_new_tokens + width + 7
    texts = rollout.history + group * (2 if control.run_ahead_rows else 1)
    places = rollout.slots + -(-rollout.slots // group)
    size = 8 * places * texts * capacity / 2**20
    if size > _LARGEST_CORPUS:
      raise ConfigError(
          f'rollout.history={rollout.history} and samples_per_prompt={group} '
          f'for {rollout.slots} slots of {capacity} tokens take {size:.0f} MiB '
          f'on the device, above {_LARGEST_CORPUS}; lower rollout.history or '
          'rollout.slots')
  return width


_LARGEST_CORPUS = 8192  # MiB
