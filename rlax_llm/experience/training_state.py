"""Everything that a checkpoint holds, as one value."""

import dataclasses
from typing import Any
from typing import NamedTuple

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience.collector import Collector
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import dump
from rlax_llm.learning.train_states import OPTIONAL
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.runtime import processes
from rlax_llm.types import TrainState
from rlax_llm.workdir.checkpoint import Checkpoints
from rlax_llm.workdir.run_statistics import RunStatistics


class TrainingState(NamedTuple):
  """State of a run between two steps."""

  train_states: dict[str, TrainState]  # by name, 'policy' among them
  experience: Buffer
  statistics: RunStatistics
  engine: RolloutEngine  # its strategy learns from the lengths it has seen
  rollouts: RolloutStore  # past rollouts, drafted from


def save(saved: Checkpoints, step: int, state: TrainingState) -> None:
  """Saves the state after a step.

  Args:
    saved: the run's checkpoints.
    step: number of steps taken.
    state: after that step.
  """
  saved.save(
    step,
    state.train_states,
    {
      'progression': dataclasses.asdict(state.statistics),
      'rollouts': processes.gather(state.rollouts.dump(), to_writer=True),
      'experience': dump(state.experience),
      'strategy': state.engine.strategy.dump(),
    },
  )


def restore(
  saved: Checkpoints,
  run: Run,
  empty: TrainingState,
  collector: Collector,
  more: dict[str, Any],
) -> tuple[int, TrainingState, list[str]] | None:
  """Restores the newest checkpoint.

  Args:
    saved: the run's checkpoints.
    run: the run.
    empty: its engine and its past rollouts are filled in place.
    collector: takes over the experience.
    more: shapes of further train states, by name.

  Returns:
    (number of steps taken, state, warnings), or None without a checkpoint.

  Raises:
    ConfigError: past rollouts are of another tokenizer.
  """
  if not saved.steps():
    return None
  found = saved.restore(run.states.abstract_all() | more, optional=OPTIONAL)
  assert found is not None
  step, restored, host = found
  empty.engine.strategy.restore(host['strategy'])
  state = empty._replace(
    train_states=run.states.completed(restored),
    experience=collector.restore(host['experience']),
    statistics=RunStatistics(**host['progression']),
  )
  return step, state, restore_store(state.rollouts, host['rollouts'])


def restore_store(store: RolloutStore, texts: list[str]) -> list[str]:
  """Restores past rollouts; returns warnings.

  They are hints: a run continues without them where they cannot be read.

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
