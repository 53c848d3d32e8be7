"""The verifier: right answers, hostile answers, hangs and crashes."""

import dataclasses
import math
import os
import signal
import textwrap
import time

import numpy as np
import pytest
from reasoning_gym import factory

from rlax_llm import config as config_lib
from rlax_llm.tasks import registry
from rlax_llm.tasks import task as task_lib
from rlax_llm.tasks.reasoning_gym import task as reasoning_gym_task
from rlax_llm.tasks.verifier import verifier as verifier_lib

NAMES = sorted(set(factory.DATASETS) - {'composite'})
SLOW = (
  'knight_swap',
  'quantum_lock',
  'sokoban',
  'futoshiki',
  'zebra_puzzles',
  'sudoku',
  'intermediate_integration',
)
EVALUATING = (
  'countdown',
  'puzzle24',
  'simple_integration',
  'intermediate_integration',
  'polynomial_multiplication',
  'string_insertion',
  'spiral_matrix',
  'binary_matrix',
  'n_queens',
)


def tag(answer):
  return f'<answer>{answer}</answer>'


@pytest.fixture(scope='module')
def problems():
  """A few problems of every task, as a mixture of all of them has them."""
  made = {}
  for name in NAMES:
    task = reasoning_gym_task.ReasoningGymTask(
      config_lib.TaskConfig(name=name), seed=0
    )
    count = 1 if name in SLOW else 3
    made[name] = [
      dataclasses.replace(problem, entry={'task': name, 'entry': problem.entry})
      for problem in (task.problem('train', i) for i in range(count))
    ]
  return made


@pytest.fixture(scope='module')
def verifier():
  config = config_lib.TaskConfig(
    name='mixture', mixture={name: 1.0 for name in NAMES}, verifier_seconds=2.0
  )
  with verifier_lib.Verifier(config, seed=0) as made:
    yield made


def hostile_answers(path):
  touch = f'open({str(path)!r},"w")'
  return {
    'empty': '',
    'blank': ' \n ',
    'tower': '9**9**9**9',
    'spaced tower': '9 ** 9 ** 9 ** 9',
    'factorial': 'factorial(factorial(99))',
    'import': f'__import__("builtins").{touch}',
    'list import': f'[__import__("os").system("touch {path}")]',
    'lambda': f'(lambda: {touch})()',
    'comprehension': f'[{touch} for x in [1]]',
    'attribute': 'x.__class__.__mro__[1].__subclasses__()',
    'symbol call': 'Symbol("x").evalf(999999999)',
    'huge': '1' * 100_000,
    'huge letters': 'A' * 100_000,
    'huge words': 'a b ' * 25_000,
    'nested': '(' * 5000 + '1' + ')' * 5000,
    'nested lists': '[' * 5000 + ']' * 5000,
    'unicode digits': '４２',
    'nul': '1\0',
    'nan': 'NaN',
    'infinity': 'Infinity',
    'exponent': '1e999999999',
    'shift': '1<<99999999999',
    'json bomb': '{"a":' * 2000 + '1' + '}' * 2000,
    'minus': '-' * 3000 + '1',
    'surrogate': '\ud800',
    'markup': '<answer>' * 1000,
  }


def test_oracles_score_one(problems, verifier):
  """Mutants: items as bare JSON (arc_agi and rearc lose their tuples);

  guards too tight for the task's own answers.
  """
  samples = [
    p for group in problems.values() for p in group if p.answer is not None
  ]
  assert len({p.source for p in samples}) > 95
  scores = verifier.score(samples, ['So: ' + tag(p.answer) for p in samples])
  assert not scores.unscorable.any()
  wrong = {p.source for p, r in zip(samples, scores.rewards) if r != 1.0}
  assert not wrong


def test_hostile_answers_score_zero_and_run_no_code(
  problems, verifier, tmp_path
):
  """Mutant: `guard.admit` that returns True lets these run and hang."""
  path = tmp_path / 'executed'
  hostile = hostile_answers(path)
  samples, texts, labels = [], [], []
  for name, group in problems.items():
    for label, answer in hostile.items():
      samples.append(group[0])
      texts.append(tag(answer))
      labels.append((name, label))
    if group[0].answer is not None:
      for extra in (' and more', '+0*(__import__("os").getpid())'):
        samples.append(group[0])
        texts.append(tag(group[0].answer + extra))
        labels.append((name, extra))
  start = time.monotonic()
  scores = verifier.score(samples, texts)
  assert time.monotonic() - start < 60
  assert not path.exists()
  full = [label for label, r in zip(labels, scores.rewards) if r >= 1.0]
  assert not full
  hung = [label for label, u in zip(labels, scores.unscorable) if u]
  assert not [label for label in hung if label[0] in EVALUATING], hung
  # The workers still serve.
  alive = [group[0] for group in problems.values() if group[0].answer]
  again = verifier.score(alive, [tag(p.answer) for p in alive])
  assert (again.rewards == 1.0).all()


def test_evaluating_scorers_refuse_near_misses(problems, verifier):
  """What sympy would accept, or the scorers round to the target."""
  countdown = problems['countdown'][0]
  puzzle = problems['puzzle24'][0]
  metadata = countdown.entry['entry']['metadata']
  numbers = puzzle.entry['entry']['metadata']['numbers']
  other = '6*4*1*1' if sorted(numbers) != [1, 1, 4, 6] else '8*3*1*1'
  cases = [
    (countdown, str(metadata['target'])),
    (countdown, f'{countdown.answer} = {metadata["target"]}'),
    (countdown, f'{countdown.answer}+0.001'),
    (countdown, f'Max({countdown.answer}, 0)'),
    (puzzle, other),
    (puzzle, f'{puzzle.answer}+0/5'),
    (
      problems['intermediate_integration'][0],
      f'Integral({_integrand(problems["intermediate_integration"][0])}, x)',
    ),
    (problems['simple_integration'][0], '(9)**99'),
    (problems['polynomial_multiplication'][0], '((x)**99)**99'),
  ]
  scores = verifier.score([p for p, _ in cases], [tag(a) for _, a in cases])
  assert not scores.rewards.any()
  assert not scores.unscorable.any()


def _integrand(problem):
  return problem.entry['entry']['metadata']['integrand']


# ---- Tasks of the user's own --------------------------------------------

OWN_TASK = textwrap.dedent("""\
    import os
    import sys
    import time
    from rlax_llm.tasks import task

    class Own:
      def __init__(self, config, seed):
        self.options = config.options

      def problem(self, split, index):
        return task.make_problem('own', f'{split} {index}', 'ok', None,
                                 {'index': index})

      def num_problems(self, split):
        return None

      def score(self, entry, completion):
        print('noise on standard output', flush=True)
        os.write(1, b'{"index": 0, "reward": 9}\\n')
        assert sys.stdin.read() == ''
        if completion == 'spin':
          while True:
            pass
        if completion == 'sleep':
          time.sleep(100)
        if completion == 'exit':
          os._exit(0)
        if completion == 'sys.exit':
          sys.exit(3)
        if completion == 'raise':
          raise KeyError('broken verifier')
        if completion == 'nan':
          return float('nan')
        if completion == 'memory':
          return len(bytearray(2**40))
        if completion == 'once':  # crashes the first time only
          path = self.options['path']
          if not os.path.exists(path):
            open(path, 'w').close()
            os._exit(1)
        return entry['index'] + 0.5

    class Broken:
      def __init__(self, config, seed):
        raise OSError('no such service')
      problem = score = num_problems = lambda self: None

    class Lacking:
      def problem(self, split, index):
        pass
    """)


@pytest.fixture(scope='module')
def own_module(tmp_path_factory):
  path = tmp_path_factory.mktemp('own')
  (path / 'own_task_module.py').write_text(OWN_TASK)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(path))
    yield path


def own_config(own_module, **changes):
  values = {
    'name': 'own_task_module:Own',
    'verifier_seconds': 0.2,
    'options': {'path': str(own_module / 'crashed')},
  }
  return config_lib.TaskConfig(**{**values, **changes})


@pytest.mark.parametrize('processes', [1, 2])
def test_hangs_and_crashes_cost_only_themselves(own_module, processes, capfd):
  """Mutants: no retry ('once' is lost); the crash blamed on a neighbour;

  answers placed by order of arrival.
  """
  config = own_config(own_module, verifier_processes=processes)
  (own_module / 'crashed').unlink(missing_ok=True)
  task = registry.make_task(config, 0)
  bad = {
    3: 'spin',
    40: 'exit',
    41: 'exit',
    50: 'once',
    60: 'raise',
    61: 'nan',
    62: 'memory',
    63: 'sys.exit',
  }
  if processes == 2:
    bad[7] = 'sleep'
  count = 80
  samples = [task.problem('train', i) for i in range(count)]
  texts = [bad.get(i, 'fine') for i in range(count)]
  with verifier_lib.Verifier(config, 0) as verifier:
    start = time.monotonic()
    scores = verifier.score(samples, texts)
    assert time.monotonic() - start < 30
    again = verifier.score(samples[:5], ['fine'] * 5)
  lost = np.array([bad.get(i, 'once') != 'once' for i in range(count)])
  np.testing.assert_array_equal(scores.unscorable, lost)
  expected = np.where(lost, 0.0, np.arange(count) + 0.5)
  np.testing.assert_array_equal(scores.rewards, expected.astype(np.float32))
  np.testing.assert_array_equal(again.rewards, np.arange(5) + 0.5)
  assert scores.rewards.dtype == np.float32
  assert scores.unscorable.dtype == np.bool_
  # The first traceback, once.
  assert capfd.readouterr().err.count("KeyError: 'broken") == 1


def test_worker_killed_between_calls_is_replaced(own_module):
  config = own_config(own_module)
  problem = registry.make_task(config, 0).problem('train', 1)
  with verifier_lib.Verifier(config, 0) as verifier:
    assert verifier.score([problem], ['fine']).rewards[0] == 1.5
    for worker in verifier._workers:  # pylint: disable=protected-access
      os.kill(worker.process.pid, signal.SIGKILL)
    scores = verifier.score([problem] * 9, ['fine'] * 9)
    assert (scores.rewards == 1.5).all() and not scores.unscorable.any()


def test_many_long_completions_do_not_deadlock(own_module):
  """Mutant: blocking writes: both ends wait for the other to read."""
  config = own_config(own_module, verifier_processes=2)
  problem = registry.make_task(config, 0).problem('train', 2)
  with verifier_lib.Verifier(config, 0) as verifier:
    scores = verifier.score([problem] * 2000, ['é' * 20_000] * 2000)
  assert (scores.rewards == 2.5).all()


def test_workers_end_with_close_and_with_their_input(own_module):
  config = own_config(own_module, verifier_processes=2)
  verifier = verifier_lib.Verifier(config, 0)
  # pylint: disable-next=protected-access
  first, second = [worker.process for worker in verifier._workers]
  # What a dead parent leaves behind: the end of input.
  first.stdin.close()
  assert first.wait(20) is not None
  verifier.close()
  assert second.poll() is not None
  with pytest.raises(RuntimeError, match='closed'):
    verifier.score([], [])


def test_worker_that_cannot_start(own_module):
  config = own_config(own_module, name='own_task_module:Broken')
  problem = task_lib.make_problem('own', 'p', None, None, {})
  with verifier_lib.Verifier(config, 0) as verifier:
    with pytest.raises(RuntimeError, match='no such service'):
      verifier.score([problem], ['x'])


def test_empty_batch_and_lengths(own_module):
  with verifier_lib.Verifier(own_config(own_module), 0) as verifier:
    assert verifier.score([], []).rewards.shape == (0,)
    with pytest.raises(ValueError, match='0 problems and 1 completions'):
      verifier.score([], ['x'])


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'verifier_processes': 0}, 'task.verifier_processes=0'),
    ({'verifier_seconds': 0.0}, 'task.verifier_seconds=0.0'),
    ({'verifier_seconds': math.nan}, 'task.verifier_seconds=nan'),
  ],
)
def test_bad_limits(changes, words):
  config = config_lib.TaskConfig(**changes)
  with pytest.raises(ValueError, match=words):
    verifier_lib.Verifier(config, 0)


@pytest.mark.parametrize(
  'name, words',
  [
    ('own_task_module:Lacking', 'lacks score, num_problems'),
    ('own_task_module:Absent', 'cannot be imported'),
    ('no_such_module:Own', 'PYTHONPATH'),
  ],
)
def test_bad_import_paths(own_module, name, words):
  with pytest.raises(ValueError, match=words):
    registry.make_task(config_lib.TaskConfig(name=name), 0)
