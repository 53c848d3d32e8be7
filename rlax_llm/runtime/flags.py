# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""Command lines: `--config=FILE`, `--config.a.b=value`, one-line errors.

    _CONFIG = flags.DEFINE_config()
    _WORKDIR = flags.DEFINE_workdir()

    def main(argv): train(_CONFIG.value, _WORKDIR.value)

    if __name__ == '__main__':
      flags.run(main)

Whatever the user got wrong ends in one line on stderr, `error: ...`, and exit
code 2, before any device is touched. Other exceptions keep their traceback.
"""

import collections.abc
from collections.abc import Callable
import dataclasses
import json
import os
import re
import runpy
import sys
from typing import Any
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import nearest
from rlax_llm.config import RENAMED_FIELDS
from rlax_llm.config import Section
from rlax_llm.runtime import launch
from rlax_llm.runtime.files import ReadError
from rlax_llm.runtime.files import WriteError
from rlax_llm.runtime.stopping import Diverged

FLAGS = flags.FLAGS
USER_ERROR = 2  # exit code
STOPPED = 1  # exit code: not by the user's input
INTERRUPTED = 130  # exit code, 128 + SIGINT as shells have it
_PROCESS_FLAGS = [field.name for field in dataclasses.fields(launch.Launch)]


def field_paths(config: Section, prefix: str = '') -> dict[str, Any]:
  """Returns the dotted path of every field below `config`, with its value.

  Args:
    config: a config or one of its sections.
    prefix: put before each path.

  Returns:
    dict from path ('learning.learning_rate') to value; a section has an entry
    of its own besides those of its fields.
  """
  paths = {}
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    value = getattr(config, field.name)
    paths[prefix + field.name] = value
    if isinstance(value, Section):
      paths.update(field_paths(value, f'{prefix}{field.name}.'))
  return paths


def load_config(path: str) -> Config:
  """Runs a config file and returns what its `get_config()` returns.

  Args:
    path: a Python file.

  Returns:
    The config, not yet validated.

  Raises:
    ConfigError: there is no such file, it fails, or it returns something else.
  """
  if not os.path.isfile(path):
    raise ConfigError(
      f'config file {path!r} does not exist; give --config the '
      'path of a Python file that defines get_config()'
    )
  try:
    get_config = runpy.run_path(path).get('get_config')
    config = get_config() if get_config else None
  except (Exception, SystemExit) as e:
    message = e.msg if isinstance(e, SyntaxError) else _one_line(e)
    raise ConfigError(
      f'config file {path!r} fails: {type(e).__name__}: '
      f'{message}{_line_in(path, e)}'
    ) from e
  if get_config is None:
    raise ConfigError(
      f'config file {path!r} has no get_config(); define '
      'get_config() -> rlax_llm.config.Config'
    )
  if not isinstance(config, Config):
    raise ConfigError(
      f'get_config() of {path!r} returned {type(config).__name__}, '
      'not rlax_llm.config.Config'
    )
  if config.__dict__.get('_frozen'):
    raise ConfigError(
      f'get_config() of {path!r} returned a frozen config; '
      'return it before validate(), which the run calls itself'
    )
  _check_attributes(config, path)
  return config


def DEFINE_config(required: bool = True) -> flags.FlagHolder:
  """Defines `--config=FILE` and its overrides `--config.a.b=value`.

  Args:
    required: whether a command line without it is refused.

  Returns:
    The holder; its `.value` is the `Config` with the overrides applied, or
    None where the flag is absent and not required.
  """
  config_flags.register_flag_parser_for_type(
    collections.abc.Mapping, _MappingParser()
  )
  holder = config_flags.DEFINE_config_file(
    'config',
    None,
    'Python file that defines get_config(); override a field '
    'with --config.section.field=value.',
  )
  # ml_collections keeps a failed load silent until the config is read.
  FLAGS['config'].parser = _FileParser()
  if required:
    _require('config', 'the Python file that defines get_config()')
  return holder


def DEFINE_workdir(
  required: bool = True, help_string: str = 'the folder that holds the run'
) -> flags.FlagHolder:
  """Defines `--workdir=DIR`.

  Args:
    required: whether a command line without it is refused.
    help_string: what the folder is; part of the refusal.

  Returns:
    The holder; its `.value` is the path or None.
  """
  holder = flags.DEFINE_string('workdir', None, help_string)
  if required:
    _require('workdir', help_string)
  return holder


def DEFINE_base() -> flags.FlagHolder:
  """Defines `--base=FOLDER`: where `model.pretrained` of a run lies now."""
  return flags.DEFINE_string(
    'base', None, 'where the weights that the run began with lie, if moved'
  )


def DEFINE_processes() -> None:
  """Defines how a process finds the others of its run; `run` joins them."""
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, if there are several'
  )
  flags.DEFINE_integer('processes', None, 'how many processes there are')
  flags.DEFINE_integer('process', None, 'which of them this is, from 0')
  flags.DEFINE_boolean(
    'distributed',
    False,
    'find the other processes by the environment: SLURM, TPU pods, Open MPI',
  )


def _launch() -> launch.Launch:
  values: dict[str, Any] = {
    name: FLAGS[name].value for name in _PROCESS_FLAGS if name in FLAGS
  }
  return launch.Launch(**values)


def DEFINE_steps(name: str, help_string: str) -> flags.FlagHolder:
  """Defines a flag for a range of steps, `--name=A:B`, both included.

  Returns:
    The holder; its `.value` is (A, B) or None.
  """
  return flags.DEFINE(_StepsParser(), name, None, help_string)


def run(main: Callable[[list[str]], Any]) -> NoReturn:
  """Parses the command line, calls `main(argv)` and exits.

  With the flags of `DEFINE_processes`, all processes call their `main`
  together.

  Args:
    main: the program; argv holds only the program's name. Its return value is
      the exit code (None: 0). A `ConfigError` it raises is a user error.

  Raises:
    SystemExit: always. Code 2 after a user error, 1 when the updates are not
      finite any more or a file cannot be read or written, 130 when interrupted.
  """

  def together(argv: list[str]) -> Any:
    with launch.joined(_launch()):
      return main(argv)

  try:
    app.run(together, flags_parser=_parse_quietly)
  except (ConfigError, flags.Error) as e:
    print(f'error: {_one_line(e)}', file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)
  except (Diverged, ReadError, WriteError) as e:
    print(f'error: {_one_line(e)}', file=sys.stderr, flush=True)
    sys.exit(STOPPED)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)
  sys.exit(0)


class _FileParser(flags.ArgumentParser):
  """Loads the config file eagerly."""

  def parse(self, path: Any) -> Any:
    return load_config(path)


class _StepsParser(flags.ArgumentParser):
  """Two step numbers, 'A:B'."""

  def parse(self, argument: Any) -> Any:
    match = re.fullmatch(r'(\d+):(\d+)', argument)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
      raise ValueError('give the first and the last step, from 1, as in 3:5')
    return int(match[1]), int(match[2])

  def flag_type(self) -> str:
    return 'steps A:B'


class _MappingParser(flags.ArgumentParser):
  """A dict field, written as a JSON object."""

  def parse(self, argument: Any) -> Any:
    try:
      value = json.loads(argument) if isinstance(argument, str) else argument
    except RecursionError as error:
      raise ValueError('nested too deeply') from error
    if not isinstance(value, collections.abc.Mapping):
      raise ValueError('not a JSON object')
    return value

  def flag_type(self) -> str:
    return 'JSON object'


def _require(name: str, what: str) -> None:
  flags.register_validator(
    name,
    lambda value: value is not None,
    message=f'--{name} is missing: {what}',
  )


def _parse_quietly(argv: list[str]) -> list[str]:
  rest = _parse(argv)
  # absl.app raises a verbosity left at its default to INFO, where Orbax writes
  # dozens of lines per checkpoint, and as errors what it raises besides; after
  # that it no longer looks defaulted.
  if FLAGS['verbosity'].using_default_value:
    FLAGS.verbosity = logging.FATAL  # type: ignore[assignment]
  return rest


def _parse(argv: list[str]) -> list[str]:
  """Parses argv into FLAGS; every refusal is a `ConfigError`."""
  if 'config' in FLAGS:
    _check_overrides(argv)
  for argument in argv[1:]:
    name = argument.lstrip('-').split('=')[0]
    if name in _PROCESS_FLAGS and name not in FLAGS:
      raise ConfigError(
        f'--{name}: this program runs in one process; leave '
        'it out, or use rlax_llm.train or evaluate'
      )
  try:
    rest = FLAGS(argv)
  except flags.Error as e:
    raise ConfigError(_explain(e)) from e
  if len(rest) > 1:
    raise ConfigError(
      f'unexpected argument {_short(rest[1])!r}: every argument is a '
      'flag, --name=value'
    )
  return rest


def _check_overrides(argv: list[str]) -> None:
  """Refuses overrides that name no field, with the names that come near."""
  paths = field_paths(Config())
  config_given = False
  for argument in argv[1:]:
    config_given |= re.match(r'--?config(=|$)', argument) is not None
    match = re.match(r'--?(?:no)?config\.([^=]*)', argument)
    if not match:
      continue
    path = match[1]
    if path not in paths:
      raise ConfigError(
        f'--config.{_short(path)}: the config has no field {_short(path)!r}'
        f'{_near(path, paths)}'
      )
    if isinstance(paths[path], Section):
      fields = ', '.join(f.name for f in dataclasses.fields(paths[path]))
      raise ConfigError(
        f'--config.{path} is a section; override one of its fields: {fields}'
      )
    if not config_given:
      raise ConfigError(
        f'--config.{path} stands before or without '
        '--config=FILE; put --config=FILE first'
      )


def _check_attributes(config: Config, path: str) -> None:
  """Refuses attributes that are no field: Python would accept a typo."""
  paths = field_paths(config)
  for prefix, section in [('', config), *paths.items()]:
    if isinstance(section, Section):
      for name in section.__dict__:
        dotted = f'{prefix}.{name}'.lstrip('.')
        if dotted not in paths:
          raise ConfigError(
            f'get_config() of {path!r} sets {dotted!r}, which '
            f'is no field of the config{_near(dotted, paths)}'
          )


def _near(path: str, paths: dict[str, Any]) -> str:
  """Returns nearest()'s clause, preferring equal last names: a forgotten or
  wrong section is the commonest slip."""
  if path in RENAMED_FIELDS:
    return f'; its name is now {RENAMED_FIELDS[path]!r}'
  leaf = path.rsplit('.', 1)[-1]
  same = [p for p in paths if p.rsplit('.', 1)[-1] == leaf]
  if same:
    return f'; did you mean {" or ".join(map(repr, same))}?'
  return nearest(path, paths) or '; rlax_llm/config/schema.py lists the fields'


def _explain(error: flags.Error) -> str:
  """Returns absl's message, made plain where it is about a config field."""
  text = _one_line(error)
  text = re.sub(
    r'^flag --\w+=[^:]*: (?=--\w+ is missing|config file|get_conf)', '', text
  )
  match = re.match(r'flag --(?:no)?config\.([\w.]+)=(.*?): ', text)
  if match:
    path, value = match[1], _short(match[2])
    fields = field_paths(Config())
    parent, _, leaf = path.rpartition('.')
    section = type(fields[parent]) if parent else Config
    kind = section.__annotations__[leaf]
    kind = (
      getattr(kind, '__name__', kind)
      if kind in (int, float, str, bool)
      else kind
    )
    if isinstance(fields[path], collections.abc.Mapping):
      kind = """JSON object like '{"name": 1}'"""
    return (
      f'--config.{path}={value} is not of type {kind}; '
      f'its default is {fields[path]!r}'
    )
  return text


def _short(text: str) -> str:
  return text if len(text) <= 80 else f'{text[:80]}...'


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split())


def _line_in(path: str, error: BaseException) -> str:
  """Returns ' (line N)', the last line of `path` in the traceback, or ''."""
  line, frame = getattr(error, 'lineno', None), error.__traceback__
  while frame is not None:
    if os.path.abspath(frame.tb_frame.f_code.co_filename) == os.path.abspath(
      path
    ):
      line = frame.tb_lineno
    frame = frame.tb_next
  return f' (line {line})' if line else ''
