"""Advantages, returns and value losses against outside oracles, in float64."""

import jax
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

from rlax_llm.ops import advantages as advantage_ops
from rlax_llm.ops import batch_advantages
from rlax_llm.ops import entropy_terms
from rlax_llm.ops import masking
from rlax_llm.ops import values


def _mask(lengths, capacity=6):
  return jnp.asarray(np.arange(capacity) < np.array(lengths)[:, None])


def _by_group(estimate, index, *arrays):
  """Applies an estimate of one group to each group of a flat batch."""
  index = np.array(index)
  out = np.zeros(index.shape)
  for number in np.unique(index):
    members = index == number
    out[members] = estimate(*(array(np.array(x)[members]) for x in arrays))
  return out


def test_group_advantages():
  """Law: one estimator per entry; TRL's group of one is 0, ours its reward.

  Mutants: ddof ignored; the plain mean as OPO's baseline.
  """
  oracle = load('group_advantages')
  inputs, expected = oracle['inputs'], oracle['expected']
  rewards, index = inputs['reward'], inputs['group_index']
  by_group = lambda estimate, *more: _by_group(estimate, index, rewards, *more)
  check(by_group(advantage_ops.group), expected['grpo_verl_ddof1_eps1e6'])
  check(
    by_group(advantage_ops.group_centred), expected['dr_grpo_center_only_verl']
  )
  check(by_group(advantage_ops.leave_one_out), expected['rloo'])
  check(
    by_group(lambda r: advantage_ops.group(r, ddof=0)),
    expected['grpo_population_std_eps1e6'],
  )
  check(
    by_group(advantage_ops.length_weighted, inputs['lengths']), expected['opo']
  )
  check(
    by_group(lambda r: advantage_ops.group(r, epsilon=1e-4))[:11],
    expected['grpo_trl_ddof1_eps1e4'][:11],
  )
  centred = array(by_group(advantage_ops.group_centred))
  check(centred[:11], expected['center_only_trl'][:11])
  check(
    batch_advantages.signal_scaled(centred, array(rewards)),
    expected['gpg_fnorm1'],
  )
  check(
    batch_advantages.batch_scaled(centred, array(rewards))[:11],
    expected['trl_scale_rewards_batch_value'][:11],
  )
  best = _by_group(advantage_ops.best_minus_second, index[:11], rewards[:11])
  check(best, expected['passk_top_minus_second'])
  with pytest.raises(ValueError, match='groups of 2, got 1'):
    advantage_ops.best_minus_second(array([1.0]))


def test_reinforce_plus_plus():
  """Law: whitened returns-to-go; with a group baseline; NaN outside the mask.

  Mutants: the variance without Bessel's correction; the discount ignored.
  """
  oracle = load('group_advantages')
  inputs, expected = oracle['inputs'], oracle['expected']
  lengths = np.array(inputs['lengths'])
  mask = _mask(lengths)
  rewards = np.full(mask.shape, np.nan)
  rewards[np.asarray(mask)] = 0
  rewards[np.arange(len(lengths)), lengths - 1] = inputs['reward']
  check(
    values.returns_to_go(array(rewards), mask),
    expected['reinforce_pp_returns_gamma1'],
  )
  for discount, name in (
    (1.0, 'reinforce_pp_gamma1'),
    (0.9, 'reinforce_pp_gamma0_9'),
  ):
    returns = values.returns_to_go(array(rewards), mask, discount=discount)
    check(batch_advantages.whiten(returns, mask), expected[name])
    packing = Packing(mask)
    packed = values.returns_to_go(
      packing.pack(rewards),
      packing.mask,
      discount=discount,
      segments=packing.segments,
    )
    packed = batch_advantages.whiten(packed, packing.mask)
    check(packing.unpack(packed), expected[name])
  centred = _by_group(
    advantage_ops.group_centred, inputs['group_index'], inputs['reward']
  )
  by_token = jnp.where(mask, array(centred)[:, None], jnp.nan)
  check(
    batch_advantages.whiten(by_token, mask), expected['reinforce_pp_baseline']
  )


def test_whitening_of_one_token():
  """Law: a lone token has no deviation; its advantage is 0, not NaN.

  Mutant: division by count - 1 without the guard.
  """
  check(
    batch_advantages.whiten(array([3.0, jnp.nan]), jnp.array([True, False])),
    [0, 0],
  )


def test_reward_decoupled_advantages():
  """Law: GDPO in verl's and TRL's form, and LightningRL's.

  Mutants: rewards summed before the normalisation; ddof ignored.
  """
  oracle = load('multi_reward_advantages')
  inputs, expected = oracle['inputs'], oracle['expected']
  accuracy, form, speed = (
    array(inputs[k]).reshape(2, 4) for k in ('accuracy', 'format', 'tpf')
  )
  weights = array(inputs['weights'])
  mask = jnp.asarray(np.array(inputs['mask']) > 0)
  pair = jnp.stack([accuracy, form], axis=1)

  def decoupled(rewards, **kwargs):
    estimate = lambda r: advantage_ops.reward_decoupled(r, weights, **kwargs)
    return jax.vmap(estimate)(rewards).reshape(-1)

  check(
    jax.vmap(advantage_ops.group)(accuracy + form).reshape(-1),
    expected['summed_then_grpo'],
  )
  check(decoupled(pair), expected['decoupled_sum'])
  by_token = jnp.broadcast_to(decoupled(pair)[:, None], mask.shape)
  check(
    batch_advantages.whiten(by_token, mask),
    expected['gdpo_verl_token_whitened'],
  )
  check(
    batch_advantages.batch_normalised(decoupled(pair, epsilon=1e-4)),
    expected['gdpo_trl_batch'],
  )
  scores = decoupled(jnp.stack([accuracy, speed], axis=1), epsilon=0.0, ddof=0)
  check(scores, expected['lightningrl_group_z_sum'])
  check(
    batch_advantages.batch_normalised(scores, epsilon=0.0),
    expected['lightningrl_after_batch_norm'],
  )
  # A sample left out changes the others' statistics, and is 0 itself.
  some = jnp.arange(8) < 7
  kept = batch_advantages.batch_normalised(scores.at[7].set(jnp.nan), some)
  check(kept[:7], batch_advantages.batch_normalised(scores[:7]))
  assert kept[7] == 0


# ---- Values -----------------------------------------------------------------
@pytest.mark.parametrize('case', [0, 1, 2])
def test_generalised_advantages(case):
  """Law: advantages, returns and whitening, over gaps; packed rows agree.

  Mutants: a masked token that resets the carry; the trace left out; the carry
  kept across segments.
  """
  oracle = load('gae_value')
  inputs, expected = oracle['inputs'], oracle['gae_cases'][case]
  params = expected['params']
  mask = jnp.asarray(np.array(inputs['mask']) > 0)
  rewards = jnp.where(mask, array(expected['rewards']), jnp.nan)
  critic = jnp.where(mask, array(inputs['values_old']), jnp.nan)
  found = values.generalised_advantages(
    rewards, critic, mask, discount=params['gamma'], trace=params['lam']
  )
  check(found.advantages, expected['advantages_raw_masked'])
  check(found.returns, expected['returns_masked'])
  check(
    batch_advantages.whiten(found.advantages, mask),
    expected['advantages_whitened_masked'],
  )
  twice = lambda x: jnp.concatenate([x, x])
  packing = Packing(twice(mask))
  packed = values.generalised_advantages(
    packing.pack(twice(rewards)),
    packing.pack(twice(critic)),
    packing.mask,
    discount=params['gamma'],
    trace=params['lam'],
    segments=packing.segments,
  )
  check(
    packing.unpack(packed.returns), twice(array(expected['returns_masked']))
  )


def test_generalised_advantages_are_constants():
  """Law: no gradient flows from advantages or returns into the critic.

  Mutant: values without stop_gradient.
  """
  mask = jnp.ones((1, 3), bool)
  rewards = array([[0, 0, 1]])

  def total(critic):
    found = values.generalised_advantages(rewards, critic, mask)
    return jnp.sum(found.advantages * 2 + found.returns)

  check(jax.grad(total)(array([[0.1, 0.2, 0.3]])), np.zeros((1, 3)))


def test_value_loss():
  """Law: loss, gradient and clip fraction for two ranges.

  Mutants: `minimum` for `maximum`; without the 1/2.
  """
  oracle = load('gae_value')
  inputs, expected = oracle['inputs'], oracle['value_loss']
  mask = jnp.asarray(np.array(inputs['mask']) > 0)
  old, new = (array(inputs[k]) for k in ('values_old', 'values_new'))
  returns = array(expected['returns'])
  for clip, name in ((0.5, 'clip_0_5'), (0.2, 'clip_0_2')):
    loss = lambda x, clip=clip: values.value_loss(x, old, returns, clip=clip)
    value, gradient = reduce_loss(lambda x: loss(x).loss, new, mask)
    check(value, expected[name]['loss'])
    check(gradient, expected[name]['grad_wrt_values'])
    check(
      masking.masked_mean(mask, loss(new).clipped), expected[name]['clipfrac']
    )
  check(values.value_loss(array([1.0]), array([0.0]), array([3.0])).loss, [2.0])


def test_agent_advantages():
  """Law: the next agent is the successor, in the same step or the next.

  Mutant: the successor's value without its alive mask.
  """
  oracle = load('marft_gae')
  inputs = oracle['inputs']
  rewards, critic = (array(inputs[k]) for k in ('rewards', 'values'))
  for alive, expected in (
    (inputs['masks_T_plus_1'], oracle['expected']),
    (
      oracle['done_after_step_0']['masks_T_plus_1'],
      oracle['done_after_step_0'],
    ),
  ):
    found = values.agent_advantages(
      rewards,
      critic,
      array(inputs['bootstrap_value']),
      jnp.asarray(np.array(alive) > 0),
      discount=inputs['gamma'],
      trace=inputs['lam'],
    )
    check(found.advantages, expected['advantages'])
    check(found.returns, expected['returns'])


def test_agent_advantages_bootstrap():
  """Law: one alive agent: r + discount * bootstrap - V = 1 + .5 * 4 - 2.

  Mutant: the bootstrap taken as 0.
  """
  one = jnp.ones((1, 1))
  found = values.agent_advantages(
    one, 2 * one, array(4.0), jnp.ones((2, 1), bool), discount=0.5
  )
  check(found.advantages, [[1.0]])


def test_turns_in_reverse():
  """Law: SeeUPO's advantages and multipliers, turn 1 and then turn 0.

  Mutants: inactive samples counted in the deviation; their multiplier not
  kept.
  """
  oracle = load('seeupo')
  inputs = oracle['inputs']
  rewards = array(inputs['reward'])[None]
  multiplier = jnp.ones_like(rewards)
  for step in oracle['steps']:
    active = jnp.asarray(np.array(step['active'])[None] > 0)
    check(
      batch_advantages.turn_advantages(rewards, active, jnp.ones_like(rewards))[
        0
      ],
      step['advantage_before_M'],
    )
    check(
      batch_advantages.turn_advantages(rewards, active, multiplier)[0],
      step['advantage_used'],
    )
    moved = array(inputs['mean_logratio_after_update'][str(step['turn'])])
    log_ratios = jnp.where(active, jnp.mean(moved, axis=1)[None], jnp.nan)
    one = jnp.ones_like(multiplier)
    check(
      batch_advantages.turn_multiplier(one, log_ratios, active)[0], step['rho']
    )
    multiplier = batch_advantages.turn_multiplier(
      multiplier, log_ratios, active
    )
    check(multiplier[0], step['M_out'])


# ---- Shaping by entropy and confidence --------------------------------------
def test_hybrid_shaping():
  """Law: ECHO's shaped advantages, tails and clip ranges; packed rows agree.

  Mutants: z(C) for z(1 - C); the window over the row, not the segment.
  """
  oracle = load('ttrl_echo')['echo']
  inputs, params = oracle['inputs'], oracle['params']
  mask, advantages = tokens(inputs)
  entropy, confidence = (
    jnp.where(mask, array(inputs[k]), jnp.nan)
    for k in ('entropy', 'confidence')
  )
  shaped = entropy_terms.shaped_advantages(
    advantages, entropy, confidence, mask
  )
  check(shaped, oracle['shaped_advantages'])
  unit = entropy_terms.shaped_advantages(
    jnp.ones_like(advantages), entropy, confidence, mask, strength=1.0
  )
  check(jnp.where(mask, unit - 1, 0), oracle['S'])
  packing = Packing(mask)
  for window, suffix in ((params['tail_window'], ''), (3, '_window3')):
    tail = entropy_terms.tail_confidence(confidence, mask, window=window)
    check(tail[:, 0], oracle[f'tail_confidence{suffix}'])
    check(
      entropy_terms.confidence_clip(tail)[:, 0], oracle[f'clip_epsilon{suffix}']
    )
    packed = entropy_terms.tail_confidence(
      packing.pack(confidence),
      packing.mask,
      window=window,
      segments=packing.segments,
    )
    check(packing.unpack(packed), jnp.where(mask, tail, 0))


def test_hardness_weighting():
  """Law: Confucius3's weights for four accuracies.

  Mutant: D of the accuracy instead of the mean of +-1.
  """
  oracle = load('confucius3')
  for row in oracle['pshw']:
    rewards = np.full(row['n'], -1.0)
    rewards[: row['correct']] = 1.0
    found = advantage_ops.hardness_weighted(array(rewards), array(rewards))
    check(found[: row['correct']], row['A_correct'])
    check(found[row['correct'] :], row['A_wrong'])
