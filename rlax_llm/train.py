"""THE loop: warm start, then rollout -> reward -> batch -> update.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR

Rerunning the same command continues a run that was stopped.
"""

import dataclasses
import time
from typing import Any, Callable
import uuid

from rlax_llm import checkpoint
from rlax_llm import evaluate as evaluation
from rlax_llm import executables
from rlax_llm import flags
from rlax_llm import learner as learners
from rlax_llm import manifest
from rlax_llm import metrics
from rlax_llm import report
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import to_dict
from rlax_llm.drafter_training import DrafterTraining
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience import Collector
from rlax_llm.progress import Progress
from rlax_llm.progression import Progression
from rlax_llm.progression import Stopwatch
from rlax_llm.run import make_run
from rlax_llm.states import drafter_params
from rlax_llm.states import OPTIONAL
from rlax_llm.step import Loop
from rlax_llm.step import train_step
from rlax_llm.tasks.verifier import Verifier
from rlax_llm.warm_start import warm_start


def restore_store(store: RolloutStore, text: str | None) -> list[str]:
  """Restores past rollouts; returns warnings.

  They are hints: a run goes on without them where they cannot be read.

  Raises:
    ConfigError: they are of another tokenizer.
  """
  try:
    store.restore(text or '')
  except ValueError as error:
    if isinstance(error, ConfigError):
      raise
    return [f'past rollouts are not restored, drafts start anew: {error}']
  return []


def train(config: Config,
          workdir: str,
          *,
          clock: Callable[[], float] = time.perf_counter,
          display: Progress | None = None) -> dict[str, Any]:
  """Trains, or continues a run that was stopped.

  Args:
    config: as a config file returned it.
    workdir: the run's folder.
    clock: seconds; read for timing only.
    display: where to show progress; None: stderr.

  Returns:
    The summary, as in summary.json.

  Raises:
    ConfigError: for whatever the user got wrong, before any device work.
  """
  started, compiled = clock(), executables.compile_totals()
  # ---- Config, data, model ---------------------------------------------------
  run = make_run(config, clock=clock)
  config = run.config
  warnings = manifest.check_workdir(workdir, to_dict(config))
  held_out = evaluation.held_out_problems(run)
  run.check_prompts([*held_out, *run.known_problems()])
  if config.sft.steps:
    run.demonstration(0)
  with checkpoint.Checkpoints(workdir) as saved:
    # A continued run has its parameters, and the weights may be gone.
    facts = {} if saved.steps() else run.states.check_pretrained()
  executables.enable_compilation_cache()
  engine = run.engine(run.sampling)
  law = evaluation.evaluation_sampling(run)
  judge = engine if law == run.sampling else run.engine(law)
  learner = learners.make_learner(run)
  drafter = DrafterTraining(run) if run.states.draft_model else None
  store = run.rollout_store()
  run_id = uuid.uuid4().hex[:8]

  with (Verifier(config.task, config.seed) as verifier,
        checkpoint.Checkpoints(workdir,
                               keep=config.checkpoint.keep,
                               warn=lambda line: progress.message(line)) as
        saved, display or Progress() as progress):
    # ---- Restore, or start with a warm start ---------------------------------
    found = None
    if saved.steps():
      found = saved.restore(run.states.abstract_all(), optional=OPTIONAL)
    first, states, host = found or (0, {}, {})
    progression = Progression(**host.get('progression', {}))
    if found:
      warnings += restore_store(store, host.get('rollouts'))
    warnings += manifest.write_manifest(workdir,
                                        to_dict(config),
                                        run_id=run_id,
                                        resume_step=first if found else None,
                                        extra=facts)
    for line in warnings:
      progress.message(f'warning: {line}')
    earlier = progression.wall_seconds

    def save(step: int) -> None:
      progression.wall_seconds = earlier + clock() - started
      host = {
          'progression': dataclasses.asdict(progression),
          'rollouts': store.dump(),
      }
      saved.save(step, states, host)

    def measure() -> dict[str, float]:
      values = evaluation.evaluate(run,
                                   judge,
                                   states['policy'].params,
                                   verifier,
                                   held_out,
                                   drafter_params=drafter_params(states))
      progression.accuracy_after = values['evaluate/accuracy']
      return values

    with metrics.MetricsWriter(workdir,
                               resume_step=first if found else None,
                               run_id=run_id) as writer:
      if found:
        progress.message(f'continuing {workdir} after step {first}')
        states = run.states.completed(states)
      else:
        params = run.states.init_params()
        if config.sft.steps:
          progress.phase('warm start', config.sft.steps)

          def show(done: int, loss: float) -> None:
            values = {'sft/loss': loss}
            progress.update(done, values)
            # Steps below 0: the warm start comes before step 0.
            writer.write(done - config.sft.steps - 1, values)

          params = warm_start(run, params, show)
        states = run.states.init_all(params)
        if drafter and config.drafter.warmup_updates:
          progress.phase('warm-up of the drafter',
                         config.drafter.warmup_updates)
          states['drafter'] = drafter.warm_up(
              states['drafter'], states['policy'].params,
              lambda done, loss: progress.update(done, {'drafter/loss': loss}))
        values = measure()
        progression.accuracy_before = progression.accuracy_after
        writer.write(0, values)
        progress.phase('evaluate', 0)
        progress.update(0, values)
        save(0)
      loop = Loop(run, Collector(run, engine, verifier, store), learner,
                  run.states.reference(workdir, states['policy'].params, first),
                  progression, drafter)

      # ---- Train ------------------------------------------------------------
      progress.phase('reinforcement learning', config.num_steps)
      for step in range(first, config.num_steps):
        states, values, rows = train_step(loop, step, states)
        done, last = step + 1, step + 1 == config.num_steps
        every = config.evaluate.every
        watch = Stopwatch(clock)
        if last or (every and done % every == 0):
          values |= measure()
          watch.lap('evaluate')
        # Files first: what a checkpoint says happened has been written.
        writer.write_samples(done, rows)
        writer.write(done, values | watch.seconds)
        progress.update(done, values)
        every = config.checkpoint.every
        if last or (every and done % every == 0):
          watch = Stopwatch(clock)
          save(done)
          watch.lap('checkpoint')
          writer.write(done, watch.seconds)

    # ---- Summary -------------------------------------------------------------
    saved.wait()
  after = executables.compile_totals()
  summary = {
      'steps':
          config.num_steps,
      **dataclasses.asdict(progression),
      'wall_seconds':
          earlier + clock() - started,
      'compile_count':
          after[0] - compiled[0],
      'compile_seconds':
          after[1] - compiled[1],
      'parameters_sha256':
          checkpoint.digest_arrays(states['policy'].params),
  }
  metrics.write_summary(workdir, summary)
  report.build_report(workdir)
  return summary


def main(argv: list[str]) -> None:
  """Trains as the command line says."""
  del argv
  summary = train(_CONFIG.value, _WORKDIR.value)
  before, after = summary['accuracy_before'], summary['accuracy_after']
  print(f'held-out accuracy {before:.3f} -> {after:.3f} in '
        f'{summary["wall_seconds"]:.0f} s; see {_WORKDIR.value}/report.html')


if __name__ == '__main__':
  _CONFIG = flags.DEFINE_config()
  _WORKDIR = flags.DEFINE_workdir()
  flags.run(main)
