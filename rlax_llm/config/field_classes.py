"""What each field of the config decides, hence what a resume may change.

A run is a value: a continued run must not change what its training steps
compute. Every field has one of these classes:

  training: training values depend on it; a resume with another value is
    refused.
  evaluation: held-out results depend on it, training does not.
  extent: how far the run goes, how often it saves, when it warns.
  layout: sums are taken in another order, and metrics of the policy on other
    samples; parameters are equal up to rounding.
  speed: no token and no parameter depends on it.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import functools
from typing import Any

from rlax_llm.config import Config
from rlax_llm.config import Section

TRAINING, EVALUATION = 'training', 'evaluation'
EXTENT, LAYOUT, SPEED = 'extent', 'layout', 'speed'
# What a resume may change.
MAY_DIFFER = frozenset({EVALUATION, EXTENT, LAYOUT, SPEED})

# By section, then by class. A class alone stands for every field of a section
# whose purpose is that class; fields of the other sections are listed.
_CLASSES: Mapping[str, str | Mapping[str, tuple[str, ...]]] = {
  '': {TRAINING: ('seed', 'deterministic'), EXTENT: ('num_steps',)},
  'algorithm': TRAINING,
  'task': {
    TRAINING: (
      'name',
      'options',
      'mixture',
      'prompts_per_step',
      'epoch_prompts',
      'prompt_format',
      'answer_format',
      'instruction',
      'chat_template',
      'system_prompt',
      'chat_variables',
      'path',
      'held_out_path',
      'match',
      'trace_unfinished',
      'rewards',
      'length_limit',
      'length_cache',
      'verifier_seconds',
      'permute_rewards',
    ),
    SPEED: ('verifier_processes',),
  },
  'model': TRAINING,
  'model.lora': TRAINING,
  'sft': TRAINING,
  'rollout': {
    TRAINING: (
      'samples_per_prompt',
      'max_new_tokens',
      'prompt_length',
      'temperature',
      'top_k',
      'top_p',
      'min_p',
    ),
    # See `comparable` for `slots`.
    SPEED: (
      'slots',
      'drafter',
      'width',
      'branching',
      'draft_least',
      'history',
      'cache_megabytes',
      'segment_forwards',
      'min_capacity',
    ),
  },
  'control': {
    TRAINING: (
      'over_provision',
      'max_staleness',
      'stop_policy',
      'dynamic_sampling',
      'staleness',
      'replay',
      'replay_steps',
      'order',
      'prune_at',
      'prune_keep',
      'prune_steps',
      'prune_weights',
      'extra_samples',
      'extra_by_hardness',
      'logical_slots',
    ),
    SPEED: (
      'refill_threshold',
      'compact',
      'min_slots',
      'strategy',
      'widths',
      'branchings',
      'buckets',
      'bandit_epsilon',
      'bandit_window',
      'run_ahead_rows',
    ),
  },
  'drafter': SPEED,
  'learning': {
    TRAINING: (
      'learning_rate',
      'schedule',
      'warmup_steps',
      'weight_decay',
      'b1',
      'b2',
      'epsilon',
      'max_grad_norm',
      'minibatches',
      'old_logprobs',
    ),
    LAYOUT: ('row_length', 'microbatch_rows', 'score_chunk', 'remat'),
    EXTENT: ('most_skipped', 'gap_alarm'),
  },
  'learning.precision': TRAINING,
  'mesh': LAYOUT,
  'checkpoint': EXTENT,
  'evaluate': {
    EVALUATION: (
      'samples',
      'temperature',
      'top_p',
      'early_stop',
      'probe',
      'probe_every',
      'probe_tokens',
    ),
    EXTENT: ('every', 'problems'),
  },
}


def sections(section: Section, path: str = '') -> Iterator[tuple[str, Section]]:
  """Yields (dotted path, section) of a section and of those inside it."""
  yield path, section
  for name, value in vars(section).items():
    if isinstance(value, Section):
      yield from sections(value, f'{path}.{name}' if path else name)


@functools.cache
def _by_field() -> dict[str, str]:
  """Returns dotted name -> class of every field.

  Raises:
    ValueError: a field has no class or several, or a name is no field.
  """
  found: dict[str, str] = {}
  for path, section in sections(Config()):
    names = {
      name
      for name, value in vars(section).items()
      if not isinstance(value, Section)
    }
    classes = _CLASSES.get(path, {})
    if isinstance(classes, str):
      classes = {classes: tuple(names)}
    listed = [name for group in classes.values() for name in group]
    wrong = names.symmetric_difference(listed)
    wrong |= {name for name in listed if listed.count(name) > 1}
    if wrong:
      raise ValueError(
        f'section {path!r}: {sorted(wrong)} must have one class '
        'each in rlax_llm/config/field_classes.py'
      )
    for kind, group in classes.items():
      found |= {f'{path}.{name}' if path else name: kind for name in group}
  return found


def class_of(name: str) -> str:
  """Returns the class of a field; TRAINING for names that are no field.

  Args:
    name: dotted; an entry of a dict field has the class of the field.
  """
  classes = _by_field()
  while name and name not in classes:
    name = name.rpartition('.')[0]
  return classes.get(name, TRAINING)


def comparable(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields by dotted name as they are compared at a resume.

  `control.logical_slots=0` means `rollout.slots`, and logical time is read
  only with `control.over_provision` above 1: then `rollout.slots` decides on
  training values under the name of `control.logical_slots`.
  """
  found = dict(fields)
  slots = found['control.logical_slots'] or found['rollout.slots']
  late = found['control.over_provision'] > 1
  found['control.logical_slots'] = slots if late else 0
  return found
