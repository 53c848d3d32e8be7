"""The drafter's training beside RL: what it learns from, and for how long.

TLT trains its drafter where devices would idle, on rollouts of the last two
steps, long answers first ("Taming the Long Tail: Efficient Reasoning RL
Training with Adaptive Drafter", https://arxiv.org/abs/2511.16665). With one
mesh nothing idles: here it gets a share of the time between steps. The clock
decides how many updates that is, which it may: a drafter changes drafts and no
token.
"""

import collections
import functools
from typing import Callable, Sequence

import jax
import numpy as np

from rlax_llm import processes
from rlax_llm import sharding
from rlax_llm.learning import auxiliary
from rlax_llm.learning import batch as batches
from rlax_llm.learning.batch import Sample
from rlax_llm.run import Run
from rlax_llm.types import Batch
from rlax_llm.types import Params
from rlax_llm.types import Rollout
from rlax_llm.types import TrainState

_STEPS = 2  # whose rollouts are learned from
_SHOWN_EVERY = 10  # updates of the warm-up


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


class DrafterTraining:
  """Trains the drafter of a run."""

  def __init__(self, run: Run) -> None:
    """Prepares it; nothing is compiled yet.

    Args:
      run: its rollouts are drafted by a network.
    """
    self._run = run
    self._config = run.config.drafter
    self._recent: collections.deque[list[Sample]] = collections.deque(
        maxlen=_STEPS)
    self._allowed = 0.0  # seconds; below 0 after an update that took longer
    self._cost = 0.0  # seconds of the last update
    self._rng = np.random.default_rng(run.config.seed)

  def warm_up(self, state: TrainState, policy: Params,
              show: Callable[[int, float], None]) -> TrainState:
    """Returns the drafter after the updates on the task's traces.

    Args:
      state: the drafter's; donated.
      policy: the policy's parameters, as RL finds them.
      show: receives (updates done, loss) now and then.
    """
    config, run = self._config, self._run
    first = 0
    for done in range(1, config.warmup_updates + 1):
      # More than enough for one microbatch; what is left over is not used.
      samples = []
      room = config.microbatch_rows * run.row_length
      while room > 0:
        samples.append(run.demonstration(first))
        first += 1
        room -= len(samples[-1].prompt) + len(samples[-1].completion)
      state, loss = self._update(state, policy, self._pack(samples), 0)
      if done % _SHOWN_EVERY == 0 or done == config.warmup_updates:
        show(done, float(jax.device_get(loss)))
    return state

  def after_step(self, state: TrainState, policy: Params, step: int,
                 rollouts: Sequence[Rollout],
                 seconds: float) -> tuple[TrainState, dict[str, float]]:
    """Takes note of a step and trains, if there is time.

    Args:
      state: the drafter's; donated.
      policy: the policy's parameters, newest.
      step: from 0.
      rollouts: of the step.
      seconds: that the step took.

    Returns:
      (state, metrics; speed values).
    """
    config = self._config
    samples = [Sample(r.request.prompt, r.tokens) for r in rollouts]
    self._recent.append(keep_longest(samples, config.buffer_tokens))
    # Every process takes as many updates: the first one's clock decides.
    self._allowed += config.share * processes.broadcast(seconds)
    losses: list[float] = []
    if config.every and (step + 1) % config.every == 0:
      state, losses = self._train(state, policy)
    values = {'drafter/updates': float(len(losses))}
    if losses:
      values['drafter/loss'] = float(np.mean(losses))
    return state, values

  def _train(self, state: TrainState,
             policy: Params) -> tuple[TrainState, list[float]]:
    """Takes updates while time is left: at most one pass over the buffer."""
    losses: list[float] = []
    if self._allowed < self._cost:
      return state, losses
    batch = self._pack([s for samples in self._recent for s in samples])
    for place in self._rng.permutation(int(batch.count)):
      if self._allowed < self._cost:
        break
      start = self._now()
      state, loss = self._update(state, policy, batch, int(place))
      losses.append(float(jax.device_get(loss)))  # waits for the device
      self._cost = processes.broadcast(self._now() - start)
      self._allowed -= self._cost
    return state, losses

  def _now(self) -> float:
    """Returns seconds on a clock that stands still while XLA compiles."""
    return self._run.clock() - self._run.pool.seconds

  def _pack(self, samples: Sequence[Sample]) -> Batch:
    """Returns packed microbatches, on the host."""
    return batches.make_batch(samples,
                              reduction='token_mean',
                              constant=1,
                              row_length=self._run.row_length,
                              microbatch_rows=self._config.microbatch_rows)

  def _update(self, state: TrainState, policy: Params, batch: Batch,
              place: int) -> tuple[TrainState, jax.Array]:
    """Takes one update on one microbatch."""
    mesh = self._run.mesh
    window = auxiliary.DraftWindow(
        *(processes.put(getattr(batch, name)[place], sharding.rows(mesh))
          for name in ('tokens', 'positions', 'segments', 'targets')))
    learning = self._run.states.draft_learning
    return self._run.pool(
        ('drafter', window.tokens.shape, learning),
        functools.partial(auxiliary.update_drafter, learning=learning),
        state,
        policy,
        window,
        donate_argnums=(0,),
        out_shardings=(jax.tree.map(lambda x: x.sharding,
                                    state), sharding.replicated(mesh)))
