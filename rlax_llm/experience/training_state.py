"""Everything that a checkpoint holds, as one value."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.experience import advantages
from rlax_llm.experience import groups
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.sampler import problem_stream
from rlax_llm.experience.steps import Steps
from rlax_llm.learning.train_states import OPTIONAL
from rlax_llm.runtime import processes
from rlax_llm.types import TRAIN
from rlax_llm.types import TrainState
from rlax_llm.workdir.checkpoint import Checkpoints
from rlax_llm.workdir.checkpoint import digest_arrays
from rlax_llm.workdir.run_statistics import RunStatistics
from rlax_llm.workdir.run_statistics import Stopwatch


class TrainingState(NamedTuple):
  """State of a run between two steps.

  Store and strategy are speed values: rollouts write into them, and no training
  value reads them. Everything else is replaced, never written into.
  """

  train_states: dict[str, TrainState]  # by name, 'policy' among them
  buffer: Buffer  # groups and counters that coming steps depend on
  statistics: RunStatistics
  store: RolloutStore  # past rollouts, drafted from
  strategy: Strategy  # chooses the drafts by what it has measured


class Saver:
  """Saves the state of a run, once after each step that is due."""

  def __init__(
    self, checkpoints: Checkpoints, saved: int | None, watch: Stopwatch
  ) -> None:
    """Saves nothing yet.

    Args:
      checkpoints: the run's.
      saved: the step that a checkpoint has; None: there is none.
      watch: started with the process.
    """
    self._checkpoints, self._saved, self._watch = checkpoints, saved, watch

  def save(self, step: int, state: TrainingState) -> bool:
    """Saves the state after a step; returns False if a checkpoint has it."""
    if step == self._saved:
      return False
    self._saved = step
    self._checkpoints.save(
      step,
      state.train_states,
      {
        'progression': dataclasses.asdict(state.statistics)
        | {'wall_seconds': self._seconds(state)},
        'rollouts': processes.gather(state.store.dump(), to_writer=True),
        'experience': groups.dump(state.buffer),
        'strategy': state.strategy.dump(),
      },
    )
    return True

  def summary(self, steps: int, state: TrainingState) -> dict[str, Any]:
    """Returns what summary.json holds.

    Args:
      steps: of the run.
      state: after the last one.
    """
    compilations, seconds = self._watch.compiled()
    return {
      'steps': steps,
      **dataclasses.asdict(state.statistics),
      'wall_seconds': self._seconds(state),
      'compile_count': compilations,
      'compile_seconds': seconds,
      'parameters_sha256': digest_arrays(state.train_states['policy'].params),
    }

  def _seconds(self, state: TrainingState) -> float:
    """Returns seconds of this process and of those before it."""
    return state.statistics.wall_seconds + self._watch.elapsed()


def first(
  steps: Steps, train_states: Mapping[str, TrainState]
) -> TrainingState:
  """Returns the state of a run before its first step."""
  return TrainingState(
    dict(train_states),
    Buffer(),
    RunStatistics(),
    steps.store,
    steps.engine.strategy,
  )


def restore(
  checkpoints: Checkpoints, steps: Steps
) -> tuple[int | None, TrainingState, list[str]]:
  """Restores the newest checkpoint.

  Args:
    checkpoints: the run's.
    steps: their store and strategy are filled in place.

  Returns:
    (number of steps taken, state, warnings); without a checkpoint (None, a
    state without train states, []).

  Raises:
    ConfigError: past rollouts are of another tokenizer.
  """
  run, strategy = steps.run, steps.engine.strategy
  if not checkpoints.steps():
    return None, first(steps, {}), []
  more = steps.leaps.abstract() if steps.leaps else {}
  found = checkpoints.restore(
    run.states.abstract_all() | more, optional=OPTIONAL
  )
  assert found is not None
  step, restored, host = found
  strategy.restore(host['strategy'])
  state = TrainingState(
    run.states.completed(restored),
    restore_buffer(run, host['experience']),
    RunStatistics(**host['progression']),
    steps.store,
    strategy,
  )
  return step, state, restore_store(steps.store, host['rollouts'])


def describe_saved(workdir: str) -> str:
  """Returns a phrase that says what the checkpoints of a run hold."""
  with Checkpoints(workdir) as checkpoints:
    steps = checkpoints.steps()
  if not steps:
    return 'nothing was saved yet'
  return (
    f'the state after step {steps[-1]} is saved, and the same command continues'
  )


def restore_buffer(run: Run, record: Mapping[str, Any]) -> Buffer:
  """Returns the buffer that `groups.dump` of an earlier process wrote."""
  return groups.restore(
    record,
    problem_stream(run),
    lambda prompt: run.encode(prompt, prompt=True),
    run.tokenizer.decode,
    functools.partial(advantages.judge, run),
    TRAIN,
  )


def restore_store(store: RolloutStore, texts: list[str]) -> list[str]:
  """Restores past rollouts; returns warnings.

  They are draft hints: a run continues without them if they cannot be read.

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
