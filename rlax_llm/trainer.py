"""A run under way: its states, steps, evaluations and checkpoints."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from rlax_llm import evaluate as evaluation
from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience.collector import Collector
from rlax_llm.learning import learner as learners
from rlax_llm.learning import teacher as teachers
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.learning.extrapolation import Leaps
from rlax_llm.learning.supervised import warm_start
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.learning.train_states import OPTIONAL
from rlax_llm.learning.train_states import States
from rlax_llm.runtime import executables
from rlax_llm.runtime import monitor
from rlax_llm.runtime import processes
from rlax_llm.runtime.stopping import Diverged
from rlax_llm.runtime.stopping import Stopped
from rlax_llm.step import Loop
from rlax_llm.step import train_step
from rlax_llm.tasks import task as tasks
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import TrainState
from rlax_llm.workdir import checkpoint
from rlax_llm.workdir import metrics
from rlax_llm.workdir.progress import Progress
from rlax_llm.workdir.run_statistics import Progression
from rlax_llm.workdir.run_statistics import Stopwatch


def restore_store(store: RolloutStore, texts: list[str]) -> list[str]:
  """Restores past rollouts; returns warnings.

  They are hints: a run goes on without them where they cannot be read.

  Raises:
    ConfigError: they are of another tokenizer.
  """
  try:
    for text in texts:
      store.restore(text)
  except ValueError as error:
    if isinstance(error, ConfigError):
      raise
    return [f'past rollouts are not restored, drafts start anew: {error}']
  return []


class Trainer:
  """What `train` drives: restores or begins, takes steps, writes and saves."""

  def __init__(
    self,
    run: Run,
    *,
    workdir: str,
    run_id: str,
    held_out: Sequence[tasks.Problem],
    verifier: Verifier,
    saved: checkpoint.Checkpoints,
    progress: Progress,
    started: float,
    teacher: States | None,
  ) -> None:
    """Makes the parts that need no parameters.

    Args:
      run: the run.
      workdir: its folder.
      run_id: tells this process's rows in timing.jsonl apart.
      held_out: problems to evaluate on.
      verifier: gives rewards.
      saved: the run's checkpoints.
      progress: where to show progress.
      started: when the process began, by the run's clock.
      teacher: from `teachers.find_teacher`.
    """
    self.run = run
    self.progress = progress
    self._workdir = workdir
    self._run_id = run_id
    self._verifier = verifier
    self._saved = saved
    self._started = started
    self._held_out = held_out
    self._engine = engine = run.engine(run.sampling)
    law = evaluation.evaluation_sampling(run)
    self._judge = engine if law == run.sampling else run.engine(law)
    self._learner = learners.make_learner(
      run, teachers.load_teacher(run, teacher)
    )
    self._store = run.rollout_store()
    self._collector = Collector(
      run,
      engine,
      verifier,
      self._store,
      self._learner.score_samples,
      reads_sampler=self._learner.reads_sampler,
    )
    learns = run.states.draft_model is not None
    self._drafter = DrafterTraining(run) if learns else None
    self._leaps = Leaps(run, self._judged) if run.algorithm.leaps else None
    self.states: dict[str, TrainState] = {}
    self.progression = Progression()
    self._earlier = 0.0  # seconds, of the processes before this one
    self._saved_step: int | None = None  # the newest, on disk or on its way

  def restore(self) -> tuple[int | None, list[str]]:
    """Restores the newest checkpoint; returns (its step, warnings)."""
    if not self._saved.steps():
      return None, []
    states = self.run.states
    abstract = states.abstract_all()
    if self._leaps:
      abstract |= self._leaps.abstract()
    found = self._saved.restore(abstract, optional=OPTIONAL)
    assert found is not None
    step, restored, host = found
    self.states = states.completed(restored)
    self._saved_step = step
    self.progression = Progression(**host['progression'])
    self._earlier = self.progression.wall_seconds
    self._collector.restore(host['experience'])
    self._engine.strategy.restore(host['strategy'])
    return step, restore_store(self._store, host['rollouts'])

  def go(self, first: int | None, profile: tuple[int, int] | None) -> None:
    """Trains from where the checkpoint stands; None: from the start.

    Raises:
      Stopped: after a signal; what is needed to go on has been saved.
      Diverged: after too many updates that were not finite; likewise.
    """
    config, run = self.run.config, self.run
    make_writer = (
      metrics.MetricsWriter if processes.is_writer() else metrics.NoWriter
    )
    with make_writer(
      self._workdir,
      resume_step=first,
      evaluated_step=self.progression.evaluated_step,
      run_id=self._run_id,
      warn=lambda line: self.progress.message(f'warning: {line}'),
    ) as self._writer:
      if first is None:
        self._begin()
        first = 0
      params = self.states['policy'].params
      reference = run.states.reference(self._workdir, params, first)
      loop = Loop(
        run,
        self._collector,
        self._learner,
        reference,
        self.progression,
        self._drafter,
        self._leaps,
      )
      self._rails = rails = monitor.Rails(
        run.pool, config.learning, self.progress.message
      )
      # A stop may have come between the step and its evaluation.
      self._evaluate_and_save(first)
      self.progress.phase('reinforcement learning', config.num_steps)
      if profile:
        profile = max(profile[0], first + 1), min(profile[1], config.num_steps)
        profile = profile if profile[0] <= profile[1] else None
      with monitor.no_surprises():
        for step in range(first, config.num_steps):
          with monitor.profiled(step + 1, profile, self._workdir):
            try:
              self.states, values, rows = train_step(loop, step, self.states)
            except (Stopped, ConfigError):
              # Raised before `learn_all`, which takes the states.
              self._save(step)
              raise
          self._report_left_out('prompts', self._collector.left_out)
          rails.look_at_sampling(
            f'step {step + 1}', self._collector.sampling_stats.warning()
          )
          rails.look(step + 1, values)
          # Files first: what a checkpoint says happened has been written.
          self._writer.write_samples(step + 1, rows)
          self._writer.write(step + 1, values)
          self.progress.update(step + 1, values)
          self._evaluate_and_save(step + 1)
          if rails.lost:
            self._save(step + 1)
            raise Diverged(rails.lost)

  def summary(self, compiled: tuple[int, float]) -> dict[str, Any]:
    """Returns summary.json; `compiled` was compiled before the run."""
    after = executables.compile_totals()
    return {
      'steps': self.run.config.num_steps,
      **dataclasses.asdict(self.progression),
      'wall_seconds': self._seconds(),
      'compile_count': after[0] - compiled[0],
      'compile_seconds': after[1] - compiled[1],
      'parameters_sha256': checkpoint.digest_arrays(
        self.states['policy'].params
      ),
    }

  def _begin(self) -> None:
    """Makes the states, by a warm start if the config has one."""
    run, steps = self.run, self.run.config.sft.steps
    params = run.states.init_params()
    if steps:
      self.progress.phase('warm start', steps)

      def show(done: int, loss: float) -> None:
        values = {'sft/loss': loss}
        self.progress.update(done, values)
        # Steps below 0: the warm start comes before step 0.
        self._writer.write(done - steps - 1, values)
        run.on_boundary()

      left_out: list[str] = []
      params = warm_start(run, params, show, left_out)
      self._report_left_out('demonstrations', left_out)
    self.states = run.states.init_all(params)
    if self._leaps:
      self.states |= self._leaps.init(self.states)
    if self._drafter and run.config.drafter.warmup_updates:
      self._warm_up_drafter(self._drafter)
    self.progress.phase('evaluate', 0)

  def _warm_up_drafter(self, drafter: DrafterTraining) -> None:
    """Trains the drafter on the policy as RL finds it."""
    self.progress.phase(
      'warm-up of the drafter', self.run.config.drafter.warmup_updates
    )

    def show(done: int, loss: float) -> None:
      self.progress.update(done, {'drafter/loss': loss})
      self.run.on_boundary()

    left_out: list[str] = []
    self.states['drafter'] = drafter.warm_up(
      self.states['drafter'], self.states['policy'].params, show, left_out
    )
    self._report_left_out('demonstrations', left_out)

  def _report_left_out(self, what: str, left_out: Sequence[str]) -> None:
    """Warns of problems that could not be used, with one of them as example."""
    if left_out:
      self.progress.message(
        f'warning: {len(left_out)} {what} are left out; '
        f'for example, {left_out[0]}'
      )

  def _judged(
    self, states: dict[str, TrainState], problems: Sequence[tasks.Problem]
  ) -> Judged:
    """Returns which of some problems a policy solves."""
    judged, _ = evaluation.judge(
      self.run,
      self._judge,
      states['policy'].params,
      self._verifier,
      problems,
      drafter_params=drafter_params(states),
    )
    return judged

  def _evaluate_and_save(self, done: int) -> None:
    """Evaluates and saves what is due after a step, unless that has been done.

    Args:
      done: steps taken.
    """
    config = self.run.config
    last = done == config.num_steps
    due = lambda every: last or done == 0 or (every and done % every == 0)
    if due(config.evaluate.every) and self.progression.evaluated_step != done:
      watch = Stopwatch(self.run.clock)
      try:
        values: dict[str, Any] = evaluation.evaluate(
          self.run,
          self._judge,
          self.states['policy'].params,
          self._verifier,
          self._held_out,
          drafter_params=drafter_params(self.states),
        )
      except Stopped:
        self._save(done)
        raise
      watch.lap('evaluate')
      self._rails.look_at_sampling(
        f'evaluation after step {done}', self._judge.stats.warning()
      )
      self._writer.write(done, values | (watch.seconds if done else {}))
      self.progression.add_accuracy(done, values['evaluate/accuracy'])
      self.progress.update(done, values)
    if due(config.checkpoint.every) and done != self._saved_step:
      watch = Stopwatch(self.run.clock)
      self._save(done)
      watch.lap('checkpoint')
      if done:
        self._writer.write(done, watch.seconds)

  def _save(self, step: int) -> None:
    """Saves the states after a step, unless a checkpoint has them."""
    if step == self._saved_step:
      return
    self._saved_step = step
    self.progression.wall_seconds = self._seconds()
    self._saved.save(
      step,
      self.states,
      {
        'progression': dataclasses.asdict(self.progression),
        'rollouts': processes.gather(self._store.dump(), to_writer=True),
        'experience': self._collector.dump(),
        'strategy': self._engine.strategy.dump(),
      },
    )

  def _seconds(self) -> float:
    return self._earlier + self.run.clock() - self._started
