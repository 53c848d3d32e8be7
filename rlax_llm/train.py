"""THE loop: warm start, then rollout -> reward -> batch -> update.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR

Rerunning the same command continues a run that was stopped.
"""

import dataclasses
import time
from typing import Any, Callable
import uuid

import numpy as np

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
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.estimators import ESTIMATORS
from rlax_llm.progress import Progress
from rlax_llm.progression import Progression
from rlax_llm.progression import Stopwatch
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.run import make_run
from rlax_llm.run import Run
from rlax_llm.tasks.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import TRAIN
from rlax_llm.types import TrainState
from rlax_llm.warm_start import warm_start


@dataclasses.dataclass(frozen=True)
class Loop:
  """What every step of a run needs."""
  run: Run
  engine: RolloutEngine
  learner: learners.Learner
  verifier: Verifier
  reference: Params | None  # for the KL term
  store: RolloutStore  # past rollouts, to draft from
  progression: Progression  # updated in place


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


def group_advantages(run: Run, rewards: np.ndarray, lengths: np.ndarray,
                     unscorable: np.ndarray) -> np.ndarray:
  """Returns float32[B, G]: advantages of a batch of groups.

  Args:
    run: names the estimator.
    rewards: float32[B, G].
    lengths: int32[B, G], trained tokens.
    unscorable: bool[B, G]: their advantage is 0, whatever the rest says.
  """
  estimate = ESTIMATORS[run.algorithm.advantage]
  advantages = run.pool(('advantages', run.algorithm.advantage, rewards.shape),
                        estimate, rewards.astype(np.float32),
                        lengths.astype(np.int32))
  return np.where(unscorable, 0.0, np.asarray(advantages)).astype(np.float32)


def permuted(rewards: np.ndarray, seed: int, step: int) -> np.ndarray:
  """Returns the rewards shuffled among all samples of the step.

  The control experiment: with it, nothing must be learned.
  """
  rng = np.random.default_rng([seed, step])
  return rng.permutation(rewards.reshape(-1)).reshape(rewards.shape)


def coming_requests(run: Run, engine: RolloutEngine,
                    step: int) -> list[Request]:
  """Returns the requests of a coming step, if any use can be made of them.

  They are for hints only: whatever is wrong with them is reported in their own
  step, not here.
  """
  if not engine.runs_ahead or step >= run.config.num_steps:
    return []
  try:
    return run.requests(run.problems(step),
                        samples=run.config.rollout.samples_per_prompt,
                        domain=TRAIN,
                        step=step)
  except ConfigError:
    return []


def train_step(loop: Loop, step: int,
               state: TrainState) -> tuple[TrainState, dict, list]:
  """Runs one step: rollout -> reward -> batch -> update.

  Args:
    loop: the run's parts.
    step: from 0.
    state: donated.

  Returns:
    (state, metrics of the step, sample rows for samples.jsonl).
  """
  run, engine, store = loop.run, loop.engine, loop.store
  config, progression = run.config, loop.progression
  watch = Stopwatch(run.clock)
  compiled = executables.compile_totals()
  samples_per_prompt = config.rollout.samples_per_prompt
  problems = run.problems(step)
  requests = run.requests(problems,
                          samples=samples_per_prompt,
                          domain=TRAIN,
                          step=step)
  coming = coming_requests(run, engine, step + 1)
  rollouts, _ = engine.generate(state.params,
                                requests,
                                RolloutState(version=step, store=store),
                                ahead=coming)
  store.drop_hints(step)
  watch.lap('rollout')

  texts = [run.tokenizer.decode(rollout.tokens) for rollout in rollouts]
  repeated = [p for p in problems for _ in range(samples_per_prompt)]
  scores = loop.verifier.reward(repeated,
                                texts,
                                tokens=[r.length for r in rollouts],
                                finished=[r.finished for r in rollouts])
  shape = (len(problems), samples_per_prompt)
  rewards = scores.rewards.reshape(shape)
  if config.task.permute_rewards:
    rewards = permuted(rewards, config.seed, step)
  lengths = np.array([rollout.length for rollout in rollouts])
  advantages = group_advantages(run, rewards, lengths.reshape(shape),
                                scores.unscorable.reshape(shape))
  watch.lap('reward')

  samples = [
      Sample(prompt=rollout.request.prompt,
             completion=rollout.tokens,
             advantage=float(advantage),
             behaviour_logprobs=rollout.behaviour_logprobs)
      for rollout, advantage in zip(rollouts, advantages.reshape(-1))
  ]
  prepared, padding = loop.learner.prepare(state.params, samples,
                                           loop.reference)
  watch.lap('score')
  state, values = loop.learner.learn(state, prepared)
  watch.lap('update')

  progression.add_tokens(rollouts)
  progression.reward_last = float(np.mean(rewards))
  if progression.reward_first is None:
    progression.reward_first = progression.reward_last
  seconds = watch.seconds
  after = executables.compile_totals()
  parts = {f'reward/{name}': np.mean(v) for name, v in scores.parts.items()}
  numbers: dict[str, Any] = values | parts | {
      'reward/mean':
          np.mean(rewards),
      'reward/std':
          np.std(rewards),
      'reward/unscorable':
          int(np.sum(scores.unscorable)),
      'reward/groups_with_signal':
          np.mean(np.ptp(rewards, axis=-1) > 0),
      'rollout/length_mean':
          np.mean(lengths),
      'rollout/length_p50':
          np.percentile(lengths, 50),
      'rollout/length_p95':
          np.percentile(lengths, 95),
      'rollout/length_max':
          np.max(lengths),
      'rollout/truncated_fraction':
          np.mean([not r.finished for r in rollouts]),
      'policy/staleness_mean':
          np.mean([step - np.mean(r.token_version) for r in rollouts]),
      'learning/learning_rate':
          run.learning_rate(step),
      'learning/padding_fraction':
          padding,
      'rollout/drafted_fraction':
          np.mean(np.concatenate([r.drafted for r in rollouts])),
      **engine.stats.metrics(),
      'rollout/cache_bytes':
          store.bytes,
      'rollout/cached_prompts':
          len(store),
      **seconds,
      'time/step':
          sum(seconds.values()),
      'compile/count':
          after[0] - compiled[0],
      'compile/seconds':
          after[1] - compiled[1],
      'memory/update':
          run.pool.memory_bytes('update'),
      'memory/segment':
          run.pool.memory_bytes('segment'),
  }
  rows = [{
      'prompt': problem.prompt,
      'completion': text,
      'reward': float(reward),
      'advantage': float(advantage),
  } for problem, text, reward, advantage in zip(
      repeated, texts, rewards.reshape(-1), advantages.reshape(-1))]
  return state, numbers, rows


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
    facts = {} if saved.steps() else run.check_pretrained()
  executables.enable_compilation_cache()
  engine = run.engine(run.sampling)
  law = evaluation.evaluation_sampling(run)
  judge = engine if law == run.sampling else run.engine(law)
  learner = learners.make_learner(run)
  store = run.rollout_store()
  run_id = uuid.uuid4().hex[:8]

  with (Verifier(config.task, config.seed) as verifier,
        checkpoint.Checkpoints(workdir,
                               keep=config.checkpoint.keep,
                               warn=lambda line: progress.message(line)) as
        saved, display or Progress() as progress):
    # ---- Restore, or start with a warm start ---------------------------------
    found = saved.restore(run.abstract_state()) if saved.steps() else None
    first, restored, host = found or (0, None, {})
    state: Any = restored
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
      saved.save(step, state, host)

    def measure(params: Params) -> dict[str, float]:
      values = evaluation.evaluate(run, judge, params, verifier, held_out)
      progression.accuracy_after = values['evaluate/accuracy']
      return values

    with metrics.MetricsWriter(workdir,
                               resume_step=first if found else None,
                               run_id=run_id) as writer:
      if found:
        progress.message(f'continuing {workdir} after step {first}')
      else:
        params = run.init_params()
        if config.sft.steps:
          progress.phase('warm start', config.sft.steps)

          def show(done: int, loss: float) -> None:
            values = {'sft/loss': loss}
            progress.update(done, values)
            # Steps below 0: the warm start comes before step 0.
            writer.write(done - config.sft.steps - 1, values)

          params = warm_start(run, params, show)
        state = run.init_state(params)
        values = measure(state.params)
        progression.accuracy_before = progression.accuracy_after
        writer.write(0, values)
        progress.phase('evaluate', 0)
        progress.update(0, values)
        save(0)
      loop = Loop(run, engine, learner, verifier,
                  run.reference(workdir, state.params, first), store,
                  progression)

      # ---- Train ------------------------------------------------------------
      progress.phase('reinforcement learning', config.num_steps)
      for step in range(first, config.num_steps):
        state, values, rows = train_step(loop, step, state)
        done, last = step + 1, step + 1 == config.num_steps
        every = config.evaluate.every
        watch = Stopwatch(clock)
        if last or (every and done % every == 0):
          values |= measure(state.params)
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
          checkpoint.digest_arrays(state.params),
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
