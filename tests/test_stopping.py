"""Signals, locks, health checks: how a run stops, and what it warns of."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

from config_helpers import train_quietly
import file_helpers
import jax
from jax._src import array as jax_array
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm import testing
from rlax_llm import train as training
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import LearningConfig
from rlax_llm.runtime import executables
from rlax_llm.runtime import monitor
from rlax_llm.runtime.stopping import Diverged
from rlax_llm.runtime.stopping import Stopped
from rlax_llm.workdir.lock import lock_workdir
from rlax_llm.workdir.progress import Progress

VALUES = (
  'tokens_sha256',
  'parameters_sha256',
  'reward_last',
  'accuracy_before',
  'accuracy_after',
)


def _config(**learning):
  config = testing.tiny_config()
  config.mesh.data = 1
  config.num_steps = 3
  config.evaluate.every = 2
  config.checkpoint.every = 2
  for name, value in learning.items():
    setattr(config.learning, name, value)
  return config


def _train(folder, clock=time.perf_counter, **options):
  shown = io.StringIO()
  learning = options.pop('learning', {})
  summary = train_quietly(
    _config(**learning), folder, clock=clock, display=Progress(shown), **options
  )
  return summary, shown.getvalue()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that nothing disturbed: (folder, summary)."""
  folder = tmp_path_factory.mktemp('whole')
  return folder, _train(folder)[0]


def _signalling(calls, number=signal.SIGTERM):
  """A clock that sends this process a signal at its n-th reading."""
  left = [calls]

  def clock():
    left[0] -= 1
    if left[0] == 0:
      os.kill(os.getpid(), number)
    return time.perf_counter()

  return clock


def _same(folder, summary, whole):
  for name in VALUES:
    assert summary[name] == whole[1][name], name
  for name in ('metrics.jsonl', 'evaluations.jsonl', 'samples.jsonl'):
    got = (pathlib.Path(folder) / name).read_bytes()
    assert got == (whole[0] / name).read_bytes(), name


@pytest.mark.slow
def test_a_signal_anywhere_changes_no_bit(whole, tmp_path):
  """Law: SIGTERM at any reading of the clock ends in a saved state from which
  the run goes on, to the same files and parameters, byte for byte.

  Mutants: an evaluation that was given up not made again; `check` after the
  update instead of before.
  """
  readings = [0]

  def counting():
    readings[0] += 1
    return time.perf_counter()

  _train(tmp_path / 'count', clock=counting)
  stops = 0
  for i, calls in enumerate(np.linspace(30, 0.9 * readings[0], 5).astype(int)):
    folder = tmp_path / str(i)
    number = (signal.SIGTERM, signal.SIGINT)[i % 2]
    before = signal.getsignal(number)
    try:
      _train(folder, clock=_signalling(int(calls), number))
    except Stopped as error:
      assert str(error) == signal.Signals(number).name
      stops += 1
    assert signal.getsignal(number) is before
    summary, _ = _train(folder)
    _same(folder, summary, whole)
  assert stops == 5


def test_a_stopped_command_says_how_to_go_on(tmp_path):
  """Law: SIGTERM to the command: exit code 0 and one line; a second signal
  ends it at once.

  Mutant: `Stopped` not caught in `main`.
  """
  (tmp_path / 'c.py').write_text(
    'from rlax_llm import testing\n'
    'def get_config():\n'
    '  config = testing.tiny_config()\n'
    '  config.mesh.data = 1\n'
    '  config.num_steps = 100000\n'
    '  return config\n'
  )
  command = [
    sys.executable,
    '-m',
    'rlax_llm.train',
    f'--config={tmp_path / "c.py"}',
    f'--workdir={tmp_path / "run"}',
  ]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  ) as process:
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
      assert process.poll() is None
      time.sleep(0.05)
    refused = subprocess.run(
      command, capture_output=True, text=True, check=False
    )
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  assert 'SIGTERM: stopped; the state after step ' in out
  assert 'the same command continues' in out
  assert refused.returncode == 2
  assert f'is in use by process {process.pid}' in refused.stderr
  steps = [int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  rows = [json.loads(r) for r in metrics.read_text().splitlines()]
  assert max(steps) == rows[-1]['step']


def test_the_second_signal_ends_the_process():
  """Mutant: the second signal noted like the first."""
  code = (
    'import os, signal\n'
    'from rlax_llm.runtime.stopping import StopRequest\n'
    'with StopRequest():\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  print("alive", flush=True)\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
    '  print("still alive", flush=True)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=False
  )
  assert done.returncode == 128 + signal.SIGINT
  assert done.stdout == 'alive\n'


def test_a_killed_process_frees_its_lock(tmp_path):
  """Law: one run to a workdir; SIGKILL frees it.

  Mutant: a lock file whose existence is the lock.
  """
  code = (
    'import sys, time\n'
    'from rlax_llm.workdir.lock import lock_workdir\n'
    'with lock_workdir(sys.argv[1]):\n'
    '  print("held", flush=True)\n'
    '  time.sleep(60)\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match=f'in use by process {process.pid}'):
      with lock_workdir(tmp_path):
        pass
    process.kill()
  with lock_workdir(tmp_path):
    pass


def test_updates_that_are_not_finite_are_skipped(tmp_path):
  """Law: parameters stay as they are; after `most_skipped` updates in a row
  the run stops, its state saved.

  Mutant: `keep` returns the new values.
  """
  learning = {'learning_rate': 1e30, 'max_grad_norm': 1e30, 'most_skipped': 2}
  with pytest.raises(Diverged, match='2 updates in a row were not finite'):
    _train(tmp_path, learning=learning)
  rows = [
    json.loads(r)
    for r in (tmp_path / 'metrics.jsonl').read_text().split('\n')
    if r
  ]
  assert [r['learning/skipped'] for r in rows] == [0, 1, 1]
  states = make_run(_config(**learning)).states
  two, three = (
    file_helpers.read_states(states, str(tmp_path), i)[1]['policy']
    for i in (2, 3)
  )
  assert (two.step, three.step) == (2, 3)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(three.params))
  jax.tree.map(
    np.testing.assert_array_equal,
    (two.params, two.opt_state),
    (three.params, three.opt_state),
  )


def _health(**learning):
  lines = []
  pool = executables.ExecutablePool(time.perf_counter)
  config = freeze(LearningConfig(**learning))
  return monitor.HealthMonitor(pool, config, lines.append), lines, pool


def _values(**changes):
  values = {
    'learning/skipped': 0.0,
    'learning/loss': 1.0,
    'learning/grad_norm': 1.0,
    'policy/behaviour_gap_max': 1e-5,
  }
  return values | {k.replace('__', '/'): v for k, v in changes.items()}


def test_the_monitor_is_silent_until_something_is_wrong():
  """Mutants: `_skipped` not reset; the gap's limit that of bfloat16; NaN below
  the limit; programs of the pool counted as leaks."""
  health, lines, pool = _health(most_skipped=2)
  bad = _values(learning__skipped=1.0, learning__loss=float('nan'))
  health.check(1, _values())
  health.check(2, bad)
  health.check(3, _values())
  assert len(lines) == 1 and 'step 2: the update was skipped' in lines[0]
  health.check(4, bad)
  assert not health.abort_reason
  health.check(5, bad)
  assert 'learning.most_skipped=2' in health.abort_reason
  lines.clear()
  health.check(6, _values(policy__behaviour_gap_max=0.02))
  assert len(lines) == 1 and 'policy/behaviour_gap_max is 0.02' in lines[0]
  health.check(6, _values(policy__behaviour_gap_max=float('nan')))
  assert len(lines) == 2 and 'policy/behaviour_gap_max is nan' in lines[1]
  lines.clear()
  health.check_sampling('step 6', '')
  assert not lines
  health.check_sampling('step 6', '3 samples')
  assert lines == ['warning: step 6: 3 samples']
  lines.clear()
  pool(('a',), lambda x: x * 3.5, np.float32(2))
  health.check(7, _values())
  assert not lines
  jax.jit(lambda x: x * 4.5)(np.float32(2))
  health.check(8, _values())
  assert len(lines) == 1 and 'compiled outside of the pool' in lines[0]


def test_no_surprises():
  """Mutant: an empty `no_surprises`."""
  with jax.numpy_rank_promotion('allow'):
    assert (jnp.ones((2, 3)) + jnp.ones(3)).shape == (2, 3)
    with monitor.no_surprises():
      with pytest.raises(ValueError, match='rank'):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_a_step_reads_the_device_explicitly(tmp_path, monkeypatch):
  """Law: `jax.device_get` is the only way by which a step reads the device.

  The transfer guard does not see conversions on CPU: they are watched here.
  Mutant: `np.asarray(advantages)` of a jax array.
  """
  seen = []
  inside = [False]
  real_step = training.train_step

  def step(*args):
    inside[0] = True
    try:
      return real_step(*args)
    finally:
      inside[0] = False

  explicit = types.SimpleNamespace(on=False)
  real_get = jax.device_get

  def get(x):
    explicit.on = True
    try:
      return real_get(x)
    finally:
      explicit.on = False

  def watch(name):
    method = getattr(jax_array.ArrayImpl, name)

    def watched(self, *args, **kwargs):
      if inside[0] and not explicit.on:
        seen.append(name)
      return method(self, *args, **kwargs)

    monkeypatch.setattr(jax_array.ArrayImpl, name, watched)

  for name in (
    '__array__',
    '__float__',
    '__int__',
    '__index__',
    '__bool__',
    'item',
    'tolist',
  ):
    watch(name)
  monkeypatch.setattr(training, 'train_step', step)
  monkeypatch.setattr(jax, 'device_get', get)
  _train(tmp_path)
  assert not seen


def test_a_trace_is_written(tmp_path, whole):
  """Law: `profile` writes a trace and changes no bit; steps that lie behind
  the run are left out.

  Mutant: the trace stopped at the first step whatever the range.
  """
  folder = tmp_path / 'run'
  summary, _ = _train(folder, profile=(2, 9))
  _same(folder, summary, whole)
  assert list((folder / 'profile').rglob('*.xplane.pb'))
  shutil.rmtree(folder / 'profile')
  _train(folder, profile=(2, 3))
  assert not (folder / 'profile').exists()
