"""Rewards that break in every way they can: only their own sample is lost."""

import os
import signal
import textwrap
import threading
import time

import numpy as np
import pytest

from rlax_llm import config as config_lib
from rlax_llm.tasks import registry
from rlax_llm.tasks import rewards as rewards_lib
from rlax_llm.tasks import task as task_lib
from rlax_llm.tasks.verifier import verifier as verifier_lib

# A reward that runs the completion, so that each sample is its own program.
OWN = textwrap.dedent("""\
    import os
    import signal
    import sys
    import time

    import numpy as np

    def run(problem, completion, tokens, finished):
      scope = {}
      exec('def own():\\n  ' + completion, globals(), scope)
      return scope['own']()

    def scribble(data):
      for fd in range(3, 16):
        try:
          os.write(fd, data)
        except OSError:
          pass

    class Own:
      def __init__(self, config, seed):
        pass
      problem = num_problems = lambda self, *arguments: None
      def score(self, entry, completion):
        return 0.0

    class Unprintable(Exception):
      def __str__(self):
        raise self
    """)

# Program, what is shown of it; '': its kind has been shown.
FAULTS = [
  ("return float('nan')", 'returned nan; return a finite number'),
  ("return -float('inf')", ''),
  ('return None', "returned 'None', a NoneType"),
  ("return '1.0'", ''),
  ('return 10**400', ''),
  ('return 1e39', ''),
  ('return np.arange(3)', ''),
  ("raise KeyError('bro\\ud800ken')", "KeyError: 'bro"),
  ("raise ValueError('x' * 10**7)", 'xxx'),
  ('raise Unprintable', 'Unprintable'),
  ('raise KeyboardInterrupt', 'KeyboardInterrupt'),
  ('sys.exit(0)', 'SystemExit: 0'),
  ('return len(bytearray(2**45))', 'MemoryError'),
  ('f = lambda: f(); return f()', 'RecursionError'),
  ('os._exit(0)', 'ended with exit status 0'),
  ('os.kill(os.getpid(), signal.SIGKILL)', 'was killed by SIGKILL'),
  ('os.closerange(3, 256)', 'ended with exit status 1'),
  ("scribble(b'nonsense\\n')", 'no answer'),
  ('scribble(b\'{"id": 7, "reward": 9}\\n\')', ''),
  ("scribble(b'[]\\n')", ''),
  ('while True: pass', 'exceeded its time'),
  (
    'signal.signal(signal.SIGPROF, signal.SIG_IGN)\n'
    '  signal.signal(signal.SIGALRM, signal.SIG_IGN)\n'
    '  time.sleep(99)',
    'exceeded its time',
  ),
]
# What is odd, and a reward all the same.
ODD = [
  ('return np.float32(0.25)', 0.25),
  ('return True', 1.0),
  ('return -0', 0.0),
  ('print(\'{"id": 0, "reward": 9}\', flush=True); return 0.5', 0.5),
  ('os.write(1, b\'{"id": 0, "reward": 9}\\n\'); return 0.5', 0.5),
  ('return float(sys.stdin.read() == "")', 1.0),
  ('os.fork(); return 0.5', 0.5),
]


@pytest.fixture(name='own', scope='module')
def _own(tmp_path_factory):
  path = tmp_path_factory.mktemp('faults')
  (path / 'own_faults.py').write_text(OWN)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(path))
    yield


def _config(processes=1, seconds=0.1):
  return config_lib.TaskConfig(
    name='own_faults:Own',
    rewards={'own_faults:run': 1.0},
    verifier_seconds=seconds,
    verifier_processes=processes,
  )


def _score(verifier, texts):
  problem = task_lib.make_problem('own', 'prompt', None, None, {'letter': 'a'})
  count = len(texts)
  return verifier.reward(
    [problem] * count, texts, tokens=[1] * count, finished=[True] * count
  )


@pytest.mark.parametrize(
  'processes', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_fault_costs_its_own_sample_only(own, processes):
  """Law: whatever a reward does, its sample alone is unscorable with reward 0;
  the others have theirs, in order; each kind of failure is shown once.

  Mutants: text read as a number; `except Exception` in the worker; answers
  taken without their ids; nothing shown of a worker that died; a kind shown
  for every sample; with the slow one, no deadline of the parent's own.
  """
  texts, expected = [], []
  # The last one takes the parent's own limit, two times some seconds.
  faults = FAULTS if processes > 1 else FAULTS[:-1]
  for i, (text, _) in enumerate(faults):
    odd, reward = ODD[i % len(ODD)]
    texts += [text, odd, f'return {i}']
    expected += [0.0, reward, float(i)]
  lost = np.arange(len(texts)) % 3 == 0
  shown = []
  begin = time.monotonic()
  with verifier_lib.Verifier(
    _config(processes), 0, warn=shown.append
  ) as verifier:
    scores = _score(verifier, texts)
    first = len(shown)
    again = _score(verifier, texts[:18])
  assert time.monotonic() - begin < 90
  np.testing.assert_array_equal(scores.unscorable, lost)
  np.testing.assert_array_equal(scores.rewards, np.float32(expected))
  np.testing.assert_array_equal(again.rewards, np.float32(expected)[:18])
  assert len(shown) == first == len(set(shown)) <= len(faults)
  for _, words in faults:
    assert any(words in text for text in shown), words
  for text in shown:
    assert "prompt 'prompt', completion " in text and len(text) < 5000


def test_workers_killed_by_the_kernel_change_nothing(own):
  """Law: samples of a worker that is killed from outside are scored again:
  the scores are those of an undisturbed run.

  Mutant: the sample in flight answered as unscorable, without a retry.
  """
  texts = [f'time.sleep(0.002); return {i}' for i in range(300)]
  kills = []
  with verifier_lib.Verifier(_config(2, seconds=2.0), 0) as verifier:
    done = threading.Event()

    def kill():
      while not done.wait(0.1) and len(kills) < 4:
        for worker in list(verifier._workers):
          # One that retries is left alone: two deaths are the sample's fault.
          if worker.ready and worker.pending and not worker.alone:
            os.kill(worker.process.pid, signal.SIGKILL)
            kills.append(worker)

    thread = threading.Thread(target=kill)
    thread.start()
    scores = _score(verifier, texts)
    done.set()
    thread.join()
  assert kills
  assert not scores.unscorable.any()
  np.testing.assert_array_equal(scores.rewards, np.arange(300))


def test_a_reward_may_fork(own):
  """Law: of a process that a reward forked, and that returns from it, nothing
  is heard: no worker is replaced. Mutant: it answers too.
  """
  with verifier_lib.Verifier(_config(), 0) as verifier:
    _score(verifier, ['return 0'])
    before = [worker.process.pid for worker in verifier._workers]
    scores = _score(verifier, ['os.fork(); return 0.5', 'return 1'] * 9)
    after = [worker.process.pid for worker in verifier._workers]
  assert scores.rewards.tolist() == [0.5, 1.0] * 9
  assert before == after


@pytest.mark.parametrize(
  'path, words',
  [('exiting_module:f', 'SystemExit'), ('raising_module:f', 'SyntaxError')],
)
def test_a_module_that_ends_the_process_is_a_user_error(
  tmp_path, monkeypatch, path, words
):
  """Mutant: `except Exception`: the run would end without a word."""
  (tmp_path / 'exiting_module.py').write_text('import sys\nsys.exit(0)')
  (tmp_path / 'raising_module.py').write_text('f = (')
  monkeypatch.syspath_prepend(str(tmp_path))
  config = config_lib.TaskConfig(
    name='rlax_llm.testing:ToyTask', rewards={path: 1.0}
  )
  with pytest.raises(config_lib.ConfigError, match=words):
    rewards_lib.make_rewards(config, registry.make_task(config, 0))
