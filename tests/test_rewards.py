"""Rewards: by hand, weighted, of the user's own, and in a run."""

import itertools
import json
import textwrap

from config_helpers import train_quietly
import numpy as np
import pytest

from rlax_llm import config as config_lib
from rlax_llm import testing
from rlax_llm.config import validation
from rlax_llm.tasks import registry
from rlax_llm.tasks import rewards as rewards_lib
from rlax_llm.tasks.verifier import verifier as verifier_lib
from rlax_llm.workdir import metric_names

OWN = textwrap.dedent('''\
    import os

    def ends(problem, completion, tokens, finished):
      """What it is given, as digits."""
      assert problem.prompt and problem.answer and problem.source == 'own'
      return problem.entry['index'] + 0.1 * len(completion) + 100 * tokens + (
          1000 * finished)

    def broken(problem, completion, tokens, finished):
      if completion == 'nan':
        return float('nan')
      if completion == 'none':
        return None
      if completion == 'raise':
        raise KeyError('no such rubric')
      if completion == 'spin':
        while True:
          pass
      if completion == 'exit':
        os._exit(1)
      return 0.25

    def reports(problem, completion, tokens, finished):
      import numpy as np
      from rlax_llm.tasks.task import Score
      metrics = {
          'plain': {'words': 2, 'by/kind': np.float32(0.5), 'flag': True},
          'some': {'words': 4.0},
          'nothing': {},
          'nan': {'words': float('nan'), 'kept': 1.0},
          'inf': {'words': float('inf')},
          'text': {'words': '7'},
          'name': {'two words': 1.0, 'kept': 3.0},
          'long': {'x' * 101: 1.0},
          'key': {3: 1.0},
          'list': [1.0],
          'twice': {'length': 1.0},
      }[completion]
      return Score(0.5, metrics)

    def also(problem, completion, tokens, finished):
      from rlax_llm.tasks.task import Score
      return Score(0.0, {'length': 9.0})

    def narrow(problem, completion):
      return 0.0

    number = 3

    class Own:
      def __init__(self, config, seed):
        pass

      def problem(self, split, index):
        from rlax_llm.tasks import task
        return task.make_problem('own', f'{split} {index}', 'ok', None,
                                 {'index': index})

      def num_problems(self, split):
        return None

      def score(self, entry, completion):
        return float('<answer>ok</answer>' in completion)
    ''')


@pytest.fixture(name='own', scope='module')
def _own(tmp_path_factory):
  path = tmp_path_factory.mktemp('rewards')
  (path / 'own_rewards.py').write_text(OWN)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(path))
    yield


def own_config(**changes):
  return config_lib.TaskConfig(
    **{'name': 'own_rewards:Own', 'verifier_seconds': 0.3, **changes}
  )


def make(config):
  return rewards_lib.make_rewards(config, registry.make_task(config, 0))


def problems_of(config, count):
  task = registry.make_task(config, 0)
  return [task.problem('train', i) for i in range(count)]


# ---- Each by hand --------------------------------------------------------


@pytest.mark.parametrize(
  'tokens, reward',
  [
    (0, 0.0),
    (16384, 0.0),
    (16385, -1 / 4096),
    (18432, -0.5),
    (20479, -4095 / 4096),
    (20480, -1.0),
    (99999, -1.0),
  ],
)
def test_soft_overlong_punishment_by_hand(tokens, reward):
  """The paper's L_max = 20480 and L_cache = 4096.

  Mutants: divided by L_max; the sign; no floor at -1.
  """
  assert rewards_lib.soft_overlong(tokens, 20480, 4096) == reward


def test_format_does_not_look_at_the_answer(own):
  """Mutant: `format` as 1.0 for the right answer."""
  config = own_config(rewards={'correct': 1.0, 'format': 0.5})
  rewards, problem = make(config), problems_of(config, 1)[0]
  totals = [
    rewards(problem, text, 9, True)
    for text in (
      '<answer>ok</answer>',
      '<answer>no</answer>',
      'ok',
      '<answer></answer>',
    )
  ]
  assert [found.total for found in totals] == [1.5, 0.5, 0.0, 0.0]
  assert totals[1].parts == {'correct': 0.0, 'format': 1.0}


def test_the_sum_does_not_depend_on_the_order(own):
  """Mutant: `sum`, whose rounding depends on the order of the names."""
  weights = {
    'correct': 0.1,
    'format': 1e16,
    'length': 1e16,
    'own_rewards:ends': 0.3,
  }
  totals = set()
  for names in itertools.permutations(weights):
    config = own_config(
      rewards={name: weights[name] for name in names},
      length_limit=4,
      length_cache=1,
    )
    total, parts, metrics, faults = make(config)(
      problems_of(config, 1)[0], '<answer>ok</answer>', 7, True
    )
    assert (metrics, faults) == ({}, {})
    assert (parts['format'], parts['length']) == (1.0, -1.0)
    totals.add(total)
  assert totals == {0.1 + 0.3 * (1.9 + 700 + 1000)}


# ---- In the workers ------------------------------------------------------


def test_the_default_is_the_verifier_alone(own):
  """Law: with {'correct': 1.0} a reward is the task's score, bit for bit.

  Mutant: `only_correct` with a weight of 2.
  """
  config = own_config()
  texts = ['<answer>ok</answer>', 'no', 'x<answer>ok</answer>']
  problems = problems_of(config, 3)
  with verifier_lib.Verifier(config, 0) as verifier:
    scores = verifier.score(problems, texts)
    rewards = verifier.reward(
      problems, texts, tokens=[1, 2, 3], finished=[True] * 3
    )
  assert scores.rewards.tolist() == rewards.rewards.tolist() == [1, 0, 1]
  assert list(rewards.parts) == list(scores.parts) == ['correct']
  assert rewards.parts['correct'].tolist() == [1, 0, 1]


def test_weights_and_own_rewards(own):
  """Law: reward = sum of weight * part, part by part and sample by sample;

  `score` stays the verifier's alone.

  Mutants: tokens or ends of another sample; unweighted parts; `correct` not
  logged without a weight of its own.
  """
  weights = {'format': 0.5, 'length': 2.0, 'own_rewards:ends': -0.25}
  config = own_config(
    rewards=weights, length_limit=10, length_cache=4, verifier_processes=2
  )
  rng = np.random.default_rng(0)
  count = 200
  tokens = rng.integers(0, 15, count)
  finished = rng.integers(0, 2, count).astype(bool)
  texts = [
    ('<answer>ok</answer>' if i % 3 else '') + 'x' * (i % 5)
    for i in range(count)
  ]
  problems = problems_of(config, count)
  with verifier_lib.Verifier(config, 0) as verifier:
    scores = verifier.reward(problems, texts, tokens=tokens, finished=finished)
    alone = verifier.score(problems, texts)
  right = np.array([float(i % 3 > 0) for i in range(count)])
  expected = {
    'correct': right,
    'format': right,
    'length': np.clip((6 - tokens) / 4, -1, 0),
    'own_rewards:ends': np.arange(count)
    + 0.1 * np.array([len(t) for t in texts])
    + 100 * tokens
    + 1000 * finished,
  }
  assert set(scores.parts) == set(expected)
  for name, values in expected.items():
    np.testing.assert_array_equal(
      scores.parts[name], values.astype(np.float32), err_msg=name
    )
  total = sum(weight * expected[name] for name, weight in weights.items())
  np.testing.assert_allclose(scores.rewards, total, rtol=1e-6)
  assert scores.rewards.dtype == np.float32
  np.testing.assert_array_equal(alone.rewards, right)


def test_own_rewards_that_break_cost_their_sample_only(own):
  """Mutant: NaN passed on, which makes NaN of every parameter."""
  config = own_config(rewards={'correct': 1.0, 'own_rewards:broken': 1.0})
  bad = ['nan', 'none', 'raise', 'spin', 'exit']
  texts = ['fine', *bad, '<answer>ok</answer>']
  count = len(texts)
  shown = []
  with verifier_lib.Verifier(config, 0, warn=shown.append) as verifier:
    scores = verifier.reward(
      problems_of(config, count),
      texts,
      tokens=[1] * count,
      finished=[True] * count,
    )
  assert scores.unscorable.tolist() == [False] + [True] * 5 + [False]
  assert scores.rewards.tolist() == [0.25] + [0.0] * 5 + [1.25]
  assert scores.parts['own_rewards:broken'].tolist() == (
    [0.25] + [0.0] * 5 + [0.25]
  )
  assert "'own_rewards:broken' returned nan; return a finite" in shown[0]


def test_metrics_beside_a_reward(own):
  """Law: a reward may be a `Score`: its metrics reach the caller as they are,
  through the workers; one that cannot be logged is left out alone, with one
  warning of a kind, and the reward stands.

  Mutants: the sample unscorable; metrics of the sample before it; all metrics
  of a sample left out for one.
  """
  config = own_config(
    rewards={'own_rewards:reports': 1.0, 'own_rewards:also': 1.0}
  )
  texts = [
    'plain',
    'some',
    'nothing',
    'nan',
    'inf',
    'text',
    'name',
    'long',
    'key',
    'list',
    'twice',
    'plain',
  ]
  count = len(texts)
  shown = []
  problems = problems_of(config, count)
  with verifier_lib.Verifier(config, 0, warn=shown.append) as verifier:
    for _ in range(2):
      scores = verifier.reward(
        problems, texts, tokens=[1] * count, finished=[True] * count
      )
      assert scores.rewards.tolist() == [0.5] * count
      assert not scores.unscorable.any()
      plain = {'words': 2.0, 'by/kind': 0.5, 'flag': 1.0}
      wanted = [
        plain,
        {'words': 4.0},
        {},
        {'kept': 1.0},
        {},
        {},
        {'kept': 3.0},
        {},
        {},
        {},
        {'length': 1.0},
        plain,
      ]
      also = [{'length': 9.0}] * (count - 2) + [{}, {'length': 9.0}]
      assert list(scores.metrics) == [a | b for a, b in zip(wanted, also)]
    # The task's own score alone has no metrics of other rewards.
    assert verifier.score(problems, texts).metrics == [{}] * count
  kinds = (
    "the metric 'words' of reward 'own_rewards:reports' returned nan",
    "'two words'",
    "the metrics '[1.0]', a list",
    "the metric 'length', as another",
  )
  assert len(shown) == len(kinds)
  for words in kinds:
    assert sum(words in line for line in shown) == 1, words


def test_means_of_own_metrics():
  """Law: the mean over the samples that have it, whatever their order, under a
  name of the vocabulary; a training value.

  Mutants: over all samples; `sum`, whose rounding depends on the order.
  """
  samples = [
    {'a/b': 1.0},
    {},
    {'a/b': 2.0, 'c': 1e16},
    {'c': 1.0},
    {'c': -1e16},
  ]
  wanted = {'user/a/b': 1.5, 'user/c': 1 / 3}
  for order in itertools.permutations(samples):
    assert metric_names.user_means(order) == wanted
  assert list(metric_names.user_means(samples[:1], evaluated=True)) == [
    'evaluate/user/a/b'
  ]
  for name in ('user/a/b', 'user/x-1.y'):
    assert metric_names.describe(name).kind == 'training'
  of_evaluation = metric_names.describe('evaluate/accuracy').kind
  assert metric_names.describe('evaluate/user/a').kind == of_evaluation
  for name in (
    'user/',
    'user/a b',
    'user//a',
    'user/a/',
    'user/é',
    'users/a',
    'user/' + 'x' * 101,
    'evaluate/user/',
  ):
    with pytest.raises(ValueError, match='not in the vocabulary'):
      metric_names.describe(name)


def test_lengths_of_another_batch(own):
  with verifier_lib.Verifier(own_config(), 0) as verifier:
    with pytest.raises(ValueError, match='1 completions, 2 lengths'):
      verifier.reward([], ['x'], tokens=[1, 2], finished=[True])


def test_a_punishment_no_completion_can_reach_is_refused():
  config = testing.tiny_config()
  config.task.rewards = {'correct': 1.0, 'length': 1.0}
  config.task.length_limit, config.task.length_cache = 10, 2
  with pytest.raises(
    config_lib.ConfigError,
    match='leaves 8 tokens unpunished, all of rollout.max_new_tokens=8',
  ):
    validation.validate(config)
  config.task.length_cache = 3
  validation.validate(config)


def test_names_of_own_rewards_are_in_the_vocabulary():
  """Mutant: any name behind 'reward/', which takes in typing errors."""
  entry = metric_names.describe('reward/my.module:brevity')
  assert entry.kind == 'training' and 'my.module:brevity' in entry.meaning
  for name in rewards_lib.BUILT_IN:
    assert metric_names.describe(f'reward/{name}').kind == 'training'
  for name in ('reward/brevity', 'reward/a:', 'reward/:b', 'reward/a:b:c'):
    with pytest.raises(ValueError, match='not in the vocabulary'):
      metric_names.describe(name)


# ---- A run ---------------------------------------------------------------


def test_a_run_logs_every_reward(tmp_path):
  """Law: reward/mean is the weighted sum of the parts' means, and the lengths
  punished are those of rollout/length_mean, in tokens. What the task's score
  reports is logged too, of training and of evaluation.

  Mutants: lengths in characters, EOS left out; parts times their weights; the
  metrics of a group not passed on; those of an evaluation left out.
  """
  weights = {'correct': 2.0, 'length': 0.5}
  config = testing.tiny_config()
  config.mesh.data, config.num_steps = 1, 1
  config.task.rewards = weights
  config.task.length_limit, config.task.length_cache = 8, 7
  config.task.name = 'process_task:Reporting'
  train_quietly(config, tmp_path)
  rows = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  row = json.loads(rows[-1])
  expected = sum(w * row[f'reward/{name}'] for name, w in weights.items())
  assert row['reward/mean'] == pytest.approx(expected, abs=1e-6)
  assert row['reward/length'] == pytest.approx(
    (1 - row['rollout/length_mean']) / 7, abs=1e-6
  )
  assert row['reward/length'] < 0 < row['reward/correct']
  # What the task reports is the letters of every prompt's first sample.
  assert row['user/letters'] == pytest.approx(
    row['rollout/length_mean'] - 1, abs=1.01
  )
  evaluation, *_ = (tmp_path / 'evaluations.jsonl').read_text().splitlines()
  assert 0 < json.loads(evaluation)['evaluate/user/letters'] <= 8
