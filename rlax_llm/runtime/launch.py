"""Joins the processes of a run, and ends them all when one fails."""

import atexit
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import re
import sys
import threading
from typing import Any

import jax
from jax._src import distributed  # The service has no public interface.

from rlax_llm.config import ConfigError
from rlax_llm.runtime import processes

_START_SECONDS = 300  # for the others to come
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10  # for the others to hear of a failure
_FAILED, _HEARD = 'rlax_llm/failed', 'rlax_llm/heard'


@dataclasses.dataclass(frozen=True)
class Launch:
  """How a process finds the others."""

  coordinator: str | None = None  # host:port of process 0
  processes: int | None = None  # how many
  process: int | None = None  # which of them this is, from 0
  distributed: bool = False  # the cluster's environment says all this

  @property
  def alone(self) -> bool:
    """Whether there are no others."""
    return self == Launch()

  def check(self) -> None:
    """Refuses values that are missing or contradict each other.

    Raises:
      ConfigError: naming the flag.
    """
    given = {
      f'--{name}': getattr(self, name)
      for name in ('coordinator', 'processes', 'process')
    }
    there = [name for name, value in given.items() if value is not None]
    missing = [name for name, value in given.items() if value is None]
    if self.distributed:
      if there:
        raise ConfigError(
          f'--distributed reads the environment of the cluster and '
          f'{there[0]}={given[there[0]]} says otherwise; give one of them'
        )
      return
    if missing:
      raise ConfigError(
        f'{", ".join(there)} without {", ".join(missing)}; give '
        '--coordinator=HOST:PORT of process 0, --processes and --process, or '
        '--distributed on a cluster'
      )
    match = re.fullmatch(r'.+:(\d+)', self.coordinator or '')
    if not match or not 0 < int(match[1]) < 65536:
      raise ConfigError(
        f'--coordinator={self.coordinator} is not HOST:PORT, '
        'where process 0 listens'
      )
    assert self.processes is not None and self.process is not None
    if self.processes < 1:
      raise ConfigError(f'--processes={self.processes} must be at least 1')
    if not 0 <= self.process < self.processes:
      raise ConfigError(
        f'--process={self.process} is not one of --processes='
        f'{self.processes}; they are numbered from 0'
      )


@contextlib.contextmanager
def joined(launch: Launch) -> Iterator[None]:
  """Joins the other processes for what is done inside.

  Where it raises in one process, that one ends as it would have ended alone,
  and every other one with one line that names it.

  Args:
    launch: how to find them; nothing is done if there are none.

  Raises:
    ConfigError: the values are wrong, or the others are not found.
  """
  if launch.alone:
    yield
    return
  launch.check()
  _initialize(launch)
  watch = _Watch()
  try:
    yield
    # A process that has gone cannot hear that another one fails.
    processes.barrier()
  except BaseException as error:
    watch.stop()
    _tell(error)
    raise
  watch.stop()


def _initialize(launch: Launch) -> None:
  # Its handler of SIGTERM would keep a run from being stopped.
  jax.config.update('jax_enable_preemption_service', False)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # jax would abort the process, with a dump of its threads.
  late = threading.Timer(_START_SECONDS, _give_up, (launch,))
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      launch.coordinator,
      launch.processes,
      launch.process,
      initialization_timeout=2 * _START_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    reason = ' '.join(str(error).split())[:300]
    raise ConfigError(
      f'the processes cannot be joined ({reason}); give --coordinator='
      'HOST:PORT of process 0, --processes and --process, or --distributed '
      'on a cluster that jax knows'
    ) from error
  finally:
    late.cancel()


def _give_up(launch: Launch) -> None:
  there = (
    f'--processes={launch.processes} at --coordinator={launch.coordinator}'
    if launch.coordinator
    else 'processes that the environment names'
  )
  print(
    f'error: not all {there} have come within {_START_SECONDS} s; start '
    'them all, where they reach that address',
    file=sys.stderr,
  )
  _end(2)


class _Watch:
  """A thread that ends this process when another one has failed."""

  def __init__(self) -> None:
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Returns once nothing ends this process any more."""
    self._ended.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._ended.wait(_POLL_SECONDS):
      record = _failure()
      if record:
        print(f'error: {record["text"]}', file=sys.stderr)
        _hear()
        _end(record['code'])


def _failure() -> dict[str, Any] | None:
  """Returns what another process has told of its failure."""
  try:
    return json.loads(_client().key_value_try_get(_FAILED))
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' in str(error):
      return None
    reason = ' '.join(str(error).split())[:300]
    return {'text': f'process 0 has gone ({reason})', 'code': 1}


def _hear() -> None:
  """Tells the process that failed that this one is about to end."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _client().key_value_set(f'{_HEARD}/{processes.index()}', '')


def _tell(error: BaseException) -> None:
  """Ends the other processes, and this one at its exit."""
  lines = str(error).strip().splitlines() or ['']
  # Of a traceback in a message the ends say most.
  text = ' ... '.join(dict.fromkeys((lines[0], lines[-1])))
  if not isinstance(error, ConfigError):
    text = f'{type(error).__name__}: {text}'
  text = f'process {processes.index()} of {processes.count()} failed: {text}'
  codes = {ConfigError: 2, KeyboardInterrupt: 130}  # as alone
  code = codes.get(type(error), 1)
  # At a normal exit jax would wait for the other processes, which have ended.
  atexit.register(_end, code)
  try:
    _client().key_value_set(_FAILED, json.dumps({'text': text, 'code': code}))
  except jax.errors.JaxRuntimeError:
    _hear()  # Another one was first.
    return
  others = set(range(processes.count())) - {processes.index()}
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    for other in others:
      _client().blocking_key_value_get(
        f'{_HEARD}/{other}', _PATIENCE_SECONDS * 1000
      )


def _end(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _client() -> Any:
  return distributed.global_state.client
