# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""Checkpoints: Orbax underneath, every byte verified before it is used.

workdir/checkpoints/STEP holds one item for each named device pytree (`policy`
and whatever trains beside it), and `host`, a JSON object with the host-side
state, and the description and a SHA-256 of every leaf. `restore` takes the
newest step whose content matches its digests. A later step whose content is
damaged is named and passed over. Storage that cannot be read is no damage: it
raises `ReadError`, and no older step is used in its place.

A name may be that of a part of an item, as in `policy/params`: then nothing
else of the item is read.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
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
from typing import Any
from typing import cast
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlax_llm.config import ConfigError
from rlax_llm.runtime import processes
from rlax_llm.runtime.files import ReadError
from rlax_llm.runtime.files import reading
from rlax_llm.runtime.files import writing

FOLDER = 'checkpoints'
_Read = TypeVar('_Read')
_RECORD = pathlib.Path('host', 'metadata')  # where Orbax puts the JSON item
# What there is instead of a file that should be there.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# TensorStore's messages for corrupt data. Operating-system errors can match
# too, but those contain `os_error_code`.
_TENSORSTORE_DAMAGE = re.compile(
  r'(NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION): Error '
  r'|Error (?:opening|reading) .*Error decoding ',
  re.DOTALL,
)
_SYSTEM_CODE = re.compile(r"\[os_error_code='(\d+)'")


class _Damaged(Exception):
  """The content of a checkpoint is not what was saved."""


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields (path, leaf) in path order, whatever the containers are."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  named = [
    (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
    for path, leaf in flat
  ]
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
    _add_leaf(digest, path, leaf)
  return digest.hexdigest()


def _digest_leaves(tree: Any) -> dict[str, str]:
  """Returns a SHA-256 of every leaf by path, as `digest_arrays` has it."""
  digests = {}
  for path, leaf in _leaves(tree):
    digest = hashlib.sha256()
    _add_leaf(digest, path, leaf)
    digests[path] = digest.hexdigest()
  return digests


def _add_leaf(digest: Any, path: str, leaf: Any) -> None:
  array = processes.whole(leaf)
  digest.update(f'{path} {array.dtype.name} {array.shape}\n'.encode())
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int = 2,
    keep_every: int = 0,
    warn: Callable[[str], None] | None = None,
  ) -> None:
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
    """Returns the steps that have a checkpoint, ascending, readable or not.

    Raises:
      ReadError: the folder cannot be read.
    """
    try:
      with reading(self._root):
        found = os.listdir(self._root)
    except ReadError as error:
      if not isinstance(
        error.__cause__, (FileNotFoundError, NotADirectoryError)
      ):
        raise
      found = []
    # Another process may have begun to save meanwhile.
    return processes.broadcast(sorted(int(n) for n in found if n.isdecimal()))

  def save(
    self, step: int, states: Mapping[str, Any], host: Mapping[str, Any]
  ) -> None:
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
    record: dict[str, Any] = {
      'leaves': {name: _describe(state) for name, state in states.items()},
      'sha256': {name: _digest_leaves(state) for name, state in states.items()},
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
      raise ValueError(
        f'step {step} cannot be saved: {self._root} holds steps '
        f'{self.steps()}; steps must grow'
      )

  def restore(
    self,
    abstract: Mapping[str, Any],
    *,
    step: int | None = None,
    optional: Collection[str] = (),
  ) -> tuple[int, dict[str, Any], Any] | None:
    """Reads the newest checkpoint that is whole, or that of one step.

    Args:
      abstract: by name, pytrees of `jax.ShapeDtypeStruct` (or arrays) as the
        states were; their shardings place what is read. `policy/params` names
        a part of the state `policy`. What is not named is not read; but a
        checkpoint with one digest for the whole of a state, as earlier versions
        wrote it, is read as a whole into the host's memory, to verify it.
      step: the only one to read; None: the newest.
      optional: names that the result may lack, where none was saved.

    Returns:
      (step, states, host), or None where nothing was ever saved.

    Raises:
      ConfigError: checkpoints exist and none is whole, or none is of `step`, or
        the newest whole one is of another model; names the first leaf that
        differs.
      ReadError: the newest one cannot be read, whether it is whole or not.
    """
    self.wait()
    failures: list[str] = []
    steps = self.steps()
    if step is not None and steps and step not in steps:
      raise ConfigError(
        f'{self._root} holds no checkpoint of step {step}; it '
        f'has {", ".join(map(str, steps))}'
      )
    for candidate in reversed(steps):
      if step not in (None, candidate):
        continue
      path = self._root / str(candidate)
      found, reason = self._attempt(candidate, abstract, optional)
      if found is None:
        failures.append(f'{path} is unreadable ({reason})')
        self._unreadable.append(candidate)
        continue
      if failures:
        self._warn(f'{"; ".join(failures)}; using {path} instead')
      return candidate, *found
    if failures and step is not None:
      raise ConfigError(
        f'{failures[0]}; leave --step out for the newest one '
        f'that is whole (there are {", ".join(map(str, steps))})'
      )
    if failures:
      raise ConfigError(
        f'no checkpoint can be used: {"; ".join(failures)}; give another '
        f'--workdir, or delete {self._root} to start again'
      )
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

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns what a full or read-only disk makes Orbax raise into one line."""
    with writing(self._root):
      try:
        yield
      except ValueError as error:
        cause = _system_error(error)
        if cause is None:
          raise
        raise cause from error

  def _open(self) -> ocp.CheckpointManager:
    _quieten()
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self._root,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=self._keep, keep_period=self._keep_every or None
        ),
      )
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
    self, step: int, abstract: Mapping[str, Any], optional: Collection[str]
  ) -> tuple[tuple[dict, Any] | None, str]:
    """Returns ((states, host), ''), or (None, what is damaged).

    Raises:
      ConfigError: it is of another model.
      Exception: any process failed to read it for another reason than damage.
    """
    try:
      return self._read(step, abstract, optional), ''
    except _Damaged as error:
      return None, ' '.join(str(error).split())

  def _read(
    self, step: int, abstract: Mapping[str, Any], optional: Collection[str]
  ) -> tuple[dict[str, Any], Any]:
    path = self._root / str(step)
    record = _agree(lambda: _read_record(path / _RECORD))
    wanted = {
      name: state
      for name, state in abstract.items()
      if name.partition('/')[0] in record['leaves'] or name not in optional
    }
    for name, state in wanted.items():
      item, _, part = name.partition('/')
      _check_leaves(
        path,
        item,
        _below(part, record['leaves'].get(item, {})),
        _describe(_nested(part, state)),
      )
    states = {
      name: _read_state(path, name, state, record)
      for name, state in wanted.items()
    }
    return states, record['host']


def _agree(read: Callable[[], _Read]) -> _Read:
  """Returns what every process reads; raises in all where one cannot read it.

  All processes use the same checkpoint, or all of them end. So none may go on
  to a collective operation while another has failed.

  Args:
    read: reads files, without collective operations.

  Raises:
    _Damaged: in one of the processes its content is not what was saved.
    Exception: one of the processes could not read it.
  """
  found, damage, failure = None, '', None
  try:
    found = read()
  except _Damaged as error:
    damage = str(error)
  except Exception as error:  # pylint: disable=broad-exception-caught
    failure = error
  said = processes.gather([damage, str(failure) if failure else ''])
  if failure is not None:
    raise failure
  for i, (_, line) in enumerate(said):
    if line:
      raise ReadError(f'process {i}: {line}')
  for damage, _ in said:
    if damage:
      raise _Damaged(damage)
  return cast(_Read, found)


def _read_record(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON item of a checkpoint; raises _Damaged or ReadError."""
  text = _read_file(path)
  try:
    record = json.loads(text)
    expected = record.pop('record_sha256')
  except (
    ValueError,
    RecursionError,
    LookupError,
    TypeError,
    AttributeError,
  ) as error:
    raise _Damaged(
      f'{path} is no record: {type(error).__name__}: {str(error)[:100]}'
    ) from error
  if _digest_json(record) != expected:
    raise _Damaged('the digest of the host state does not match')
  return record


def _read_file(path: pathlib.Path) -> bytes:
  """Returns a file's content; raises _Damaged where there is no such file."""
  try:
    with reading(path):
      return path.read_bytes()
  except ReadError as error:
    if isinstance(error.__cause__, _ABSENT):
      raise _Damaged(f'{path} is missing') from error
    raise


def _read_state(
  path: pathlib.Path, name: str, state: Any, record: Mapping[str, Any]
) -> Any:
  """Reads a state, or a part of one, and verifies its digests.

  Args:
    path: of the checkpoint.
    name: `item`, or `item/part`.
    state: what to read, as shapes.
    record: verified.

  Raises:
    _Damaged: its content is not what was saved.
    Exception: it could not be read.
  """
  _quieten()
  item, _, part = name.partition('/')
  folder = path / item
  digests = record['sha256'][item]
  by_leaf = not isinstance(digests, str)
  tree = jax.tree.map(_abstract, _nested(part, state))
  arguments = ocp.checkpoint_utils.construct_restore_args(tree)

  def read() -> Any:
    wanted, how = tree, arguments
    # The handler alone: a Checkpointer's restore is a barrier.
    handler = ocp.PyTreeCheckpointHandler()
    try:
      if part and not by_leaf:
        rest = dict(handler.metadata(folder).tree)
        host = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), rest)
        wanted, how = rest | wanted, host | how
      return handler.restore(
        folder,
        args=ocp.args.PyTreeRestore(
          wanted, restore_args=how, partial_restore=bool(part)
        ),
      )
    except Exception as error:
      _explain(error, folder, record['leaves'][item])
      raise
    finally:
      handler.close()

  found = _agree(read)
  # Collective: a digest is of the whole array.
  if by_leaf:
    same = _digest_leaves(found) == _below(part, digests)
  else:
    same = digest_arrays(found) == digests
  if not same:
    raise _Damaged(f'the digest of the arrays of {name} does not match')
  return found[part] if part else found


def _nested(part: str, state: Any) -> Any:
  """Returns a state, or a dict with one part of it."""
  return {part: state} if part else state


def _below(part: str, values: Mapping[str, str]) -> dict[str, str]:
  """Returns the values of the leaves of a part of a state; '': of all."""
  return {
    path: value
    for path, value in values.items()
    if part in ('', path) or path.startswith(f'{part}/')
  }


def _explain(
  error: BaseException, folder: pathlib.Path, leaves: Collection[str]
) -> None:
  """Raises what an error of Orbax's readers means; returns if that is unknown.

  Args:
    error: whatever they raised.
    folder: of the item that was read.
    leaves: the paths of its leaves.

  Raises:
    ReadError: the system refused to read, or there is too little memory.
    _Damaged: a file is missing, torn or altered.
  """
  with reading(folder):
    for cause in _causes(error):
      system = _system_error(cause)
      if system is not None and not isinstance(system, _ABSENT):
        raise system from error
      if isinstance(cause, jax.errors.JaxRuntimeError) and (
        'RESOURCE_EXHAUSTED' in str(cause)
      ):
        raise MemoryError from error
      if _TENSORSTORE_DAMAGE.match(str(cause)):
        text = ' '.join(str(cause).split()).split(' [tensorstore_spec')[0]
        raise _Damaged(text[:200]) from error
  _check_texts(folder, leaves)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and what led to it."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _system_error(error: BaseException) -> OSError | MemoryError | None:
  """Returns the system's error that an error is, or reports; None: neither."""
  if isinstance(error, MemoryError):
    return error
  code = _SYSTEM_CODE.search(str(error))  # TensorStore's way to say it
  number = int(code[1]) if code else getattr(error, 'errno', None)
  return OSError(number, os.strerror(number)) if number else None


def _check_texts(folder: pathlib.Path, leaves: Collection[str]) -> None:
  """Checks the JSON files that Orbax keeps beside the arrays of an item.

  Orbax has no digest of them, and raises all manner of errors where one is
  altered. This is asked once it has raised something.

  Args:
    folder: of the item.
    leaves: the paths of its leaves.

  Raises:
    _Damaged: one is missing, or is not what Orbax wrote.
    ReadError: one cannot be read.
  """
  names = set()

  def read_tree(record: dict[str, Any]) -> None:
    for name, entry in record['tree_metadata'].items():
      parts = [part['key'] for part in entry['key_metadata']]
      kinds = [part['key_type'] for part in entry['key_metadata']]
      entry['value_metadata']['value_type'].lower()
      bool(entry['value_metadata']['skip_deserialize'])
      if str(tuple(parts)) != name or not set(kinds) <= {1, 2}:
        raise ValueError(name)
      names.add('/'.join(parts))

  def read_shapes(record: dict[str, Any]) -> None:
    for entry in record['array_metadatas']:
      shapes = entry['array_metadata']
      tuple(shapes['write_shape']), tuple(shapes['chunk_shape'])
      if shapes['param_name'].replace('.', '/') not in names:
        raise ValueError(shapes['param_name'])

  def check(path: pathlib.Path, read: Callable[[dict[str, Any]], None]) -> None:
    text = _read_file(path)
    try:
      read(json.loads(text))
    except (
      ValueError,
      LookupError,
      TypeError,
      AttributeError,
      RecursionError,
    ) as error:
      raise _Damaged(
        f'{path} is altered: {type(error).__name__}: {str(error)[:100]}'
      ) from error

  check(folder / '_METADATA', read_tree)
  if not names >= set(leaves):
    raise _Damaged(f'{folder / "_METADATA"} names other arrays')
  shapes = folder / 'array_metadatas'
  with reading(shapes):
    files = sorted(os.listdir(shapes)) if shapes.is_dir() else []
  for file in files:
    check(shapes / file, read_shapes)


def _to_stderr(line: str) -> None:
  if processes.is_writer():
    print(f'warning: {line}', file=sys.stderr, flush=True)


def _quieten() -> None:
  """Installs the filters, for good: their cases may come at any later time."""
  if getattr(sys.unraisablehook, 'func', None) is not _pass_on:
    sys.unraisablehook = functools.partial(_pass_on, sys.unraisablehook)
  if getattr(threading.excepthook, 'func', None) is not _pass_on_thread:
    threading.excepthook = functools.partial(
      _pass_on_thread, threading.excepthook
    )


def _pass_on(hook: Callable[[Any], Any], unraisable: Any) -> None:
  """Calls `hook`, except for what a failed read or write leaves behind.

  When one array fails, Orbax closes its event loop under the others; each would
  print a traceback in the middle of the run.
  """
  code = getattr(unraisable.object, 'cr_code', None)
  abandoned = code is not None and 'orbax' in code.co_filename
  closed = isinstance(
    unraisable.exc_value, RuntimeError
  ) and 'Event loop is closed' in str(unraisable.exc_value)
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


def _check_leaves(
  path: pathlib.Path,
  state: str,
  saved: Mapping[str, str],
  wanted: Mapping[str, str],
) -> None:
  for leaf in sorted(saved.keys() | wanted.keys()):
    there, here = saved.get(leaf, 'absent'), wanted.get(leaf, 'absent')
    if there != here:
      raise ConfigError(
        f'checkpoint {path} is of another model: {state}/{leaf} '
        f"is {there} there and {here} in this config; give that model's "
        'config or another --workdir'
      )


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
