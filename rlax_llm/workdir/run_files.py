"""The files of a run, opened and closed together."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import io
import os
from typing import Any
import uuid

from rlax_llm.config import Config
from rlax_llm.config import to_dict
from rlax_llm.runtime import processes
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metrics
from rlax_llm.workdir.checkpoint import Checkpoints
from rlax_llm.workdir.lock import lock_workdir
from rlax_llm.workdir.progress import Progress


class RunFiles(contextlib.ExitStack):
  """Lock, checkpoints, manifest, metrics and progress of a run.

  Attributes:
    workdir: the run's folder.
    progress: what is shown while it runs; only process 0 shows it.
    checkpoints: the run's.
    writer: of metrics and samples; after `begin`.
  """

  writer: metrics.MetricsWriter

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    config: Config,
    display: Progress | None = None,
  ) -> None:
    """Opens nothing yet.

    Args:
      workdir: the run's folder.
      config: frozen.
      display: where progress is shown; None: stderr.
    """
    super().__init__()
    self.workdir = workdir
    self._config = config
    self._is_writer = processes.is_writer()
    self.progress = display or Progress(
      None if self._is_writer else io.StringIO()
    )
    self.checkpoints = Checkpoints(
      workdir,
      keep=config.checkpoint.keep,
      keep_every=config.checkpoint.keep_every,
      warn=self.progress.message,
    )

  def __enter__(self) -> 'RunFiles':
    if self._is_writer:
      self.enter_context(lock_workdir(self.workdir))
    self.enter_context(self.checkpoints)
    self.enter_context(self.progress)
    return self

  def warn(self, line: str) -> None:
    """Shows a warning."""
    self.progress.message(f'warning: {line}')

  def warn_left_out(self, what: str, left_out: Sequence[str]) -> None:
    """Warns of problems that could not be used, with one as an example."""
    if left_out:
      self.warn(
        f'{len(left_out)} {what} are left out; for example, {left_out[0]}'
      )

  def begin(
    self,
    resume_step: int | None,
    evaluated_step: int | None,
    warnings: Sequence[str],
    facts: Mapping[str, Any],
  ) -> None:
    """Writes the manifest, shows warnings, and opens the metrics.

    Args:
      resume_step: the step that was restored; None: the run begins.
      evaluated_step: the last one with an evaluation.
      warnings: found so far.
      facts: of published weights, for the manifest.
    """
    run_id = uuid.uuid4().hex[:8]
    make_writer: type[metrics.MetricsWriter] = metrics.NoWriter
    if self._is_writer:
      make_writer = metrics.MetricsWriter
      warnings = [
        *warnings,
        *manifest.write_manifest(
          self.workdir,
          to_dict(self._config),
          run_id=run_id,
          resume_step=resume_step,
          extra=facts,
        ),
      ]
    for line in warnings:
      self.warn(line)
    if resume_step is not None:
      self.progress.message(
        f'continuing {self.workdir} after step {resume_step}'
      )
    self.writer = self.enter_context(
      make_writer(
        self.workdir,
        resume_step=resume_step,
        evaluated_step=evaluated_step,
        run_id=run_id,
        warn=self.warn,
      )
    )
