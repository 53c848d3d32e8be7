"""Rewards, votes, schedules and metrics against outside oracles, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle_helpers import array
from oracle_helpers import check
from oracle_helpers import float64  # noqa: F401
from oracle_helpers import load
import pytest

from rlax_llm.learning.filters import has_signal
from rlax_llm.ops import metrics
from rlax_llm.ops import pseudo_labels
from rlax_llm.ops import rewards
from rlax_llm.ops import token_bleu
from rlax_llm.tasks.rewards import soft_overlong


def test_overlong_punishment_and_dynamic_sampling():
  """Law: DAPO's, by its authors' code; beyond the limit the paper's clamp.

  Mutants: no clamp at -1; the buffer after the limit.
  """
  oracle = load('dapo_extras')
  for case, limit in (
    (oracle['overlong'], oracle['overlong']['max_response_length']),
    (oracle['overlong']['small'], oracle['overlong']['small']['max']),
  ):
    found = [soft_overlong(n, limit, case['buffer']) for n in case['lengths']]
    assert found == pytest.approx(np.maximum(case['penalty'], -1.0))
  groups = oracle['dynamic_sampling']['groups']
  kept = [
    name
    for name, correctness in groups.items()
    if has_signal(np.array(correctness), np.ones(len(correctness), bool))
  ]
  assert kept == oracle['dynamic_sampling']['kept']


def test_extra_rollouts():
  """Law: DARS's schedules, by rows of accuracy.

  Mutants: floor for ceil; the cap on the extra samples alone.
  """
  for row in load('dars_schedule')['rows']:
    extra = lambda most, **kwargs: rewards.extra_rollouts(
      row['acc'], samples=row['N'], most=most, **kwargs
    )
    assert extra(32, hardness_weighted=False) == row['ET_nmax32']
    assert extra(64, hardness_weighted=True) == row['HW_nmax64']
    assert (
      extra(32, hardness_weighted=False, scaled=True) == row['ET_std_nmax32']
    )
    assert (
      extra(64, hardness_weighted=True, scaled=True) == row['HW_std_nmax64']
    )


def test_progress_improvement_and_parallel_rewards():
  """Law: MRT's progress, ExIt's reward and priorities, Parallel-R1.

  Mutants: an improvement reward below 0; the priority without its
  normalisation; the parallel bonus without a right format.
  """
  oracle = load('mrt_exit_parallel')
  mrt = oracle['mrt']
  success = array(mrt['J_after_block'])
  check(rewards.progress_bonus(success), mrt['progress'])
  check(
    mrt['alpha'] * rewards.progress_bonus(success),
    mrt['example_block_advantage'],
  )
  stored = array(list(oracle['exit']['group_returns'].values()))
  check(rewards.replay_probabilities(stored), oracle['exit']['sampling_prob'])
  check(rewards.replay_probabilities(stored * 0), np.full(4, 0.25))
  for row in oracle['exit']['improvement']:
    check(
      rewards.improvement_reward(array(row['new']), array(row['prev'])),
      row['reward'],
    )
  check(rewards.improvement_reward(array(1.0), array(1.0)), 0)
  for row in oracle['parallel_r1']:
    check(
      rewards.parallel_reward(
        jnp.asarray(row['correct'] > 0),
        jnp.asarray(row['format_ok'] > 0),
        jnp.asarray(row['n_parallel']),
      ),
      row['reward'],
    )


def test_majority_vote():
  """Law: TTRL's majority, its share of all samples, rewards and accuracy.

  Mutants: the share of the answered samples; None rewarded where nobody
  answered; ties to the last seen.
  """
  oracle = load('ttrl_echo')['ttrl']
  answers = oracle['answers']
  vote = pseudo_labels.majority_vote(answers)
  assert vote == (oracle['majority'], oracle['majority_ratio'])
  assert pseudo_labels.majority_rewards(answers) == oracle['rewards']
  truth = oracle['true_answer']
  assert float(vote.answer == truth) == oracle['label_accuracy']
  assert pseudo_labels.majority_vote([None, None]) == (None, 0.0)
  assert pseudo_labels.majority_rewards([None, None]) == [0.0, 0.0]
  assert pseudo_labels.majority_vote(['b', 'a', 'b', 'a']).answer == 'b'


def test_pass_at_k():
  """Law: the unbiased estimator for every row; pass@1 is the mean.

  Mutant: 1 - (1 - c / n)^k.
  """
  oracle = load('passk')
  for row in oracle['table']:
    check(metrics.pass_at_k(row['n'], row['c'], row['k']), row['pass_at_k'])
  data = oracle['dataset']
  correct = np.array(data['correct'])
  check(correct.mean(), data['avg_at_4'])
  for k in (1, 2, 4):
    found = np.mean([metrics.pass_at_k(4, int(sum(row)), k) for row in correct])
    check(found, data[f'pass_at_{k}'])


@pytest.mark.parametrize(
  'smooth, name', [(False, 'unsmoothed'), (True, 'add1_orders_ge2')]
)
def test_token_bleu(smooth, name):
  """Law: clipped counts and BLEU on padded ids, jitted and vmapped.

  Mutants: counts not clipped by the candidate's, or by the reference's; padding
  counted; the brevity penalty upside down.
  """
  rows = load('token_bleu')['rows']
  pad = lambda ids: np.array(ids + [7] * (8 - len(ids)), np.int32)
  padded = {
    key: jnp.asarray([pad(row[key]) for row in rows])
    for key in ('candidate', 'reference')
  }
  lengths = {
    key: jnp.asarray([len(row[key]) for row in rows])
    for key in ('candidate', 'reference')
  }
  arrays = (
    padded['candidate'],
    lengths['candidate'],
    padded['reference'],
    lengths['reference'],
  )
  found = jax.jit(
    jax.vmap(lambda *x: token_bleu.token_bleu(*x, smooth=smooth))
  )(*arrays)
  check(found, [row[name]['bleu'] for row in rows])
  matches, totals = jax.vmap(
    lambda *x: token_bleu.clipped_matches(*x, orders=4)
  )(*arrays)
  check(
    jnp.stack([matches, totals], axis=-1),
    [row[name]['clipped_counts'] for row in rows],
  )
  # More in the reference than in the candidate: 7 1 against 7 7.
  ids = lambda *x: jnp.asarray(x, jnp.int32)
  two = jnp.asarray(2)
  matches, _ = token_bleu.clipped_matches(
    ids(7, 1), two, ids(7, 7), two, orders=1
  )
  check(matches, [1])
