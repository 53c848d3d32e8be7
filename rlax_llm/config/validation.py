"""`validate`: every fact that one config can be checked for."""

import dataclasses
from typing import Any

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import LORA_TARGETS
from rlax_llm.config import ModelConfig
from rlax_llm.config import nearest
from rlax_llm.config import TaskConfig
from rlax_llm.config.field_classes import sections
from rlax_llm.config.field_types import check_types
from rlax_llm.config.rollout_validation import validate_rollout
from rlax_llm.config.section import check_limits


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
  check_types(config)
  for path, section in sections(config):
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
      name = f'{path}.{field.name}' if path else field.name
      check_limits(name, getattr(section, field.name), field.metadata)
  _validate_model(config.model)
  validate_rollout(config)
  if not 0 < config.evaluate.top_p <= 1:
    raise ConfigError(
      f'evaluate.top_p={config.evaluate.top_p} must be in (0, 1]'
    )
  if config.evaluate.early_stop and not config.evaluate.probe:
    raise ConfigError(
      f'evaluate.early_stop={config.evaluate.early_stop} needs '
      "evaluate.probe, the text that asks for the answer, for instance '='"
    )
  for name in ('b1', 'b2'):
    value = getattr(config.learning, name)
    if not 0 <= value < 1:
      raise ConfigError(f'learning.{name}={value} must be in [0, 1)')
  if config.task.prompts_per_step % config.learning.minibatches:
    raise ConfigError(
      f'task.prompts_per_step={config.task.prompts_per_step} is not '
      f'divisible by learning.minibatches={config.learning.minibatches}; '
      'every optimizer step takes whole groups'
    )
  _check_unused(config.task)
  for path in ('task.system_prompt', 'task.chat_variables'):
    if _get(config, path) and not config.task.chat_template:
      raise ConfigError(
        f'{path} is read by the chat template only; set '
        'task.chat_template=True or leave it empty'
      )
  free = config.task.length_limit - config.task.length_cache
  if free >= config.rollout.max_new_tokens:
    raise ConfigError(
      f'task.length_limit={config.task.length_limit} less task.length_cache='
      f'{config.task.length_cache} leaves {free} tokens unpunished, all of '
      f'rollout.max_new_tokens={config.rollout.max_new_tokens}; lower the '
      'limit or raise the cache'
    )
  longest = config.rollout.prompt_length + config.rollout.max_new_tokens
  if 0 < config.learning.row_length < longest:
    raise ConfigError(
      f'learning.row_length={config.learning.row_length} cannot hold a '
      f'prompt of {config.rollout.prompt_length} and '
      f'{config.rollout.max_new_tokens} new tokens; use at least {longest}, '
      'or 0 to have it chosen'
    )
  return freeze(config)


def check_durations(config: Config, critic_warmup: int) -> None:
  """Refuses durations that exceed the run: what they schedule never completes.

  Only a run that begins is checked; one that exists can be continued to another
  end, evaluated, sampled and exported. The default of `sft.warmup_steps` is
  free, too, and so is what is harmless beyond the end:
  `checkpoint.every`, `keep_every` and `evaluate.every` (the start and the end
  are always among them), `control.replay_steps` and `max_staleness` (bounds of
  an age), `control.staleness` (the first steps learn from step 0's samples),
  `control.prune_steps` (then all pruning is at random).

  Args:
    config: frozen.
    critic_warmup: RL steps in which the policy does not learn.

  Raises:
    ConfigError: names the duration, the run's and the way out.
  """
  minibatches = config.learning.minibatches
  steps = config.num_steps - critic_warmup
  of_policy = (
    f'{steps * minibatches} optimizer steps (num_steps='
    f'{config.num_steps}, of which algorithm.critic_warmup='
    f'{critic_warmup}; learning.minibatches={minibatches})'
  )
  for path, most, what in (
    ('learning.warmup_steps', steps * minibatches, of_policy),
    ('sft.warmup_steps', config.sft.steps, f'sft.steps={config.sft.steps}'),
    ('drafter.every', config.num_steps, f'num_steps={config.num_steps}'),
  ):
    given = path != 'sft.warmup_steps' or _get(config, path) != _get(
      Config(), path
    )
    if given and _get(config, path) > most > 0:
      raise ConfigError(
        f'{path}={_get(config, path)} is beyond the end: the run has {what}; '
        f'use at most {most}, or 0'
      )


def _check_unused(task: TaskConfig) -> None:
  """Refuses data that the task does not read; one of your own may."""
  for path, readers in (
    ('mixture', ('mixture',)),
    ('path', ('jsonl', 'mixture')),
    ('held_out_path', ('jsonl', 'mixture')),
  ):
    if (
      getattr(task, path) and ':' not in task.name and task.name not in readers
    ):
      raise ConfigError(
        f'task.{path} is set, but task.name={task.name!r} does not read it; '
        f'set task.name={" or ".join(map(repr, readers))}, or leave it empty'
      )


def _validate_model(model: ModelConfig) -> None:
  if model.heads % model.kv_heads:
    raise ConfigError(
      f'model.heads={model.heads} is not divisible by '
      f'model.kv_heads={model.kv_heads}'
    )
  if not model.head_dim and model.width % model.heads:
    raise ConfigError(
      f'model.width={model.width} is not divisible by '
      f'model.heads={model.heads}; change one or set model.head_dim'
    )
  unknown = sorted(set(model.lora.targets) - set(LORA_TARGETS))
  if unknown or (model.lora.rank and not model.lora.targets):
    raise ConfigError(
      f'model.lora.targets={tuple(model.lora.targets)}'
      f'{nearest(unknown[0], LORA_TARGETS) if unknown else ""}; name some '
      f'of {", ".join(LORA_TARGETS)}'
    )
  head_dim = model.head_dim or model.width // model.heads
  if head_dim % 2:
    raise ConfigError(
      f'the head dimension is {head_dim}; rotary positions need an even one'
    )
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
        'too, or leave it'
      )
  if model.rope_low >= model.rope_high:
    raise ConfigError(
      f'model.rope_low={model.rope_low} must be below '
      f'model.rope_high={model.rope_high}'
    )
