# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""Checkpoints: Orbax underneath, every byte verified before it is used.

workdir/checkpoints/STEP holds one item for each named device pytree (`policy`
and whatever trains beside it), and `host`, a JSON object with the host-side
state, the description of every leaf and a SHA-256 of each item. `restore` takes
the newest step whose content matches its digests; a later one that does not is
named and passed over.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
from types import TracebackType
from typing import Any, Callable, Collection, Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlax_llm import processes
from rlax_llm.config import ConfigError
from rlax_llm.files import writing

FOLDER = 'checkpoints'


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields (path, leaf) in path order, whatever the containers are."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  named = [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
           for path, leaf in flat]
  return iter(sorted(named, key=lambda item: item[0]))


def digest_arrays(tree: Any) -> str:
  """SHA-256 over the leaves of a pytree: path, dtype, shape and bytes.

  Args:
    tree: arrays of any dtype, divided over the devices of any process; one
      leaf at a time is brought together on the host.

  Returns:
    64 hexadecimal digits. Leaves are taken in path order, so dicts,
    dataclasses and named tuples with the same names have the same digest.
  """
  digest = hashlib.sha256()
  for path, leaf in _leaves(tree):
    array = processes.whole(leaf)
    digest.update(f'{path} {array.dtype.name} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self,
               workdir: str | os.PathLike[str],
               *,
               keep: int = 2,
               keep_every: int = 0,
               warn: Callable[[str], None] | None = None) -> None:
    """Opens workdir/checkpoints; makes it on the first save.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay; at least 1.
      keep_every: those of its multiples stay besides; 0: none.
      warn: receives one line per restore that passed over a checkpoint; None:
        stderr does.

    Raises:
      ConfigError: `keep` is below 1.
    """
    if keep < 1:
      raise ConfigError(f'checkpoint.keep is {keep}; it must be at least 1')
    self._root = pathlib.Path(workdir).absolute() / FOLDER
    self._keep, self._keep_every = keep, keep_every
    self._warn = warn or _to_stderr
    self._manager: ocp.CheckpointManager | None = None
    self._unreadable: list[int] = []
    self._saved = False

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, ascending, readable or not."""
    found = list(self._root.iterdir()) if self._root.is_dir() else []
    # Another process may have begun to save meanwhile.
    return processes.broadcast(
        sorted(int(p.name) for p in found if p.name.isdecimal()))

  def save(self, step: int, states: Mapping[str, Any],
           host: Mapping[str, Any]) -> None:
    """Begins to save; returns once the states may be donated.

    Args:
      step: names the checkpoint; above every step saved before.
      states: pytrees of arrays by name.
      host: JSON-able dict with string keys throughout.

    Raises:
      ValueError: `host` would not come back from JSON as it is, or the step
        exists already.
      WriteError: it cannot be written.
    """
    _check_keys(host, 'host')
    if not self._saved:
      with self._writing():
        self._clear()
      self._saved = True
    record = {
        'leaves': {
            name: _describe(state) for name, state in states.items()
        },
        'sha256': {
            name: digest_arrays(state) for name, state in states.items()
        },
        'host': host,
    }
    record['record_sha256'] = _digest_json(record)
    items = {
        name: ocp.args.StandardSave(state) for name, state in states.items()
    }
    args = ocp.args.Composite(host=ocp.args.JsonSave(record), **items)
    with self._writing():
      saved = self._open().save(step, args=args)
    if not saved:
      raise ValueError(f'step {step} cannot be saved: {self._root} holds steps '
                       f'{self.steps()}; steps must grow')

  def restore(
      self,
      abstract: Mapping[str, Any],
      *,
      step: int | None = None,
      optional: Collection[str] = ()
  ) -> tuple[int, dict[str, Any], Any] | None:
    """Reads the newest checkpoint that is whole, or that of one step.

    Args:
      abstract: by name, pytrees of `jax.ShapeDtypeStruct` (or arrays) as the
        states were; their shardings place what is read. States that are not
        named are not read.
      step: the only one to read; None: the newest.
      optional: names that the result may lack, where none was saved.

    Returns:
      (step, states, host), or None where nothing was ever saved.

    Raises:
      ConfigError: checkpoints exist and none is whole, or none is of `step`, or
        the newest whole one is of another model; names the first leaf that
        differs.
    """
    self.wait()
    failures: list[str] = []
    steps = self.steps()
    if step is not None and steps and step not in steps:
      raise ConfigError(f'{self._root} holds no checkpoint of step {step}; it '
                        f'has {", ".join(map(str, steps))}')
    for candidate in reversed(steps):
      if step not in (None, candidate):
        continue
      path = self._root / str(candidate)
      found, reason = self._attempt(candidate, abstract, optional)
      reason = next(filter(None, processes.gather(reason)), '')
      if found is None or reason:
        failures.append(f'{path} is unreadable ({reason})')
        self._unreadable.append(candidate)
        continue
      if failures:
        self._warn(f'{"; ".join(failures)}; using {path} instead')
      return candidate, *found
    if failures and step is not None:
      raise ConfigError(
          f'{failures[0]}; leave --step out for the newest one '
          f'that is whole (there are {", ".join(map(str, steps))})')
    if failures:
      raise ConfigError(
          f'no checkpoint can be used: {"; ".join(failures)}; give another '
          f'--workdir, or delete {self._root} to start again')
    return None

  def wait(self) -> None:
    """Returns once every save has reached the disk.

    Raises:
      WriteError: one has not; the checkpoints before it are whole.
    """
    if self._manager:
      with self._writing():
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

  def close(self) -> None:
    """Waits, then lets go of the folder."""
    if self._manager:
      self.wait()
      self._manager.close()
      self._manager = None

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None,
               error: BaseException | None,
               trace: TracebackType | None) -> None:
    self.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns what a full or read-only disk makes Orbax raise into one line."""
    with writing(self._root):
      try:
        yield
      except ValueError as error:  # TensorStore's, with the system's own code
        code = re.search(r"\[os_error_code='(\d+)'", str(error))
        if code is None:
          raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error

  def _open(self) -> ocp.CheckpointManager:
    _quieten()
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
          self._root,
          options=ocp.CheckpointManagerOptions(max_to_keep=self._keep,
                                               keep_period=self._keep_every or
                                               None))
    return self._manager

  def _clear(self) -> None:
    """Makes room for the steps to come; reading alone changes no file."""
    self.close()
    if processes.is_writer():
      self._clear_files()
    self._unreadable.clear()
    processes.barrier()

  def _clear_files(self) -> None:
    for step in self._unreadable:
      path = self._root / str(step)
      target = path.with_name(f'{step}.unreadable')
      if path.exists():
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
    for left_over in self._root.glob('*.orbax-checkpoint-tmp*'):
      shutil.rmtree(left_over, ignore_errors=True)

  def _attempt(
      self, step: int, abstract: Mapping[str, Any],
      optional: Collection[str]) -> tuple[tuple[dict, Any] | None, str]:
    """Returns ((states, host), ''), or (None, why it cannot be read)."""
    try:
      return self._read(step, abstract, optional), ''
    except ConfigError:
      raise
    except Exception as e:  # Orbax raises whatever its readers raise.
      text = ' '.join(str(e).split()).split(' See full TensorStore')[0]
      return None, f'{type(e).__name__}: {text[:200]}'

  def _read(self, step: int, abstract: Mapping[str, Any],
            optional: Collection[str]) -> tuple[dict[str, Any], Any]:
    manager = self._open()
    args = ocp.args.Composite(host=ocp.args.JsonRestore())
    record = manager.restore(step, args=args).host
    expected = record.pop('record_sha256')
    if _digest_json(record) != expected:
      raise ValueError('the digest of the host state does not match')
    wanted = {
        name: state
        for name, state in abstract.items()
        if name in record['leaves'] or name not in optional
    }
    path = self._root / str(step)
    for name, state in wanted.items():
      _check_leaves(path, name, record['leaves'].get(name, {}),
                    _describe(state))
    items = {
        name: ocp.args.StandardRestore(jax.tree.map(_abstract, state))
        for name, state in wanted.items()
    }
    read = manager.restore(step, args=ocp.args.Composite(**items))
    states = {name: read[name] for name in wanted}
    for name, state in states.items():
      if digest_arrays(state) != record['sha256'][name]:
        raise ValueError(f'the digest of the arrays of {name} does not match')
    return states, record['host']


def _to_stderr(line: str) -> None:
  if processes.is_writer():
    print(f'warning: {line}', file=sys.stderr, flush=True)


def _quieten() -> None:
  """Installs the filters, for good: their cases may come at any later time."""
  if getattr(sys.unraisablehook, 'func', None) is not _pass_on:
    sys.unraisablehook = functools.partial(_pass_on, sys.unraisablehook)
  if getattr(threading.excepthook, 'func', None) is not _pass_on_thread:
    threading.excepthook = functools.partial(_pass_on_thread,
                                             threading.excepthook)


def _pass_on(hook: Callable[[Any], Any], unraisable: Any) -> None:
  """Calls `hook`, except for what a failed read or write leaves behind.

  When one array fails, Orbax closes its event loop under the others; each would
  print a traceback in the middle of the run.
  """
  code = getattr(unraisable.object, 'cr_code', None)
  abandoned = code is not None and 'orbax' in code.co_filename
  closed = (isinstance(unraisable.exc_value, RuntimeError) and
            'Event loop is closed' in str(unraisable.exc_value))
  if not (abandoned or closed):
    hook(unraisable)


def _pass_on_thread(hook: Callable[[Any], Any], raised: Any) -> None:
  """Calls `hook`, except for Orbax's own threads: `wait` raises the same."""
  if not type(raised.thread).__module__.startswith('orbax.'):
    hook(raised)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  # Without one Orbax would place the array as the saving machine did.
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(tree: Any) -> dict[str, str]:
  """Returns path -> 'dtype[shape]' of every leaf."""
  return {
      path: f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
      for path, leaf in _leaves(tree)
  }


def _check_leaves(path: pathlib.Path, state: str, saved: Mapping[str, str],
                  wanted: Mapping[str, str]) -> None:
  for leaf in sorted(saved.keys() | wanted.keys()):
    there, here = saved.get(leaf, 'absent'), wanted.get(leaf, 'absent')
    if there != here:
      raise ConfigError(
          f'checkpoint {path} is of another model: {state}/{leaf} '
          f'is {there} there and {here} in this config; give that model\'s '
          'config or another --workdir')


def _digest_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_keys(value: Any, path: str) -> None:
  """Refuses keys that JSON would turn into strings without a word."""
  if isinstance(value, Mapping):
    for key, item in value.items():
      if not isinstance(key, str):
        raise ValueError(f'{path} has the key {key!r}; JSON keeps only strings')
      _check_keys(item, f'{path}.{key}')
  elif isinstance(value, (list, tuple)):
    for i, item in enumerate(value):
      if isinstance(item, (Mapping, list, tuple)):
        _check_keys(item, f'{path}[{i}]')
