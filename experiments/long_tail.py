"""A policy whose answers have a long tail, and runs of it under `control`.

The sums of experiments/srt/task.py and a small model. One warm start serves
every arm and seed of an experiment; it is kept in a file.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import pathlib
import tempfile
from typing import Any

from absl import flags
from flax import serialization
import jax
import numpy as np

from experiments import common
from experiments.srt import settings
from experiments.srt import workload
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.config import Config
from rlax_llm.experience import evaluation
from rlax_llm.experience import training_state
from rlax_llm.experience.steps import make_steps
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.train import train_step
from rlax_llm.types import Params

WARM = flags.DEFINE_string(
  'warm', None, 'Folder of warm starts; what it lacks is written there.'
)


def DEFINE_arms(arms: Sequence[str]) -> flags.FlagHolder:
  """Defines `--arms=A,B`: which of the arms are run.

  Args:
    arms: all; the others are compared with the first, which must be run.

  Returns:
    The holder; its `.value` are the names as given.
  """

  def check(given: Sequence[str]) -> bool:
    unknown = [name for name in given if name not in arms]
    if unknown or arms[0] not in given:
      raise flags.ValidationError(
        f'{unknown[0] if unknown else given!r}: name some of '
        f'{", ".join(arms)}, the first among them'
      )
    return True

  holder = flags.DEFINE_list(
    'arms', list(arms), 'Which to run, the first among them.'
  )
  flags.register_validator('arms', check)
  return holder


def make_config(seed: int, size: str, **changes: Any) -> Config:
  """Returns the config of a run: GRPO, without speculation.

  Args:
    seed: of problems, noise and order.
    size: of `srt.settings.SIZES`.
    **changes: fields by dotted path, '__' for the dot.
  """
  config = settings.make_config(size, 'grpo', 8, seed)
  for path, value in changes.items():
    section, _, name = path.rpartition('__')
    setattr(getattr(config, section) if section else config, name, value)
  return config


def _show(phase: str) -> Callable[[int, float], None]:
  """Returns what prints the loss now and then."""

  def show(done: int, loss: float) -> None:
    if not done % 100:
      print(f'{phase}: step {done}, loss {loss:.3f}', flush=True)

  return show


def warm_params(config: Config, name: str) -> Params:
  """Returns the parameters after the warm start, on the host.

  Args:
    config: of any run with the same model and task.
    name: of its file.
  """
  run = make_run(config)
  path = pathlib.Path(WARM.value) / name if WARM.value else None
  params = run.states.init_params()
  if path and path.exists():
    return serialization.from_bytes(
      jax.tree.map(np.array, params), path.read_bytes()
    )

  params = jax.tree.map(np.array, run.warm_start(params, _show('warm start')))
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialization.to_bytes(params))
  return params


def train(
  config: Config,
  warm: Params,
  *,
  drafting: Callable[[Run], DrafterTraining] | None = None,
) -> Iterator[dict[str, Any]]:
  """Trains a run; yields the metrics of each step, the last with accuracy.

  Args:
    config: of the run.
    warm: from `warm_params`.
    drafting: makes what trains the drafter, if the config has one; None: what
      a run has.
  """
  run = make_run(config, clock=workload.clock())
  config = run.config
  states = run.states.init_all(jax.tree.map(jax.numpy.asarray, warm))
  with Verifier(config.task, config.seed) as verifier:
    steps = make_steps(
      run, verifier, drafter=drafting(run) if drafting else None
    )
    reference = run.states.reference(
      tempfile.mkdtemp(), states['policy'].params, 0
    )
    if steps.drafter and config.drafter.warmup_updates:
      states['drafter'] = steps.drafter.warm_up(
        states['drafter'],
        states['policy'].params,
        _show('warm-up of the drafter'),
      )
    state = training_state.first(steps, states)
    for step in range(config.num_steps):
      state, values, _ = train_step(step, state, steps, reference)
      if step + 1 == config.num_steps:
        values |= steps.evaluator.evaluate(
          state.train_states['policy'].params,
          evaluation.held_out_problems(run),
          drafter_params=drafter_params(state.train_states),
        )
      yield values


def run_arms(
  arms: Sequence[str],
  seeds: int,
  run_arm: Callable[[str, int], dict[str, Any]],
  summarize: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
  out: pathlib.Path,
) -> None:
  """Runs every seed and arm; writes runs.csv and arms.csv after each seed.

  So a command that is stopped leaves what it has.

  Args:
    arms: in order.
    seeds: of each.
    run_arm: (arm, seed) -> what the run comes to.
    summarize: runs -> a row for each arm.
    out: where the tables go.
  """
  rows: list[dict[str, Any]] = []
  for seed in range(seeds):
    for arm in arms:
      rows.append(run_arm(arm, seed))
      print(rows[-1], flush=True)
    table = summarize(rows)
    common.write_csv(out / 'runs.csv', rows)
    common.write_csv(out / 'arms.csv', table)
    for row in table:
      print(row, flush=True)
