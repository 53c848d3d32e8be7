"""An objective as data: which functions make it up, and their numbers.

`Algorithm` is the only place where a field of an objective is declared, with
its default, its limits and what reads it. `AlgorithmConfig` is derived from it.
To give a loss a number of its own, add one field here that names the loss in
`read_by`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import TypeVar

from rlax_llm.config.section import field
from rlax_llm.config.section import Section

MAX = 1e6
# (the field that selects a function, the values with which the number is read;
# None: any but 'none' and 0).
_GAE = ('credit', ('gae',))
_DISTILL = ('credit', ('distillation',))
_PROGRESS = ('credit', ('progress',))
_CORRECTION = ('correction', None)
_REJECTION = ('rejection', None)
_LEAPS = ('leaps', None)
_CLIPPED = ('loss', ('clipped', 'sequence_clipped'))
_CLIPPED_ABOVE = ('loss', ('clipped', 'sequence_clipped', 'truncated'))
_COVERAGE = ('loss', ('coverage',))
_MASK = ('correction', ('token_mask', 'sequence_mask', 'geometric_mask'))
_K1 = ('rejection', ('token_k1', 'sum_k1', 'mean_k1', 'max_k1'))
_REHEARSAL = ('rehearsal', None)


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """An objective; every field holds a value. Hashable, static."""

  # Of a sample; `estimators.ESTIMATORS`.
  advantage: str = 'group'
  # How the sample's advantage is assigned to its tokens;
  # `token_credit.CREDITS`.
  credit: str = 'sample'
  # Per token; `objectives.LOSSES`.
  loss: str = 'clipped'
  # From tokens to the batch's loss; `masking.REDUCTIONS`.
  reduction: str = 'token_mean'
  # From the reference policy, added to the loss; `divergences.DIVERGENCES`.
  divergence: str = 'k3'
  # Of the divergence.
  kl_coefficient: float = field(0.0, ge=0, le=MAX)
  # Measure the divergence from the reference even if its coefficient is 0.
  keep_reference: bool = False
  # Ratios below 1 - clip_low are clipped.
  clip_low: float = field(0.2, ge=0, le=1, read_by=_CLIPPED)
  # Ratios above 1 + clip_high are clipped.
  clip_high: float = field(0.2, ge=0, le=MAX, read_by=_CLIPPED_ABOVE)
  # Bound on the loss of tokens with a negative advantage and a large ratio; 0:
  # off.
  dual_clip: float = field(0.0, ge=0, le=MAX, read_by=('loss', ('clipped',)))
  # Of the entropy bonus, or of |entropy - target|.
  entropy_coefficient: float = field(0.0, ge=-MAX, le=MAX)
  # Nats; 0: the term is a bonus.
  entropy_target: float = field(0.0, ge=0, le=MAX)
  # Importance weight of tokens that another policy sampled;
  # `objectives.CORRECTIONS`.
  correction: str = 'none'
  # Smallest importance weight that is not rejected.
  weight_low: float = field(0.0, ge=0, le=1, read_by=_MASK)
  # Importance weight above which tokens are truncated or rejected.
  weight_high: float = field(2.0, ge=1, le=MAX, read_by=_CORRECTION)
  # Which tokens are dropped; `objectives.REJECTIONS`.
  rejection: str = 'none'
  # Smallest ratio of sampler to trainer that is kept.
  reject_low: float = field(0.5, ge=0, le=1, read_by=_K1)
  # Bound of the statistic, a ratio for k1, else nats.
  reject_high: float = field(2.0, ge=0, le=MAX, read_by=_REJECTION)
  # Which samples are left out of the loss, besides those without a reward;
  # `filters.FILTERS`.
  filter: str = 'none'
  # Source of the rewards; `filters.LABELS`.
  labels: str = 'verifier'
  # Factor on the optimizer's step; `token_credit.STEP_SCALES`.
  step_scale: str = 'none'
  # Gamma of the returns.
  discount: float = field(1.0, ge=0, le=1, read_by=_GAE)
  # Lambda of the advantages.
  trace: float = field(1.0, ge=0, le=1, read_by=_GAE)
  # Bound on the change of a value in a step; 0: none.
  value_clip: float = field(0.2, ge=0, le=MAX, read_by=_GAE)
  # Of the critic's optimizer; 0: the policy's.
  critic_learning_rate: float = field(0.0, ge=0, le=1, read_by=_GAE)
  # RL steps in which only the critic learns.
  critic_warmup: int = field(0, ge=0, le=MAX, read_by=_GAE)
  # N; one of N answers has to be right.
  coverage_samples: int = field(4, ge=1, le=MAX, read_by=_COVERAGE)
  # Of the teacher's log-ratio.
  distillation_coefficient: float = field(1.0, ge=0, le=MAX, read_by=_DISTILL)
  # Of later log-ratios.
  distillation_discount: float = field(0.0, ge=0, le=1, read_by=_DISTILL)
  # A folder of published weights, or a run's workdir.
  teacher: str = field('', read_by=_DISTILL)
  # Extrapolations of the parameters along their last change that are tried
  # before steps 1, 2, 4, 8, ...: by twice, four times, ... that change; 0:
  # none.
  leaps: int = field(0, ge=0, le=16)
  # Training problems on which an extrapolation is evaluated.
  leap_problems: int = field(50, ge=1, le=MAX, read_by=_LEAPS)
  # Of the progress reward of an episode.
  progress_coefficient: float = field(0.5, ge=0, le=MAX, read_by=_PROGRESS)
  # Episodes into which a sample is divided, at most.
  progress_episodes: int = field(4, ge=2, le=MAX, read_by=_PROGRESS)
  # Text that ends an episode; '': episodes of equal length.
  progress_marker: str = field('', read_by=_PROGRESS)
  # Answers that estimate the success probability after an episode.
  progress_samples: int = field(1, ge=1, le=MAX, read_by=_PROGRESS)
  # Length limit of such an answer, tokens.
  progress_tokens: int = field(8, ge=1, le=MAX, read_by=_PROGRESS)
  # Divergence from the initial policy on the problems which that policy
  # solved, added to the loss; `f_divergences.F_DIVERGENCES`.
  rehearsal: str = 'none'
  # Of the rehearsal's divergence.
  rehearsal_coefficient: float = field(0.01, ge=0, le=MAX, read_by=_REHEARSAL)
  # Problems that the initial policy attempts.
  rehearsal_prompts: int = field(256, ge=1, le=MAX, read_by=_REHEARSAL)
  # Mean correctness from which on a problem counts as solved.
  rehearsal_least: float = field(0.75, ge=0, le=1, read_by=_REHEARSAL)
  # Rehearsed samples in a step, as a share of the step's samples.
  rehearsal_share: float = field(0.25, ge=0, le=1, read_by=_REHEARSAL)

  @property
  def linear_in_advantage(self) -> bool:
    """Whether a token of advantage 0 adds nothing to the gradient."""
    return (
      self.loss != 'negative_log_likelihood'
      and self.credit == 'sample'
      and self.step_scale == 'none'
      and self.kl_coefficient == 0
      and self.entropy_coefficient == 0
    )

  @property
  def reads_rewards(self) -> bool:
    """Whether a sample's reward enters its loss."""
    return self.advantage != 'none' or self.credit == 'progress'

  @property
  def has_critic(self) -> bool:
    """Whether a critic is trained beside the policy."""
    return self.credit == 'gae'

  @property
  def has_reference(self) -> bool:
    """Whether the policy before RL is kept."""
    return bool(self.kl_coefficient) or self.keep_reference


_Class = TypeVar('_Class', bound=type)


def _with_overrides(cls: type) -> Callable[[_Class], _Class]:
  """Returns a decorator that adds the fields of a class, None by default."""

  def add(section: _Class) -> _Class:
    for item in dataclasses.fields(cls):
      section.__annotations__[item.name] = item.type | None  # type: ignore
      setattr(section, item.name, None)
    return section

  return add


@dataclasses.dataclass(unsafe_hash=True)
@_with_overrides(Algorithm)
class AlgorithmConfig(Section):
  """Which objective. A field left at None takes the preset's value.

  The fields are those of `Algorithm`; the presets are in `learning/presets.py`.
  """

  name: str = 'grpo'


def overrides(config: AlgorithmConfig) -> dict[str, Any]:
  """Returns the fields of `Algorithm` that a config sets."""
  return {
    item.name: value
    for item in dataclasses.fields(Algorithm)
    if (value := getattr(config, item.name)) is not None
  }
