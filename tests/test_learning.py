"""Objectives and updates: oracles, literals, gradients, invariances."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

from group_helpers import make_group
import jax
import jax.numpy as jnp
import jax.test_util
from learning_helpers import CAPTURE
from learning_helpers import distance
from learning_helpers import gradient_of
from learning_helpers import make_learner
from learning_helpers import make_state
from learning_helpers import pad_rows
from learning_helpers import plain_logprobs
from learning_helpers import poison
from learning_helpers import random_samples
from learning_helpers import SGD
from learning_helpers import sharp_params
from learning_helpers import tiny_run
import numpy as np
import optax
import pytest

from rlax_llm import learning
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import AlgorithmConfig
from rlax_llm.config import ConfigError
from rlax_llm.experience import advantages
from rlax_llm.learning import algorithms
from rlax_llm.learning import batch as batches
from rlax_llm.learning import estimators
from rlax_llm.learning import filters
from rlax_llm.learning import objectives
from rlax_llm.learning import presets
from rlax_llm.learning import sft
from rlax_llm.learning import token_credit
from rlax_llm.learning import update as updates
from rlax_llm.learning.batch import Sample
from rlax_llm.models import kv_cache
from rlax_llm.models import lora
from rlax_llm.ops import advantages as advantage_ops
from rlax_llm.ops import batch_advantages
from rlax_llm.ops import divergences
from rlax_llm.ops import f_divergences
from rlax_llm.ops import losses
from rlax_llm.ops import masking
from rlax_llm.ops import metrics as metric_ops
from rlax_llm.ops import values
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
ORACLES = pathlib.Path(__file__).parent / 'oracles'


def _oracle(name):
  return json.loads((ORACLES / f'{name}.json').read_text())


def _floats(values):
  return jnp.asarray(values, jnp.float32)


# ---- Oracles and literals ---------------------------------------------------
@pytest.mark.parametrize(
  'reduction, constant, name',
  [
    ('token_mean', 0, 'token-mean'),
    ('sequence_mean', 0, 'seq-mean-token-mean'),
    ('sequence_mean_token_sum', 0, 'seq-mean-token-sum'),
    (
      'sequence_sum_token_mean_constant',
      5,
      'seq-mean-token-sum-norm (const=T=5)',
    ),
    (
      'sequence_sum_token_mean_constant',
      8,
      'seq-mean-token-sum-norm (const=8)',
    ),
  ],
)
def test_reductions_match_the_oracle(reduction, constant, name):
  """Law: a reduction is a weighted sum with denominators of the whole batch.

  Mutant: counting the empty sequence (`lengths.size` for the number of
  nonzero lengths) gives 1.875 instead of 2.5 in sequence_mean.
  """
  oracle = _oracle('agg_modes')
  mask = np.array(oracle['inputs']['mask'])
  weights = masking.token_weights(
    mask.sum(axis=1).astype(int), reduction=reduction, constant=constant
  )
  rows = (weights[:, None] * mask * np.array(oracle['inputs']['loss'])).sum(1)
  np.testing.assert_allclose(rows.sum(), oracle['expected'][name], **TOLERANCE)
  split = oracle['micro_batch_split_rows_01_23'].get(name)
  if split:
    np.testing.assert_allclose(
      rows[:2].sum() + rows[2:].sum(),
      split['sum_of_micro_losses_with_global_denominators'],
      **TOLERANCE,
    )


def test_reductions_by_hand():
  """Law: weights of lengths (3, 1, 0), T = 4, as in the table of the docs.

  N = 4 tokens, S = 2 sequences. Mutant: 1 / L_i without the 1 / S.
  """
  weigh = lambda name: masking.token_weights(
    np.array([3, 1, 0]), reduction=name, constant=4
  )[:2]
  np.testing.assert_allclose(weigh('token_mean'), [1 / 4, 1 / 4])
  np.testing.assert_allclose(weigh('sequence_mean'), [1 / 6, 1 / 2])
  np.testing.assert_allclose(weigh('sequence_mean_token_sum'), [1 / 2, 1 / 2])
  np.testing.assert_allclose(
    weigh('sequence_sum_token_mean_constant'), [1 / 8, 1 / 8]
  )


@pytest.mark.parametrize('name', ['k1', 'k2', 'k3'])
def test_divergences_match_the_oracle(name):
  """Law: value and in-loss gradient of each estimator, by token.

  Mutant: k3 with the sign of d exchanged, exp(d) - d - 1.
  """
  oracle = _oracle('kl_estimators')
  estimate = divergences.DIVERGENCES[name]
  logprobs = _floats(oracle['inputs']['lp'])
  reference = _floats(oracle['inputs']['ref'])
  expected = oracle['per_token'][name]
  np.testing.assert_allclose(
    estimate(logprobs, reference), expected['value'], **TOLERANCE
  )
  gradient = jax.grad(lambda x: jnp.sum(estimate(x, reference)))(logprobs)
  np.testing.assert_allclose(gradient, expected['grad_wrt_lp'], **TOLERANCE)


@pytest.mark.parametrize('name', ['k1', 'k2', 'k3'])
def test_divergences_in_expectation(name):
  """Law: the exact expectation and expected gradient over three tokens.

  Mutant: k2 without its 1/2 doubles the expected gradient.
  """
  oracle = _oracle('kl_estimators')['categorical']
  probabilities = _floats(oracle['inputs']['pi'])
  reference = jnp.log(_floats(oracle['inputs']['ref']))
  estimate = divergences.DIVERGENCES[name]

  def expectation(logits):
    return jnp.sum(
      probabilities * estimate(jax.nn.log_softmax(logits), reference)
    )

  value, gradient = jax.value_and_grad(expectation)(jnp.log(probabilities))
  np.testing.assert_allclose(
    value, oracle['expected'][f'E_{name}'], **TOLERANCE
  )
  np.testing.assert_allclose(
    gradient, oracle['expected'][f'in_loss_grad_{name}'], **TOLERANCE
  )


PPO_CASES = ['symmetric_0.2_no_dual', 'dapo_clip_higher_0.2_0.28_dual_10']
PPO_REDUCTIONS = {
  'token_mean': 'token-mean',
  'sequence_mean': 'seq-mean-token-mean',
  'sequence_sum_token_mean_constant': 'seq-mean-token-sum-norm',
}


def _ppo_inputs():
  inputs = _oracle('ppo_loss')['inputs']
  mask = np.array(inputs['mask'], bool)
  advantages = np.broadcast_to(
    np.array(inputs['advantages'])[:, None], mask.shape
  )
  return (
    mask,
    _floats(inputs['lp']),
    _floats(inputs['old']),
    _floats(advantages),
  )


@pytest.mark.parametrize('case', PPO_CASES)
def test_clipped_surrogate_matches_the_oracle(case):
  """Law: loss, ratio and clip fraction by token.

  The dual clip of the second case is out of reach (c = 10). Mutants:
  `maximum` for `minimum`; clip_low used on both sides.
  """
  oracle = _oracle('ppo_loss')['cases'][case]
  mask, logprobs, old, advantages = _ppo_inputs()
  token = losses.clipped_surrogate(
    logprobs,
    old,
    advantages,
    clip_low=oracle['params']['el'],
    clip_high=oracle['params']['eh'],
  )
  np.testing.assert_allclose(
    np.asarray(token.loss)[mask],
    np.array(oracle['per_token_loss'])[mask],
    **TOLERANCE,
  )
  np.testing.assert_allclose(
    np.asarray(token.ratio)[mask], np.array(oracle['ratio'])[mask], **TOLERANCE
  )
  np.testing.assert_allclose(
    np.asarray(token.clipped)[mask].mean(), oracle['clipfrac'], **TOLERANCE
  )


@pytest.mark.parametrize('case', PPO_CASES)
@pytest.mark.parametrize('reduction', PPO_REDUCTIONS)
def test_clipped_surrogate_gradient_matches_the_oracle(case, reduction):
  """Law: the reduced loss and its gradient, 0 outside the mask.

  Mutants: a gradient that passes through the clip; `select_masked`
  that returns its values. (XLA turns `mask * values` into a select.)
  """
  oracle = _oracle('ppo_loss')['cases'][case]
  expected = oracle[PPO_REDUCTIONS[reduction]]
  mask, logprobs, old, advantages = _ppo_inputs()
  weights = (
    masking.token_weights(
      mask.sum(axis=1), reduction=reduction, constant=mask.shape[1]
    )[:, None]
    * mask
  )

  def loss(logprobs):
    token = losses.clipped_surrogate(
      masking.select_masked(mask, logprobs),
      masking.select_masked(mask, old),
      advantages,
      clip_low=oracle['params']['el'],
      clip_high=oracle['params']['eh'],
    )
    return jnp.sum(weights * token.loss)

  garbage = jnp.where(mask, logprobs, jnp.nan)
  value, gradient = jax.value_and_grad(loss)(garbage)
  np.testing.assert_allclose(value, expected['loss'], **TOLERANCE)
  np.testing.assert_allclose(gradient, expected['grad_wrt_lp'], **TOLERANCE)
  assert np.all(np.asarray(gradient)[~mask] == 0)


@pytest.mark.parametrize('name', ['clipped', 'reinforce'])
def test_on_policy_gradient_matches_the_oracle(name):
  """Law: with old = current, both losses have the gradient -A w.

  Mutant: `reinforce` without its minus sign.
  """
  oracle = _oracle('ppo_loss')['on_policy']
  mask, logprobs, _, advantages = _ppo_inputs()
  weights = mask / mask.sum()

  def loss(x):
    tokens = objectives.Tokens(
      x,
      logprobs,
      logprobs,
      advantages,
      mask > 0,
      jnp.ones(mask.shape, jnp.int32),
      {},
    )
    token = objectives.LOSSES[name](algorithms.Algorithm(), tokens)
    return jnp.sum(weights * token.loss)

  np.testing.assert_allclose(
    jax.grad(loss)(logprobs), oracle['grad_wrt_lp'], **TOLERANCE
  )
  if name == 'clipped':
    np.testing.assert_allclose(
      loss(logprobs), oracle['token_mean_loss'], **TOLERANCE
    )


def test_losses_by_hand():
  """Law: one token, ratio 2, advantage +1 and -1, clip (0.2, 0.5).

  +1: min(2, 1.5) = 1.5, clipped; -1: min(-2, -1.5) = -2, not clipped, its
  gradient is -r A = 2. REINFORCE weighs by the ratio: gradient -r A = -2 for
  +1. Mutant: the ratio of REINFORCE differentiated (no stop_gradient).
  """
  old = jnp.zeros(2)
  logprobs = jnp.full(2, jnp.log(2.0))
  advantages = jnp.array([1.0, -1.0])
  clipped = lambda x: losses.clipped_surrogate(
    x, old, advantages, clip_low=0.2, clip_high=0.5
  )
  np.testing.assert_allclose(clipped(logprobs).loss, [-1.5, 2.0], rtol=1e-6)
  assert clipped(logprobs).clipped.tolist() == [True, False]
  np.testing.assert_allclose(
    jax.grad(lambda x: clipped(x).loss.sum())(logprobs), [0.0, 2.0], rtol=1e-6
  )
  reinforce = lambda x: losses.reinforce(x, old, advantages).loss.sum()
  np.testing.assert_allclose(
    jax.grad(reinforce)(logprobs), [-2.0, 2.0], rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.negative_log_likelihood(logprobs).loss, -logprobs
  )


def test_ratio_does_not_overflow():
  """Law: a log-ratio of 1000 gives e^20 and a finite gradient.

  Mutant: exp without the clip is inf, and inf - inf NaN.
  """
  value, gradient = jax.value_and_grad(
    lambda x: (
      losses.clipped_surrogate(
        x, -x, jnp.ones(()), clip_low=0.2, clip_high=0.2
      ).loss
    )
  )(_floats(500.0))
  assert np.isfinite(value) and np.isfinite(gradient)
  assert float(losses.importance_ratio(_floats(500.0), _floats(-500.0))) < 5e8
  assert np.isfinite(divergences.k3(_floats(-500.0), _floats(500.0)))


def test_check_grads():
  """Law: analytic gradients equal numeric ones, away from the kinks.

  Mutant: `jax.lax.stop_gradient` around the clipped ratio only.
  """
  rng = np.random.default_rng(0)
  x, old, advantages = (_floats(rng.uniform(-1, 1, 6)) for _ in range(3))
  old = x + jnp.clip(old, -0.15, 0.15)
  check = lambda f: jax.test_util.check_grads(
    f, (x,), order=1, modes=['rev'], atol=2e-2, rtol=2e-2
  )
  check(
    lambda x: (
      losses.clipped_surrogate(
        x, old, advantages, clip_low=0.2, clip_high=0.3
      ).loss
    )
  )
  check(lambda x: losses.negative_log_likelihood(x).loss)
  # Not the two that put k2's gradient under k3's value.
  for name in ('k1', 'k2', 'k3', 'absolute'):
    estimate = divergences.DIVERGENCES[name]
    check(lambda x, estimate=estimate: estimate(x, old))


@pytest.mark.parametrize(
  'name, expected',
  [
    ('group', 'grpo_verl_ddof1_eps1e6'),
    ('group_centred', 'dr_grpo_center_only_verl'),
    ('leave_one_out', 'rloo'),
  ],
)
def test_advantages_match_the_oracle(name, expected):
  """Law: advantages by group; equal rewards 0; a group of one keeps its own.

  Mutants: ddof = 0; epsilon inside the square root; a singleton centred to 0.
  """
  oracle = _oracle('group_advantages')
  rewards = np.array(oracle['inputs']['reward'], np.float32)
  index = np.array(oracle['inputs']['group_index'])
  estimate = advantage_ops.ADVANTAGES[name]
  for group in np.unique(index):
    np.testing.assert_allclose(
      estimate(jnp.asarray(rewards[index == group])),
      np.array(oracle['expected'][expected])[index == group],
      **TOLERANCE,
    )


def test_advantages_by_hand():
  """Law: rewards (1, 0, 0): mean 1/3, std sqrt(1/3).

  Mutant: centring by rounding: three rewards of 0.1 have a float32 mean that
  is not 0.1, and the division by their tiny deviation would give +-0.6.
  """
  rewards = _floats([1, 0, 0])
  np.testing.assert_allclose(
    advantage_ops.group(rewards), np.array([2, -1, -1]) / 3**0.5, rtol=1e-5
  )
  np.testing.assert_allclose(
    advantage_ops.leave_one_out(rewards), [1, -0.5, -0.5], rtol=1e-6
  )
  for estimate in advantage_ops.ADVANTAGES.values():
    for size in (3, 5, 6, 7):
      assert np.all(np.asarray(estimate(jnp.full(size, 0.1))) == 0)


def test_pass_at_k_matches_the_oracle():
  """Law: the unbiased estimator. Mutant: 1 - (1 - c / n)^k."""
  oracle = _oracle('passk')
  for row in oracle['table']:
    np.testing.assert_allclose(
      metric_ops.pass_at_k(row['n'], row['c'], row['k']),
      row['pass_at_k'],
      **TOLERANCE,
    )
  data = oracle['dataset']
  for k in (1, 2, 4):
    values = [
      metric_ops.pass_at_k(4, int(sum(row)), k) for row in data['correct']
    ]
    np.testing.assert_allclose(
      np.mean(values), data[f'pass_at_{k}'], **TOLERANCE
    )
  with pytest.raises(ValueError, match=r'pass@5 needs 1 <= k <= 4'):
    metric_ops.pass_at_k(4, 1, 5)


# ---- Lengths ----------------------------------------------------------------
def _scripted_model():
  """A model that says params['script'][p] at position p, whatever it reads."""
  base = testing.tiny_model(vocabulary=10)

  def extend(params, tokens, positions, node_mask, cache):
    hidden, nodes = base.extend(
      params['base'], tokens, positions, node_mask, cache
    )
    said = jax.nn.one_hot(params['script'][positions], 10) * 1e4
    return hidden[..., :1] * 0 + said, nodes

  return base._replace(
    init=base.init, extend=extend, logits=lambda params, hidden: hidden
  )


@pytest.mark.parametrize(
  'eos_ids, key', [((2, 3), 'mask'), ((2,), 'mask_if_only_eos_2')]
)
def test_lengths_match_the_eos_oracle(eos_ids, key):
  """Law: a completion ends with its first EOS, which is part of it.

  The mask comes from the length alone, so a PAD of id 0, or one equal to EOS,
  cannot matter. Mutants: EOS dropped from the length; only eos_ids[0] ends.
  """
  oracle = _oracle('eos_mask')
  config = testing.tiny_config()
  config.mesh.data = 1
  config.rollout.max_new_tokens = 5
  run = make_run(config)
  model = _scripted_model()
  engine = RolloutEngine(
    model,
    rollout=run.config.rollout,
    control=run.config.control,
    sampling=Sampling(),
    eos_ids=eos_ids,
    seed=0,
    mesh=run.mesh,
  )
  base = testing.tiny_model(vocabulary=10).init(jax.random.key(0))
  request = Request(np.array([5], np.int32), 1, TRAIN, 0, 0)
  for i, script in enumerate(oracle['inputs']['tokens']):
    padded = jnp.asarray(script + [9] * 40, jnp.int32)
    (rollout,), _ = engine.generate(
      {'base': base, 'script': padded}, [request], RolloutState()
    )
    mask = masking.length_mask(rollout.length, 5)
    assert mask.astype(int).tolist() == oracle['expected'][key][i]
    assert rollout.tokens.tolist() == script[: rollout.length]
    assert len(rollout.behaviour_logprobs) == rollout.length
    if key == 'mask':
      assert rollout.finished != oracle['expected']['truncated'][i]
  assert isinstance(model.init_cache(1, 8), kv_cache.KVCache)


# ---- Updates ----------------------------------------------------------------
@pytest.fixture(name='base', scope='module')
def _base():
  run = tiny_run()
  samples = random_samples()
  return run, samples, *gradient_of(run, samples)


@pytest.mark.parametrize(
  'learning',
  [
    dict(microbatch_rows=2),
    dict(microbatch_rows=4),
    dict(row_length=12),
    dict(data=8),
    dict(remat=True, score_chunk=7),
  ],
  ids=str,
)
def test_update_does_not_depend_on_the_layout(base, learning):
  """Law: microbatches, packing and devices change the update by rounding.

  row_length=12 puts one sample in a row. Mutants: the loss divided by the
  number of tokens of each microbatch; segments ignored by attention.
  """
  _, samples, expected, _ = base
  run = tiny_run(**learning)
  gradient, _ = gradient_of(run, samples)
  assert distance(gradient, expected) < 1e-5


def test_update_ignores_padding_order_and_samples_without_signal(base):
  """Law: empty rows, the order of samples, and leaving out samples of
  advantage 0 change nothing but rounding.

  Mutants: denominators over the kept samples only; advantages not permuted
  with their samples.
  """
  run, samples, expected, _ = base
  gradient, values = gradient_of(tiny_run(), samples, change=pad_rows)
  assert distance(gradient, expected) < 1e-5
  assert float(values['policy/entropy']) > 0
  skipped, _ = gradient_of(run, samples, skip=True)
  assert distance(skipped, expected) < 1e-5
  order = np.random.default_rng(1).permutation(len(samples))
  permuted, _ = gradient_of(run, [samples[i] for i in order])
  assert distance(permuted, expected) < 1e-5
  reversed_signal = [
    dataclasses.replace(s, advantage=-s.advantage) for s in samples
  ]
  negated, _ = gradient_of(run, reversed_signal)
  assert distance(negated, expected) > 0.1


def test_samples_without_signal_are_kept_when_they_matter():
  """Law: with a KL term or entropy bonus every token has a gradient.

  Mutant: `linear_in_advantage` that forgets the KL coefficient.
  """
  run = tiny_run()
  algorithm = dataclasses.replace(run.algorithm, kl_coefficient=0.1)
  samples = random_samples()
  packed = make_learner(run, algorithm).pack(samples, skip_without_signal=True)
  assert packed.targets.sum() == sum(len(s.completion) for s in samples)
  packed = make_learner(run).pack(samples, skip_without_signal=True)
  assert packed.targets.sum() == sum(
    len(s.completion) for s in samples if s.advantage
  )


FULL = algorithms.Algorithm(kl_coefficient=0.1, entropy_coefficient=0.01)


def test_nan_outside_the_mask_reaches_nothing():
  """Law: values where no token is trained on are not read.

  Mutants: advantages, weights, or old log-probabilities read unmasked.
  """
  run = tiny_run(minibatches=2)
  assert not make_learner(run).old_is_current
  clean, values = gradient_of(run, random_samples(), algorithm=FULL)
  poisoned, after = gradient_of(
    run, random_samples(), algorithm=FULL, change=poison
  )
  np.testing.assert_array_equal(poisoned, clean)
  assert all(
    np.array_equal(values[name], after[name]) and np.isfinite(after[name])
    for name in values
  )


def test_gradient_is_zero_without_targets():
  """Law: what is not a target has no gradient: prompts are not trained on.

  Mutant: the mask taken from `segments` instead of `targets`.
  """
  untarget = lambda batch: batch.replace(targets=np.zeros_like(batch.targets))
  gradient, _ = gradient_of(
    tiny_run(minibatches=2),
    random_samples(),
    algorithm=FULL,
    change=lambda b: poison(untarget(b)),
  )
  assert np.all(gradient == 0)


def test_first_update_is_reinforce(base):
  """Law: with old = current the ratio is 1, nothing is clipped, and the
  gradient is that of REINFORCE.

  Mutant: `stop_gradient` missing around old: the gradient is 0.
  """
  run, samples, expected, values = base
  assert float(values['policy/ratio_max']) == 1
  assert float(values['policy/clip_fraction']) == 0
  assert float(values['policy/approximate_kl']) == 0
  reinforce = dataclasses.replace(run.algorithm, loss='reinforce')
  gradient, _ = gradient_of(tiny_run(), samples, algorithm=reinforce)
  assert np.linalg.norm(expected) > 1e-3
  assert distance(gradient, expected) < 1e-6


def test_supervised_loss_is_the_mean_negative_log_likelihood():
  """Law: -mean log pi over the trace's tokens, EOS included, prompt excluded.

  Mutant: the score at l taken for tokens[l + 1].
  """
  run = tiny_run()
  samples = [
    sft.make_sample(s.prompt, s.completion[:4], 0, 12)
    for s in random_samples(5)
  ]
  assert all(s.completion[-1] == 0 and len(s.completion) == 5 for s in samples)
  _, values = gradient_of(run, samples, algorithm=presets.SUPERVISED)
  params = sharp_params(run)
  expected = -np.mean(
    np.concatenate([plain_logprobs(run, params, s) for s in samples])
  )
  np.testing.assert_allclose(values['learning/loss'], expected, rtol=1e-5)


def _learn(run, samples, *, optimizer=SGD, reference=None, algorithm=None):
  learner = make_learner(run, algorithm, optimizer)
  state = make_state(run, optimizer)
  prepared, padding = learner.prepare(state.params, samples, reference)
  state, values = learner.learn(state, prepared)
  assert 0 <= padding < 1
  return state, values


def test_later_minibatches_read_old_from_before_the_first_step():
  """Law: old log-probabilities are scored once, under the sampling policy.

  Mutants: old = current in each minibatch (ratio_max is 1); minibatches
  scored after the first step.
  """
  run, samples = tiny_run(minibatches=2), random_samples()
  samples = [
    dataclasses.replace(s, group=i // 4) for i, s in enumerate(samples)
  ]
  state, values = _learn(run, samples)
  assert values['policy/ratio_max'] > 1.01
  learner = make_learner(run, optimizer=SGD)
  by_hand = make_state(run, SGD)
  halves = [
    learner.put(learner.pack(half, skip_without_signal=True))
    for half in (samples[:12], samples[12:])
  ]
  olds = [learner.score(by_hand.params, half) for half in halves]
  first, second = (
    half.replace(old_logprobs=old) for half, old in zip(halves, olds)
  )
  by_hand, before = learner.update(by_hand, first)
  by_hand, after = learner.update(by_hand, second)
  assert int(state.step) == 2
  assert float(before['policy/ratio_max']) == pytest.approx(1, abs=1e-5)
  assert float(after['policy/ratio_max']) == values['policy/ratio_max']
  jax.tree.map(np.testing.assert_array_equal, state.params, by_hand.params)


@pytest.mark.parametrize('divergence', ['k1', 'k2', 'k3'])
def test_kl_to_itself_is_zero(divergence):
  """Law: with reference = policy the KL metric is 0; k2 and k3 have no
  gradient there, and k1, whose per-token gradient is 1, has one.

  Mutant: reference log-probabilities never scored (left at 0).
  """
  run, samples = tiny_run(), random_samples()
  algorithm = dataclasses.replace(
    run.algorithm, kl_coefficient=0.3, divergence=divergence
  )
  params = sharp_params(run)
  state, values = _learn(
    run, samples, optimizer=CAPTURE, reference=params, algorithm=algorithm
  )
  assert abs(values['policy/kl_reference']) < 1e-6
  plain, _ = _learn(tiny_run(), samples, optimizer=CAPTURE)
  flat = lambda state: np.concatenate(
    [np.ravel(x) for x in jax.tree.leaves(state.opt_state)]
  )
  apart = distance(flat(state), flat(plain))
  assert apart > 1e-2 if divergence == 'k1' else apart < 1e-4


def test_kl_to_another_policy_by_hand():
  """Law: the metric is the mean of k1 over completion tokens.

  Mutant: the mean taken over all positions of the batch.
  """
  run, samples = tiny_run(), random_samples(6)
  algorithm = dataclasses.replace(
    run.algorithm, kl_coefficient=0.3, divergence='k1'
  )
  params = sharp_params(run)
  reference = jax.tree.map(lambda x: x * 0.5, params)
  _, values = _learn(
    run, samples, optimizer=CAPTURE, reference=reference, algorithm=algorithm
  )
  gaps = [
    plain_logprobs(run, params, s) - plain_logprobs(run, reference, s)
    for s in samples
  ]
  np.testing.assert_allclose(
    values['policy/kl_reference'], np.mean(np.concatenate(gaps)), rtol=1e-4
  )


def _half_below(run):
  """Samples whose behaviour log-probabilities are 0.5 below the policy's."""
  params = sharp_params(run)
  return [
    dataclasses.replace(
      s,
      advantage=1.0,
      behaviour_logprobs=(plain_logprobs(run, params, s) - 0.5).astype(
        np.float32
      ),
    )
    for s in random_samples()
  ]


def test_old_logprobs_of_the_sampler():
  """Law: 'sampler' takes the ratio to the behaviour; 'recompute' never reads
  it, except for the reported gap.

  The ratio is e^0.5 in one, 1 in the other, and the gap 0.5. Mutant:
  'sampler' ignored with one minibatch.
  """
  run = tiny_run(old_logprobs='sampler')
  _, values = _learn(run, _half_below(run))
  assert values['policy/ratio_max'] == pytest.approx(np.exp(0.5), rel=1e-4)
  assert values['policy/clip_fraction'] == 1
  _, values = _learn(tiny_run(), _half_below(run))
  assert values['policy/ratio_max'] == 1
  assert values['policy/behaviour_gap_max'] == pytest.approx(0.5, rel=1e-4)


def test_behaviour_gap_is_that_of_the_sampler():
  """Law: |behaviour - recomputed| also where old is the behaviour itself.

  Mutant: the gap measured against old, which is 0 by definition there.
  """
  run = tiny_run(old_logprobs='sampler')
  _, values = _learn(run, _half_below(run))
  assert values['policy/behaviour_gap_max'] == pytest.approx(0.5, rel=1e-4)


def test_permuted_rewards_are_a_permutation():
  """Law: the control shuffles across groups, differently at each step.

  Mutant: shuffling within each group only, which keeps the group's mean.
  """
  rewards = np.arange(32, dtype=np.float32).reshape(8, 4)
  groups = [make_group(r) for r in rewards]
  get = lambda step: np.array(
    [g.rewards for g in advantages.permuted(groups, 0, step)]
  )
  one, two = get(0), get(1)
  assert sorted(one.ravel()) == sorted(rewards.ravel())
  assert not np.array_equal(one, two)
  assert not np.array_equal(one.mean(axis=1), rewards.mean(axis=1))
  np.testing.assert_array_equal(one, get(0))


# ---- Optimizer and presets --------------------------------------------------
def test_schedules_by_hand():
  """Law: warm-up 1/2, 2/2, then the schedule to 0 over the remaining steps.

  Mutant: a first step of rate 0.
  """
  config = tiny_run(learning_rate=1.0, warmup_steps=2).config.learning
  rate = lambda name: [
    float(
      updates.make_schedule(dataclasses.replace(config, schedule=name), 6)(i)
    )
    for i in range(7)
  ]
  np.testing.assert_allclose(rate('constant'), [0.5, 1, 1, 1, 1, 1, 1])
  np.testing.assert_allclose(
    rate('linear'), [0.5, 1, 1, 0.75, 0.5, 0.25, 0], atol=1e-6
  )
  np.testing.assert_allclose(
    rate('cosine')[2:], 0.5 * (1 + np.cos(np.pi * np.arange(5) / 4)), atol=1e-6
  )


def test_gradient_norm_is_clipped():
  """Law: a gradient of norm 5 enters Adam as one of norm max_grad_norm.

  With epsilon = 1 the first Adam step is g / (|g| + 1): g = 1 gives 0.5, where
  g = 5 would give 0.83. Mutant: the clip behind Adam.
  """
  config = tiny_run(learning_rate=1.0, epsilon=1.0, max_grad_norm=1.0)
  optimizer = updates.make_optimizer(config.config.learning, 10)
  params = jnp.zeros(1)
  change, _ = optimizer.update(jnp.full(1, 5.0), optimizer.init(params), params)
  np.testing.assert_allclose(change, [-0.5], rtol=1e-5)


def _decay_of(states, optimizer, model=None):
  """Returns (shares of every parameter that a step without a gradient takes,
  gaps left out, by path)."""
  state = jax.tree.map(
    lambda x: np.ones(x.shape, x.dtype), states.abstract_state(optimizer, model)
  )
  trained, _ = lora.split(
    state.params, (model or states.model).trainable(state.params)
  )
  update = jax.jit(
    lambda params: optimizer.update(
      jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )[0]
  )
  changes = update(trained)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.unique(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(changes)[0]
  }


@pytest.mark.parametrize(
  'changes',
  [
    dict(tied_head=False, qkv_bias=True, qk_norm=True),
    dict(lora__rank=2, lora__targets=('q_proj', 'v_proj', 'down_proj')),
  ],
  ids=['whole', 'adapters'],
)
def test_weight_decay_is_of_matrices(changes):
  """Law: without a gradient a step takes rate * decay of every matrix, of the
  policy, the critic and adapters, and nothing of norms, biases and embeddings.

  Mutants: no mask; `ndim > 1`, which takes the joint bias (three axes) for a
  matrix and the critic's value for none; the head left out.
  """
  config = testing.tiny_config()
  config.algorithm.name = 'ppo'
  config.mesh.data = 1
  for path, value in changes.items():
    section, _, name = path.rpartition('__')
    setattr(config.model.lora if section else config.model, name, value)
  config.learning.learning_rate = 0.5
  config.learning.weight_decay = 0.25
  states = make_run(config).states
  policy = _decay_of(states, states.optimizer)
  critic = _decay_of(states, states.critic_optimizer, states.critic_model)
  spared = ('scale', 'bias', 'embedding')
  for path, found in (policy | critic).items():
    want = 0.0 if path.rpartition('/')[2] in spared else -0.125
    np.testing.assert_array_equal(found, [want], err_msg=path)
  assert 'value/kernel' in critic
  if config.model.lora.rank:
    assert {path.split('/')[1] for path in policy} == {
      'lora_q_proj',
      'lora_v_proj',
      'lora_down_proj',
    }
  else:
    names = {path.rpartition('/')[2] for path in policy}
    assert names == {'kernel', 'head', *spared}


@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_the_optimizer_is_adamw_of_optax(decay):
  """Law: a state of the structure of `optax.adamw`'s, whatever the decay is, so
  that checkpoints of one are those of the other; and its bits, for a matrix.

  Mutants: a decay whose state nests; the decay before Adam.
  """
  config = dataclasses.replace(
    testing.tiny_config().learning, weight_decay=decay
  )
  ours = updates.make_optimizer(config, 3)
  theirs = optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(
      updates.make_schedule(config, 3),
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=decay,
    ),
  )
  noise = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  found = []
  for optimizer in (ours, theirs):
    params = {'x': {'kernel': jnp.asarray(noise[0])}}
    state = optimizer.init(params)
    for gradient in noise:
      changes, state = jax.jit(optimizer.update)(
        {'x': {'kernel': gradient}}, state, params
      )
      params = optax.apply_updates(params, changes)
    found.append((params, state))
  assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_choices_of_the_algorithms_are_implemented():
  """Law: every preset and every named choice resolves and is computed.

  Mutant: a preset that names a loss which LOSSES lacks.
  """
  for preset in (*algorithms.PRESETS.values(), presets.SUPERVISED):
    assert preset.loss in algorithms.LOSSES
    assert preset.advantage in (
      estimators.ESTIMATORS | estimators.PART_ESTIMATORS
    )
    assert preset.credit in token_credit.CREDITS
    assert preset.correction in objectives.CORRECTIONS
    assert preset.rejection in objectives.REJECTIONS
    assert preset.filter in filters.FILTERS
    assert preset.labels in filters.LABELS
    assert preset.reduction in masking.REDUCTIONS
    assert preset.divergence in divergences.DIVERGENCES
    assert preset.rehearsal in ('none', *f_divergences.F_DIVERGENCES)
  assert algorithms.PRESETS['grpo'].reduction == 'sequence_mean'
  assert algorithms.PRESETS['rloo'].advantage == 'leave_one_out'
  assert (
    algorithms.PRESETS['dr_grpo'].reduction
    == 'sequence_sum_token_mean_constant'
  )


def test_estimators_of_a_batch():
  """Law: by hand, two groups of two; whitening is that of every token.

  Equal rewards give exactly 0. Mutants: samples not weighted by length;
  rounding of the mean passed on by `length_weighted` or `whitened`.
  """
  rewards, lengths = _floats([[1, 0], [1, 1]]), jnp.asarray([[1, 3], [2, 2]])
  lengths3 = jnp.asarray([[3, 5, 7], [1, 4, 2]])
  estimate = lambda name, rewards, lengths: np.asarray(
    estimators.ESTIMATORS[name](rewards, lengths, rewards, None)
  )
  get = lambda name: estimate(name, rewards, lengths)
  np.testing.assert_allclose(get('batch_scaled')[0], [1, -1], rtol=1e-3)
  assert np.all(get('batch_scaled')[1] == 0)
  np.testing.assert_allclose(
    get('signal_scaled')[0], [2 / 3, -2 / 3], rtol=1e-6
  )
  np.testing.assert_allclose(
    get('length_weighted')[0], [0.75, -0.25], rtol=1e-6
  )
  for name in estimators.ESTIMATORS:
    if name == 'outcome':  # the reward itself
      continue
    for reward in (0.1, 0.3, 0.7, 1.1, 1.3):
      equal = jnp.full((2, 3), reward)
      assert np.all(estimate(name, equal, lengths3) == 0)
  for by_part in estimators.PART_ESTIMATORS.values():
    parts = jnp.stack([jnp.full((2, 3), 0.1), jnp.full((2, 3), 0.7)])
    assert np.all(np.asarray(by_part(parts, _floats([1, 0.3]), None)) == 0)
  place, ends = jnp.arange(3)[None], lengths.reshape(4, 1)
  outcome = jnp.where(place == ends - 1, rewards.reshape(4, 1), 0.0)
  returns = values.returns_to_go(outcome, place < ends)
  by_token = batch_advantages.whiten(returns, place < ends)
  np.testing.assert_allclose(
    get('whitened').reshape(4), by_token[:, 0], rtol=1e-5
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(name='cispo', clip_low=0.1), ['clip_low', "'truncated'"]),
    (dict(name='gpg', clip_high=0.1), ['clip_high', "'reinforce'"]),
    (dict(name='gspo', dual_clip=3.0), ['dual_clip', "'sequence_clipped'"]),
    (dict(dual_clip=0.5), ['dual_clip=0.5', 'above 1']),
    (dict(advantage='grup'), ["'grup'", 'whitened']),
  ],
  ids=str,
)
def test_a_field_that_is_not_read_is_refused(changes, words):
  """One line that names the field and who reads it."""
  with pytest.raises(ConfigError) as error:
    algorithms.resolve(AlgorithmConfig(**changes))
  assert all(word in str(error.value) for word in words), error.value


def test_the_loss_of_the_readme(monkeypatch):
  """Law: a loss is one function and one preset, as the README writes them.

  Mutant: an argument more in the function of the README.
  """
  path = pathlib.Path(learning.__file__).parent / 'README.md'
  code = path.read_text().split('# learning/objectives.py\n')[1]
  code = code.split('```')[0]
  assert len(code.splitlines()) < 25
  for table, places in (
    ('LOSSES', (objectives, algorithms)),
    ('PRESETS', (presets, algorithms)),
  ):
    copy = dict(getattr(algorithms, table))
    for place in places:
      monkeypatch.setattr(place, table, copy)
  exec(code, vars(objectives) | vars(presets))  # pylint: disable=exec-used
  algorithm = algorithms.resolve(AlgorithmConfig(name='mine'))
  gradient, _ = gradient_of(tiny_run(), random_samples(), algorithm=algorithm)
  plain = dataclasses.replace(algorithm, loss='reinforce')
  want, _ = gradient_of(tiny_run(), random_samples(), algorithm=plain)
  assert distance(gradient, want) < 1e-6  # at a ratio of 1


_OWN_NUMBER = """
import jax.numpy as jnp
from rlax_llm.config import AlgorithmConfig
from rlax_llm.learning import algorithms, objectives
for given in ({}, {'penalty': 0.3}):
  algorithm = algorithms.resolve(AlgorithmConfig(loss='penalised', **given))
  ones = jnp.ones((1, 1))
  tokens = objectives.Tokens(jnp.log(2 * ones), 0 * ones, 0 * ones, 0 * ones,
                             ones > 0, ones.astype(jnp.int32), {})
  loss = objectives.LOSSES['penalised'](algorithm, tokens).loss
  print(round(float(loss[0, 0]), 4))
"""


def test_the_loss_with_a_number_of_the_readme(tmp_path):
  """Law: a loss with a number is a field and a function, two files and at most
  25 lines; a flag sets the number, and another loss refuses it.

  Mutants: `read_by` without effect; AlgorithmConfig without the new field.
  """
  root = pathlib.Path(learning.__file__).parent.parent
  shutil.copytree(root, tmp_path / 'rlax_llm')
  text = (root / 'learning' / 'README.md').read_text()
  text = text.split('a field of Algorithm\n')[1].split('```')[0]
  field, function = text.split('# learning/objectives.py\n')
  assert len(text.splitlines()) <= 25
  path = tmp_path / 'rlax_llm' / 'config' / 'algorithm.py'
  head, tail = path.read_text().split('  @property\n', 1)
  path.write_text(f'{head}{field}\n  @property\n{tail}')
  path = tmp_path / 'rlax_llm' / 'learning' / 'objectives.py'
  path.write_text(path.read_text() + function)
  env = os.environ | {'PYTHONPATH': str(tmp_path), 'JAX_PLATFORMS': 'cpu'}
  run = lambda *words: subprocess.run(
    [sys.executable, *words],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  done = run('-c', _OWN_NUMBER)
  assert done.stdout.split() == ['0.1', '0.3'], done.stderr
  config = root.parent / 'configs' / 'quickstart.py'
  done = run(
    '-m',
    'rlax_llm.train',
    f'--config={config}',
    f'--workdir={tmp_path / "run"}',
    '--config.algorithm.penalty=0.3',
  )
  assert done.returncode == 2
  assert "algorithm.loss='penalised'" in done.stderr


def test_padding_fraction_counts_computed_positions():
  """Law: 2 samples of 3 tokens in one row of 8, microbatch of 2: 10/16.

  Mutant: microbatches beyond `count` counted as padding.
  """
  sample = Sample(np.array([2], np.int32), np.array([3, 0], np.int32))
  batch = batches.make_batch(
    [sample] * 2,
    reduction='token_mean',
    constant=8,
    row_length=8,
    microbatch_rows=2,
  )
  assert batches.padding_fraction(batch) == pytest.approx(10 / 16)
