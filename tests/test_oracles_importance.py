"""Off-policy weights and masks against outside oracles, in float64."""

import jax.numpy as jnp
import numpy as np
from oracle_helpers import array
from oracle_helpers import check
from oracle_helpers import float64  # noqa: F401
from oracle_helpers import load
from oracle_helpers import Packing
from oracle_helpers import reduce_loss
from oracle_helpers import tokens
import pytest

from rlax_llm.ops import importance
from rlax_llm.ops import losses
from rlax_llm.ops import masking
from rlax_llm.ops import variance_control


def _inputs(oracle, *names):
  """Returns the mask and arrays that are NaN outside of it."""
  mask = jnp.asarray(np.array(oracle['inputs']['mask']) > 0)
  return (
    mask,
    *(
      jnp.where(mask, array(oracle['inputs'][name]), jnp.nan) for name in names
    ),
  )


CASES = [
  'token_tis_2',
  'sequence_tis_2',
  'token_icepop_0_5_5',
  'token_icepop_0_5_2',
]


def _bounded(raw, params):
  if 'lo' in params:
    return importance.zero_outside(raw, lower=params['lo'], upper=params['hi'])
  return importance.truncate(raw, upper=params['hi'])


@pytest.mark.parametrize('case', CASES)
def test_rollout_weights(case):
  """Law: raw and bounded weights, by token and sequence; packed rows agree.

  Mutants: behaviour over old; truncation where IcePop zeroes.
  """
  oracle = load('rollout_correction')
  assert set(oracle['weights']) == set(CASES)
  expected = oracle['weights'][case]
  params = expected['params']
  mask, old, behaviour = _inputs(oracle, 'old', 'rollout')
  raw = importance.importance_weights(
    old, behaviour, mask, level=params['level']
  )
  check(raw, expected['raw'])
  check(_bounded(raw, params), expected['weights'])
  packing = Packing(mask)
  packed = importance.importance_weights(
    packing.pack(old),
    packing.pack(behaviour),
    packing.mask,
    level=params['level'],
    segments=packing.segments,
  )
  packed = _bounded(packed, params)
  check(packing.unpack(packed), expected['weights'])


@pytest.mark.parametrize(
  'case',
  [
    'token_k1_0_5_2',
    'seq_mean_k1_geo_0_9_1_1',
    'seq_sum_k1_0_5_2',
    'token_k2_0_1',
    'seq_mean_k3_0_01',
    'seq_max_k3_0_2',
  ],
)
def test_rejection(case):
  """Law: each statistic and the mask it leaves; packed rows agree.

  Mutants: old and behaviour exchanged; bounds of k1 not taken to logarithms;
  the maximum over the row instead of the segment.
  """
  oracle = load('rollout_correction')
  expected = oracle['rejection'][case]
  over, statistic = expected['mode'].removeprefix('seq_').rsplit('_', 1)
  kwargs = dict(
    statistic=statistic,
    over=over,
    upper=expected['upper'],
    lower=expected['lower'],
  )
  mask, old, behaviour = _inputs(oracle, 'old', 'rollout')
  found = importance.reject(old, behaviour, mask, **kwargs)
  check(found.statistic, expected['stat_masked'])
  check(found.keep, expected['mask'])
  packing = Packing(mask)
  packed = importance.reject(
    packing.pack(old),
    packing.pack(behaviour),
    packing.mask,
    segments=packing.segments,
    **kwargs,
  )
  check(packing.unpack(packed.keep), expected['mask'])
  check(packing.unpack(packed.statistic), expected['stat_masked'])


def test_importance_errors():
  """Law: unknown names and a lower bound without meaning are refused.

  Mutant: unknown names let through.
  """
  one = jnp.ones((1, 1))
  mask = one > 0
  with pytest.raises(ValueError, match="level 'row' is none of token"):
    importance.importance_weights(one, one, mask, level='row')
  with pytest.raises(ValueError, match="statistic 'k4'"):
    importance.reject(one, one, mask, statistic='k4', over='sum', upper=1.0)
  with pytest.raises(ValueError, match=r'lower=0.1 bounds k1 only'):
    importance.reject(
      one, one, mask, statistic='k2', over='sum', upper=1.0, lower=0.1
    )


def test_weights_as_in_trl():
  """Law: token and sequence, truncated and masked, at TRL's bounds.

  Mutant: the sequence's weight as a geometric mean.
  """
  oracle = load('rollout_correction')
  expected = oracle['trl']
  mask, old, behaviour = _inputs(oracle, 'old', 'rollout')
  token, sequence = (
    importance.importance_weights(old, behaviour, mask, level=level)
    for level in ('token', 'sequence')
  )
  check(importance.truncate(token, upper=3.0), expected['token_truncate_3'])
  check(
    importance.zero_outside(token, lower=0.0, upper=2.0),
    expected['token_mask_2'],
  )
  check(
    importance.truncate(sequence, upper=3.0)[:, 0],
    expected['sequence_truncate_3'],
  )
  check(
    importance.zero_outside(sequence, lower=0.0, upper=3.0)[:, 0],
    expected['sequence_mask_3'],
  )


def test_stale_failures_are_rejected():
  """Law: a sample is kept if it is good or near its sampler.

  Mutant: good samples judged by the gap as well.
  """
  oracle = load('rollout_correction')
  mask, logprobs, behaviour = _inputs(oracle, 'lp', 'rollout')
  _, advantages = tokens(oracle['inputs'])
  packing = Packing(mask)
  for delta, name in ((0.02, 'delta_0_02'), (0.2, 'delta_0_2')):
    keep = importance.reject_stale_failures(
      logprobs, behaviour, advantages, mask, largest_gap=delta
    )
    expected = array(oracle['opsm_deepseek_v3_2'][name])
    check(keep, expected[:, None] * mask)
    packed = importance.reject_stale_failures(
      packing.pack(logprobs),
      packing.pack(behaviour),
      packing.pack(advantages),
      packing.mask,
      largest_gap=delta,
      segments=packing.segments,
    )
    check(packing.unpack(packed), expected[:, None] * mask)


@pytest.mark.parametrize(
  'case, level',
  [
    ('token_ratio_mask_upper2', 'token'),
    ('token_ratio_clamp_upper2', 'token'),
    ('token_ratio_mask_upper5', 'token'),
    ('seq_geomean_ratio_mask_0_95_1_05', 'geometric'),
  ],
)
def test_decoupled_surrogate(case, level):
  """Law: AReaL's loss and gradient; rejected tokens stay in the denominator.

  Mutant: the sum for the mean in the geometric weight.
  """
  oracle = load('decoupled_ppo')
  expected = oracle['expected'][case]
  _, advantages = tokens(oracle['inputs'])
  mask, logprobs, proximal, behaviour = _inputs(
    oracle, 'theta', 'prox', 'behav'
  )
  raw = importance.importance_weights(proximal, behaviour, mask, level=level)
  if 'clamp' in case:
    weights = importance.truncate(raw, upper=2.0)
    check(weights, expected['weights'])
  else:
    check(raw, expected['weights'])
    lower, upper = (
      (0.95, 1.05) if level == 'geometric' else (0.0, float(case[-1]))
    )
    weights = importance.zero_outside(raw, lower=lower, upper=upper)
    check(weights, raw * array(expected['keep']))
  proximal = masking.select_masked(mask, proximal)
  value, gradient = reduce_loss(
    lambda x: (
      losses.weighted(
        losses.clipped_surrogate(
          x, proximal, advantages, clip_low=0.2, clip_high=0.2
        ),
        weights,
      ).loss
    ),
    logprobs,
    mask,
  )
  check(value, expected['loss'])
  check(gradient, expected['grad_wrt_lp'])


def test_decoupled_surrogate_without_weights():
  """Law: without weights it is plain PPO, clipped around the proximal policy.

  Mutant: clipped around the policy that sampled.
  """
  oracle = load('decoupled_ppo')
  _, advantages = tokens(oracle['inputs'])
  mask, logprobs, proximal = _inputs(oracle, 'theta', 'prox')
  proximal = masking.select_masked(mask, proximal)
  value, _ = reduce_loss(
    lambda x: (
      losses.clipped_surrogate(
        x, proximal, advantages, clip_low=0.2, clip_high=0.2
      ).loss
    ),
    logprobs,
    mask,
  )
  check(value, oracle['expected']['no_rejection_sampling_config']['loss'])


def test_effective_sample_ratio_and_step_scale():
  """Law: VCPO's ratio and learning rates; a shift of log-weights is nothing.

  Mutants: exp before the shift (overflow); the ratio not divided by n; the
  scale above 1 let through.
  """
  oracle = load('vcpo')
  inputs, expected = oracle['inputs'], oracle['expected']
  log_weights = jnp.log(array(inputs['seq_is_weight']))
  ratio = importance.effective_sample_ratio(log_weights)
  check(ratio, expected['ess_ratio'])
  check(importance.effective_sample_ratio(log_weights + 2000), ratio)
  held = jnp.minimum(log_weights, np.log(inputs['is_clip']))
  check(importance.effective_sample_ratio(held), expected['ess_ratio_clipped'])
  for power, name in ((0.5, 'lr_sqrt'), (1.0, 'lr_linear')):
    scale = variance_control.step_scale(
      ratio, base_ratio=inputs['base_ess_ratio'], power=power
    )
    np.testing.assert_allclose(
      inputs['base_lr'] * scale, expected[name], rtol=1e-6
    )
  assert variance_control.step_scale(array(0.9), base_ratio=0.5) == 1
  some = jnp.array([True, True, False, False])
  poisoned = jnp.where(some, log_weights, jnp.nan)
  check(
    importance.effective_sample_ratio(poisoned, some), 1.6**2 / (2 * (1 + 0.36))
  )
  check(importance.effective_sample_ratio(poisoned, some & False), 0)
