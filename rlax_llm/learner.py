"""The compiled steps of learning, and the batches they take."""

import functools
from typing import Any, Sequence

import jax
import numpy as np

from rlax_llm import sharding
from rlax_llm.config import LearningConfig
from rlax_llm.learning import algorithms
from rlax_llm.learning import batch as batches
from rlax_llm.learning import update as updates
from rlax_llm.learning.batch import Sample
from rlax_llm.models import lora
from rlax_llm.ops.sampling import Sampling
from rlax_llm.run import Run
from rlax_llm.types import Array
from rlax_llm.types import Batch
from rlax_llm.types import Metrics
from rlax_llm.types import Params
from rlax_llm.types import TrainState


class Learner:
  """Packs samples, scores them and takes optimizer steps.

  One learner per objective: RL has one, the warm start has another.
  """

  def __init__(self, run: Run, *, algorithm: algorithms.Algorithm,
               sampling: Sampling, optimizer: Any, name: str,
               learning: LearningConfig) -> None:
    """Prepares a learner; nothing is compiled yet.

    Args:
      run: the run.
      algorithm: the objective.
      sampling: the law under which tokens are scored.
      optimizer: an optax transformation.
      name: tells its executables apart.
      learning: frozen section.
    """
    self._run = run
    self._algorithm = algorithm
    self._optimizer = optimizer
    self._name = name
    self._learning = learning
    self._config = updates.UpdateConfig(
        algorithm=algorithm,
        sampling=sampling,
        chunk=learning.score_chunk,
        old_is_current=self.old_is_current,
        old_is_behaviour=learning.old_logprobs == 'sampler')

  @property
  def old_is_current(self) -> bool:
    """Whether old log-probabilities are those of the update itself."""
    return (self._learning.minibatches == 1 and
            self._learning.old_logprobs == 'recompute')

  def pack(self,
           samples: Sequence[Sample],
           *,
           skip_without_signal: bool = False) -> Batch:
    """Returns one optimizer batch, on the host.

    Args:
      samples: the whole optimizer batch.
      skip_without_signal: leave out samples of advantage 0. They count in the
        denominators; their gradient is 0, so the update is the same.
    """
    keep = None
    if skip_without_signal and self._algorithm.linear_in_advantage:
      keep = np.array([s.advantage != 0 for s in samples])
    return batches.make_batch(samples,
                              reduction=self._algorithm.reduction,
                              constant=self._run.config.rollout.max_new_tokens,
                              row_length=self._run.row_length,
                              microbatch_rows=self._learning.microbatch_rows,
                              keep=keep)

  def put(self, batch: Batch) -> Batch:
    """Puts a batch on the mesh."""
    return sharding.put_batch(batch, self._run.mesh)

  def score(self, params: Params, batch: Batch) -> Array:
    """Returns log-probabilities of the batch's tokens, nats, on the mesh."""
    return self._run.pool(
        ('score', self._name, self._config, batch.tokens.shape),
        functools.partial(updates.score_batch,
                          model=self._run.model,
                          config=self._config),
        params,
        batch,
        out_shardings=sharding.microbatches(self._run.mesh))

  def update(self, state: TrainState,
             batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step; donates the state."""
    return self.compile_update(state, batch)(state, batch)

  def compile_update(self, state: TrainState, batch: Batch) -> Any:
    """Returns the executable of `update` for arrays, or for their shapes."""
    return self._run.pool.compile(
        ('update', self._name, self._config, batch.tokens.shape),
        functools.partial(updates.update,
                          model=self._run.model,
                          optimizer=self._optimizer,
                          config=self._config),
        state,
        batch,
        donate_argnums=(0,),
        out_shardings=(self._placement(state),
                       sharding.replicated(self._run.mesh)))

  def _placement(self, state: TrainState) -> Any:
    """Returns the shardings of a state, those it came with."""
    return jax.tree.map(lambda x: x.sharding, state)

  def prepare(self, params: Params, samples: Sequence[Sample],
              reference: Params | None) -> tuple[list[Batch], float]:
    """Packs and scores the optimizer batches of one batch of rollouts.

    Args:
      params: the policy's, before the first of the optimizer steps: old
        log-probabilities are all scored before any step moves them.
      samples: whole groups, in order; split evenly over
        `learning.minibatches` optimizer steps.
      reference: parameters for the KL term, or None; gaps stand for frozen
        ones, which are the policy's.

    Returns:
      (batches on the mesh, share of the computed positions without a token).
    """
    size = len(samples) // self._learning.minibatches
    packed = [
        self.pack(samples[i:i + size], skip_without_signal=True)
        for i in range(0, len(samples), size)
    ]
    padding = float(np.mean([batches.padding_fraction(b) for b in packed]))
    placed = [self.put(b) for b in packed]
    if self._learning.old_logprobs == 'sampler':
      placed = [b.replace(old_logprobs=b.behaviour_logprobs) for b in placed]
    elif not self.old_is_current:
      placed = [b.replace(old_logprobs=self.score(params, b)) for b in placed]
    if reference is not None:
      model = self._run.model
      reference = lora.join(reference,
                            lora.split(params, model.trainable(params))[1])
      placed = [
          b.replace(reference_logprobs=self.score(reference, b)) for b in placed
      ]
    return jax.block_until_ready(placed), padding

  def learn(self, state: TrainState,
            prepared: Sequence[Batch]) -> tuple[TrainState, dict[str, float]]:
    """Takes one optimizer step on each batch.

    Args:
      state: donated.
      prepared: from `prepare`.

    Returns:
      (state, training values: maxima where the name says so, else means over
      the optimizer steps).
    """
    steps = []
    for batch in prepared:
      state, values = self.update(state, batch)
      steps.append(values)
    fetched = jax.device_get(steps)
    over = lambda name: np.max if name.endswith('_max') else np.mean
    return state, {
        name: float(over(name)([values[name] for values in fetched]))
        for name in fetched[0]
    }


def make_learner(run: Run) -> Learner:
  """Returns the learner of the run's RL objective."""
  return Learner(run,
                 algorithm=run.algorithm,
                 sampling=run.sampling,
                 optimizer=run.states.optimizer,
                 name='policy',
                 learning=run.config.learning)
