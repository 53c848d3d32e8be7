"""Which runs there are, and the config of each."""

from typing import NamedTuple

from configs import quickstart
from rlax_llm.config import Config
from rlax_llm.learning.presets import PRESETS

SIZES = ('tiny', 'quickstart')
STALE = 8  # steps from sampling to training, of the arms that are stale
SAMPLES = 8  # of a held-out problem before RL and at the end: pass@8
TEACHER = 'grpo'  # whose run of the same seed is distilled
LEARNING_RATE = 2e-4
EVALUATIONS = 4  # during RL


class Arm(NamedTuple):
  """What distinguishes runs of one seed."""

  preset: str
  staleness: int = 0

  @property
  def name(self) -> str:
    return self.preset + f', {self.staleness} steps stale' * bool(
      self.staleness
    )

  @property
  def folder(self) -> str:
    return self.preset + f'_stale_{self.staleness}' * bool(self.staleness)

  @property
  def distils(self) -> bool:
    return PRESETS[self.preset].credit == 'distillation'


def list_arms() -> list[Arm]:
  """Returns every preset, the teacher first; then those on stale samples."""
  names = [TEACHER, *(name for name in PRESETS if name != TEACHER)]
  stale = [Arm(name, STALE) for name in ('grpo', 'decoupled_ppo', 'vcpo')]
  return [*map(Arm, names), *stale]


def _shrink(config: Config) -> None:
  """Makes a config that is over in seconds, to see that everything runs."""
  config.model.layers, config.model.width, config.model.mlp_width = 1, 64, 128
  config.sft.steps, config.sft.sequences_per_step = 200, 64
  config.task.prompts_per_step, config.task.epoch_prompts = 4, 8
  config.rollout.samples_per_prompt, config.rollout.slots = 4, 16
  config.rollout.drafter, config.rollout.width = 'none', 1
  config.evaluate.problems = 16


def make_warm_config(seed: int, size: str) -> Config:
  """Returns the config of a seed's warm start; no step of RL follows it."""
  config = quickstart.get_config()
  config.seed, config.num_steps = seed, 0
  # A tie to the reference, the same for all, would be a part of each objective.
  config.algorithm.kl_coefficient = config.algorithm.divergence = None
  config.task.prompts_per_step = 16
  config.evaluate.problems = 256
  config.checkpoint.every, config.checkpoint.keep = 0, 1
  if size == 'tiny':
    _shrink(config)
  return config


def make_config(
  arm: Arm,
  seed: int,
  size: str,
  steps: int,
  minibatches: int,
  warm: str,
  teacher: str,
) -> Config:
  """Returns the config of a run; runs of a seed differ in the arm alone.

  Args:
    arm: which run.
    seed: of the run and of its warm start.
    size: of SIZES.
    steps: of RL.
    minibatches: updates on the batch of a step. With one all ratios are 1, and
      objectives that differ in what they do with ratios are one.
    warm: the folder of the warm start's weights.
    teacher: the workdir of the run that is distilled.
  """
  config = make_warm_config(seed, size)
  config.num_steps = steps
  config.sft.steps = 0
  config.model.pretrained = warm
  config.control.staleness = arm.staleness
  config.learning.learning_rate = LEARNING_RATE
  config.learning.minibatches = minibatches
  config.evaluate.every = max(steps // EVALUATIONS, 1)
  config.algorithm.name = arm.preset
  preset = PRESETS[arm.preset]
  if arm.distils:
    config.algorithm.teacher = teacher
  if preset.credit == 'progress':
    # A term of the written tally is an episode; answers have two digits.
    config.algorithm.progress_marker = '='
    config.algorithm.progress_tokens = 4
  if preset.rehearsal != 'none':
    config.algorithm.rehearsal_prompts = 128
  if size == 'tiny':
    config.learning.warmup_steps = 0
    config.evaluate.every = 1
    if preset.rehearsal != 'none':
      config.algorithm.rehearsal_prompts = 64
      config.algorithm.rehearsal_least = 0.0
  return config
