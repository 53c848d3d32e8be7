"""THE loop: warm start, then rollout -> reward -> batch -> update.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR

Rerunning the same command continues a run that was stopped.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import io
import time
from typing import Any
import uuid

from rlax_llm import evaluate as evaluation
from rlax_llm import report
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import field_classes
from rlax_llm.config import to_dict
from rlax_llm.config import validation
from rlax_llm.experience import advantages as credit
from rlax_llm.experience import step_metrics
from rlax_llm.experience import training_state
from rlax_llm.experience.collector import Collector
from rlax_llm.experience.training_state import TrainingState
from rlax_llm.learning import diagnostics
from rlax_llm.learning import teacher as teachers
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.learning.extrapolation import Leaps
from rlax_llm.learning.learner import Learner
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.runtime import monitor
from rlax_llm.runtime import processes
from rlax_llm.runtime.stopping import Diverged
from rlax_llm.runtime.stopping import Stopped
from rlax_llm.runtime.stopping import StopRequest
from rlax_llm.tasks import task as tasks
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.types import TrainState
from rlax_llm.workdir import checkpoint
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metrics
from rlax_llm.workdir.lock import lock_workdir
from rlax_llm.workdir.progress import Progress
from rlax_llm.workdir.run_statistics import RunStatistics
from rlax_llm.workdir.run_statistics import Stopwatch


def train_step(
  step: int,
  state: TrainingState,
  run: Run,
  collector: Collector,
  learner: Learner,
  reference: Params | None,
  drafter: DrafterTraining | None = None,
  leaps: Leaps | None = None,
) -> tuple[TrainingState, dict[str, Any], list[dict]]:
  """Runs one step: rollout -> reward -> batch -> update.

  Args:
    step: from 0.
    state: before the step; its train states are donated.
    run: the run.
    collector: samples and scores groups.
    learner: makes batches and updates.
    reference: parameters for the KL term.
    drafter: None: no network drafts.
    leaps: None: the objective takes none.

  Returns:
    (state, metrics of the step, sample rows for samples.jsonl).
  """
  watch = Stopwatch(run.clock)
  compiled = executables.compile_totals()
  states = state.train_states
  leaped: dict[str, float] = {}
  if leaps:
    states, leaped = leaps.before_step(step, states)
    watch.lap('leap')
  params = states['policy'].params
  drafts: dict[str, Any] = {'drafter_params': drafter_params(states)}
  if drafter:
    drafts['idle'] = drafter.idle_work(states['drafter'], params, step)

  # Rollouts and rewards.
  groups = credit.learned_groups(
    run, collector.collect(params, step, watch, **drafts), step
  )

  # Advantages.
  advantages = credit.advantages(run, groups)
  trained = credit.trained_samples(
    run, groups, collector.solved_at_first(groups)
  )
  watch.lap('reward')
  progress = collector.progress(
    params, step, groups, watch, drafter_params=drafter_params(states)
  )

  # Batch.
  samples = credit.training_samples(groups, advantages, trained, progress)
  critic = states['critic'].params if 'critic' in states else None
  prepared, padding = learner.prepare(
    params,
    samples,
    reference,
    critic=critic,
    rehearsed=collector.rehearsed(step),
  )
  watch.lap('score')
  rollouts = [r for group in groups for r in group.rollouts]
  diagnosis = learner.diagnose(
    params, samples, [r.token_version == step for r in rollouts], step
  )
  gap = step_metrics.sampling_gap(
    learner, collector.sampled, params, diagnosis, step
  )
  watch.lap('diagnose')

  # Update.
  run.on_boundary()  # the last time: `learn_all` takes the states
  states, values = learner.learn_all(states, prepared, step)
  experience = collector.learned()
  watch.lap('update')
  # The update's own sums leave out samples without an advantage.
  values = (
    {
      name: value
      for name, value in values.items()
      if name not in diagnostics.names(run.algorithm)
    }
    | learner.diagnose_update(states['policy'].params, diagnosis, reference)
    | gap
  )
  watch.lap('diagnose')
  if drafter:
    trained_drafter, more = drafter.after_step(
      states['drafter'],
      states['policy'].params,
      step,
      rollouts,
      sum(watch.seconds.values()),
    )
    states = states | {'drafter': trained_drafter}
    values |= more
    watch.lap('drafter')

  after = executables.compile_totals()
  values = step_metrics.step_metrics(
    run,
    step,
    groups,
    trained,
    values | leaped,
    collector.metrics(),
    padding,
    watch.seconds,
    (after[0] - compiled[0], after[1] - compiled[1]),
  )
  state.statistics.add_tokens(rollouts)
  state.statistics.add_reward(values['reward/mean'])
  state = state._replace(train_states=states, experience=experience)
  return state, values, step_metrics.sample_rows(groups, advantages)


def _make_display() -> Progress:
  """Returns where progress is shown: only process 0 shows it."""
  return Progress(None if processes.is_writer() else io.StringIO())


def _warn_left_out(
  progress: Progress, what: str, left_out: Sequence[str]
) -> None:
  """Warns of problems that could not be used, with one of them as example."""
  if left_out:
    progress.message(
      f'warning: {len(left_out)} {what} are left out; '
      f'for example, {left_out[0]}'
    )


def _initial_states(
  run: Run,
  progress: Progress,
  writer: metrics.MetricsWriter,
  drafter: DrafterTraining | None,
  leaps: Leaps | None,
) -> dict[str, TrainState]:
  """Returns train states, by a warm start if the config has one."""
  steps, updates = run.config.sft.steps, run.config.drafter.warmup_updates
  params = run.states.init_params()

  def show(done: int, loss: float) -> None:
    values = {'sft/loss': loss}
    progress.update(done, values)
    # Steps below 0: the warm start comes before step 0.
    writer.write(done - steps - 1, values)
    run.on_boundary()

  def show_drafter(done: int, loss: float) -> None:
    progress.update(done, {'drafter/loss': loss})
    run.on_boundary()

  if steps:
    progress.phase('warm start', steps)
    left_out: list[str] = []
    params = run.warm_start(params, show, left_out)
    _warn_left_out(progress, 'demonstrations', left_out)
  states = run.states.init_all(params)
  if leaps:
    states |= leaps.init(states)
  if drafter and updates:  # on the policy as RL finds it
    progress.phase('warm-up of the drafter', updates)
    left_out = []
    states['drafter'] = drafter.warm_up(
      states['drafter'], states['policy'].params, show_drafter, left_out
    )
    _warn_left_out(progress, 'demonstrations', left_out)
  progress.phase('evaluate', 0)
  return states


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
    # ---- Mesh, policy --------------------------------------------------------
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
    # ---- Task ----------------------------------------------------------------
    held_out = evaluation.held_out_problems(run)
    run.check_prompts(held_out)
    run.check_training_prompts()
    if config.sft.steps:
      next(run.demonstrations())
    teacher = teachers.find_teacher(
      config,
      run.algorithm,
      vocabulary=run.model.vocabulary,
      tokens=run.tokenizer.vocab_size,
      mesh=run.mesh,
      clock=run.clock,
    )
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
      # ---- Compiled steps ----------------------------------------------------
      engine = run.engine(run.sampling)
      law = evaluation.evaluation_sampling(run)
      judge = engine if law == run.sampling else run.engine(law)
      learner = run.learner(
        teacher=teachers.load_teacher(run.algorithm.teacher, teacher)
      )
      store = run.rollout_store()
      collector = Collector(
        run,
        engine,
        verifier,
        store,
        learner.score_samples,
        reads_sampler=learner.reads_sampler,
      )
      learns = run.states.draft_model is not None
      drafter = run.drafter_training() if learns else None

      def judged(
        states: dict[str, TrainState], problems: Sequence[tasks.Problem]
      ) -> Judged:
        return evaluation.judge(
          run,
          judge,
          states['policy'].params,
          verifier,
          problems,
          drafter_params=drafter_params(states),
        )[0]

      leaps = run.extrapolation(judged) if run.algorithm.leaps else None

      # ---- Restore -----------------------------------------------------------
      state = TrainingState(
        {}, collector.experience, RunStatistics(), engine, store
      )
      first: int | None = None
      found = training_state.restore(
        saved, run, state, collector, leaps.abstract() if leaps else {}
      )
      if found:
        first, state, more = found
        warnings += more
      saved_step = first  # the newest, on disk or on its way
      earlier = state.statistics.wall_seconds  # of the processes before
      seconds = lambda: earlier + run.clock() - started

      def save(step: int) -> None:
        """Saves the state after a step, unless a checkpoint has it."""
        nonlocal saved_step
        if step != saved_step:
          saved_step = step
          state.statistics.wall_seconds = seconds()
          training_state.save(saved, step, state)

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
      # ---- Loop --------------------------------------------------------------
      make_writer = (
        metrics.MetricsWriter if processes.is_writer() else metrics.NoWriter
      )
      with make_writer(
        workdir,
        resume_step=first,
        evaluated_step=state.statistics.evaluated_step,
        run_id=run_id,
        warn=lambda line: progress.message(f'warning: {line}'),
      ) as writer:
        if first is None:
          state = state._replace(
            train_states=_initial_states(run, progress, writer, drafter, leaps)
          )
          first = 0
        reference = run.states.reference(
          workdir, state.train_states['policy'].params, first
        )
        health = monitor.HealthMonitor(
          run.pool, config.learning, progress.message
        )

        def evaluate_and_save(done: int) -> None:
          """Does what is due after a step, unless that has been done."""
          last = done == config.num_steps
          due = lambda every: last or done == 0 or (every and done % every == 0)
          if (
            due(config.evaluate.every)
            and state.statistics.evaluated_step != done
          ):
            watch = Stopwatch(run.clock)
            try:
              values: dict[str, Any] = evaluation.evaluate(
                run,
                judge,
                state.train_states['policy'].params,
                verifier,
                held_out,
                drafter_params=drafter_params(state.train_states),
              )
            except Stopped:
              save(done)
              raise
            watch.lap('evaluate')
            health.check_sampling(
              f'evaluation after step {done}', judge.stats.warning()
            )
            writer.write(done, values | (watch.seconds if done else {}))
            state.statistics.add_accuracy(done, values['evaluate/accuracy'])
            progress.update(done, values)
          if due(config.checkpoint.every) and done != saved_step:
            watch = Stopwatch(run.clock)
            save(done)
            watch.lap('checkpoint')
            if done:
              writer.write(done, watch.seconds)

        # A stop may have come between the step and its evaluation.
        evaluate_and_save(first)
        progress.phase('reinforcement learning', config.num_steps)
        if profile:
          profile = (
            max(profile[0], first + 1),
            min(profile[1], config.num_steps),
          )
          profile = profile if profile[0] <= profile[1] else None
        with monitor.no_surprises():
          for step in range(first, config.num_steps):
            with monitor.profiled(step + 1, profile, workdir):
              try:
                state, values, rows = train_step(
                  step,
                  state,
                  run,
                  collector,
                  learner,
                  reference,
                  drafter,
                  leaps,
                )
              except (Stopped, ConfigError):
                # Raised before `learn_all`, which takes the states.
                save(step)
                raise
            _warn_left_out(progress, 'prompts', collector.left_out)
            health.check_sampling(
              f'step {step + 1}', collector.sampling_stats.warning()
            )
            health.check(step + 1, values)
            # Files first: what a checkpoint says happened has been written.
            writer.write_samples(step + 1, rows)
            writer.write(step + 1, values)
            progress.update(step + 1, values)
            evaluate_and_save(step + 1)
            if health.abort_reason:
              save(step + 1)
              raise Diverged(health.abort_reason)
      saved.wait()
  after = executables.compile_totals()
  summary = {
    'steps': config.num_steps,
    **dataclasses.asdict(state.statistics),
    'wall_seconds': seconds(),
    'compile_count': after[0] - compiled[0],
    'compile_seconds': after[1] - compiled[1],
    'parameters_sha256': checkpoint.digest_arrays(
      state.train_states['policy'].params
    ),
  }
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
