"""Losses, reductions and divergences against outside oracles, in float64."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
from oracle_helpers import array
from oracle_helpers import check
from oracle_helpers import float64  # noqa: F401
from oracle_helpers import load
from oracle_helpers import ORACLES
from oracle_helpers import Packing
from oracle_helpers import reduce_loss
from oracle_helpers import tokens
import pytest

from rlax_llm.config import LearningConfig
from rlax_llm.learning import update as updates
from rlax_llm.ops import coverage
from rlax_llm.ops import divergences
from rlax_llm.ops import f_divergences
from rlax_llm.ops import losses
from rlax_llm.ops import masking
from rlax_llm.ops import values

REDUCTIONS = {
  'token-mean': ('token_mean', 0),
  'token-sum': ('token_sum', 0),
  'seq-mean-token-sum': ('sequence_mean_token_sum', 0),
  'seq-mean-token-mean': ('sequence_mean', 0),
  'seq-mean-token-sum-norm (const=T=5)': (
    'sequence_sum_token_mean_constant',
    5,
  ),
  'seq-mean-token-sum-norm (const=8)': ('sequence_sum_token_mean_constant', 8),
  'trl-grpo (fully masked row counts in the mean)': (
    'sequence_mean_over_all',
    0,
  ),
  'trl-dr_grpo (B*max_completion_length=4*8)': (
    'sequence_sum_token_mean_constant_over_all',
    8,
  ),
}


def test_every_oracle_has_a_test():
  """Law: each file of tests/oracles is named by a string in some test.

  Mutant: a file copied without a test.
  """
  named = set()
  for path in pathlib.Path(__file__).parent.glob('test_*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        named.add(node.value.removesuffix('.json'))
  missing = {path.stem for path in ORACLES.glob('*.json')} - named
  assert not missing, f'write a test for, or remove, {sorted(missing)}'
  assert len(list(ORACLES.glob('*.json'))) >= 26


def test_every_reduction():
  """Law: all eight named reductions; each is a sum over microbatches.

  Mutant: only samples with a trained token counted where all should be.
  """
  oracle = load('agg_modes')
  mask = np.array(oracle['inputs']['mask']) > 0
  loss = array(oracle['inputs']['loss'])
  assert set(oracle['expected']) == set(REDUCTIONS)
  assert {name for name, _ in REDUCTIONS.values()} == set(masking.REDUCTIONS)
  for name, (reduction, constant) in REDUCTIONS.items():
    value, _ = reduce_loss(lambda x: x, loss, mask, reduction, constant)
    check(value, oracle['expected'][name])


# ---- Clipped surrogates -----------------------------------------------------
@pytest.mark.parametrize(
  'case',
  [
    'symmetric_0.2_dual_3',
    'symmetric_0.2_no_dual',
    'dapo_clip_higher_0.2_0.28_dual_10',
  ],
)
def test_clipped_surrogate(case):
  """Law: loss, ratio, clip fraction and gradients, dual clip included.

  Mutants: the dual clip for positive advantages too; the dual clip left out;
  clip_high used on both sides.
  """
  oracle = load('ppo_loss')
  expected = oracle['cases'][case]
  mask, advantages = tokens(oracle['inputs'])
  logprobs, old = (array(oracle['inputs'][k]) for k in ('lp', 'old'))
  params = expected['params']
  token = lambda x: losses.clipped_surrogate(
    x,
    old,
    advantages,
    clip_low=params['el'],
    clip_high=params['eh'],
    dual_clip=params['c'],
  )
  valid = np.asarray(mask)
  check(
    token(logprobs).loss[valid], np.array(expected['per_token_loss'])[valid]
  )
  check(token(logprobs).ratio[valid], np.array(expected['ratio'])[valid])
  check(
    token(logprobs).clipped[valid].mean(),
    expected['clipfrac'] + expected['clipfrac_dual'],
  )
  check(masking.masked_mean(mask, old - logprobs), expected['ppo_kl_k1'])
  for name, reduction in (
    ('token-mean', 'token_mean'),
    ('seq-mean-token-mean', 'sequence_mean'),
    ('seq-mean-token-sum-norm', 'sequence_sum_token_mean_constant'),
  ):
    value, gradient = reduce_loss(
      lambda x: token(x).loss, logprobs, mask, reduction, mask.shape[1]
    )
    check(value, expected[name]['loss'])
    check(gradient, expected[name]['grad_wrt_lp'])


def test_clipped_surrogate_with_weights():
  """Law: rollout weights multiply the loss behind the clip.

  Mutant: the weights ignored.
  """
  oracle = load('ppo_loss')
  mask, advantages = tokens(oracle['inputs'])
  logprobs, old = (array(oracle['inputs'][k]) for k in ('lp', 'old'))
  expected = oracle['with_rollout_weights']
  weights = array(expected['weights'])
  value, gradient = reduce_loss(
    lambda x: (
      losses.weighted(
        losses.clipped_surrogate(
          x, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0
        ),
        weights,
      ).loss
    ),
    logprobs,
    mask,
  )
  check(value, expected['token_mean_loss'])
  check(gradient, expected['grad_wrt_lp'])


@pytest.mark.parametrize(
  'loss', ['clipped_surrogate', 'surrogate', 'reinforce', 'cispo']
)
def test_on_policy(loss):
  """Law: with old = current the gradient is -A w, whatever the loss's value.

  Mutant: no stop_gradient around the ratio of REINFORCE and CISPO.
  """
  oracle = load('ppo_loss')
  mask, advantages = tokens(oracle['inputs'])
  logprobs = array(oracle['inputs']['lp'])
  by_name = {
    'clipped_surrogate': lambda x: losses.clipped_surrogate(
      x, logprobs, advantages, clip_low=0.2, clip_high=0.2
    ),
    'surrogate': lambda x: losses.surrogate(x, logprobs, advantages),
    'reinforce': lambda x: losses.reinforce(x, logprobs, advantages),
    'cispo': lambda x: losses.truncated_reinforce(
      x, logprobs, advantages, ratio_high=5.0
    ),
  }
  value, gradient = reduce_loss(lambda x: by_name[loss](x).loss, logprobs, mask)
  check(gradient, oracle['on_policy']['grad_wrt_lp'])
  if 'surrogate' in loss:
    check(value, oracle['on_policy']['token_mean_loss'])


@pytest.mark.parametrize(
  'case, low, high', [('eps_3e4_4e4', 3e-4, 4e-4), ('eps_0_2_0_28', 0.2, 0.28)]
)
def test_sequence_clipped_surrogate(case, low, high):
  """Law: GSPO's ratio, loss, clip fraction, gradient; packed rows agree.

  Mutants: the sum of log-ratios for their mean; a mean over the row instead
  of the segment.
  """
  oracle = load('gspo_loss')
  expected = oracle['expected']
  mask, advantages = tokens(oracle['inputs'])
  logprobs, old = (array(oracle['inputs'][k]) for k in ('lp', 'old'))
  token = lambda x: losses.sequence_clipped_surrogate(
    x, old, advantages, mask, clip_low=low, clip_high=high
  )
  check(token(logprobs).ratio[:, 0], expected['s_i'])
  check(
    masking.masked_mean(mask, token(logprobs).clipped),
    expected[case]['clipfrac'],
  )
  value, gradient = reduce_loss(
    lambda x: token(x).loss, logprobs, mask, 'sequence_mean'
  )
  check(value, expected[case]['loss'])
  check(gradient, expected[case]['grad_wrt_lp'])
  packing = Packing(mask)
  weights = packing.pack(
    1
    / (
      8 * np.array(oracle['inputs']['lengths'])[:, None] * np.ones(mask.shape)
    ),
    0.0,
  )

  def packed_loss(x):
    packed = losses.sequence_clipped_surrogate(
      x,
      packing.pack(old),
      packing.pack(advantages),
      packing.mask,
      clip_low=low,
      clip_high=high,
      segments=packing.segments,
    )
    return jnp.sum(weights * packed.loss)

  value, gradient = jax.value_and_grad(packed_loss)(packing.pack(logprobs))
  check(value, expected[case]['loss'])
  check(packing.unpack(gradient), expected[case]['grad_wrt_lp'])
  assert np.all(np.asarray(gradient)[~packing.mask] == 0)


CISPO = {
  'cispo_verl_low0_2_high0_28': (0.8, 1.28),
  'cispo_trl_max_5': (None, 5.0),
}


def test_cispo_dro_and_sapo():
  """Law: value and gradient of each, by the named reduction.

  Mutants: CISPO's weight not clipped; DRO without its 1/2; SAPO's two
  temperatures exchanged.
  """
  oracle = load('cispo_dro_sapo_loss')
  expected = oracle['expected']
  mask, advantages = tokens(oracle['inputs'])
  logprobs, old = (array(oracle['inputs'][k]) for k in ('lp', 'old'))
  for name, (low, high) in CISPO.items():
    token = lambda x, low=low, high=high: losses.truncated_reinforce(
      x, old, advantages, ratio_low=low, ratio_high=high
    )
    value, gradient = reduce_loss(lambda x: token(x).loss, logprobs, mask)
    check(value, expected[name]['token_mean_loss'])
    check(gradient, expected[name]['token_mean_grad'])
    check(
      masking.masked_mean(mask, token(logprobs).clipped),
      expected[name]['clipfrac'],
    )
  value, gradient = reduce_loss(
    lambda x: (
      losses.truncated_reinforce(
        x, old, advantages, ratio_low=0.8, ratio_high=1.2
      ).loss
    ),
    logprobs,
    mask,
    'token_sum',
  )
  check(value, expected['cispo_tinker_0_8_1_2_token_SUM']['loss'])
  check(gradient, expected['cispo_tinker_0_8_1_2_token_SUM']['grad'])
  value, gradient = reduce_loss(
    lambda x: losses.quadratic_regularised(x, old, advantages, beta=0.1).loss,
    logprobs,
    mask,
  )
  check(value, expected['dro_beta_0_1']['token_mean_loss'])
  check(gradient, expected['dro_beta_0_1']['token_mean_grad'])
  value, gradient = reduce_loss(
    lambda x: losses.soft_gated_surrogate(x, old, advantages).loss,
    logprobs,
    mask,
    'sequence_mean',
  )
  check(value, expected['sapo_seq_mean_token_mean']['loss'])
  check(gradient, expected['sapo_seq_mean_token_mean']['grad'])


def test_tinker_losses():
  """Law: token sums of five losses; a custom loss by way of cross-entropy.

  Mutant: the token mean for the sum.
  """
  oracle = load('tinker_losses')
  inputs = {k: array(v) for k, v in oracle['inputs'].items()}
  logprobs, old = inputs['target_logprobs'], inputs['sampling_logprobs']
  advantages, weights = inputs['advantages'], inputs['weights']
  mask = jnp.ones(logprobs.shape, bool)
  cases = {
    'cross_entropy': lambda x: losses.weighted(
      losses.negative_log_likelihood(x), weights
    ),
    'importance_sampling': lambda x: losses.surrogate(x, old, advantages),
    'ppo_0_8_1_2': lambda x: losses.clipped_surrogate(
      x, old, advantages, clip_low=0.2, clip_high=0.2
    ),
    'cispo_0_8_1_2': lambda x: losses.truncated_reinforce(
      x, old, advantages, ratio_low=0.8, ratio_high=1.2
    ),
    'dro_beta_0_1': lambda x: losses.quadratic_regularised(
      x, old, advantages, beta=0.1
    ),
  }
  for name, token in cases.items():
    expected = oracle['expected'][name]
    value, gradient = reduce_loss(
      lambda x, token=token: token(x).loss, logprobs, mask, 'token_sum'
    )
    check(value, expected['loss'])
    check(gradient, expected['grad_wrt_lp'])
  custom = oracle['expected']['custom_quadratic']
  weights = -jax.grad(lambda x: jnp.sum(x**2) / 2)(logprobs)
  check(weights, custom['weights'])
  _, gradient = reduce_loss(
    lambda x: losses.weighted(losses.negative_log_likelihood(x), weights).loss,
    logprobs,
    mask,
    'token_sum',
  )
  check(gradient, custom['ce_grad_wrt_lp'])


def test_adamw_steps():
  """Law: two steps of our optimizer, with the clip of the norm out of reach.

  Mutant: b2 in the place of b1 in `make_optimizer`.
  """
  oracle = load('tinker_losses')['adamw']
  config = LearningConfig(
    learning_rate=oracle['lr'],
    schedule='constant',
    warmup_steps=0,
    max_grad_norm=1e6,
    b1=oracle['beta1'],
    b2=oracle['beta2'],
    epsilon=oracle['eps'],
    weight_decay=oracle['weight_decay'],
  )
  optimizer = updates.make_optimizer(config, 2)
  params = array(oracle['params'])
  state = optimizer.init(params)
  for gradient, after in zip(oracle['grads'], ('after_step1', 'after_step2')):
    change, state = optimizer.update(array(gradient), state, params)
    params = optax.apply_updates(params, change)
    np.testing.assert_allclose(params, oracle[after], rtol=0, atol=1e-9)


# ---- Gradients --------------------------------------------------------------
def test_check_grads():
  """Law: analytic gradients of every differentiable value equal numeric ones,
  to 1e-5, at generic points away from the kinks.

  Left out are those whose gradient is not their value's on purpose: the
  REINFORCE kind, the straight-through estimators. Mutants: a stop_gradient
  around SAPO's gate, DRO's square, the student in Jensen-Shannon.
  """
  rng = np.random.default_rng(0)
  draw = lambda *shape: array(rng.uniform(-1, 1, shape))
  x, advantages = draw(4, 6), draw(4, 6)
  old = x + 0.7 * draw(4, 6)
  returns = draw(4, 6)
  clipped = lambda x, dual: (
    losses.clipped_surrogate(
      x, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=dual
    ).loss
  )
  value = lambda clip: (
    lambda x: values.value_loss(x, old, returns, clip=clip).loss
  )
  functions = [
    lambda x: clipped(x, None),
    lambda x: clipped(x, 1.4),
    lambda x: losses.surrogate(x, old, advantages).loss,
    lambda x: losses.quadratic_regularised(x, old, advantages, beta=0.3).loss,
    lambda x: losses.soft_gated_surrogate(x, old, advantages).loss,
    lambda x: losses.negative_log_likelihood(x).loss,
    lambda x: coverage.coverage_loss(x - 1.2, samples=4),
    lambda x: coverage.coverage_loss(x - 9.0, samples=4),
    value(None),
    value(0.3),
    *(lambda x, f=f: f(x, old) for f in f_divergences.F_DIVERGENCES.values()),
    *(
      lambda x, name=name: divergences.DIVERGENCES[name](x, old)
      for name in ('k1', 'k2', 'k3', 'absolute')
    ),
  ]
  everything = jax.jit(lambda x: [function(x) for function in functions])
  jax.test_util.check_grads(
    everything, (x,), order=1, modes=['rev'], eps=1e-6, atol=1e-5, rtol=1e-5
  )
  assert np.any(clipped(x, 1.4) != clipped(x, None))
