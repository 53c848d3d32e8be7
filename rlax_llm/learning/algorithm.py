"""An objective as data: which functions make it up, and their numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """An objective; every field holds a value. Hashable, static.

  Attributes:
    advantage: what a sample is worth; `estimators.ESTIMATORS`.
    credit: how its tokens share that; `token_credit.CREDITS`.
    loss: of a token; `objectives.LOSSES`.
    reduction: `masking.REDUCTIONS`.
    divergence: from the reference, in the loss; `divergences.DIVERGENCES`.
    kl_coefficient: of the divergence.
    keep_reference: keep one to measure the divergence by, whatever its
      coefficient.
    clip_low: ratios below 1 - clip_low are clipped.
    clip_high: ratios above 1 + clip_high are clipped.
    dual_clip: bounds the loss of bad tokens that became likely; 0: off.
    entropy_coefficient: of the entropy bonus, or of |entropy - target|.
    entropy_target: nats; 0: the term is a bonus.
    correction: the weight of what another policy sampled;
      `objectives.CORRECTIONS`.
    weight_low: least weight that is not rejected.
    weight_high: where weights are truncated or rejected.
    rejection: which tokens are dropped; `objectives.REJECTIONS`.
    reject_low: least ratio of sampler to trainer.
    reject_high: bound of the statistic, a ratio for k1, else nats.
    filter: which samples are out of the loss, besides those whose reward is
      missing; `filters.FILTERS`.
    labels: whom the rewards are from; `filters.LABELS`.
    step_scale: what the optimizer's step is multiplied by;
      `token_credit.STEP_SCALES`.
    discount: gamma of the returns.
    trace: lambda of the advantages.
    value_clip: how far a value moves in a step; 0: unbounded.
    critic_learning_rate: of the critic's optimizer; 0: the policy's.
    critic_warmup: RL steps in which only the critic learns.
    coverage_samples: N, the answers of which one has to be right.
    distillation_coefficient: of the teacher's log-ratio.
    distillation_discount: of later log-ratios.
    teacher: a folder of published weights, or a run's workdir.
    leaps: how many leaps along the last direction are tried before steps 1, 2,
      4, 8, ...: twice, four times, ... as far; 0: none.
    leap_problems: training problems by which a leap is judged.
    progress_coefficient: of what an episode of a sample added to its success.
    progress_episodes: a sample is cut into so many at most.
    progress_marker: the text that ends an episode; '': they are equally long.
    progress_samples: answers by which the success after an episode is judged.
    progress_tokens: the longest such answer.
    rehearsal: divergence from the initial policy on what that solved, in the
      loss; `f_divergences.F_DIVERGENCES`.
    rehearsal_coefficient: of it.
    rehearsal_prompts: first problems of the run that the initial policy tries.
    rehearsal_least: mean correctness from which on a problem counts as solved.
    rehearsal_share: samples that are rehearsed in a step, by those of the step.
  """

  advantage: str = 'group'
  credit: str = 'sample'
  loss: str = 'clipped'
  reduction: str = 'token_mean'
  divergence: str = 'k3'
  kl_coefficient: float = 0.0
  keep_reference: bool = False
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  entropy_coefficient: float = 0.0
  entropy_target: float = 0.0
  correction: str = 'none'
  weight_low: float = 0.0
  weight_high: float = 2.0
  rejection: str = 'none'
  reject_low: float = 0.5
  reject_high: float = 2.0
  filter: str = 'none'
  labels: str = 'verifier'
  step_scale: str = 'none'
  discount: float = 1.0
  trace: float = 1.0
  value_clip: float = 0.2
  critic_learning_rate: float = 0.0
  critic_warmup: int = 0
  coverage_samples: int = 4
  distillation_coefficient: float = 1.0
  distillation_discount: float = 0.0
  teacher: str = ''
  leaps: int = 0
  leap_problems: int = 50
  progress_coefficient: float = 0.5
  progress_episodes: int = 4
  progress_marker: str = ''
  progress_samples: int = 1
  progress_tokens: int = 8
  rehearsal: str = 'none'
  rehearsal_coefficient: float = 0.01
  rehearsal_prompts: int = 256
  rehearsal_least: float = 0.75
  rehearsal_share: float = 0.25

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
