"""Drafters beside a policy that moves: frozen, or adapted as it is trained.

  python -m experiments.tlt.drift

One RL run of a warm-started policy on a long-tailed task. Its rollouts teach
drafters that began alike: one is left as it is, one is trained behind every
step, one behind every tenth. Drafts change no token, so all of them see the
same policy. Every --every steps each drafts the same fixed requests; the table
holds its accepted tokens per forward, the policy's KL divergence from its
start, and what its training took. "Taming the Long Tail: Efficient Reasoning RL
Training with Adaptive Drafter", https://arxiv.org/abs/2511.16665. Writes
drift.csv into --out.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from experiments import common
from experiments import long_tail
from rlax_llm.components import Run
from rlax_llm.config import Config
from rlax_llm.config import freeze
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables
from rlax_llm.types import EVALUATE
from rlax_llm.types import Params
from rlax_llm.types import Rollout
from rlax_llm.types import TrainState

_OUT = flags.DEFINE_string('out', 'experiments/tlt', 'Where drift.csv goes.')
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model and the batch.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the run.')
_STEPS = flags.DEFINE_integer('steps', 150, 'RL steps.')
_EVERY = flags.DEFINE_integer('every', 15, 'Steps between two measurements.')
_WARMUP = flags.DEFINE_integer('warmup', 300, 'Updates of a drafter before RL.')
_RATE = flags.DEFINE_float('rate', 3e-4, "The policy's learning rate.")
_SHARE = flags.DEFINE_float(
  'share', 0.05, "Of the run's time, for training each drafter."
)
_DEPTH = flags.DEFINE_integer('depth', 7, 'Tokens that are drafted in a line.')

# Name -> `drafter.every`; the first drafts the run's own rollouts.
ARMS = {'every step': 1, 'every 10 steps': 10, 'frozen': 0}
_PROBLEMS = 16  # that are drafted at every measurement


def make_config(**changes: Any) -> Config:
  """Returns the config of a run that a network drafts for."""
  return long_tail.make_config(
    _SEED.value,
    _SIZE.value,
    num_steps=_STEPS.value,
    rollout__drafter='model',
    rollout__width=_DEPTH.value + 1,
    drafter__warmup_updates=_WARMUP.value,
    drafter__share=_SHARE.value,
    evaluate__problems=_PROBLEMS,
    learning__learning_rate=_RATE.value,
    algorithm__kl_coefficient=1e-6,
    **changes,
  )


class Drafters(DrafterTraining):
  """Trains the drafter of every arm on the rollouts of one run."""

  def __init__(self, run: Run) -> None:
    super().__init__(
      run.config,
      run.states,
      run.mesh,
      run.pool,
      networks=run.networks,
      demonstrations=run.demonstrations,
      row_length=run.row_length,
      clock=run.clock,
    )
    self._arms = {}
    for name, every in ARMS.items():
      drafter = dataclasses.replace(run.config.drafter, every=every)
      config = freeze(dataclasses.replace(run.config, drafter=drafter))
      self._arms[name] = dataclasses.replace(
        run, config=config
      ).drafter_training()
    self._engine = run.engine(run.sampling)
    problems = [run.task.problem('held_out', i) for i in range(_PROBLEMS)]
    self._requests = run.requests(problems, samples=4, domain=EVALUATE, step=0)
    self._arm_states: dict[str, TrainState] = {}
    self._last: dict[str, dict[str, float]] = {}
    self._totals = dict.fromkeys(ARMS, (0, 0.0))  # updates, seconds
    self.rows: list[dict[str, Any]] = []

  def warm_up(
    self,
    state: TrainState,
    policy: Params,
    show: Callable[[int, float], None],
    left_out: list[str] | None = None,
  ) -> TrainState:
    """Warms one drafter up, copies it, and measures."""
    state = super().warm_up(state, policy, show, left_out)
    self._arm_states = {name: jax.tree.map(jnp.copy, state) for name in ARMS}
    self._measure(0, policy)
    return state

  def after_step(
    self,
    state: TrainState,
    policy: Params,
    step: int,
    rollouts: Sequence[Rollout],
    seconds: float,
  ) -> tuple[TrainState, dict[str, float]]:
    """Trains every arm; the run drafts with the first."""
    for name, arm in self._arms.items():
      start = self._clock() - self._pool.seconds
      self._arm_states[name], values = arm.after_step(
        self._arm_states[name], policy, step, rollouts, seconds
      )
      took = self._clock() - self._pool.seconds - start
      updates, before = self._totals[name]
      self._totals[name] = (
        updates + int(values['drafter/updates']),
        before + took,
      )
    if (step + 1) % _EVERY.value == 0:
      self._measure(step + 1, policy)
    return jax.tree.map(jnp.copy, self._arm_states[next(iter(ARMS))]), {}

  def _measure(self, step: int, policy: Params) -> None:
    """Drafts the fixed requests with every arm."""
    row: dict[str, Any] = {'step': step, 'kl': ''}
    for name, state in self._arm_states.items():
      self._engine.generate(
        policy, self._requests, RolloutState(), drafter_params=state.params
      )
      stats = self._engine.stats
      row[name] = round(stats.tokens / stats.row_forwards, 3)
    for name, (updates, took) in self._totals.items():
      row[f'{name}: updates'], row[f'{name}: seconds'] = updates, round(took, 1)
    self.rows.append(row)


def main(argv: list[str]) -> None:
  """Trains once, prints and writes the table."""
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  warm = long_tail.warm_params(
    long_tail.make_config(_SEED.value, _SIZE.value), 'tally'
  )
  made: list[Drafters] = []

  def drafting(run: Run) -> DrafterTraining:
    made.append(Drafters(run))
    return made[0]

  seconds, shown = 0.0, 0
  for step, values in enumerate(
    long_tail.train(make_config(), warm, drafting=drafting), 1
  ):
    seconds += values['time/step'] - values['compile/seconds']
    rows = made[0].rows
    if rows[-1]['step'] == step:
      rows[-1]['kl'] = round(float(values['policy/kl_reference_k3']), 4)
      rows[-1]['reward'] = round(float(values['reward/mean']), 3)
      rows[-1]['run_seconds'] = round(seconds, 1)
    for row in rows[shown:]:
      print(row, flush=True)
    shown = len(rows)
  rows[0] |= {'kl': 0.0, 'reward': '', 'run_seconds': 0.0}
  common.write_csv(pathlib.Path(_OUT.value) / 'drift.csv', rows)


if __name__ == '__main__':
  app.run(main)
