"""Correctness decides signal, hardness and replay; rewards make advantages."""

import dataclasses

from config_helpers import tiny_config
from group_helpers import collect
from group_helpers import make_group
from group_helpers import ScriptedVerifier
from learning_helpers import tiny_run
import numpy as np
import pytest

from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.experience import advantages
from rlax_llm.experience import step_metrics
from rlax_llm.experience.pruning import Pruner
from rlax_llm.learning.presets import PRESETS
from rlax_llm.learning.quality_head import QualityHead

WRONG = lambda i, n: (0.0, False)


def _run(rewards, preset='grpo'):
  config = tiny_config(task__rewards=rewards)
  config.algorithm.name = preset
  if 'length' in rewards:
    config.task.length_limit, config.task.length_cache = 10, 3
  return make_run(config)


@pytest.mark.parametrize(
  'weights, preset, want',
  [
    ({'correct': 1.0, 'length': 0.5}, 'grpo', 'correct'),
    ({'correct': 0.1, 'length': 1.0}, 'grpo', 'correct'),
    ({'correct': 0.0, 'length': 1.0}, 'grpo', 'rewards'),
    ({'length': 1.0}, 'grpo', 'rewards'),
    ({'length': 1.0}, 'ttrl', 'votes'),
    ({'correct': 1.0, 'length': 0.5}, 'ttrl', 'votes'),
  ],
  ids=str,
)
def test_what_correctness_is(weights, preset, want):
  """Law: the reward `correct`; the weighted sum where it has no weight; the
  vote where labels are voted, whatever the verifier says.

  Mutants: the weighted sum always; `correct` without a weight; the truth beside
  votes.
  """
  run = _run(weights, preset)
  parts = {
    'correct': np.float32([1, 0, 1, 0]),
    'length': np.float32([-1, 0, 0, -0.5]),
  }
  rewards = np.float32([0.5, 0, 1, -0.25])
  lost = np.array([False, True, False, False])
  labels = advantages.judge(run, ['a', 'b', 'b', 'c'], rewards, lost, parts)
  votes = np.float32([0, 1, 1, 0])
  np.testing.assert_array_equal(
    labels.correctness,
    dict(correct=parts['correct'], rewards=rewards, votes=votes)[want],
  )
  np.testing.assert_array_equal(
    labels.rewards, votes if want == 'votes' else rewards
  )
  assert labels.known.tolist() == [True, want == 'votes', True, True]


def _config(**changes):
  return tiny_config(
    rollout__drafter='none',
    rollout__width=1,
    rollout__max_new_tokens=2,
    **changes,
  )


SHAPED = {'correct': 1.0, 'format': 1.0}


def _shaped(script, value, weight=1.0):
  return ScriptedVerifier(script, ('format', weight, value))


@pytest.mark.parametrize(
  'script, value, refills',
  [
    (WRONG, lambda i: i % 3, 3),
    (lambda i, n: (1.0, False), lambda i: i % 3, 3),
    (lambda i, n: (float(i % 2), False), lambda i: -(i % 2), 0),
  ],
  ids=['all wrong', 'all right', 'sums equal'],
)
def test_dynamic_sampling_goes_by_correctness(script, value, refills):
  """Law: groups that are all right or all wrong have no signal, however shaping
  spreads their rewards, and groups that differ have it, however shaping evens
  them out; replay takes the latter alone.

  Mutant: the weighted sum.
  """
  config = _config(
    control__dynamic_sampling=3,
    control__replay=2,
    task__rewards=SHAPED,
    task__answer_format='tag',
  )
  verifier = _shaped(script, value)
  _, collector, groups = collect(config, verifier)
  assert collector.metrics()['rollout/refills'] == refills
  want = float(refills == 0)
  assert (
    step_metrics.group_metrics(groups, 0)['reward/groups_with_signal'] == want
  )
  _, _, groups = collect(config, verifier, collecting=collector, step=1)
  assert sum(group.replayed for group in groups) == 2 * want


@pytest.mark.parametrize('bonus', [0.0, 0.6, -0.4])
def test_hard_prompts_are_hard_whatever_their_bonus(bonus):
  """Law: four prompts that are never solved get three more samples each, with
  any bonus.

  Mutant: the mean of the weighted sum, by which a bonus of 0.6 solves them.
  """
  config = _config(
    control__extra_samples=4, task__rewards=SHAPED, task__answer_format='tag'
  )
  verifier = _shaped(WRONG, lambda i: bonus)
  _, collector, _ = collect(config, verifier, steps=3)
  assert collector.metrics()['rollout/extra_samples'] == 12


def test_voted_labels_decide_without_the_verifier():
  """Law: with labels by majority, signal, hardness and replay are those of the
  votes: what the verifier says changes no group, failures included.

  Mutant: the verifier's rewards kept in groups.
  """
  config = _config(
    algorithm__name='ttrl',
    control__dynamic_sampling=2,
    control__replay=1,
    control__extra_samples=4,
  )
  seen = []
  for script in (
    WRONG,
    lambda i, n: (1.0, False),
    lambda i, n: (0.0, True),
    lambda i, n: (float(i % 2), False),
  ):
    _, collector, groups = collect(config, ScriptedVerifier(script), steps=3)
    assert all(group.known.all() for group in groups)
    seen.append(
      (
        collector.metrics()['rollout/refills'],
        collector.dump()['successes'],
        [(g.texts, g.replayed, g.rewards.tolist()) for g in groups],
      )
    )
  assert all(x == seen[0] for x in seen)
  assert any(replayed for _, replayed, _ in seen[0][2])


def test_filters_and_hardness_go_by_correctness():
  """Law: Confucius3 drops groups that are all right or all wrong, and weighs by
  the share that is right: 2 (R - mean R) (1.256 - 0.256 mean(2 C - 1)). GPG
  scales by the share of samples that are right.

  Mutants: hardness of the weighted sum; the filter by rewards; GPG by rewards.
  """
  run = dataclasses.replace(tiny_run(), algorithm=PRESETS['confucius3'])
  correct = [[1, 0, 0, 0], [0, 0, 0, 0]]
  shaped = np.float32(correct) + np.float32([0.5, 0.5, 0, -0.5])
  groups = [make_group(r, correctness=c) for r, c in zip(shaped, correct)]
  trained = advantages.trained_samples(run, groups, np.zeros(2, bool))
  assert [t.all() for t in trained] == [True, False]
  centred = shaped - shaped.mean(axis=1, keepdims=True)
  hardness = 1.256 - 0.256 * (2 * np.mean(correct, axis=1) - 1)
  np.testing.assert_allclose(
    advantages.advantages(run, groups),
    2 * centred * hardness[:, None],
    rtol=1e-5,
    atol=1e-6,
  )
  run = dataclasses.replace(run, algorithm=PRESETS['gpg'])
  np.testing.assert_allclose(
    advantages.advantages(run, groups), centred * 8, rtol=1e-5, atol=1e-6
  )


def test_the_head_predicts_success():
  """Law: a head is that of unshaped rewards, however they are shaped.

  Mutant: rewards as labels.
  """
  run = make_run(tiny_config(control__prune_at=2))
  pruner, params = Pruner(run), run.states.init_params()
  plain = make_group([1, 0, 0, 1])
  shaped = dataclasses.replace(plain, rewards=np.float32([0.4, 0.9, 0, 1]))
  (one, values), (two, more) = (
    pruner.learn(params, QualityHead(), [group]) for group in (plain, shaped)
  )
  assert values == more and values['prune/kept_success'] == 0.5
  for name, array in one.weights.items():
    np.testing.assert_array_equal(two.weights[name], array)


def test_what_is_rehearsed_is_right():
  """Law: the right samples, by correctness: not those whose bonus lifts a wrong
  answer to 1, and those whose punishment lowers a right one. Without a weight
  of `correct`, by the weighted sum.

  Mutants: the weighted sum always; `correct` always.
  """
  config = _config(
    algorithm__name='dph_forward_kl',
    algorithm__rehearsal_least=0.25,
    algorithm__rehearsal_prompts=1,
    task__rewards=SHAPED,
    task__answer_format='tag',
  )
  script = lambda i, n: (float(i == 0), False)
  shaping = lambda i: 1.0 if i in (1, 2) else -0.5
  _, collector, _ = collect(config, _shaped(script, shaping))
  (kept,) = collector.buffer.rehearsal
  assert [r.index for r in kept.rollouts] == [0]
  config.task.rewards = {'format': 1.0}
  verifier = _shaped(script, shaping)
  verifier.weight = 0.0
  _, collector, _ = collect(config, verifier)
  (kept,) = collector.buffer.rehearsal
  assert [r.index for r in kept.rollouts] == [1, 2]


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      dict(name='gdpo', labels='majority'),
      "advantage='reward_decoupled'.*labels='majority'.*use labels='verifier'",
    ),
    (
      dict(name='effopd', teacher='x', labels='majority'),
      "leaps=5 asks the verifier.*use labels='verifier'",
    ),
  ],
  ids=str,
)
def test_a_run_without_labels_reads_no_truth(changes, words):
  """Law: what would read the verifier beside voted labels is refused.

  Mutant: only `credit` and `rehearsal` looked at.
  """
  with pytest.raises(ConfigError, match=words):
    make_run(
      tiny_config(
        **{f'algorithm__{name}': value for name, value in changes.items()}
      )
    )


def test_permuted_signal_is_that_of_the_permuted_labels():
  """Law: with permuted rewards, the filter and the metric look at correctness
  where the permutation put it.

  Mutant: correctness left in its place.
  """
  run = make_run(
    tiny_config(algorithm__name='confucius3', task__permute_rewards=True)
  )
  groups = [make_group([1] * 4), make_group([0] * 4)]
  found = advantages.learned_groups(run, groups, 0)
  assert step_metrics.group_metrics(groups, 0)['reward/groups_with_signal'] == 0
  assert step_metrics.group_metrics(found, 0)['reward/groups_with_signal'] == 1
  trained = advantages.trained_samples(run, found, np.zeros(2, bool))
  assert all(t.all() for t in trained)
