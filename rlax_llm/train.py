"""THE loop: warm start, then rollout -> reward -> batch -> update.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR

Rerunning the same command continues a run that was stopped.
"""

from collections.abc import Callable
import contextlib
import io
import time
from typing import Any
import uuid

from rlax_llm import evaluate as evaluation
from rlax_llm import report
from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import field_classes
from rlax_llm.config import to_dict
from rlax_llm.config import validation
from rlax_llm.learning import teacher as teachers
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.runtime import processes
from rlax_llm.runtime.stopping import Stopped
from rlax_llm.runtime.stopping import StopRequest
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.trainer import Trainer
from rlax_llm.workdir import checkpoint
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metrics
from rlax_llm.workdir.lock import lock_workdir
from rlax_llm.workdir.progress import Progress


def _make_display() -> Progress:
  """Returns where progress is shown: of several processes one shows it."""
  return Progress(None if processes.is_writer() else io.StringIO())


def train(
  config: Config,
  workdir: str,
  *,
  clock: Callable[[], float] = time.perf_counter,
  display: Progress | None = None,
  profile: tuple[int, int] | None = None,
  with_report: bool = True,
) -> dict[str, Any]:
  """Trains, or continues a run that was stopped.

  Args:
    config: as a config file returned it.
    workdir: the run's folder.
    clock: seconds; read for timing only.
    display: where to show progress; None: stderr.
    profile: the first and the last step to trace into workdir/profile.
    with_report: write report.html and its plots at the end; they can be made
      later, by `rlax_llm.report`.

  Returns:
    The summary, as in summary.json.

  Raises:
    ConfigError: for whatever the user got wrong, before any device work.
    Stopped: after SIGTERM or SIGINT; the state is saved, the same call
      continues.
    Diverged: the updates are not finite any more; the state is saved.
  """
  started, compiled = clock(), executables.compile_totals()
  with StopRequest() as stop:
    run = make_run(config, clock=clock, on_boundary=stop.check)
    config = run.config
    if config.evaluate.early_stop:
      raise ConfigError(
        f'evaluate.early_stop={config.evaluate.early_stop} stops samples by '
        'their content: they come from another law than the policy, whose '
        'log-probabilities are not known; train with 0, and give it to '
        'rlax_llm.evaluate'
      )
    allowed = field_classes.MAY_DIFFER
    if run.algorithm.leaps:  # They are judged as held-out answers are.
      allowed -= {field_classes.EVALUATION}
    warnings = [
      *run.tokenizer.warnings,
      *manifest.check_workdir(workdir, to_dict(config), allow=allowed),
    ]
    held_out = evaluation.held_out_problems(run)
    run.check_prompts(held_out)
    run.check_training_prompts()
    if config.sft.steps:
      next(run.demonstrations())
    teacher = teachers.find_teacher(run)
    with checkpoint.Checkpoints(workdir) as saved:
      begins = not saved.steps()
    facts = {}
    if begins:  # Later the weights may be gone, and the run may end early.
      validation.check_durations(config, run.algorithm.critic_warmup)
      facts = run.states.check_pretrained()
    executables.enable_compilation_cache()
    run_id = uuid.uuid4().hex[:8]
    lock = (
      lock_workdir(workdir)
      if processes.is_writer()
      else contextlib.nullcontext()
    )
    with (
      lock,
      Verifier(
        config.task,
        config.seed,
        warn=lambda line: progress.message(f'warning: {line}'),
      ) as verifier,
      checkpoint.Checkpoints(
        workdir,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        warn=lambda line: progress.message(line),
      ) as saved,
      display or _make_display() as progress,
    ):
      trainer = Trainer(
        run,
        workdir=workdir,
        run_id=run_id,
        held_out=held_out,
        verifier=verifier,
        saved=saved,
        progress=progress,
        started=started,
        teacher=teacher,
      )
      first, more = trainer.restore()
      warnings += more
      if processes.is_writer():
        warnings += manifest.write_manifest(
          workdir,
          to_dict(config),
          run_id=run_id,
          resume_step=first,
          extra=facts,
        )
      for line in warnings:
        progress.message(f'warning: {line}')
      if first is not None:
        progress.message(f'continuing {workdir} after step {first}')
      trainer.go(first, profile)
      saved.wait()
  summary = trainer.summary(compiled)
  if processes.is_writer():
    metrics.write_summary(workdir, summary)
    if with_report:
      report.build_report(workdir)
  return summary


def main(argv: list[str]) -> None:
  """Trains as the command line says."""
  del argv
  workdir = _WORKDIR.value
  try:
    summary = train(_CONFIG.value, workdir, profile=_PROFILE.value)
  except Stopped as signal:
    with checkpoint.Checkpoints(workdir) as saved:
      steps = saved.steps()
    state = (
      f'the state after step {steps[-1]} is saved, and the same command '
      'continues'
      if steps
      else 'nothing was saved yet'
    )
    if processes.is_writer():
      print(f'{signal}: stopped; {state}')
    return
  if not processes.is_writer():
    return
  before, after = summary['accuracy_before'], summary['accuracy_after']
  print(
    f'held-out accuracy {before:.3f} -> {after:.3f} in '
    f'{summary["wall_seconds"]:.0f} s; see {workdir}/report.html'
  )


if __name__ == '__main__':
  _CONFIG = flags.DEFINE_config()
  _WORKDIR = flags.DEFINE_workdir()
  flags.DEFINE_processes()
  _PROFILE = flags.DEFINE_steps('profile_steps', 'trace these steps, A:B')
  flags.run(main)
