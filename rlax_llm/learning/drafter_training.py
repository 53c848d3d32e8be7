"""The drafter's training beside RL: what it learns from, and for how long.

TLT trains its drafter where devices would idle, on rollouts of the last two
steps, long answers first ("Taming the Long Tail: Efficient Reasoning RL
Training with Adaptive Drafter", https://arxiv.org/abs/2511.16665). So here:
with `mesh.replicas` the first replica that has nothing to do trains it until
the last answer is there. Where nothing idled it gets a share of the time
between steps. Clocks decide how many updates that is, which they may: a drafter
changes drafts and no token.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from rlax_llm.config import Config
from rlax_llm.learning import auxiliary
from rlax_llm.learning import batch as batches
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.train_states import States
from rlax_llm.runtime import processes
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import Batch
from rlax_llm.types import Params
from rlax_llm.types import Rollout
from rlax_llm.types import TrainState

_STEPS = 2  # whose rollouts are learned from
_SHOWN_EVERY = 10  # updates of the warm-up
_NEWEST = 0.2  # weight of the last update in their mean cost


def keep_longest(samples: Sequence[Sample], tokens: int) -> list[Sample]:
  """Returns the samples of the longest answers that fit into a budget.

  Args:
    samples: any number.
    tokens: prompts and completions together, at most.
  """
  kept, used = [], 0
  for sample in sorted(samples, key=lambda s: -len(s.completion)):
    used += len(sample.prompt) + len(sample.completion)
    if used > tokens:
      break
    kept.append(sample)
  return kept


@dataclasses.dataclass
class _Spot:
  """Training on the devices of a replica that idles, during one step."""

  mesh: Mesh
  state: TrainState  # the drafter's, copied there
  policy: Params
  learning: auxiliary.DraftLearning  # of networks bound to these devices
  batch: Batch
  places: Iterator[int]  # of microbatches, at most one pass
  losses: list[jax.Array] = dataclasses.field(default_factory=list)


class DrafterTraining:
  """Trains the drafter of a run."""

  def __init__(
    self,
    config: Config,
    states: States,
    mesh: Mesh,
    pool: ExecutablePool,
    *,
    networks: Callable[[Mesh], Any],
    demonstrations: Callable[[list[str] | None], Iterator[Sample]],
    row_length: int,
    clock: Callable[[], float],
  ) -> None:
    """Prepares it; nothing is compiled yet.

    Args:
      config: of a run whose rollouts are drafted by a network.
      states: of the run.
      mesh: of the run.
      pool: of compiled programs.
      networks: returns policy and drafter, bound to the devices of a mesh.
      demonstrations: yields samples of the task's solutions.
      row_length: L, tokens of a packed row.
      clock: seconds.
    """
    self._mesh, self._pool, self._clock = mesh, pool, clock
    self._states, self._networks = states, networks
    self._demonstrations = demonstrations
    self._row_length = row_length
    self._is_divided = config.mesh.replicas > 1
    self._config = config.drafter
    self._recent: collections.deque[list[Sample]] = collections.deque(
      maxlen=_STEPS
    )
    self._allowed = 0.0  # seconds; below 0 after an update that took longer
    self._cost = 0.0  # seconds of an update, a moving average
    self._compiled = pool.seconds  # as of the last step
    self._rng = np.random.default_rng(config.seed)
    self._spot: _Spot | None = None

  def warm_up(
    self,
    state: TrainState,
    policy: Params,
    show: Callable[[int, float], None],
    left_out: list[str] | None = None,
  ) -> TrainState:
    """Returns the drafter after the updates on the task's traces.

    Args:
      state: the drafter's; donated.
      policy: the policy's parameters, as RL finds them.
      show: receives (updates done, loss) now and then.
      left_out: see `Run.demonstrations`.
    """
    config = self._config
    demonstrations = self._demonstrations(left_out)
    for done in range(1, config.warmup_updates + 1):
      # More than enough for one microbatch; what is left over is not used.
      samples = []
      room = config.microbatch_rows * self._row_length
      while room > 0:
        samples.append(next(demonstrations))
        room -= len(samples[-1].prompt) + len(samples[-1].completion)
      state, loss = self._update(state, policy, self._pack(samples), 0)
      if done % _SHOWN_EVERY == 0 or done == config.warmup_updates:
        show(done, float(jax.device_get(loss)))
    return state

  def idle_work(
    self, state: TrainState, policy: Params, step: int
  ) -> Callable[[Mesh], None]:
    """Returns what a replica does that has no sample to decode.

    Args:
      state: the drafter's; it is copied by the first replica that idles.
      policy: the policy's parameters that sample.
      step: from 0.
    """
    config = self._config
    self._spot = None

    def begin(mesh: Mesh) -> _Spot:
      place = jax.tree.map(lambda x: x.sharding, sharding.on_part(state, mesh))
      copy = self._pool(
        ('copy_drafter', mesh),
        lambda tree: jax.tree.map(jnp.copy, tree),
        sharding.on_part(state, mesh),
        out_shardings=place,
      )
      networks = self._networks(mesh)
      assert networks.learned is not None
      learning = dataclasses.replace(
        self._states.draft_learning,
        model=networks.model,
        draft_model=networks.learned.draft_model,
      )
      batch = self._pack_recent()
      places = iter(self._rng.permutation(int(batch.count)).tolist())
      return _Spot(
        mesh, copy, sharding.on_part(policy, mesh), learning, batch, places
      )

    def work(mesh: Mesh) -> None:
      if self._spot is None:
        self._spot = begin(mesh)
      spot = self._spot
      # One update at a time: work that is given to the replica does not queue
      # behind more.
      busy: Any = spot.losses and spot.losses[-1]
      if spot.mesh != mesh or spot.losses and not busy.is_ready():
        return
      for place in spot.places:
        spot.state, loss = self._update(
          spot.state, spot.policy, spot.batch, place, spot.mesh, spot.learning
        )
        spot.losses.append(loss)
        return

    trains = (
      config.every
      and (step + 1) % config.every == 0
      and self._is_divided
      and any(self._recent)
    )
    return work if trains else lambda mesh: None

  def after_step(
    self,
    state: TrainState,
    policy: Params,
    step: int,
    rollouts: Sequence[Rollout],
    seconds: float,
  ) -> tuple[TrainState, dict[str, float]]:
    """Takes note of a step and trains, if there is time.

    Args:
      state: the drafter's; donated.
      policy: the policy's parameters, newest.
      step: from 0.
      rollouts: of the step.
      seconds: that the step took; what was compiled meanwhile earns nothing.

    Returns:
      (state, metrics; speed values).
    """
    config = self._config
    samples = [Sample(r.request.prompt, r.tokens) for r in rollouts]
    self._recent.append(keep_longest(samples, config.buffer_tokens))
    seconds = max(seconds - (self._pool.seconds - self._compiled), 0.0)
    # Every process takes as many updates: the first one's clock decides.
    earned = config.share * processes.broadcast(seconds)
    # What one pass leaves over, behind a long step, is not saved up: later
    # steps would give more than their share.
    self._allowed = min(
      self._allowed + earned, self._cost + max(config.every, 1) * earned
    )
    losses: list[float] = []
    spot, self._spot = self._spot, None
    if spot and spot.losses:
      state = jax.device_put(
        spot.state, jax.tree.map(lambda x: x.sharding, state)
      )
      losses = [float(jax.device_get(loss)) for loss in spot.losses]
    elif config.every and (step + 1) % config.every == 0:
      state, losses = self._train(state, policy)
    self._compiled = self._pool.seconds
    values = {
      'drafter/updates': float(len(losses)),
      'drafter/idle_updates': float(len(spot.losses) if spot else 0),
    }
    if losses:
      values['drafter/loss'] = float(np.mean(losses))
    return state, values

  def _train(
    self, state: TrainState, policy: Params
  ) -> tuple[TrainState, list[float]]:
    """Takes updates while time is left: at most one pass over the buffer."""
    losses: list[float] = []
    if self._allowed < self._cost:
      return state, losses
    start = self._now()
    batch = self._pack_recent()
    for place in self._rng.permutation(int(batch.count)):
      if self._allowed < self._cost:
        break
      state, loss = self._update(state, policy, batch, int(place))
      losses.append(float(jax.device_get(loss)))  # waits for the device
      # The first one pays for the packing.
      now = self._now()
      took, start = processes.broadcast(now - start), now
      self._cost += _NEWEST * (took - self._cost) if self._cost else took
      self._allowed -= took
    return state, losses

  def _now(self) -> float:
    """Returns seconds on a clock that stands still while XLA compiles."""
    return self._clock() - self._pool.seconds

  def _pack_recent(self) -> Batch:
    return self._pack([s for samples in self._recent for s in samples])

  def _pack(self, samples: Sequence[Sample]) -> Batch:
    """Returns packed microbatches, on the host."""
    return batches.make_batch(
      samples,
      reduction='token_mean',
      constant=1,
      row_length=self._row_length,
      microbatch_rows=self._config.microbatch_rows,
    )

  def _update(
    self,
    state: TrainState,
    policy: Params,
    batch: Batch,
    place: int,
    mesh: Mesh | None = None,
    learning: auxiliary.DraftLearning | None = None,
  ) -> tuple[TrainState, jax.Array]:
    """Takes one update on one microbatch, on the run's mesh or another."""
    mesh = mesh or self._mesh
    window = auxiliary.DraftWindow(
      *(
        processes.put(getattr(batch, name)[place], sharding.rows(mesh))
        for name in ('tokens', 'positions', 'segments', 'targets')
      )
    )
    learning = learning or self._states.draft_learning
    return self._pool(
      ('drafter', window.tokens.shape, learning, mesh),
      functools.partial(auxiliary.update_drafter, learning=learning),
      state,
      policy,
      window,
      donate_argnums=(0,),
      out_shardings=(
        jax.tree.map(lambda x: x.sharding, state),
        sharding.replicated(mesh),
      ),
    )
