# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""What a run writes: the files of metrics, samples and the summary.

Training values (functions of config, seed and step) go to metrics.jsonl, one
object per step, bit for bit the same in every repetition. Held-out results go
to evaluations.jsonl, which is reproducible likewise. Speed values go to
timing.jsonl with the run's id. All of them also go to TensorBoard.

Numbers in the files are exact: a float32 is written as the float64 that
equals it, in the shortest form that reads back to it. JSON has no NaN and no
infinity, so either is written as null; TensorBoard receives the value itself.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import json
import math
import os
import pathlib
import sys
from types import TracebackType
from typing import Any

import numpy as np

from rlax_llm.runtime import files
from rlax_llm.workdir import metric_names
from rlax_llm.workdir import tensorboard

METRICS_FILE = 'metrics.jsonl'
EVALUATIONS_FILE = 'evaluations.jsonl'
TIMING_FILE = 'timing.jsonl'
SAMPLES_FILE = 'samples.jsonl'
SUMMARY_FILE = 'summary.json'
SAMPLES_PER_STEP = 8


def jsonable(value: Any) -> Any:
  """Returns a value as JSON can hold it exactly; NaN and infinity as None.

  Args:
    value: nested dicts and sequences of strings, booleans, Python, NumPy or
      JAX numbers and arrays.

  Returns:
    The same, of plain Python types.
  """
  if value is None or isinstance(value, (str, bool)):
    return value
  if isinstance(value, Mapping):
    return {str(k): jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v) for v in value]
  if isinstance(value, (int, float)):
    return value if math.isfinite(value) else None
  array = np.asarray(value)
  if array.dtype.kind not in 'biuf':  # bfloat16 and its kin
    array = array.astype(np.float32)
  return jsonable(array.tolist())


def write_summary(
  workdir: str | os.PathLike[str], summary: Mapping[str, Any]
) -> None:
  """Writes summary.json, atomically.

  Args:
    workdir: the run's folder.
    summary: what to write; numbers may be NumPy or JAX scalars.
  """
  files.write_atomic(
    pathlib.Path(workdir) / SUMMARY_FILE,
    json.dumps(jsonable(summary), indent=2) + '\n',
  )


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the objects of a JSON-lines file.

  Args:
    path: the file; it may be missing.

  Returns:
    One dict per line, in order. Lines that are not JSON objects are left out:
    a killed run leaves a torn one.
  """
  if not os.path.isfile(path):
    return []
  rows = []
  with open(path, encoding='utf-8', errors='replace') as file:
    for line in file:
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(row, dict):
        rows.append(row)
  return rows


class MetricsWriter:
  """Writes a run's metrics and samples; flushed after every step."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    evaluated_step: int | None = None,
    run_id: str,
    warn: Callable[[str], None] | None = None,
  ) -> None:
    """Opens the files, keeping what belongs before the restored step.

    Args:
      workdir: the run's folder; made if missing.
      resume_step: the restored step: metrics.jsonl and samples.jsonl keep
        the lines up to it, whole ones only. None: the run starts from nothing,
        and so do these two files. timing.jsonl is always kept.
      evaluated_step: the last evaluation that the restored checkpoint knows
        of: evaluations.jsonl keeps the lines up to it. None: none.
      run_id: written into each line of timing.jsonl.
      warn: receives one line when TensorBoard's copy is lost; None: stderr
        does.

    Raises:
      WriteError: a file cannot be written; so do the methods.
    """
    root = pathlib.Path(workdir)
    with files.writing(root):
      root.mkdir(parents=True, exist_ok=True)
    self._run_id = run_id
    self._reproducible = {
      metric_names.TRAINING: _StepFile(root / METRICS_FILE, resume_step),
      metric_names.EVALUATION: _StepFile(
        root / EVALUATIONS_FILE, evaluated_step
      ),
    }
    _truncate(root / SAMPLES_FILE, resume_step)
    self._samples = files.JsonlFile(root / SAMPLES_FILE)
    self._timing = files.JsonlFile(root / TIMING_FILE)
    self._board = tensorboard.Board(
      root,
      # TensorBoard then hides what an interrupted run wrote beyond it.
      purge_step=None if resume_step is None else resume_step + 1,
      run_id=run_id,
      warn=warn or _to_stderr,
    )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one step's metrics, each to the file of its kind.

    Args:
      step: the step they belong to; above every step written before to
        the same file, timing.jsonl apart. A warm start may count up to 0 from
        below.
      values: scalars by name; the names are those of `METRICS`.

    Raises:
      ValueError: an unknown name, or a step already written.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
      kind = metric_names.describe(name).kind
      kinds.setdefault(kind, {})[name] = jsonable(value)
    speed = kinds.pop(metric_names.SPEED, None)
    for kind, found in kinds.items():
      self._reproducible[kind].write(step, found)
    if speed:
      self._timing.write(_line({'step': step, 'run': self._run_id}, speed))
    self._board.write(step, values)

  def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the first `SAMPLES_PER_STEP` rows to samples.jsonl.

    Args:
      step: the step they belong to.
      rows: `prompt`, `completion`, `reward`, `advantage` and whatever else
        tells a reader about the sample.
    """
    for row, _ in zip(rows, range(SAMPLES_PER_STEP)):
      self._samples.write(_line({'step': step}, jsonable(row)))

  def close(self) -> None:
    """Closes every file."""
    for file in self._reproducible.values():
      file.close()
    self._samples.close()
    self._timing.close()
    self._board.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


class NoWriter(MetricsWriter):
  """Writes nothing: of several processes one writes."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    evaluated_step: int | None,
    run_id: str,
    warn: Callable[[str], None],
  ) -> None:
    """Takes what `MetricsWriter` takes."""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Does nothing."""

  def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class _StepFile:
  """A file with one line for each step, in ascending order."""

  def __init__(self, path: pathlib.Path, last: int | None) -> None:
    """Opens the file and keeps its lines up to the step `last`; None: none."""
    self._name = path.name
    kept = _truncate(path, last)
    self._last = kept[-1] if kept else None
    self._file = files.JsonlFile(path)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    if self._last is not None and step <= self._last:
      raise ValueError(
        f'step {step} cannot be written to {self._name}: it '
        f'already holds step {self._last}; write the values of '
        'a step in one call'
      )
    self._file.write(_line({'step': step}, values))
    self._last = step

  def close(self) -> None:
    self._file.close()


def _line(head: Mapping[str, Any], values: Mapping[str, Any]) -> str:
  row = {**head, **{k: values[k] for k in sorted(values) if k not in head}}
  return json.dumps(row, allow_nan=False, ensure_ascii=False)


def _truncate(path: pathlib.Path, last: int | None) -> list[int]:
  """Keeps the whole lines of steps up to `last`; returns their steps."""
  if not path.exists():
    return []
  kept, steps = [], []
  with files.writing(path):
    lines = path.read_bytes().splitlines(keepends=True)
  for line in lines:
    try:
      step = json.loads(line.decode('utf-8'))['step']
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
    if (
      last is not None
      and isinstance(step, int)
      and step <= last
      and line.endswith(b'\n')
    ):
      kept.append(line)
      steps.append(step)
  files.write_atomic(path, b''.join(kept))
  return steps


def _to_stderr(line: str) -> None:
  print(f'warning: {line}', file=sys.stderr, flush=True)
