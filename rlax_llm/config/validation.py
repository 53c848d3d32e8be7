"""`validate`: every fact that one config can be checked for."""

from typing import Any

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import DRAFTERS
from rlax_llm.config import freeze
from rlax_llm.config import LORA_TARGETS
from rlax_llm.config import ModelConfig
from rlax_llm.config import nearest
from rlax_llm.config import TaskConfig
from rlax_llm.config.field_types import check_types
from rlax_llm.config.rollout_validation import validate_rollout

# What the string fields may hold; the modules that implement them are tested
# against these.
_CHOICES = {
  'task.prompt_format': ('question', 'short'),
  'task.answer_format': (
    'tag',
    'scratchpad',
    'last_line',
    'after_equals',
    'boxed',
    'hashes',
    'all',
  ),
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
  'control.extra_samples': 0,
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
  'mesh.replicas': 1,
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
_ABOVE_ZERO = (
  'learning.learning_rate',
  'sft.learning_rate',
  'drafter.learning_rate',
  'learning.max_grad_norm',
  'learning.epsilon',
  'task.verifier_seconds',
  'model.rope_theta',
  'model.rope_factor',
  'model.rope_low',
  'model.rope_high',
  'model.norm_epsilon',
  'model.lora.alpha',
  'model.init_scale',
  'control.refill_threshold',
  'control.prune_keep',
)

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
  check_types(config)
  for path, choices in _CHOICES.items():
    if _get(config, path) not in choices:
      raise ConfigError(
        f'{path}={_get(config, path)!r} is unknown'
        f'{nearest(str(_get(config, path)), choices)}; it is one of '
        f'{", ".join(choices)}'
      )
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
