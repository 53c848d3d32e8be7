"""Typed configuration: sections, defaults, units.

A config file defines `get_config() -> Config`. Command lines override single
fields (`--config.learning.learning_rate=1e-4`); unknown names and wrong types
are refused by `rlax_llm.runtime.flags`. `rlax_llm.config.validation` checks the
limits written at the fields and every fact that spans fields. It returns a
frozen, hashable copy, which jitted functions receive as a static argument.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from rlax_llm.config.algorithm import AlgorithmConfig
from rlax_llm.config.section import ConfigError
from rlax_llm.config.section import field
from rlax_llm.config.section import RENAMED_FIELDS
from rlax_llm.config.section import Section

# The names of `rollout.drafter`; drafting/drafters.py implements them.
DRAFTERS = ('none', 'prompt_lookup', 'tree_cache', 'model', 'hybrid')
# Which of them draft from what is kept of other rollouts, with a network, and
# trees.
FROM_ROLLOUTS = ('tree_cache', 'hybrid')
LEARNED = ('model', 'hybrid')
BRANCHING = ('tree_cache', 'model', 'hybrid')
# What the hybrid drafter drafts from.
SOURCES = ('tree_cache', 'model')
# The matrices of a layer, by their published names.
LORA_TARGETS = (
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
)


@dataclasses.dataclass(unsafe_hash=True)
class TaskConfig(Section):
  """Which problems, how they are put to the model, how they are verified."""

  # A reasoning-gym name, 'jsonl', 'tfds' (any dataset of tensorflow-datasets
  # with questions and answers), 'gsm8k', 'mixture', or 'module:Class' of your
  # own.
  name: str = 'chain_sum'
  # Arguments of the reasoning-gym dataset; for a mixture, by task name.
  # jsonl and tfds: question_field, answer_field, gold_format (where the answer
  # stands in its field: all | boxed | hashes). tfds also: dataset, data_dir,
  # train_split, held_out_split.
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # mixture: task name -> weight.
  mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
  prompts_per_step: int = field(32, ge=1)  # B
  # Distinct training prompts; they recur, reshuffled, epoch after epoch.
  # 0: every step has new problems.
  epoch_prompts: int = field(0, ge=0)
  # question: the task's own text; short: only the expression (arithmetic).
  prompt_format: str = field('question', choices=('question', 'short'))
  # Where the answer stands in a completion: tag (the last <answer>...
  # </answer>), scratchpad (behind the last ')'), last_line, after_equals
  # (behind the last '='), boxed (the last \boxed{...} or \fbox{...}, which may
  # stand in an unfinished thought), hashes (the line behind the last ####),
  # all.
  answer_format: str = field(
    'tag',
    choices=(
      'tag',
      'scratchpad',
      'last_line',
      'after_equals',
      'boxed',
      'hashes',
      'all',
    ),
  )
  # Appended to every prompt after a line break; tells a pretrained model the
  # answer format.
  instruction: str = ''
  # Pretrained models: each problem is the user's turn of a chat, in the model's
  # chat template; False: it is put to the model as it is.
  chat_template: bool = False
  # chat_template: the system turn ('': none of ours; some templates write their
  # own), and further variables of the template (Qwen3: enable_thinking).
  system_prompt: str = ''
  chat_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # jsonl: the file, and the held-out file ('': split by the question's hash).
  path: str = ''
  held_out_path: str = ''
  # jsonl, tfds: numeric (one exact number: 2 1/2 is 5/2) | exact (text) | math
  # (the same mathematical object by math-verify, of the extra [math]).
  match: str = field('numeric', choices=('numeric', 'exact', 'math'))
  # The share of the warm start's solutions that stop before the last term and
  # answer with the sum so far (chain_sum).
  trace_unfinished: float = field(0.0, ge=0, le=1)
  # A sample's reward: the sum of weight * reward over correct (the task's
  # verifier), format (1 where there is an answer in answer_format), length
  # (DAPO's soft overlong punishment: 0 up to length_limit - length_cache
  # tokens, then linear to -1 at length_limit), and 'module:function' of your
  # own (see tasks/rewards.py). `correct` alone decides which groups have a
  # signal and which prompts are hard; where its weight is 0 or missing, the sum
  # does. A sample without a reward, because the verifier failed, is left out.
  rewards: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {'correct': 1.0}
  )
  length_limit: int = field(0, ge=0)  # tokens
  length_cache: int = field(0, ge=0)  # tokens
  verifier_processes: int = field(1, ge=1, le=1024)
  # CPU seconds for one sample
  verifier_seconds: float = field(4.0, gt=0, le=3600)
  # Control experiment: shuffle rewards, missing ones included, among the
  # samples of a step. `control` decides by those before the shuffle.
  permute_rewards: bool = False


@dataclasses.dataclass(unsafe_hash=True)
class LoRAConfig(Section):
  """Low-rank adapters; with them everything else is frozen."""

  rank: int = field(0, ge=0)  # 0: no adapters
  alpha: float = field(16.0, gt=0)  # the update is scaled by alpha / rank
  # Matrices that get one, by their published names.
  targets: tuple[str, ...] = LORA_TARGETS


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig(Section):
  """A decoder-only transformer: Llama, Qwen2 and Qwen3 are settings of it.

  With `pretrained` the fields of ARCHITECTURE_FIELDS come from that folder. One
  that is set here to another value than its default must agree with it.
  """

  # A folder with config.json and *.safetensors of a published model; '': the
  # parameters are initialised.
  pretrained: str = ''
  # bytes; the string of characters that is the whole alphabet; pretrained: the
  # folder's. '': pretrained with a folder, else bytes.
  tokenizer: str = ''
  vocabulary: int = field(0, ge=0)  # 0: the tokenizer's
  layers: int = field(4, ge=1)
  width: int = field(128, ge=1)
  heads: int = field(4, ge=1)
  kv_heads: int = field(2, ge=1)
  head_dim: int = field(0, ge=0)  # 0: width / heads
  mlp_width: int = field(512, ge=1)
  max_positions: int = 4096
  rope_theta: float = field(10000.0, gt=0)
  # RoPE scaling for texts beyond the context of pretraining: none | linear
  # (positions divided by the factor) | llama3 (only long wavelengths).
  rope_scaling: str = field('none', choices=('none', 'linear', 'llama3'))
  rope_factor: float = field(1.0, gt=0)
  # llama3: wavelengths that complete fewer than `low` turns in `original`
  # positions are stretched by the factor; those with more than `high` are kept.
  rope_low: float = field(1.0, gt=0)
  rope_high: float = field(4.0, gt=0)
  rope_original: int = field(8192, ge=1)
  norm_epsilon: float = field(1e-6, gt=0)
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # Qwen3
  tied_head: bool = True
  init_scale: float = field(1.0, gt=0)
  lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)


# The fields of ModelConfig that a published model's config.json decides.
ARCHITECTURE_FIELDS = (
  'vocabulary',
  'layers',
  'width',
  'heads',
  'kv_heads',
  'head_dim',
  'mlp_width',
  'max_positions',
  'rope_theta',
  'rope_scaling',
  'rope_factor',
  'rope_low',
  'rope_high',
  'rope_original',
  'norm_epsilon',
  'qkv_bias',
  'qk_norm',
  'tied_head',
)


@dataclasses.dataclass(unsafe_hash=True)
class SFTConfig(Section):
  """The supervised warm start on the task's written-step traces."""

  steps: int = field(0, ge=0)
  sequences_per_step: int = field(128, ge=1)
  learning_rate: float = field(2e-3, gt=0)
  warmup_steps: int = field(20, ge=0)


@dataclasses.dataclass(unsafe_hash=True)
class RolloutConfig(Section):
  """How completions are generated. Only the first block affects tokens."""

  samples_per_prompt: int = field(8, ge=1)  # G
  max_new_tokens: int = field(128, ge=1)  # T
  prompt_length: int = field(64, ge=1)  # P: the longest prompt admitted, tokens
  temperature: float = 1.0
  top_k: int = 0  # 0: off
  top_p: float = 1.0
  min_p: float = 0.0

  # Speed values: none of these changes a token.
  # N: rows decoded together. With control.over_provision it also decides which
  # groups are late, unless control.logical_slots is set.
  slots: int = field(64, ge=1)
  # none | prompt_lookup | tree_cache | model | hybrid: those two, merged; with
  # width=0 control.strategy chooses which of them drafts a segment.
  drafter: str = field('tree_cache', choices=DRAFTERS)
  # W: nodes verified in one forward; 1: no speculation; 0: control.strategy
  # chooses for every segment.
  width: int = field(0, ge=0)
  # tree_cache, model, hybrid: children of a draft node, at most; 1: a chain. It
  # holds for each source of the hybrid. 0: control.strategy chooses from
  # control.branchings.
  branching: int = field(1, ge=0)
  # minimum probability of a drafted node
  draft_least: float = field(0.05, ge=0, le=1)
  # R: earlier rollouts of a prompt that are drafted from
  history: int = field(8, ge=0)
  # memory for earlier rollouts, in every process
  cache_megabytes: int = field(256, ge=1)
  # forwards between two boundaries, at most
  segment_forwards: int = field(32, ge=1)
  min_capacity: int = field(64, ge=1)  # S starts here and doubles


@dataclasses.dataclass(unsafe_hash=True)
class ControlConfig(Section):
  """What is decided at segment boundaries.

  The first block decides which samples a step learns from, in logical time;
  the second changes speed and no token.
  """

  # APRIL: oversampling factor of groups. Sampling stops when enough groups for
  # a step are complete; the next step continues the others. 1: off.
  over_provision: float = field(1.0, ge=1)
  # Steps after which a deferred group must be complete.
  max_staleness: int = field(4, ge=1)
  # Where sampling stops, among the ticks at which enough groups are complete:
  # april stops at the first; module:function decides by a
  # rlax_llm.rollout.control.SampleView. Needs over_provision above 1.
  stop_policy: str = 'april'
  # DAPO: a step takes only groups that are neither all right nor all wrong. It
  # samples more until it has enough, in at most this many rounds. 0: off.
  dynamic_sampling: int = field(0, ge=0)
  # Step t learns from samples of the parameters of step t - staleness, as in
  # asynchronous training; the first steps use those of step 0.
  staleness: int = field(0, ge=0)
  # Groups of a step that are replayed from the last replay_steps steps; only
  # groups that are neither all right nor all wrong qualify.
  replay: int = field(0, ge=0)
  replay_steps: int = field(4, ge=1)
  # In which order new groups are sampled: arrival | longest_first |
  # shortest_first, by lengths predicted from earlier rollouts of the prompt,
  # or of prompts like it.
  order: str = field(
    'arrival', choices=('arrival', 'longest_first', 'shortest_first')
  )
  # ARRoL: after this many tokens the share prune_keep of each group's samples
  # continues. A head on hidden states predicts success and weighs the draw; in
  # the first prune_steps steps the draw is uniform. 0: off.
  prune_at: int = field(0, ge=0)
  prune_keep: float = field(0.5, gt=0, le=1)
  prune_steps: int = field(20, ge=0)
  # Weigh surviving samples by the inverse of their keep probability.
  prune_weights: bool = True
  # DARS: upper bound of the extra samples of a prompt of which fewer than half
  # of the last samples were right. Their number raises its weight in the
  # gradient to that of a prompt with accuracy one half; extra_by_hardness
  # multiplies this target by twice the share of wrong samples. 0: off.
  extra_samples: int = field(0, ge=0)
  extra_by_hardness: bool = False
  # Slots of logical time, which decides the samples that complete first; 0:
  # as many as rollout.slots.
  logical_slots: int = field(0, ge=0)

  # With requests pending, a segment ends when this share of rows is done.
  refill_threshold: float = field(0.25, gt=0, le=1)
  compact: bool = True  # halve N when half of the rows are done
  min_slots: int = field(8, ge=1)  # compaction stops here
  # With rollout.width=0, what chooses W and the draft's shape:
  #   cost_model: the most tokens per second by measured costs and acceptance;
  #   table: by the number of rows that decode;
  #   bandit: by that number among several arms, by what they earned lately.
  strategy: str = field('cost_model', choices=('cost_model', 'table', 'bandit'))
  # cost_model: the values of W to choose from; 1 is always among them.
  widths: tuple[int, ...] = (1, 4)
  branchings: tuple[int, ...] = (1, 2)  # with rollout.branching=0
  # table, bandit: (rows that decode at most, W, W of a further arm, ...),
  # ascending; above the last one nothing is drafted. A table's have one W.
  # These are the published ones.
  buckets: tuple[tuple[int, ...], ...] = ((1, 48), (4, 32), (20, 16), (32, 8))
  # probability of an arm drawn at random
  bandit_epsilon: float = field(0.1, ge=0, le=1)
  bandit_window: int = field(300, ge=1)  # segments that an arm is judged by
  # When nothing is pending, slots up to this number that would idle sample
  # the coming step, as hints to its drafts (tree_cache). 0: off. Pays where a
  # forward of few rows costs as much as one of many: on accelerators.
  run_ahead_rows: int = field(0, ge=0)


@dataclasses.dataclass(unsafe_hash=True)
class DrafterConfig(Section):
  """The learned drafter of rollout.drafter 'model' and 'hybrid'; speed only."""

  # Tokens of its longest line; 0: W - 1. rollout.branching says how many
  # children a node has.
  depth: int = field(0, ge=0)
  # hybrid: what is drafted from; leave one out to switch it off.
  sources: tuple[str, ...] = SOURCES
  # Steps between two trainings of it; 0: it stays as the warm-up left it.
  every: int = field(1, ge=0)
  # Share of the run's time for its training between steps. On idle replicas
  # training costs no time: see mesh.replicas.
  share: float = field(0.05, ge=0, le=1)
  # Updates on the task's traces before RL, on the policy as it is then.
  warmup_updates: int = field(0, ge=0)
  learning_rate: float = field(1e-3, gt=0)
  microbatch_rows: int = field(8, ge=1)  # packed rows of one update
  # Passes over a row in one update; each reads the estimates of the one before
  # in place of the target's hidden states, as drafting does.
  passes: int = field(1, ge=1)
  # of each of the last two steps, longest first
  buffer_tokens: int = field(1 << 20, ge=1)


@dataclasses.dataclass(unsafe_hash=True)
class PrecisionConfig(Section):
  """Dtypes: of stored parameters, of the trunk's maths, of the head's."""

  parameters: str = field('float32', choices=('float32', 'bfloat16'))
  compute: str = field('float32', choices=('float32', 'bfloat16'))
  head: str = field('float32', choices=('float32', 'bfloat16'))


@dataclasses.dataclass(unsafe_hash=True)
class LearningConfig(Section):
  """The optimizer step."""

  learning_rate: float = field(1e-3, gt=0)
  # constant | linear | cosine, over num_steps
  schedule: str = field('constant', choices=('constant', 'linear', 'cosine'))
  warmup_steps: int = field(0, ge=0)  # optimizer steps
  # Of matrices, the untied head and adapters among them; norms, biases and the
  # embedding are not decayed.
  weight_decay: float = field(0.0, ge=0)
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = field(1e-8, gt=0)
  max_grad_norm: float = field(1.0, gt=0)
  minibatches: int = field(1, ge=1)  # optimizer steps for one batch of rollouts
  # recompute: from a pass of its own, or the update's with one update a batch;
  # scored: of the weights that sampled the token, where they are not today's;
  # sampler: the behaviour log-probabilities.
  old_logprobs: str = field(
    'recompute', choices=('recompute', 'scored', 'sampler')
  )
  # L, tokens of a packed row; 0: chosen from P + T
  row_length: int = field(0, ge=0)
  microbatch_rows: int = field(8, ge=1)  # rows in one forward and backward pass
  # positions whose logits exist at one time
  score_chunk: int = field(2048, ge=1)
  remat: bool = False  # recompute each layer in the backward pass
  # The run stops after this many consecutive updates that were skipped because
  # loss or gradient was not finite.
  most_skipped: int = field(5, ge=1)
  # Warns where a token's behaviour log-probability and the recomputed one
  # differ by more, in nats. 0: chosen by learning.precision.compute.
  gap_alarm: float = field(0.0, ge=0)
  precision: PrecisionConfig = dataclasses.field(
    default_factory=PrecisionConfig
  )


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig(Section):
  """Devices by axis; rows are divided over data and fsdp together."""

  data: int = field(0, ge=0)  # 0: the devices that fsdp and tensor leave
  fsdp: int = field(1, ge=1)  # divides parameters and optimizer state
  tensor: int = field(1, ge=1)  # divides heads, MLP and vocabulary
  # Rollouts read parameters gathered over fsdp ahead of each generate, where
  # the memory allows it; else layer by layer, in every forward.
  gather_for_rollout: bool = True
  # Parts of the data ways that decode independently from one queue, each with
  # its share of rollout.slots: a long answer holds up its part only. Programs
  # are compiled for every part.
  replicas: int = field(1, ge=1)


@dataclasses.dataclass(unsafe_hash=True)
class CheckpointConfig(Section):
  """When to save, how much to keep."""

  every: int = field(50, ge=0)  # steps; 0: only at the start and the end
  keep: int = field(2, ge=1)  # the newest
  keep_every: int = field(0, ge=0)  # and every keep_every-th step; 0: none


@dataclasses.dataclass(unsafe_hash=True)
class EvaluateConfig(Section):
  """Accuracy on held-out problems."""

  every: int = field(0, ge=0)  # steps; 0: only before and after RL
  problems: int = field(256, ge=1)
  # per problem; pass@k for every power of two up to it
  samples: int = field(1, ge=1)
  temperature: float = field(1.0, ge=0)
  top_p: float = 1.0
  # Only for rlax_llm.evaluate: a sample ends when this many consecutive probes
  # give the same answer; 0: off. A probe is a text that asks for the answer. It
  # is inserted after every probe_every tokens, answered in at most
  # probe_tokens, and removed again.
  early_stop: int = field(0, ge=0)
  probe: str = ''
  probe_every: int = field(64, ge=1)
  probe_tokens: int = field(20, ge=1)


@dataclasses.dataclass(unsafe_hash=True)
class Config(Section):
  """Everything a run depends on."""

  seed: int = field(0, ge=0)
  num_steps: int = field(100, ge=0)
  deterministic: bool = False  # GPU: bit-reproducible kernels, slower
  algorithm: AlgorithmConfig = dataclasses.field(
    default_factory=AlgorithmConfig
  )
  task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
  rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
  control: ControlConfig = dataclasses.field(default_factory=ControlConfig)
  drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
  learning: LearningConfig = dataclasses.field(default_factory=LearningConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)


def list_widths(
  rollout: 'RolloutConfig', control: 'ControlConfig'
) -> tuple[int, ...]:
  """Returns the values of W that a config can lead to, ascending."""
  if rollout.drafter == 'none':
    return (1,)
  if rollout.width:
    return (rollout.width,)
  widths = set(control.widths)
  if control.strategy != 'cost_model':
    widths = {width for _, *found in control.buckets for width in found}
  return tuple(sorted({1, *widths}))


def largest_group(rollout: RolloutConfig, control: ControlConfig) -> int:
  """Returns how many samples a prompt can get in a step."""
  return rollout.samples_per_prompt + control.extra_samples


def check_positions(rollout: RolloutConfig, width: int, limit: int) -> None:
  """Refuses a prompt, a completion and a draft beyond the model's positions.

  Args:
    rollout: gives P and T.
    width: W, the largest.
    limit: positions that the model can address.

  Raises:
    ConfigError: they do not fit.
  """
  total = rollout.prompt_length + rollout.max_new_tokens + width
  if total > limit:
    raise ConfigError(
      f'rollout.prompt_length {rollout.prompt_length} + max_new_tokens '
      f'{rollout.max_new_tokens} + width {width} = {total} exceed '
      f'model.max_positions={limit}; shorten one of them'
    )


def from_dict(items: Mapping[str, Any]) -> Config:
  """Returns the config that `to_dict` took apart; not yet validated.

  Args:
    items: what manifest.json holds as its config.

  Raises:
    ConfigError: if a field is unknown, as after an upgrade.
  """

  def fill(section: Any, values: Any, path: str) -> None:
    if not isinstance(values, Mapping):
      raise ConfigError(
        f'the recorded config has no fields in {path or "it"}: '
        f'{str(values)[:80]!r}; it is damaged'
      )
    known = {f.name for f in dataclasses.fields(section)}
    for name, value in values.items():
      if path + name in RENAMED_FIELDS:
        raise ConfigError(
          f'the recorded config has the field {path + name!r}; its name is now '
          f'{RENAMED_FIELDS[path + name]!r}'
        )
      if name not in known:
        raise ConfigError(
          'the recorded config has the unknown field '
          f'{path + name!r}; it is of another version'
        )
      current = getattr(section, name)
      if isinstance(current, Section):
        fill(current, value, f'{path}{name}.')
      else:
        setattr(section, name, value)

  config = Config()
  fill(config, items, '')
  return config
