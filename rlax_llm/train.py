"""THE loop: rollout, reward, advantages, batch, update, evaluate, checkpoint.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR

Rerunning the same command continues a run that was stopped.
"""

from collections.abc import Callable
import contextlib
import itertools
import time
from typing import Any

from rlax_llm import preflight
from rlax_llm import report
from rlax_llm import warm_start
from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.experience import advantages as credit
from rlax_llm.experience import rehearsal
from rlax_llm.experience import step_metrics
from rlax_llm.experience import training_state
from rlax_llm.experience.steps import make_steps
from rlax_llm.experience.steps import Steps
from rlax_llm.experience.training_state import TrainingState
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.runtime import monitor
from rlax_llm.runtime import processes
from rlax_llm.runtime.stopping import Diverged
from rlax_llm.runtime.stopping import Stopped
from rlax_llm.runtime.stopping import StopRequest
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.workdir import metrics
from rlax_llm.workdir.progress import Progress
from rlax_llm.workdir.run_files import RunFiles
from rlax_llm.workdir.run_statistics import Stopwatch


def train_step(
  step: int, state: TrainingState, steps: Steps, reference: Params | None
) -> tuple[TrainingState, dict[str, Any], list[dict]]:
  """Runs one step: rollout -> reward -> advantages -> batch -> update.

  Args:
    step: from 0.
    state: before the step; its train states are donated.
    steps: of the run.
    reference: parameters for the KL term; None: there is none.

  Returns:
    (state, metrics of the step, sample rows for samples.jsonl).
  """
  run, collector, learner = steps.run, steps.collector, steps.learner
  watch = Stopwatch(run.clock)
  states = state.train_states
  values: dict[str, Any] = {}
  if steps.leaps:
    states, values = steps.leaps.before_step(step, states)
    watch.lap('leap')
  params = states['policy'].params
  drafts: dict[str, Any] = {'drafter_params': drafter_params(states)}
  if steps.drafter:
    drafts['idle'] = steps.drafter.idle_work(states['drafter'], params, step)

  # ---- Rollouts (draft -> extend -> verify -> commit), rewards ---------------
  collector.publish(step, params, **drafts)
  for batch, requested in collector.plan(state.buffer, step):
    collector.dispatch(batch, step, requested)
    watch.lap('rollout')
    collector.reward(batch)
    watch.lap('reward')
  groups, buffer = collector.take(step)
  watch.lap('score')

  # ---- Advantages ------------------------------------------------------------
  groups = credit.learned_groups(run, groups, step)
  advantages = credit.advantages(run, groups)
  trained = credit.trained_samples(
    run, groups, rehearsal.is_solved(buffer, groups)
  )
  watch.lap('reward')
  progress = collector.progress(step, groups)
  watch.lap('progress')

  # ---- Batch -----------------------------------------------------------------
  samples = credit.training_samples(groups, advantages, trained, progress)
  batches, padding = learner.prepare(
    params,
    samples,
    reference,
    critic=states['critic'].params if 'critic' in states else None,
    rehearsed=rehearsal.samples(run, buffer, step),
  )
  watch.lap('score')
  rollouts = [r for group in groups for r in group.rollouts]
  diagnosis = step_metrics.diagnose(
    learner, params, samples, rollouts, collector.sampled, step
  )
  watch.lap('diagnose')

  # ---- Update ----------------------------------------------------------------
  run.on_boundary()  # the last time: `learn_all` takes the states
  states, update_values = learner.learn_all(states, batches, step)
  watch.lap('update')
  values |= step_metrics.update_metrics(run, update_values)
  values |= learner.diagnose_update(
    states['policy'].params, diagnosis, reference
  )
  watch.lap('diagnose')
  if steps.drafter:
    states['drafter'], more = steps.drafter.after_step(
      states['drafter'],
      states['policy'].params,
      step,
      rollouts,
      sum(watch.seconds.values()),
    )
    values |= more
    watch.lap('drafter')
  values |= collector.metrics() | {'learning/padding_fraction': padding}
  values |= step_metrics.step_metrics(run, step, groups, trained, watch)
  state = state._replace(
    train_states=states,
    buffer=buffer,
    statistics=state.statistics.with_step(rollouts, values['reward/mean']),
  )
  return state, values, step_metrics.sample_rows(groups, advantages)


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
    with_report: write report.html at the end.

  Returns:
    The summary, as in summary.json.

  Raises:
    ConfigError: for whatever the user got wrong, before any device work.
    Stopped: after SIGTERM or SIGINT; the state is saved, the same call
      continues.
    Diverged: the updates are not finite any more; the state is saved.
  """
  whole = Stopwatch(clock)
  with contextlib.ExitStack() as stack:
    # ---- Mesh, task, policy --------------------------------------------------
    stop = stack.enter_context(StopRequest())
    run = make_run(config, clock=clock, on_boundary=stop.check)
    config = run.config
    checked = preflight.check(run, workdir)
    executables.enable_compilation_cache()
    files = stack.enter_context(RunFiles(workdir, config, display))
    verifier = stack.enter_context(
      Verifier(config.task, config.seed, warn=files.warn)
    )

    # ---- Compiled steps ------------------------------------------------------
    steps = make_steps(run, verifier, checked.teacher)

    # ---- Restore -------------------------------------------------------------
    found, state, warnings = training_state.restore(files.checkpoints, steps)
    warnings = [*checked.warnings, *warnings]
    files.begin(found, state.statistics.evaluated_step, warnings, checked.facts)
    first = found or 0
    if found is None:
      states = warm_start.initial_states(steps, files)
      state = state._replace(train_states=states)
    policy = state.train_states['policy'].params
    reference = run.states.reference(workdir, policy, first)
    saver = training_state.Saver(files.checkpoints, found, whole)

    # ---- Loop ----------------------------------------------------------------
    writer, progress = files.writer, files.progress
    health = monitor.HealthMonitor(run.pool, config.learning, progress.message)
    profile = monitor.steps_within(profile, first + 1, config.num_steps)
    stack.enter_context(monitor.no_surprises())
    for step in itertools.count(first):  # steps done
      ends = step in (0, config.num_steps)
      is_due = lambda every: ends or (every and step % every == 0)
      try:
        # Due again where a stop came between a step and its evaluation.
        if (
          is_due(config.evaluate.every)
          and state.statistics.evaluated_step != step
        ):
          watch = Stopwatch(clock)
          values = steps.evaluator.evaluate(
            state.train_states['policy'].params,
            checked.held_out,
            drafter_params=drafter_params(state.train_states),
          )
          watch.lap('evaluate')
          accuracy = values['evaluate/accuracy']
          statistics = state.statistics.with_accuracy(step, accuracy)
          state = state._replace(statistics=statistics)
          health.check_sampling(
            f'evaluation after step {step}', steps.evaluator.stats.warning()
          )
          writer.write(step, values | (watch.seconds if step else {}))
          progress.update(step, values)
        if is_due(config.checkpoint.every) or health.abort_reason:
          watch = Stopwatch(clock)
          if saver.save(step, state) and step:
            watch.lap('checkpoint')
            writer.write(step, watch.seconds)
        if health.abort_reason:
          raise Diverged(health.abort_reason)
        if step == config.num_steps:
          break
        if step == first:
          progress.phase('reinforcement learning', config.num_steps)
        with monitor.profiled(step + 1, profile, workdir):
          state, values, rows = train_step(step, state, steps, reference)
      except (Stopped, ConfigError):
        saver.save(step, state)  # as it was before the step
        raise
      files.warn_left_out('prompts', steps.collector.left_out)
      health.check_sampling(f'step {step + 1}', steps.collector.stats.warning())
      health.check(step + 1, values)
      # Files first: what a checkpoint says happened has been written.
      writer.write_samples(step + 1, rows)
      writer.write(step + 1, values)
      progress.update(step + 1, values)
    files.checkpoints.wait()
  summary = saver.summary(config.num_steps, state)
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
    if processes.is_writer():
      print(f'{signal}: stopped; {training_state.describe_saved(workdir)}')
    return
  if processes.is_writer():
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
