"""Objectives by name. README.md of this folder maps papers to them."""

from rlax_llm.config.algorithm import Algorithm

PRESETS: dict[str, Algorithm] = {
  # DeepSeekMath, https://arxiv.org/abs/2402.03300
  'grpo': Algorithm(reduction='sequence_mean'),
  # Understanding R1-Zero-Like Training, https://arxiv.org/abs/2503.20783
  'dr_grpo': Algorithm(
    advantage='group_centred', reduction='sequence_sum_token_mean_constant'
  ),
  # Back to Basics, https://arxiv.org/abs/2402.14740
  'rloo': Algorithm(
    advantage='leave_one_out',
    loss='reinforce',
    reduction='sequence_mean_token_sum',
  ),
  # DAPO, https://arxiv.org/abs/2503.14476: clip-higher and token mean; its
  # overlong punishment is `task.rewards['length']`.
  'dapo': Algorithm(clip_high=0.28),
  # Group Sequence Policy Optimization, https://arxiv.org/abs/2507.18071
  'gspo': Algorithm(
    loss='sequence_clipped',
    reduction='sequence_mean',
    clip_low=3e-4,
    clip_high=4e-4,
  ),
  # MiniMax-M1, https://arxiv.org/abs/2506.13585; the bound is ScaleRL's,
  # https://arxiv.org/abs/2510.13786.
  'cispo': Algorithm(loss='truncated', clip_high=4.0),
  # REINFORCE++, https://arxiv.org/abs/2501.03262, without a discount; its
  # penalty for leaving the reference is kl_coefficient with k2.
  'reinforce_plus_plus': Algorithm(advantage='whitened', divergence='k2'),
  # OPO, https://arxiv.org/abs/2505.23585: exactly on-policy.
  'opo': Algorithm(advantage='length_weighted', loss='reinforce'),
  # GPG, https://arxiv.org/abs/2504.02546
  'gpg': Algorithm(advantage='signal_scaled', loss='reinforce'),
  # Tricks or Traps? (Lite PPO), https://arxiv.org/abs/2508.08221
  'lite_ppo': Algorithm(advantage='batch_scaled'),
  # Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347
  'sapo': Algorithm(loss='soft_gated', reduction='sequence_mean'),
  # Optimizing Language Models for Inference Time Objectives,
  # https://arxiv.org/abs/2503.19595: pass@G.
  'best_of_group': Algorithm(
    advantage='best_minus_second', reduction='sequence_mean'
  ),
  # PPO, https://arxiv.org/abs/1707.06347, with a critic of its own.
  'ppo': Algorithm(advantage='outcome', credit='gae'),
  # AReaL, https://arxiv.org/abs/2505.24298: three policies.
  'decoupled_ppo': Algorithm(correction='token_mask', weight_high=5.0),
  # Truncated importance sampling, by token and by sample,
  # https://doi.org/10.1198/106186008X320456
  'token_tis': Algorithm(correction='token', weight_high=2.0),
  'sequence_tis': Algorithm(correction='sequence', weight_high=2.0),
  # IcePop, https://arxiv.org/abs/2510.18855
  'icepop': Algorithm(correction='token_mask', weight_low=0.5, weight_high=5.0),
  # Masked importance sampling: no weight, samples whose policies disagree by
  # more than 0.1 % per token dropped.
  'geometric_mask': Algorithm(
    rejection='mean_k1', reject_low=0.999, reject_high=1.001
  ),
  # DeepSeek-V3.2, https://arxiv.org/abs/2512.02556: stale failures dropped.
  'stale_failure_mask': Algorithm(rejection='stale_failures', reject_high=0.1),
  # VCPO, https://arxiv.org/abs/2602.17616
  'vcpo': Algorithm(
    advantage='group_population',
    credit='minimum_variance',
    loss='reinforce',
    reduction='sequence_mean',
    correction='sequence',
    weight_high=8.0,
    step_scale='effective_samples',
  ),
  # DCO, https://arxiv.org/abs/2502.07154: one of N answers has to be right.
  'dco': Algorithm(
    advantage='outcome', loss='coverage', reduction='sequence_mean_token_sum'
  ),
  # TTRL, https://arxiv.org/abs/2504.16084: the majority's answer is right.
  'ttrl': Algorithm(labels='majority', reduction='sequence_mean'),
  # ECHO, https://arxiv.org/abs/2602.02150, the training half.
  'echo': Algorithm(labels='majority', credit='uncertainty'),
  # Confucius3-Math, https://arxiv.org/abs/2506.18330: hardness weights and
  # the targeted entropy.
  'confucius3': Algorithm(
    advantage='hardness_weighted',
    reduction='sequence_sum_token_mean_constant',
    clip_high=0.28,
    entropy_coefficient=1e-3,
    entropy_target=0.55,
    filter='signal',
  ),
  # GDPO, https://arxiv.org/abs/2601.05242, and LightningRL,
  # https://arxiv.org/abs/2603.13319: each of several rewards by itself.
  'gdpo': Algorithm(advantage='reward_decoupled'),
  'lightning_rl': Algorithm(advantage='reward_decoupled_population'),
  # On-Policy Distillation of Language Models,
  # https://arxiv.org/abs/2306.13649: the teacher's log-ratio, by token.
  'on_policy_distillation': Algorithm(
    advantage='none', credit='distillation', loss='surrogate'
  ),
  # EffOPD, https://arxiv.org/abs/2605.11739: the same with leaps ahead.
  'effopd': Algorithm(
    advantage='none', credit='distillation', loss='surrogate', leaps=5
  ),
  # The Choice of Divergence (DPH-RL), https://arxiv.org/abs/2509.07430: what
  # the initial policy solved is rehearsed.
  'dph_forward_kl': Algorithm(
    clip_high=0.28,
    filter='unrehearsed',
    rehearsal='forward_kl',
    rehearsal_coefficient=0.01,
  ),
  'dph_jensen_shannon': Algorithm(
    clip_high=0.28,
    filter='unrehearsed',
    rehearsal='jensen_shannon',
    rehearsal_coefficient=0.05,
  ),
  # MRT, https://arxiv.org/abs/2503.07572: each episode's own progress.
  'mrt': Algorithm(credit='progress', reduction='sequence_mean'),
}

# The warm start, through the same update as everything else.
SUPERVISED = Algorithm(loss='negative_log_likelihood')
