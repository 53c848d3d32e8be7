"""Several processes: what they exchange, and runs of two of them."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import process_task
import pytest

from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.drafting import store as store_module
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.store import corpus_texts
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.runtime import processes
from rlax_llm.runtime.launch import Launch
from rlax_llm.types import Request
from rlax_llm.types import Rollout
from rlax_llm.types import TRAIN
from rlax_llm.workdir import checkpoint

HERE = pathlib.Path(__file__).parent
THREE = dict(coordinator='host:1234', processes=3, process=2)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(distributed=True), '--coordinator=host:1234 says otherwise'),
    (dict(coordinator=None), '--processes, --process without --coordinator'),
    (dict(processes=None), 'without --processes'),
    (dict(process=None), 'without --process;'),
    (dict(coordinator='host'), '--coordinator=host is not HOST:PORT'),
    (dict(coordinator='host:99999'), '--coordinator=host:99999 is not'),
    (dict(processes=0), '--processes=0 must be at least 1'),
    (dict(process=3), '--process=3 is not one of --processes=3'),
    (dict(process=-1), '--process=-1 is not one of --processes=3'),
  ],
)
def test_wrong_flags_are_refused(changes, words):
  """Contradictions, gaps and ranges; 0 is a value, not a gap.

  Mutants: `process <= processes`; a value is missing if it is falsy.
  """
  Launch(**THREE | dict(process=0)).check()
  Launch(distributed=True).check()
  with pytest.raises(ConfigError) as e:
    Launch(**THREE | changes).check()
  assert words in str(e.value)


def _command(module, *arguments):
  return [sys.executable, '-m', f'rlax_llm.{module}', *arguments]


def _environment(devices, **variables):
  return {
    **os.environ,
    'PYTHONPATH': ':'.join([str(HERE.parent), str(HERE), *sys.path]),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    **variables,
  }


@pytest.mark.parametrize(
  'module, flag, words',
  [
    ('train', '--process=1', '--process without --coordinator, --processes'),
    ('train', '--distributed', 'the processes cannot be joined'),
    ('sample', '--distributed', 'this program runs in one process'),
  ],
)
def test_programs_refuse_in_one_line(tmp_path, module, flag, words):
  """Mutants: `run` does not join; sample takes the flags and ignores them."""
  arguments = [flag, f'--workdir={tmp_path}/run']
  if module == 'train':
    arguments.append(f'--config={process_task.__file__}')
  environment = _environment(8)
  for name in [n for n in environment if n.startswith(('SLURM', 'OMPI'))]:
    del environment[name]
  done = subprocess.run(
    _command(module, *arguments),
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2
  lines = done.stderr.splitlines()
  assert len(lines) == 1 and words in lines[0] and lines[0][:7] == 'error: '


def test_what_is_exchanged_comes_back():
  """JSON types and arrays of any dtype and shape, bit for bit.

  Mutant: the shape is not sent.
  """
  value = {
    'a': [1, None, 'é\udcff', 0.1],
    'b': np.array([[1.5, -0.0], [np.inf, 2**-149]], np.float32),
    'c': [np.zeros((0, 3), np.int32), np.array(7, np.uint8)],
  }
  # pylint: disable=protected-access
  got = processes._decode(processes._encode(value))
  assert got['a'] == value['a']
  for left, right in zip([got['b'], *got['c']], [value['b'], *value['c']]):
    assert left.dtype == right.dtype and left.shape == right.shape
    assert left.tobytes() == right.tobytes()
  assert processes.gather('x') == ['x'] and processes.broadcast('x') == 'x'
  assert processes.share(lambda part: [2 * i for i in part], [1, 2]) == [2, 4]


def _stores(parts):
  return [
    RolloutStore(history=3, megabytes=1, tokenizer='t', part=(i, parts))
    for i in range(parts)
  ]


def test_parts_of_a_store_are_the_store():
  """Each prompt is kept in one part, and what the parts find together is what
  one store finds; what parts have dumped can be restored in any other number.

  Mutants: every part keeps every prompt; `merge` is not called; `restore`
  forgets the hints of the part before.
  """
  requests = [
    Request(np.asarray(p, np.int32), 2, TRAIN, 1, i)
    for i, p in enumerate([[1], [2], [3, 1], [4], [5, 5], [6]])
  ]
  shape = CorpusShape(history=3, group=2, hints=2, prompts=6, capacity=8)

  def fill(stores):
    for store in stores:
      for i, request in enumerate(requests):
        for tokens in ([i], [i, i], [7, i]):
          tokens = np.asarray(tokens, np.int32)
          store.add(
            [
              Rollout(
                tokens, len(tokens), True, tokens, tokens, tokens, 1, request, 0
              )
            ]
          )
        store.add_hint(request, i % 2, np.asarray([i, 2, 1], np.int32))
    return stores

  def texts(stores):
    # pylint: disable=protected-access
    find = store_module._completions
    found = [text for s in stores for text in find(s, requests, shape)]
    return corpus_texts(stores[0], requests, 6, shape, merge=lambda _: found)

  whole, thirds = fill(_stores(1)), fill(_stores(3))
  assert [len(s) for s in thirds] != [6] * 3 and all(map(len, thirds))
  assert sum(map(len, thirds)) == 6
  for want, got in zip(texts(whole), texts(thirds)):
    np.testing.assert_array_equal(got, want)
  again = _stores(2)
  for store in again:
    for third in thirds:
      store.restore(third.dump())
  assert sum(map(len, again)) == 6
  for want, got in zip(texts(whole), texts(again)):
    np.testing.assert_array_equal(got, want)


def _train(workdir, count, *, slurm=False, seconds=900, **variables):
  """Runs the train command in processes; returns what each came to.

  Args:
    workdir: of the run.
    count: processes; they have 8 devices together.
    slurm: they find each other as SLURM says.
    seconds: after which they are killed.
    **variables: of the environment of the last one.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  started = []
  for i in range(count):
    arguments = [f'--config={process_task.__file__}', f'--workdir={workdir}']
    environment = _environment(
      8 // count, **(variables if i == count - 1 else {})
    )
    if slurm:
      arguments.append('--distributed')
      environment |= {
        'SLURM_JOB_ID': str(port),
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_NTASKS': str(count),
        'SLURM_PROCID': str(i),
        'SLURM_LOCALID': str(i),
      }
    elif count > 1:
      arguments += [
        f'--coordinator=localhost:{port}',
        f'--processes={count}',
        f'--process={i}',
      ]
    started.append(
      subprocess.Popen(
        _command('train', *arguments),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  try:
    ended = []
    for process in started:
      out, err = process.communicate(timeout=seconds)
      # gloo writes of its connections.
      lines = [line for line in err.splitlines() if 'Gloo' not in line]
      ended.append((process.returncode, out, lines))
    return ended
  finally:
    for process in started:
      process.kill()
      process.communicate()


def _prompts(host):
  """Returns how many prompts each part of the store has in a checkpoint."""
  sizes = []
  for text in host['rollouts']:
    store = RolloutStore(
      history=8,
      megabytes=1,
      tokenizer=process_task.get_config().model.tokenizer,
    )
    store.restore(text)
    sizes.append(len(store))
  return sizes


def _restore(workdir, step):
  run = make_run(process_task.get_config())
  with checkpoint.Checkpoints(workdir) as saved:
    _, states, host = saved.restore(run.states.abstract_all(), step=step)
  return states['policy'], host


@pytest.fixture(name='runs', scope='module')
def _runs(tmp_path_factory):
  """Two steps of one process with 8 devices, and of two with 4 each."""
  folders = {}
  for count in (1, 2):
    folders[count] = tmp_path_factory.mktemp('runs') / str(count)
    for code, _, lines in _train(folders[count], count):
      assert code == 0, lines
  return folders


def _distance(want, got):
  flat = lambda tree: np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )
  want, got = flat(want), flat(got)
  assert np.linalg.norm(want) > 0
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(runs):
  """The same command: the tokens of step 1 are equal, its gradient (Adam's
  first moment, of one step) and the parameters agree to 1e-5.

  Rewards are computed in two halves, the width is chosen by clocks and
  parameters lie on devices of both.

  Mutant: `share` joins the results part by part, not in turns.
  """
  states, hosts = zip(*[_restore(runs[count], 1) for count in (1, 2)])
  want, got = [host['progression'] for host in hosts]
  assert want['tokens_sampled'] > 0
  for name in ('tokens_sha256', 'reward_first', 'accuracy_before'):
    assert want[name] == got[name], name
  moments = [
    part.mu
    for state in states
    for part in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: hasattr(x, 'mu')
    )
    if hasattr(part, 'mu')
  ]
  assert _distance(*moments) < 1e-5
  assert _distance(*[state.params for state in states]) < 1e-5


@pytest.mark.slow
def test_files_are_written_once_and_the_store_in_parts(runs):
  """One line for each step, one manifest; each prompt in one part.

  Mutant: the checkpoint keeps the first part of the store only.
  """
  for count, folder in runs.items():
    steps = lambda name: [
      json.loads(line)['step']
      for line in (folder / name).read_text().splitlines()
    ]
    assert steps('metrics.jsonl') == [1, 2]
    assert steps('evaluations.jsonl') == [0, 2]
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert [run['processes'] for run in manifest['runs']] == [count]
    _, host = _restore(folder, 2)
    sizes = _prompts(host)
    assert len(sizes) == count and sum(sizes) == 4 and min(sizes) > 0


@pytest.mark.slow
def test_one_process_continues_the_run_of_two(runs, tmp_path):
  """From the checkpoint of two after step 1, one process ends as one process
  ends alone, past rollouts of both parts in hand.

  Mutant: `share` joins the results part by part, not in turns.
  """
  folder = tmp_path / 'run'
  shutil.copytree(runs[2], folder)
  shutil.rmtree(folder / 'checkpoints' / '2')
  ((code, _, lines),) = _train(folder, 1)
  assert code == 0 and any('after step 1' in line for line in lines), lines
  want, got = (
    json.loads((f / 'summary.json').read_text()) for f in (runs[1], folder)
  )
  for name in ('steps', 'tokens_sha256', 'reward_last', 'accuracy_after'):
    assert want[name] == got[name], name
  _, host = _restore(folder, 2)
  assert _prompts(host) == [4]


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_ends_all(runs, tmp_path):
  """Law: all processes use the same checkpoint, or all of them end soon.

  Mutant: outcomes exchanged after a restore that waits for every process.
  """
  folder = tmp_path / 'run'
  shutil.copytree(runs[2], folder)
  ended = _train(folder, 2, seconds=200, UNREADABLE='host')
  assert [code for code, *_ in ended] == [1, 1]
  assert all(
    any('cannot be read' in line for line in lines) for _, _, lines in ended
  ), ended


@pytest.mark.slow
def test_a_failure_ends_all(tmp_path):
  """A reward that cannot be computed in process 1 ends process 0 as well,
  in one line. They find each other by the environment.

  Mutant: nothing watches for the failure of others.
  """
  (code, _, lines), (other, _, trace) = _train(
    tmp_path / 'run', 2, slurm=True, seconds=400, REWARD_FAILS='1'
  )
  assert code == 1 and other == 1
  errors = [line for line in lines if line.startswith('error: ')]
  assert len(errors) == 1 and lines[-1] == errors[0]
  assert 'process 1 of 2 failed: RuntimeError' in errors[0]
  assert 'there is no room' in errors[0]
  assert not any('Traceback' in line for line in lines[:-1])
  assert any('there is no room' in line for line in trace)
