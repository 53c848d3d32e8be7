"""Command lines: every mistake ends in one line, exit code 2, no backend."""

import subprocess
import sys

from absl import flags as absl_flags
import pytest

from rlax_llm import config as config_lib
from rlax_llm.runtime import flags

GOOD = """
from rlax_llm.config import Config
def get_config():
  config = Config()
  config.num_steps = 7
  return config
"""
PROGRAM = """
import sys
from rlax_llm.runtime import flags
from rlax_llm.config import ConfigError
CONFIG = flags.DEFINE_config()
WORKDIR = flags.DEFINE_workdir()
def main(argv):
  config = CONFIG.value
  if config.seed == 13:
    raise ConfigError('seed 13\\nis out of range; give another')
  if config.seed == 14:
    raise KeyboardInterrupt
  if config.seed == 15:
    raise RuntimeError('a bug, not a user error')
  print(config.num_steps, config.learning.learning_rate, WORKDIR.value)
import jax._src.xla_bridge as bridge
try:
  flags.run(main)
finally:
  assert not bridge._backends, 'a backend was initialised'
"""


@pytest.fixture(name='folder')
def _folder(tmp_path):
  (tmp_path / 'good.py').write_text(GOOD)
  (tmp_path / 'program.py').write_text(PROGRAM)
  return tmp_path


def _program(folder, *arguments):
  return subprocess.run(
    [sys.executable, 'program.py', *arguments],
    cwd=folder,
    env={'PYTHONPATH': ':'.join(sys.path), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def test_command_line_reaches_main(folder):
  done = _program(
    folder,
    '--config=good.py',
    '--workdir=w',
    '--config.learning.learning_rate=0.5',
  )
  assert (done.returncode, done.stdout) == (0, '7 0.5 w\n'), done.stderr


@pytest.mark.parametrize(
  'arguments, code, words',
  [
    (['--config.learning_rate=1'], 2, "'learning.learning_rate'"),
    (['--config.seed=13'], 2, 'seed 13 is out of range; give another'),
    (['--config.seed=14'], 130, 'interrupted'),
  ],
)
def test_one_line_and_exit_code(folder, arguments, code, words):
  """Mutant: `except flags.Error` alone (KeyError and ConfigError escape)."""
  done = _program(folder, '--config=good.py', '--workdir=w', *arguments)
  assert done.returncode == code
  assert words in done.stderr
  assert done.stderr.count('\n') == 1, done.stderr
  assert done.stderr.startswith('error: ') == (code == 2)


def test_bug_keeps_its_traceback(folder):
  """Mutant: `except Exception` in run, which would hide every bug."""
  done = _program(folder, '--config=good.py', '--workdir=w', '--config.seed=15')
  assert done.returncode == 1
  assert 'Traceback' in done.stderr


@pytest.fixture(name='parse')
def _parse(folder, monkeypatch):
  """Parses one command line with fresh flags; returns the config."""
  values = absl_flags.FlagValues()
  monkeypatch.setattr(absl_flags, 'FLAGS', values)
  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.chdir(folder)

  def parse(*arguments):
    argv = ['program', *arguments]
    monkeypatch.setattr(sys, 'argv', argv)
    # absl binds its global FLAGS when a DEFINE function is compiled.
    holder = flags.config_flags.DEFINE_config_file(
      'config', None, flag_values=values
    )
    values['config'].parser = flags._FileParser()
    absl_flags.DEFINE_string('workdir', None, '', flag_values=values)
    flags._parse(argv)
    return holder.value

  flags.config_flags.register_flag_parser_for_type(
    flags.collections.abc.Mapping, flags._MappingParser()
  )
  return parse


def test_override_before_the_file_is_refused(parse):
  with pytest.raises(config_lib.ConfigError, match='put --config=FILE first'):
    parse('--config.seed=1', '--config=good.py')


def test_overrides_of_every_type(parse):
  config = parse(
    '--config',
    'good.py',
    '--config.deterministic',
    '--config.task.options={"max_terms": 3}',
    '--config.algorithm.loss=reinforce',
    '--config.algorithm.clip_low=0.1',
    '--noconfig.control.compact',
    '--config.learning.precision.compute',
    'bfloat16',
  )
  assert config.deterministic and not config.control.compact
  assert config.task.options == {'max_terms': 3}
  assert config.algorithm.loss == 'reinforce'
  assert config.algorithm.clip_low == 0.1
  assert config.learning.precision.compute == 'bfloat16'


def test_missing_config_file(parse):
  with pytest.raises(config_lib.ConfigError, match="'no.py' does not exist"):
    parse('--config=no.py', '--config.seed=1')


def test_field_paths_lists_sections_and_fields():
  paths = flags.field_paths(config_lib.Config())
  assert paths['learning.precision.head'] == 'float32'
  assert isinstance(paths['learning'], config_lib.LearningConfig)


def test_an_old_field_name_gives_the_new_one(parse, folder, monkeypatch):
  """Law: a flag, a config file and a recorded config name the new field.

  Mutant: the nearest name in place of the new one.
  """
  monkeypatch.setitem(
    config_lib.RENAMED_FIELDS, 'rollout.rows', 'rollout.slots'
  )
  text = GOOD.replace('num_steps', 'rollout.rows')
  (folder / 'old.py').write_text(text)
  for read in (
    lambda: parse('--config=good.py', '--config.rollout.rows=8'),
    lambda: flags.load_config('old.py'),
    lambda: config_lib.from_dict({'rollout': {'rows': 8}}),
  ):
    with pytest.raises(config_lib.ConfigError) as error:
      read()
    line = str(error.value)
    assert "'rollout.rows'" in line and "is now 'rollout.slots'" in line
    assert '\n' not in line
