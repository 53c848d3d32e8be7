"""Sizes, objectives and arms of the SRT experiment."""

from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

from rlax_llm.config import Config
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting import tree_cache as trees
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.drafter import Drafter

# Model, batch and length of the experiment: `tiny` for two CPU cores, `gpu`
# for one accelerator (33 M parameters), `100m` likewise, in bfloat16; `small`
# (0.2 M) for experiments of many runs, `smoke` for tests. `changes` are fields
# of the config by path.
SIZES: dict[str, dict[str, Any]] = {
  'smoke': dict(
    model=dict(layers=1, width=16, mlp_width=32),
    prompts=4,
    epoch_steps=2,
    steps=2,
    sft_steps=2,
    slots=16,
    width=4,
  ),
  'small': dict(
    model=dict(layers=2, width=96, mlp_width=256),
    prompts=8,
    epoch_steps=4,
    steps=12,
    sft_steps=1000,
    slots=16,
    width=4,
  ),
  'tiny': dict(
    model=dict(layers=4, width=128, mlp_width=384),
    prompts=8,
    epoch_steps=4,
    steps=12,
    sft_steps=600,
    slots=16,
    width=4,
  ),
  'gpu': dict(
    model=dict(layers=8, width=512, heads=8, kv_heads=4, mlp_width=1536),
    prompts=32,
    epoch_steps=8,
    steps=32,
    sft_steps=600,
    slots=128,
    width=8,
  ),
  '100m': dict(
    model=dict(layers=16, width=768, heads=12, kv_heads=4, mlp_width=2048),
    prompts=32,
    epoch_steps=4,
    steps=16,
    sft_steps=500,
    slots=64,
    width=8,
    changes={
      'sft.learning_rate': 1e-3,
      'sft.warmup_steps': 100,
      'learning.precision.compute': 'bfloat16',
      'learning.microbatch_rows': 8,
      # One shape: programs of many layers take long to compile.
      'rollout.min_capacity': 512,
      'control.min_slots': 64,
    },
  ),
}

# The paper trains with PPO, GRPO and DAPO; here the objectives differ as there
# in clipping, in the reduction, and in the updates taken on one batch.
OBJECTIVES: dict[str, dict[str, Any]] = {
  'grpo': {},
  'ppo_clip': {
    'learning.minibatches': 2,
    'algorithm.reduction': 'token_mean',
    'algorithm.advantage': 'group_centred',
  },
  'dapo': {
    'algorithm.clip_high': 0.28,
    'algorithm.reduction': 'token_mean',
    'learning.minibatches': 2,
  },
}


class Arm(NamedTuple):
  """What is drafted from.

  Attributes:
    drafter: none | prompt_lookup | tree_cache.
    history: R; earlier rollouts.
    live: which texts of the step: none | own | group.
    shared: one history for all prompts.
    ahead: run ahead of the next step with idle slots.
  """

  drafter: str = 'tree_cache'
  history: int = 0
  live: str = 'group'
  shared: bool = False
  ahead: bool = False


ARMS: Mapping[str, Arm] = {
  'none': Arm('none'),
  'prompt lookup': Arm('prompt_lookup'),
  'own output': Arm(live='own'),
  'global tree': Arm(history=64, shared=True),
  'history': Arm(history=16, live='none'),
  'live group': Arm(),
  'SRT': Arm(history=16),
  'SRT + run-ahead': Arm(history=16, ahead=True),
}


def make_config(size: str, objective: str, samples: int, seed: int) -> Config:
  """Returns the config of a training run without speculation."""
  s = SIZES[size]
  config = Config()
  config.seed = seed
  config.num_steps = s['steps']
  config.task.name = 'experiments.srt.task:LongTail'
  config.task.prompts_per_step = s['prompts']
  config.task.epoch_prompts = s['prompts'] * s['epoch_steps']
  config.model.tokenizer = '0123456789+-=()'
  for name, value in s['model'].items():
    setattr(config.model, name, value)
  config.sft.steps = s['sft_steps']
  config.sft.warmup_steps = min(config.sft.warmup_steps, config.sft.steps)
  config.sft.sequences_per_step = 64
  config.sft.learning_rate = 3e-3
  config.rollout.prompt_length = 64
  config.rollout.max_new_tokens = 192
  config.rollout.samples_per_prompt = samples
  config.rollout.slots = s['slots']
  config.rollout.drafter = 'none'
  config.rollout.width = 1
  config.learning.learning_rate = 1e-4
  config.learning.epsilon = 1e-3
  config.learning.b2 = 0.99
  config.learning.row_length = 512
  config.learning.microbatch_rows = 1
  config.mesh.data = 1
  for path, value in (s.get('changes', {}) | OBJECTIVES[objective]).items():
    *sections, field = path.split('.')
    setattr(functools.reduce(getattr, sections, config), field, value)
  return config


def make_drafter(arm: Arm, config: Config, width: int) -> Drafter:
  """Returns the drafter of an arm."""
  if arm.drafter == 'none':
    return drafting.no_drafter()
  if arm.drafter == 'prompt_lookup':
    return drafting.prompt_lookup(width)
  rollout = config.rollout
  group = rollout.samples_per_prompt
  capacity = rollout.prompt_length + rollout.max_new_tokens + width
  shape = CorpusShape(
    prompts=rollout.slots * 3,
    capacity=-(-capacity // 8) * 8,
    history=arm.history,
    group=group,
    hints=group if arm.ahead else 0,
  )
  return trees.tree_cache(width, trees.TreeCacheConfig(shape, live=arm.live))
