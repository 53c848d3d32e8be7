"""Full disks, read-only folders, lost and torn files: stop whole, or go on."""

import errno
import json
import os
import pathlib
import sys
import tempfile

import file_helpers
import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm import testing
from rlax_llm.config import ConfigError
from rlax_llm.config import to_dict
from rlax_llm.runtime import files
from rlax_llm.runtime import flags
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metrics
from rlax_llm.workdir.checkpoint import Checkpoints


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_written_wholly_or_not_at_all(tmp_path):
  """Law: a full disk leaves whole lines; with room again the file goes on.

  Mutant: what was written of a line stays.
  """
  path = tmp_path / 'lines'
  file = files.JsonlFile(path)
  file.write('a' * 10)
  with file_helpers.room(16):
    with pytest.raises(files.WriteError) as error:
      file.write('b' * 10)
  assert path.read_text() == 'a' * 10 + '\n'
  file.write('c')
  file.close()
  assert path.read_text() == 'a' * 10 + '\nc\n'
  message = str(error.value)
  assert str(path) in message and os.strerror(errno.EFBIG) in message
  assert 'run the same command again' in message and '\n' not in message


def test_a_device_that_is_full(tmp_path):
  """Law: ENOSPC is the same one line, also from close.

  Mutant: a buffered file, whose close tries again and raises again.
  """
  (tmp_path / 'timing.jsonl').symlink_to('/dev/full')
  with pytest.raises(files.WriteError, match='No space left on device'):
    with metrics.MetricsWriter(
      tmp_path, resume_step=None, run_id='a'
    ) as writer:
      writer.write(1, {'reward/mean': 1.0, 'time/step': 1.0})
  assert _lines(tmp_path / 'metrics.jsonl') == [{'step': 1, 'reward/mean': 1.0}]


def test_atomic_writing_keeps_the_old_content(tmp_path):
  """Law: old content stays, and nothing beside it.

  Mutants: the file itself is opened; the temporary file stays.
  """
  path = tmp_path / 'summary.json'
  files.write_atomic(path, 'old')
  with file_helpers.room(100):
    with pytest.raises(files.WriteError, match='summary.json cannot be writ'):
      files.write_atomic(path, 'n' * 1000)
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_folder(tmp_path):
  """Law: one line that names the folder. Mutant: PermissionError passed on."""
  # All of pytest's own folders are closed to others.
  parent = pathlib.Path(tempfile.mkdtemp(dir=tmp_path.parents[2]))
  parent.chmod(0o755)
  folder = parent / 'run'
  folder.mkdir(mode=0o555)
  config = to_dict(testing.tiny_config())
  with file_helpers.unprivileged():
    with pytest.raises(ConfigError, match='--workdir=.*run.*Permission denied'):
      manifest.write_manifest(folder, config, run_id='a')
    with pytest.raises(files.WriteError, match='Permission denied'):
      metrics.MetricsWriter(folder, resume_step=None, run_id='a')
    with pytest.raises(files.WriteError, match='cannot be written'):
      with Checkpoints(folder) as saved:
        saved.save(1, {'policy': {'w': np.zeros(3)}}, {})
  assert not list(folder.iterdir())
  folder.rmdir()
  parent.rmdir()


def _board_in_the_way(folder):
  (folder / 'tensorboard').write_text('')


def _board_is_full(folder):
  (folder / 'tensorboard').mkdir()


@pytest.mark.parametrize('make', [_board_in_the_way, _board_is_full])
def test_a_run_goes_on_without_tensorboard(tmp_path, make):
  """Law: the event file is a copy: one warning, and every metric is written.

  Mutant: tensorboardX's SummaryWriter, whose thread dies and leaves `write`
  waiting for ever.
  """
  make(tmp_path)
  warnings = []
  limit = 300 if make is _board_is_full else 10**6
  with file_helpers.room(limit):
    with metrics.MetricsWriter(
      tmp_path, resume_step=None, run_id='a', warn=warnings.append
    ) as writer:
      for step in range(1, 9):
        writer.write(step, {'reward/mean': 1.0})
  assert [row['step'] for row in _lines(tmp_path / 'metrics.jsonl')] == list(
    range(1, 9)
  )
  (line,) = warnings
  assert 'TensorBoard' in line and 'the .jsonl files have everything' in line


def test_a_deleted_event_file_is_not_missed(tmp_path):
  """Law: as above, for a folder that is cleaned up under the run."""
  with metrics.MetricsWriter(tmp_path, resume_step=None, run_id='a') as writer:
    writer.write(1, {'reward/mean': 1.0})
    for path in (tmp_path / 'tensorboard').iterdir():
      path.unlink()
    writer.write(2, {'reward/mean': 1.0})
  assert len(_lines(tmp_path / 'metrics.jsonl')) == 2


def test_a_checkpoint_that_does_not_fit(tmp_path):
  """Law: one line; the checkpoint before it is whole, is what a restore finds,
  and with room again the run goes on.

  Mutant: what Orbax raises passed on.
  """
  noise = np.random.default_rng(0).normal(size=2**14)
  states = {'policy': {'w': jnp.float32(noise)}}
  host = {'cursor': 1}
  with Checkpoints(tmp_path, keep=1) as saved:
    saved.save(1, states, host)
  with file_helpers.room(2**15):
    with pytest.raises(files.WriteError, match='checkpoints cannot be written'):
      with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(2, states, {'cursor': 2})
  warnings = []
  with Checkpoints(tmp_path, keep=1, warn=warnings.append) as saved:
    step, _, found = saved.restore(states)
    assert (step, found, warnings) == (1, host, [])
    saved.save(2, states, {'cursor': 2})
  with Checkpoints(tmp_path) as saved:
    assert saved.restore(states)[0] == 2
  assert not list((tmp_path / 'checkpoints').glob('*tmp*'))


def test_exit_code_of_a_full_disk(monkeypatch, capsys):
  """Law: one line and code 1: it is not the user's input that is wrong.

  Mutant: a traceback.
  """

  def full(argv):
    del argv
    with files.writing('/run/metrics.jsonl'):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(sys, 'argv', ['train'])
  with pytest.raises(SystemExit) as ended:
    flags.run(full)
  err = capsys.readouterr().err
  assert ended.value.code == 1
  assert err.startswith('error: /run/metrics.jsonl cannot be written (No space')
  assert err.count('\n') == 1


_ROWS = st.dictionaries(
  st.text(max_size=5),
  st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
  ),
)
_HOSTILE_LINES = st.one_of(
  st.binary(max_size=40),
  st.just(b'[' * 10**5),
  st.just(b'{"step": ' + b'9' * 5000 + b'}'),
  st.sampled_from(
    [
      b'{"step": "3"}',
      b'{"step": NaN}',
      b'{"step": null}',
      b'{"step": 1e3}',
      b'3',
      b'\xff\xfe{\0"\0',
      b'{"step": 2, "x": "\xff"}',
    ]
  ),
  _ROWS.map(lambda row: json.dumps(row).encode()),
)


@hypothesis.settings(
  max_examples=60,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  st.lists(st.tuples(st.integers(0, 9), _HOSTILE_LINES)),
  st.integers(0, 9),
  st.sampled_from([b'{"step": 0, "torn', b'{"step": 0, "torn": 1}']),
)
def test_any_rest_of_a_metrics_file_is_continued(tmp_path, rest, last, torn):
  """Law: whatever a killed run left, its whole lines up to the restored step
  stay, byte for byte and in order, and all further lines are whole.

  Mutants: only JSONDecodeError caught; `step <= last` of any type; a torn line
  continued.
  """
  folder = pathlib.Path(tmp_path)
  good = {}
  with open(folder / 'metrics.jsonl', 'wb') as file:
    for i, (step, line) in enumerate(rest):
      good[i] = b'{"step": %d, "i": %d}\n' % (step, i)
      file.write(good[i] + line.replace(b'\n', b'').replace(b'\r', b'') + b'\n')
    file.write(torn)
  with metrics.MetricsWriter(
    folder, resume_step=last, run_id='a', warn=lambda line: None
  ) as writer:
    kept = (folder / 'metrics.jsonl').read_bytes()
    writer.write(10, {'reward/mean': 1.0})
  wanted = [good[i] for i, (step, _) in enumerate(rest) if step <= last]
  assert [x for x in kept.splitlines(True) if x in good.values()] == wanted
  assert b'torn' not in kept
  rows = metrics.read_jsonl(folder / 'metrics.jsonl')
  assert len(rows) == len(kept.splitlines()) + 1
  assert rows[-1] == {'step': 10, 'reward/mean': 1.0}
