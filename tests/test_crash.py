"""A run that is killed again and again ends with the bits of one that is not.

`pytest -m slow tests/test_crash.py --full` disturbs each run six times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

CONFIG = '''
from rlax_llm import testing


def get_config():
  """Forty steps with everything on whose state a checkpoint has to hold."""
  config = testing.tiny_config()
  config.mesh.data = 1
  config.num_steps = 40
  config.task.epoch_prompts = 2
  config.rollout.width = 0
  config.rollout.branching = 2
  config.control.widths = (1, 3)
  config.control.run_ahead_rows = 4
  config.learning.minibatches = 2
  config.algorithm.name = 'ppo'
  config.algorithm.correction = 'token'
  config.algorithm.weight_high = 2.0
  config.algorithm.kl_coefficient = 0.1
  config.control.over_provision = 1.5
  config.control.replay = 1
  config.control.order = 'longest_first'
  config.evaluate.every = 5
  config.checkpoint.every = 3
  return config
'''
VALUES = (
  'steps',
  'tokens_sampled',
  'tokens_sha256',
  'parameters_sha256',
  'reward_first',
  'reward_last',
  'accuracy_before',
  'accuracy_after',
)


def _start(folder, cache, *overrides):
  (folder / 'config.py').write_text(CONFIG)
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'rlax_llm.train',
      f'--config={folder / "config.py"}',
      f'--workdir={folder / "run"}',
      *overrides,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=cache,
  )


@pytest.fixture(name='cache', scope='module')
def _cache(tmp_path_factory):
  """The environment: compiled programs are kept between the starts."""
  folder = tmp_path_factory.mktemp('cache')
  return {
    **os.environ,
    'JAX_COMPILATION_CACHE_DIR': str(folder),
    'XLA_FLAGS': '',
  }


@pytest.fixture(name='whole', scope='module')
def _whole(tmp_path_factory, cache):
  """The run that nothing disturbs."""
  folder = tmp_path_factory.mktemp('whole')
  with _start(folder, cache) as process:
    out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  return folder / 'run'


def _steps(run):
  """Returns how many lines metrics.jsonl has."""
  path = run / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def _disturb(process, run, rng, number, writing):
  """Sends a signal a random while later; or in the middle of a save.

  Returns whether the process was still alive.
  """
  start, more = _steps(run), rng.randint(2, 9)
  pause = rng.random() * 0.5
  while process.poll() is None:
    if _steps(run) >= start + more:
      if not writing:
        time.sleep(pause)
        break
      if list((run / 'checkpoints').glob('*tmp*')):
        break
    time.sleep(0.001)
  alive = process.poll() is None
  process.send_signal(number)
  process.communicate()
  return alive


def _assert_same(run, whole):
  got, want = (
    json.loads((r / 'summary.json').read_text()) for r in (run, whole)
  )
  for name in VALUES:
    assert got[name] == want[name], name
  for name in ('metrics.jsonl', 'evaluations.jsonl', 'samples.jsonl'):
    assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, cache, whole, request):
  """Law: after SIGTERM or SIGKILL at random moments, the last one in the
  middle of a checkpoint, the same command continues; the files and parameters
  are bit-equal in the end.

  Mutant: a checkpoint that holds what its step still has to write.
  """
  rng = random.Random(0)
  faults = 6 if request.config.getoption('--full') else 2
  for sequence in range(3):
    folder = tmp_path / str(sequence)
    folder.mkdir()
    for fault in range(faults):
      last = fault + 1 == faults
      number = (
        signal.SIGKILL if last else rng.choice((signal.SIGTERM, signal.SIGKILL))
      )
      with _start(folder, cache) as process:
        _disturb(process, folder / 'run', rng, number, writing=last)
    with _start(folder, cache) as process:
      out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    _assert_same(folder / 'run', whole)


@pytest.mark.slow
def test_speculation_may_change_at_a_resume(tmp_path, cache, whole):
  """Law: killed, then continued without speculation: the same bits."""
  rng = random.Random(1)
  with _start(tmp_path, cache) as process:
    assert _disturb(
      process, tmp_path / 'run', rng, signal.SIGKILL, writing=False
    )
  with _start(
    tmp_path,
    cache,
    '--config.rollout.drafter=none',
    '--config.rollout.branching=1',
    '--config.control.run_ahead_rows=0',
  ) as process:
    out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  _assert_same(tmp_path / 'run', whole)
