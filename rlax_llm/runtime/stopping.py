"""Why a run stops before its end; signals, looked at where it is safe."""

import os
import signal
import threading
from types import FrameType
from types import TracebackType
from typing import Any

from rlax_llm.runtime import processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
  """The run was asked to stop; what is in flight can be done again."""


class Diverged(RuntimeError):
  """Too many updates in a row were not finite."""


class StopRequest:
  """Notes the first SIGTERM or SIGINT; the second ends the process at once.

  A run looks at it between segments and before it changes its state; several
  processes do so together, and one signal stops them all. Signals reach the
  main thread only: elsewhere nothing is installed.
  """

  def __init__(self) -> None:
    self._noted: int | None = None
    self._before: dict[int, Any] = {}

  def check(self) -> None:
    """Raises `Stopped` if a signal has come."""
    for noted in processes.gather(self._noted):
      if noted is not None:
        raise Stopped(signal.Signals(noted).name)

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._noted is not None:
      os._exit(128 + number)  # no clean-up: that is what a second one asks for
    self._noted = number
