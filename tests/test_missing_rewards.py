"""Samples that the verifier could not judge: they move nothing."""

import dataclasses
import functools
import math
import types

from config_helpers import tiny_config
from config_helpers import train_quietly
from group_helpers import collect
from group_helpers import make_group
from group_helpers import ScriptedVerifier
import jax
import jax.numpy as jnp
from learning_helpers import make_learner
from learning_helpers import make_state
from learning_helpers import random_samples
from learning_helpers import sharp_params
from learning_helpers import tiny_run
import numpy as np
import pytest

from rlax_llm.components import make_run
from rlax_llm.experience import advantages
from rlax_llm.experience import progress_rewards
from rlax_llm.experience import step_metrics
from rlax_llm.experience.pruning import Pruner
from rlax_llm.learning import estimators
from rlax_llm.learning import token_credit
from rlax_llm.learning.presets import PRESETS
from rlax_llm.learning.quality_head import QualityHead
from rlax_llm.ops import batch_advantages
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.types import TrainState
from rlax_llm.workdir.metrics import read_jsonl
from rlax_llm.workdir.run_statistics import RunStatistics


# ---- Estimators --------------------------------------------------------------
def _estimate(name, rewards, lengths, correctness, known, parts=None):
  if name in estimators.PART_ESTIMATORS:
    weights = jnp.asarray([1.0, 0.5])
    return np.asarray(estimators.PART_ESTIMATORS[name](parts, weights, known))
  return np.asarray(
    estimators.ESTIMATORS[name](rewards, lengths, correctness, known)
  )


def _random_groups(seed, shape=(5, 6)):
  """Returns arguments of an estimator, with two samples of a group missing."""
  rng = np.random.default_rng(seed)
  rewards = rng.normal(size=shape).astype(np.float32)
  rewards[1] = 0.3  # a group without signal
  lengths = rng.integers(1, 9, shape).astype(np.int32)
  correctness = rng.integers(0, 2, shape).astype(np.float32)
  parts = rng.normal(size=(2, *shape)).astype(np.float32)
  known = np.ones(shape, bool)
  for row in known:
    row[rng.permutation(shape[1])[:2]] = False
  return rewards, lengths, correctness, known, parts


NAMES = [*estimators.ESTIMATORS, *estimators.PART_ESTIMATORS]


@pytest.mark.parametrize('name', NAMES)
def test_statistics_are_those_of_the_known(name):
  """Law: known samples have the advantages that they have if the others were
  never sampled, whatever stands at those; the others have 0.

  Mutants: the mask not passed on by an estimator; a mean over all samples; the
  size of the group instead of the number of known samples.
  """
  rewards, lengths, correctness, known, parts = _random_groups(0)
  keep = lambda x: x[..., known].reshape(*x.shape[:-1], -1)
  want = _estimate(
    name, keep(rewards), keep(lengths), keep(correctness), None, keep(parts)
  )
  for garbage in (0, 1e9, math.nan):
    hide = lambda x: jnp.asarray(np.where(known, x, np.float32(garbage)))
    got = _estimate(
      name,
      hide(rewards),
      np.where(known, lengths, 99),
      hide(correctness),
      jnp.asarray(known),
      hide(parts),
    )
    np.testing.assert_allclose(keep(got), want, rtol=2e-5, atol=1e-6)
    assert not got[~known].any()
  # A mask that hides nothing is none.
  full = _estimate(name, rewards, lengths, correctness, known | True, parts)
  plain = _estimate(name, rewards, lengths, correctness, None, parts)
  np.testing.assert_allclose(full, plain, rtol=2e-5, atol=1e-6)


def test_missing_rewards_by_hand():
  """Law: of G = 4, three right and one missing: 0; one right and three missing:
  nothing is left to compare with; all missing: 0. A group that has one sample
  keeps its reward, if it is known.

  Mutants: missing taken as 0; a single known sample treated as a group of one.
  """
  known = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  rewards = known.astype(np.float32)
  lengths = np.full((3, 4), 5, np.int32)
  for name in estimators.ESTIMATORS:
    if name != 'outcome':
      found = _estimate(name, rewards, lengths, rewards, known)
      assert not found.any(), name
  by_part = jnp.stack([rewards, rewards])
  for name in estimators.PART_ESTIMATORS:
    assert not _estimate(name, None, None, None, known, by_part).any(), name
  for name in ('group_centred', 'leave_one_out', 'length_weighted', 'outcome'):
    one, lengths = np.float32([[0.7], [0.7]]), np.ones((2, 1), np.int32)
    found = _estimate(name, one, lengths, one, np.array([[True], [False]]))
    np.testing.assert_allclose(found, [[0.7], [0]])


def test_without_missing_rewards_the_program_is_the_plain_one():
  """Law: a step in which nothing is missing passes no mask; one with a missing
  reward runs a second program, for groups of every size.

  Mutant: a mask always.
  """
  run = make_run(tiny_config())
  keys = lambda: [k[-1] for k in run.pool.keys() if k[0] == 'advantages']
  plain = [make_group([1, 0, 1, 0]), make_group([1, 1, 0, 1])]
  advantages.advantages(run, plain)
  assert keys() == [True]
  lost = [make_group([1, 0, 1, 0], known=[1, 1, 1, 0]), plain[1]]
  found = advantages.advantages(run, lost)
  assert keys() == [True, False]
  np.testing.assert_allclose(
    found[0],
    [*advantages.advantages(run, [make_group([1, 0, 1])])[0], 0],
    rtol=1e-5,
  )
  np.testing.assert_array_equal(found[1], advantages.advantages(run, plain)[1])
  # Groups of different sizes, one of them with a missing reward.
  mixed = [make_group([1, 0, 1], known=[1, 1, 0]), make_group([1, 1, 0, 0])]
  found = advantages.advantages(run, mixed)
  np.testing.assert_allclose(found[0], [0.5**0.5, -(0.5**0.5), 0], rtol=1e-5)
  assert found[0].dtype == found[1].dtype == np.float32


def test_whitening_of_one_sample_and_of_none_is_zero():
  """Mutant: no bound below the number of samples less one."""
  known = np.array([[True, False], [False, False]])
  rewards, lengths = np.float32([[3, 9], [9, 9]]), np.ones((2, 2), np.int32)
  for mask in (known, known & False):
    found = batch_advantages.whitened_by_length(rewards, lengths, mask)
    assert not np.asarray(found).any()


# ---- The loss ----------------------------------------------------------------
@pytest.mark.parametrize('name', PRESETS)
def test_a_sample_without_a_reward_is_not_trained_on(name):
  """Law: whatever the filter, where the loss reads the verifier's rewards. A
  teacher's and a majority's objective read none: nothing is missing there.

  Mutants: the filter alone; every objective.
  """
  run = dataclasses.replace(tiny_run(), algorithm=PRESETS[name])
  parts = {'correct': np.float32([1, 0, 0, 0])}
  lost = np.array([False, False, False, True])
  labels = advantages.judge(
    run, ['a', 'b', 'b', 'b'], parts['correct'], lost, parts
  )
  group = make_group(**labels._asdict(), unscorable=lost)
  (trained,) = advantages.trained_samples(run, [group], np.zeros(1, bool))
  free = name in ('ttrl', 'echo', 'on_policy_distillation', 'effopd')
  assert trained.tolist() == [True, True, True, free]
  if name in ('ttrl', 'echo'):
    assert labels.rewards.tolist() == [0, 1, 1, 1] and labels.known.all()
    assert advantages.advantages(run, [group])[0][3] > 0


@pytest.mark.parametrize('name', ['grpo', 'ppo', 'vcpo', 'confucius3'])
def test_a_step_without_any_reward_has_a_zero_gradient(name):
  """Law: if nothing is known, nothing is trained on: the loss and its gradient
  are 0, and every metric is finite.

  Mutant: 0 / 0 of an empty batch.
  """
  run = tiny_run()
  algorithm = dataclasses.replace(
    PRESETS[name], kl_coefficient=0.1, divergence='k3'
  )
  learner = make_learner(run, algorithm)
  params = sharp_params(run)
  samples = [
    dataclasses.replace(s, advantage=0.0, trained=False, group=i // 4)
    for i, s in enumerate(random_samples(8))
  ]
  batch = learner.put(learner.pack(samples))
  batch = batch.replace(old_logprobs=jnp.zeros_like(batch.old_logprobs))
  if name == 'ppo':
    batch = batch.replace(extra={'values': jnp.zeros_like(batch.old_logprobs)})
  if name == 'vcpo':
    batch = batch.replace(
      extra={'squared_norms': jnp.zeros_like(batch.old_logprobs)}
    )
  if name == 'confucius3':
    batch = batch.replace(extra={'entropy': jnp.zeros_like(batch.old_logprobs)})
  shaped = token_credit.shape(batch, algorithm=algorithm)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(shaped.extra))
  assert not np.asarray(shaped.advantages).any()
  state, values = learner.update(make_state(run, params=params), shaped)
  assert values['learning/skipped'] == 0 == values['learning/loss']
  assert values['learning/grad_norm'] == 0
  assert all(np.isfinite(float(v)) for v in values.values())
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(state.opt_state))


def test_a_missing_reward_moves_with_the_permutation():
  """Law: the triples (reward, correctness, known) are a permutation of those
  before; the rewards are those of a shuffle of the rewards.

  Mutant: `known` left in its place.
  """
  rng = np.random.default_rng(0)
  groups = [
    make_group(
      rng.normal(size=4),
      correctness=rng.normal(size=4),
      known=rng.integers(0, 2, 4),
    )
    for _ in range(6)
  ]
  got = advantages.permuted(groups, 3, 5)
  triples = lambda groups: [
    x for g in groups for x in zip(g.rewards, g.correctness, g.known)
  ]
  assert triples(got) != triples(groups)
  assert sorted(triples(got)) == sorted(triples(groups))
  want = np.random.default_rng([3, 5]).permutation(
    np.concatenate([g.rewards for g in groups])
  )
  np.testing.assert_array_equal(np.concatenate([g.rewards for g in got]), want)
  for old, new in zip(groups, got):
    np.testing.assert_array_equal(old.unscorable, new.unscorable)


# ---- Metrics, rows and histories ---------------------------------------------
def test_metrics_are_of_what_is_known():
  """Law: by hand; a mean of nothing is NaN, a missing reward None.

  Mutants: 0 for each; parts averaged over all samples.
  """
  groups = [
    make_group([1, 0, 0], known=[1, 0, 1], parts={'format': [1, 0, 1]}),
    make_group([3, 0, 0], known=[1, 0, 0], parts={'format': [0, 0, 0]}),
  ]
  values = step_metrics.group_metrics(groups, 0)
  assert values['reward/mean'] == pytest.approx(4 / 3)
  assert values['reward/std'] == pytest.approx(np.std([1, 0, 3]))
  assert values['reward/format'] == pytest.approx(2 / 3)
  assert values['reward/groups_with_signal'] == 0.5
  assert values['reward/unscorable'] == 3
  rows = step_metrics.sample_rows(groups, [np.zeros(3)] * 2)
  assert [row['reward'] for row in rows] == [1, None, 0, 3, None, None]
  nothing = [make_group([0, 0], known=[0, 0], parts={'format': [0, 0]})]
  values = step_metrics.group_metrics(nothing, 0)
  for name in ('mean', 'std', 'format'):
    assert math.isnan(values[f'reward/{name}'])
  assert values['reward/groups_with_signal'] == 0
  found = RunStatistics()
  for mean in (math.nan, 0.25, math.nan):
    found = found.with_step([], mean)
  assert (found.reward_first, found.reward_last) == (0.25, None)


def test_votes_are_compared_with_what_was_judged():
  """Law: by hand. Mutants: what was not judged counted as wrong; a prompt whose
  voters were not judged counted as wrong.
  """
  run = dataclasses.replace(tiny_run(), algorithm=PRESETS['ttrl'])
  group = functools.partial(make_group, known=[1] * 4)
  truth = lambda *values: {'correct': values}
  groups = [
    group([1, 1, 0, 0], unscorable=[1, 0, 0, 0], parts=truth(0, 1, 0, 0)),
    group([1, 1, 0, 0], unscorable=[1, 1, 0, 0], parts=truth(0, 0, 0, 1)),
    group([0, 0, 0, 0], unscorable=[1, 1, 1, 1], parts=truth(0, 0, 0, 0)),
  ]
  values = advantages.label_metrics(run, groups)
  assert values['reward/label_accuracy'] == 0.5
  assert values['reward/label_agreement'] == 4 / 5
  values = advantages.label_metrics(run, groups[2:])
  assert math.isnan(values['reward/label_agreement'])


def test_accuracy_is_of_what_is_known():
  """Law: the mean over the known samples, by inverse survival; None of none.

  Mutant: over all samples.
  """
  group = make_group(
    [1, 0, 1, 0], known=[1, 0, 1, 1], survival=[0.5, 0.1, 1.0, 0.25]
  )
  assert group.accuracy == pytest.approx((2 + 1) / (2 + 1 + 4))
  assert make_group([0, 0], known=[0, 0]).accuracy is None
  assert not make_group([1, 1, 0], known=[1, 1, 0]).has_signal
  assert not make_group([0, 0], known=[0, 0]).has_signal
  assert make_group([1, 0, 0], known=[1, 1, 0]).has_signal


def _collector_config(**changes):
  return tiny_config(
    rollout__drafter='none',
    rollout__width=1,
    rollout__max_new_tokens=2,
    **changes,
  )


def test_dynamic_sampling_and_histories_pass_by_what_is_missing():
  """Law: groups of one known sample have no signal: the step refills as often
  as it may. An accuracy is that of the known samples; where none is known, the
  history stays as it was.

  Mutants: missing taken as 0; an accuracy of 0 noted of nothing.
  """
  config = _collector_config(
    control__dynamic_sampling=3, control__extra_samples=4
  )
  first = ScriptedVerifier(lambda i, n: (1.0, i % 4 > 0))
  run, collector, groups = collect(config, first)
  assert collector.metrics()['rollout/refills'] == 3
  known = collector.dump()['successes']['accuracies']
  assert set(known.values()) == {1.0}
  assert all(g.known.tolist() == [True, False, False, False] for g in groups)
  first.script = lambda i, n: (0.0, True)
  collect(config, first, collecting=collector, step=1)
  assert collector.dump()['successes']['accuracies'] == known
  record = collector.dump()
  _, again, _ = collect(config, first, steps=0)
  again.restore(record)
  assert again.dump() == record


def test_what_is_kept_comes_back_with_its_labels():
  """Law: groups that wait in a checkpoint have the labels that they had.

  Mutant: everything known after a restore.
  """
  config = _collector_config(control__staleness=1)
  verifier = ScriptedVerifier(lambda i, n: (float(i % 2), i % 3 == 0))
  _, collector, _ = collect(config, verifier)
  _, again, _ = collect(config, verifier, steps=0)
  again.restore(collector.dump())
  waiting, found = collector.buffer.queue[0], again.buffer.queue[0]
  assert any(not g.known.all() for g in waiting)
  for one, two in zip(waiting, found, strict=True):
    for name in ('rewards', 'correctness', 'known', 'unscorable'):
      np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_what_is_rehearsed_was_judged():
  """Law: of four samples two are missing, one of the others is right: the mean
  is 1/2, which is enough, and the right one is kept; of a problem of which
  nothing is known, none is.

  Mutants: the mean over all samples (1/4); `correct` read where it is missing.
  """
  config = _collector_config(
    algorithm__name='dph_forward_kl',
    algorithm__rehearsal_least=0.5,
    algorithm__rehearsal_prompts=2,
  )
  # The first problem's samples come first.
  verifier = ScriptedVerifier(
    lambda i, n: (float(i == 0), i in (1, 2) or i > 3)
  )
  _, collector, _ = collect(config, verifier)
  (kept,) = collector.buffer.rehearsal
  assert kept.correctness.tolist() == [1] and kept.known.all()


def test_the_head_learns_from_what_is_known():
  """Law: the head after a step is that of the known samples alone; of none, it
  stays, and its metrics are NaN.

  Mutants: labels of 0 for the missing; features of other samples.
  """
  run = make_run(
    tiny_config(control__prune_at=2, rollout__samples_per_prompt=4)
  )
  params = run.states.init_params()
  pruner, head = Pruner(run), QualityHead()
  lost = make_group(
    [1, 0, 0, 1], known=[1, 0, 1, 1], survival=[0.5, 0.1, 1, 0.9]
  )
  alone = lost.only(lost.known)
  got, values = pruner.learn(params, head, [lost])
  want, told = pruner.learn(params, head, [alone])
  for name, array in want.weights.items():
    np.testing.assert_allclose(got.weights[name], array, rtol=1e-5, atol=1e-8)
  np.testing.assert_allclose(got.counts, want.counts, rtol=1e-6)
  for name in ('success', 'kept_success', 'head_loss'):
    assert values[f'prune/{name}'] == pytest.approx(told[f'prune/{name}'])
  nothing = dataclasses.replace(lost, known=np.zeros(4, bool))
  same, values = pruner.learn(params, got, [nothing])
  assert same is got and math.isnan(values['prune/success'])


# ---- Judges of other texts ---------------------------------------------------
def test_a_forced_answer_that_was_not_judged_measures_nothing():
  """Law: J is the mean over the judged answers; an episode without any is one
  with the next; of none at all, the metric is NaN.

  Of four episodes of two tokens, the answers behind the second are missing.
  Mutants: a missing answer scored 0; the gain given to the first episode.
  """
  run = make_run(
    tiny_config(
      algorithm__name='mrt',
      algorithm__progress_tokens=2,
      algorithm__progress_samples=2,
      task__answer_format='after_equals',
      rollout__max_new_tokens=12,
      model__tokenizer='abcd=.',
    )
  )
  rollout = make_group([0], lengths=[8]).rollouts[0]
  group = dataclasses.replace(
    make_group([0.75], lengths=[8]),
    rollouts=(dataclasses.replace(rollout, tokens=np.arange(8) % 4 + 2),),
  )
  generate = lambda params, requests, state, **options: (
    [dataclasses.replace(rollout) for r in requests for _ in range(r.samples)],
    state,
  )

  def found(rewards, unscorable):
    score = lambda problems, texts: types.SimpleNamespace(
      rewards=np.float32(rewards), unscorable=np.array(unscorable)
    )
    forced = progress_rewards.ForcedAnswers(
      run,
      types.SimpleNamespace(generate=generate),
      types.SimpleNamespace(score=score),
    )
    return forced.progress((), [group], 3)

  (gains,), values = found(
    [0.5, 0, 0, 0, 0.25, 0.25], [False, True, True, True, False, False]
  )
  np.testing.assert_allclose(gains, [0, 0, *[0.25 - 0.5] * 4, 0.5, 0.5])
  assert values['reward/forced'] == pytest.approx((0.5 + 0.25) / 2)
  (gains,), values = found([0.0] * 6, [True] * 6)
  assert not gains.any() and len(gains) == 8
  assert math.isnan(values['reward/forced'])


def test_a_leap_is_judged_by_what_both_were_judged_on():
  """Law: a leap that is better only because the verifier failed on the others'
  answers is not; where nothing can be compared none is taken.

  W solves 2 of 2 judged, the leaps 2 of 3. Mutants: missing taken as wrong, by
  which the leap solves as many; NaN taken as equal.
  """
  run = dataclasses.replace(
    tiny_run(), algorithm=dataclasses.replace(PRESETS['effopd'], leaps=2)
  )
  params = {'a': jnp.ones(2)}
  state = TrainState(step=jnp.zeros(()), params=params, opt_state=())
  verdicts = []
  judge = lambda states, problems: verdicts.pop(0)
  judged = lambda correct, known: Judged(
    np.array([correct], bool) & np.array([known], bool), np.array([known], bool)
  )
  found = run.extrapolation(judge)
  states = {'policy': state, **found.init({'policy': state})}
  leap = judged([1, 0, 1], [1, 1, 1])
  verdicts[:] = [judged([1, 1, 0], [1, 1, 0]), leap, leap]
  _, values = found.before_step(1, states)
  assert values == {'learning/leap': 0.0, 'learning/leap_accuracy': 1.0}
  verdicts[:] = [judged([1, 0, 0], [1, 1, 0]), leap, leap]
  _, values = found.before_step(1, states)
  assert values['learning/leap'] == 2.0
  assert values['learning/leap_accuracy'] == pytest.approx(2 / 3)
  nothing = judged([0] * 3, [0] * 3)
  verdicts[:] = [nothing] * 3
  _, values = found.before_step(1, states)
  assert values['learning/leap'] == 0
  assert math.isnan(values['learning/leap_accuracy'])


def test_a_run_without_any_reward(tmp_path, monkeypatch):
  """Law: where every reward is missing a run goes on: no update is skipped,
  means of nothing are null, and evaluation counts what it could not judge.

  Mutant: 0 instead of null.
  """
  (tmp_path / 'no_reward.py').write_text(
    'from rlax_llm.testing import ToyTask\n'
    'class Task(ToyTask):\n'
    '  def score(self, entry, completion):\n'
    "    raise ValueError('no verdict')\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  config = tiny_config(
    num_steps=1,
    task__name='no_reward:Task',
    rollout__drafter='none',
    rollout__width=1,
  )
  summary = train_quietly(config, tmp_path / 'run')
  assert summary['reward_first'] is None is summary['reward_last']
  assert summary['accuracy_after'] == 0
  evaluations = read_jsonl(tmp_path / 'run' / 'evaluations.jsonl')
  assert [e['evaluate/unscorable'] for e in evaluations] == [2, 2]
  (row,) = read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
  assert row['reward/mean'] is None is row['reward/correct']
  assert row['reward/unscorable'] == 16
  assert row['learning/grad_norm'] == row['learning/skipped'] == 0
  assert row['learning/trained_fraction'] == 0
  rows = read_jsonl(tmp_path / 'run' / 'samples.jsonl')
  assert rows and all(r['reward'] is None for r in rows)
