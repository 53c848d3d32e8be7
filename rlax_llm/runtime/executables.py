"""Compiled functions by key: each is compiled once, counted and timed."""

from collections.abc import Callable
from collections.abc import Hashable
import os
from typing import Any

import jax

from rlax_llm.runtime import processes


class ExecutablePool:
  """Compiles lazily, ahead of the call, and never the same key twice.

  A key names everything that a function's shapes depend on. Calling a key
  again with other shapes raises instead of compiling again, so a shape that
  leaks into a loop is found at once.
  """

  def __init__(self, clock: Callable[[], float]) -> None:
    self._clock = clock
    self._compiled: dict[Hashable, Any] = {}
    self._bytes: dict[Hashable, int] = {}
    self.seconds = 0.0  # spent tracing, lowering, compiling and waiting

  @property
  def count(self) -> int:
    return len(self._compiled)

  def keys(self) -> list[Hashable]:
    return list(self._compiled)

  def memory_by_key(self, name: str) -> dict[Hashable, int]:
    """Returns bytes that one device needs to run each executable of a name.

    Arguments, results, temporaries and code, shared buffers counted once; 0 if
    the backend does not tell.

    Args:
      name: the first entry of the keys.
    """
    found: dict[Hashable, int] = {}
    for key, compiled in self._compiled.items():
      if isinstance(key, tuple) and key[0] == name:
        if key not in self._bytes:
          memory = compiled.memory_analysis()
          self._bytes[key] = (
            0
            if memory is None
            else (
              memory.argument_size_in_bytes
              + memory.output_size_in_bytes
              + memory.temp_size_in_bytes
              + memory.generated_code_size_in_bytes
              - memory.alias_size_in_bytes
            )
          )
        found[key] = self._bytes[key]
    return found

  def memory_bytes(self, name: str) -> int:
    """Returns the bytes of the largest executable of a name; 0 if none is.

    Args:
      name: see `memory_by_key`.
    """
    return max(self.memory_by_key(name).values(), default=0)

  def compile(
    self, key: Hashable, function: Callable, *args: Any, **jit_options: Any
  ) -> Any:
    """Returns the executable of `jit(function, **jit_options)` for arguments.

    Args:
      key: what the shapes and the function depend on.
      function: a pure function of arrays; traced only at the key's first use.
      *args: its arguments, or their shapes, dtypes and shardings.
      **jit_options: as for `jax.jit`; `out_shardings` may be a function that
        returns them, called at the key's first use: to find out the shapes of
        a result takes a trace.
    """
    if key not in self._compiled:
      start = self._clock()
      if callable(jit_options.get('out_shardings')):
        jit_options['out_shardings'] = jit_options['out_shardings']()
      jitted = jax.jit(function, **jit_options)
      self._compiled[key] = jitted.lower(*args).compile()
      # The collectives of a program do not wait long for a slow compiler.
      processes.barrier()
      self.seconds += self._clock() - start
    return processes.in_turn(self._compiled[key])

  def __call__(
    self, key: Hashable, function: Callable, *args: Any, **jit_options: Any
  ) -> Any:
    """Runs what `compile` returns, and returns what the function returns.

    Raises:
      TypeError: if the key was compiled for other shapes or dtypes.
    """
    return self.compile(key, function, *args, **jit_options)(*args)


class _Meter:
  """Counts what XLA compiles in this process, eager operations included."""

  def __init__(self) -> None:
    self.count = 0
    self.seconds = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **unused: Any) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      self.count += 1
    # Tracing, lowering and compiling; a hit of the persistent cache is a
    # short compilation.
    if event.startswith('/jax/core/compile/'):
      self.seconds += duration_secs


_METER = _Meter()


def compile_totals() -> tuple[int, float]:
  """Returns (compilations, seconds spent on them) since the import."""
  return _METER.count, _METER.seconds


def enable_compilation_cache() -> str:
  """Keeps compiled programs on disk between runs; returns the folder.

  `JAX_COMPILATION_CACHE_DIR` decides where, else a folder of the user's cache.
  The threshold of 1 s is lifted: the executables of a small model compile
  faster and are many.
  """
  folder = jax.config.values['jax_compilation_cache_dir']
  if not folder:
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(cache, 'rlax_llm', 'xla')
    jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return folder
