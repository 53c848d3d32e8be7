"""Divergences, distillation and coverage against oracles, in float64."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
from oracle_helpers import array
from oracle_helpers import check
from oracle_helpers import float64  # noqa: F401
from oracle_helpers import load
from oracle_helpers import reduce_loss
import pytest

from rlax_llm.ops import coverage
from rlax_llm.ops import distillation
from rlax_llm.ops import divergences
from rlax_llm.ops import f_divergences
from rlax_llm.ops import losses
from rlax_llm.ops import masking


# ---- Coverage ---------------------------------------------------------------
def test_coverage_loss():
  """Law: -log(1 - (1 - p)^N) and f for p from 1e-6 to 0.9 and N to 256.

  The gradient by each token of a sequence is -f. Mutants: N for N - 1 in f's
  exponent; the value without its gradient.
  """
  oracle = load('dco')
  for row in oracle['rows']:
    logprob = jnp.log(array(row['p']))
    loss = lambda x, row=row: coverage.coverage_loss(x, samples=row['N'])
    check(loss(logprob), row['loss'])
    check(coverage.coverage_weight(logprob, samples=row['N']), row['f'])
    check(jax.grad(loss)(logprob), -row['f'])
  example = oracle['sequence_example']
  value, gradient = jax.value_and_grad(
    lambda x: coverage.coverage_loss(jnp.sum(x), samples=example['N'])
  )(array(example['token_logp']))
  check(value, example['loss'])
  check(gradient, np.full(3, example['grad_wrt_each_token_logp']))


def test_coverage_at_the_ends():
  """Law: finite in float32 for p from 1e-40 to 1; f -> 1 and f -> 0.

  Mutant: no term for rare answers, inf for p = 1e-40.
  """
  logprobs = jnp.array([-92.0, -20.0, -1e-7, 0.0], jnp.float32)
  value, gradient = jax.vmap(
    jax.value_and_grad(lambda x: coverage.coverage_loss(x, samples=16))
  )(logprobs)
  assert value.dtype == jnp.float32 and np.all(np.isfinite(value))
  np.testing.assert_allclose(
    value[:2], -np.log(16) - np.array([-92, -20]), rtol=1e-5
  )
  np.testing.assert_allclose(gradient, [-1, -1, 0, 0], atol=1e-5)
  with pytest.raises(ValueError, match='samples=0'):
    coverage.coverage_loss(logprobs, samples=0)


# ---- Divergences ------------------------------------------------------------
KL_NAMES = {
  'k1': 'k1',
  'abs': 'absolute',
  'k2': 'k2',
  'k3': 'k3',
  'k3+': 'k3_straight_through',
}


def test_divergences():
  """Law: value and in-loss gradient by token, and in exact expectation.

  Mutants: the straight-through k3 with k2's value; `jnp.abs`, whose gradient
  at 0 is 1.
  """
  oracle = load('kl_estimators')
  logprobs, reference = (array(oracle['inputs'][k]) for k in ('lp', 'ref'))
  mask = jnp.ones(logprobs.shape, bool)
  for name, expected in oracle['per_token'].items():
    estimate = divergences.DIVERGENCES[KL_NAMES[name]]
    check(estimate(logprobs, reference), expected['value'])
    _, gradient = reduce_loss(
      lambda x, e=estimate: e(x, reference), logprobs, mask, 'token_sum'
    )
    check(gradient, expected['grad_wrt_lp'])
  check(
    divergences.k3_ratio_weighted(logprobs, reference),
    oracle['per_token']['k3']['value'],
  )


def test_divergences_in_expectation():
  """Law: which estimator has which expected gradient, exactly.

  Mutant: k3_ratio_weighted with the ratio's gradient stopped.
  """
  oracle = load('kl_estimators')['categorical']
  law = array(oracle['inputs']['pi'])
  reference = jnp.log(array(oracle['inputs']['ref']))
  expected = oracle['expected']

  def gradient(estimate):
    return jax.grad(
      lambda x: jnp.sum(law * estimate(jax.nn.log_softmax(x), reference))
    )(jnp.log(law))

  for name in ('k1', 'k2', 'k3'):
    estimate = divergences.DIVERGENCES[name]
    check(
      jnp.sum(law * estimate(jnp.log(law), reference)), expected[f'E_{name}']
    )
    check(gradient(estimate), expected[f'in_loss_grad_{name}'])
  check(
    gradient(divergences.k3_ratio_weighted),
    expected['in_loss_grad_ratio_times_k3'],
  )
  check(
    gradient(divergences.k3_straight_through), expected['true_grad_KL_pi_ref']
  )
  # k1 in the reward: its policy gradient is that of KL(pi || ref).
  reward = -divergences.k1(jnp.log(law), reference)
  check(
    gradient(lambda x, _: losses.surrogate(x, jnp.log(law), reward).loss),
    expected['k1_in_reward_policy_gradient'],
  )


F_NAMES = {'forward_kl': 'forward_kl', 'js': 'jensen_shannon', 'alpha': 'alpha'}


def test_f_divergences():
  """Law: generators, gradients, and expectations under the reference.

  Mutants: u = ref / pi; the sign of alpha's denominator.
  """
  oracle = load('dph_rl')
  logprobs, reference = (array(oracle['inputs'][k]) for k in ('lp', 'ref'))
  mask = jnp.ones(logprobs.shape, bool)
  assert set(F_NAMES.values()) == set(f_divergences.F_DIVERGENCES)
  assert oracle['inputs']['alpha'] == 0.2
  for name, expected in oracle['expected'].items():
    estimate = f_divergences.F_DIVERGENCES[F_NAMES[name]]
    check(estimate(logprobs, reference), expected['value'])
    _, gradient = reduce_loss(
      lambda x, e=estimate: e(x, reference), logprobs, mask, 'token_sum'
    )
    check(gradient, expected['grad'])
  categorical = oracle['categorical_check']
  law, other = (jnp.log(array(categorical[k])) for k in ('pi', 'ref'))
  mean = lambda f: jnp.sum(jnp.exp(other) * f(law, other))
  check(mean(f_divergences.forward_kl), categorical['KL_ref_pi'])
  check(mean(f_divergences.jensen_shannon), categorical['two_times_JS'])


# ---- Distillation -----------------------------------------------------------
def test_distillation():
  """Law: advantages and their importance-weighted loss.

  Mutant: the sign of the log-ratio.
  """
  oracle = load('distillation')
  inputs = oracle['opd']['inputs']
  mask = jnp.asarray(np.array(inputs['mask']) > 0)
  sampled = jnp.where(mask, array(inputs['student_sampled_logp']), jnp.nan)
  teacher = array(inputs['teacher_logp'])
  advantages = distillation.distillation_advantages(
    sampled, teacher, mask, coefficient=inputs['kl_penalty_coef']
  )
  check(advantages, oracle['opd']['advantages'])
  check(
    masking.masked_mean(mask, sampled - teacher),
    oracle['opd']['reverse_kl_metric'],
  )
  value, gradient = reduce_loss(
    lambda x: (
      losses.surrogate(x, masking.select_masked(mask, sampled), advantages).loss
    ),
    array(inputs['student_current_logp']),
    mask,
    'token_sum',
  )
  check(value, oracle['opd']['is_loss_token_SUM'])
  check(gradient, oracle['opd']['is_grad'])


def test_discounted_distillation_advantages():
  """Law: with a discount, log-ratios (1, 2, 4) become 1 + .5 * 2 + .25 * 4.

  Mutant: the discount ignored.
  """
  found = distillation.distillation_advantages(
    jnp.zeros(3),
    array([1, 2, 4]),
    jnp.ones(3, bool),
    coefficient=2.0,
    discount=0.5,
  )
  check(found, [6, 8, 8])


def test_extrapolation():
  """Law: candidates are all measured from the same base.

  Mutant: 2 * power for 2^power.
  """
  leap = load('distillation')['effopd']
  for candidate in leap['candidates']:
    check(
      distillation.extrapolated(
        array(leap['w_now']), array(leap['w_prev_power']), power=candidate['k']
      ),
      candidate['w'],
    )
