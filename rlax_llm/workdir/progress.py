# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""Progress of a run: a live line on a terminal, plain lines elsewhere."""

from collections.abc import Callable
from collections.abc import Mapping
import math
import sys
import time
from types import TracebackType
from typing import Any
from typing import IO

import rich.console
import rich.live
import rich.text


class Progress:
  """One live line on a terminal; elsewhere a plain line now and then."""

  SHOWN = {
    'sft/loss': 'loss {:.3f}',
    'reward/mean': 'reward {:.3f}',
    'evaluate/accuracy': 'accuracy {:.3f}',
    'rollout/accept_length': 'accept length {:.2f}',
    'rollout/tokens_per_second': '{:,.0f} tokens/s',
  }

  def __init__(
    self,
    stream: IO[str] | None = None,
    *,
    interval: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Args:
    stream: where to; None: stderr.
    interval: seconds between two plain lines, at least.
    clock: seconds, monotonic.
    """
    self._stream = stream or sys.stderr
    self._interval, self._clock = interval, clock
    self._console = rich.console.Console(file=self._stream)
    self._live: rich.live.Live | None = None
    self._shown: dict[str, float] = {}
    self._pending = ''
    self._printed = -math.inf
    self._name, self._total = '', 0
    self._first: tuple[int, float] | None = None

  def phase(self, name: str, total: int) -> None:
    """Begins a phase; its first line comes with the first `update`.

    Args:
      name: such as 'warm start', 'reinforcement learning' or 'evaluate'.
      total: the step that ends it; 0: it has no steps to count.
    """
    self._finish()
    self._name, self._total, self._first = name, total, None
    self._shown = {
      k: v for k, v in self._shown.items() if k == 'evaluate/accuracy'
    }
    if self._console.is_terminal:
      self._live = rich.live.Live(console=self._console, auto_refresh=False)
      self._live.start()

  def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
    """Shows a step.

    Args:
      step: steps done in this phase.
      values: metrics by name; those of `SHOWN` are shown and remembered.
    """
    now = self._clock()
    if self._first is None:
      self._first = (step, now)
    self._shown |= {
      k: float(v) for k, v in (values or {}).items() if k in self.SHOWN
    }
    parts = [
      f'{self._name} {step}/{self._total}' if self._total else self._name
    ]
    parts += [
      t.format(self._shown[k])
      for k, t in self.SHOWN.items()
      if k in self._shown
    ]
    # The first step compiles, so the pace is that of the later ones.
    done, since = step - self._first[0], now - self._first[1]
    if done > 0 and step < self._total:
      parts.append(f'ETA {_duration(since / done * (self._total - step))}')
    self._pending = '  '.join(parts)
    if self._live:
      self._live.update(
        rich.text.Text(self._pending, no_wrap=True, overflow='ellipsis'),
        refresh=True,
      )
      self._pending = ''
    elif now - self._printed >= self._interval:
      self._print(now)

  def message(self, line: str) -> None:
    """Prints a line of its own (a warning, a path) above the live one.

    Args:
      line: what to print.
    """
    if self._live:
      self._console.print(line, markup=False, highlight=False)
    else:
      print(line, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the last phase; a line held back is printed."""
    self._finish()

  def _print(self, now: float) -> None:
    print(self._pending, file=self._stream, flush=True)
    self._pending, self._printed = '', now

  def _finish(self) -> None:
    if self._live:
      self._live.stop()
      self._live = None
    elif self._pending:
      self._print(self._clock())

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
