"""The compiled steps of learning, and the batches they take."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np
import optax

from rlax_llm.config import LearningConfig
from rlax_llm.learning import algorithms
from rlax_llm.learning import batch as batches
from rlax_llm.learning import critic as critics
from rlax_llm.learning import diagnostics
from rlax_llm.learning import gradient_norms
from rlax_llm.learning import token_credit
from rlax_llm.learning import update as updates
from rlax_llm.learning.batch import Sample
from rlax_llm.models import lora
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.sampling import Sampling
from rlax_llm.runtime import processes
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import Array
from rlax_llm.types import Batch
from rlax_llm.types import Metrics
from rlax_llm.types import Params
from rlax_llm.types import TrainState


class Teacher(NamedTuple):
  """The teacher of a distillation: any model of the same vocabulary."""

  model: LanguageModel
  params: Params  # on the mesh


class Critic(NamedTuple):
  """The critic of an objective with a value function."""

  model: LanguageModel
  optimizer: optax.GradientTransformation


class BatchShape(NamedTuple):
  """Sizes of packed batches, tokens."""

  row_length: int  # L
  prompt_length: int  # P, of the longest prompt
  max_new_tokens: int  # T


class Diagnosis(NamedTuple):
  """A random subset of a step's samples, scored before the update."""

  batch: Batch  # on the mesh, [1, R, L]
  logprobs: Array  # float32[1, R, L], nats, on the mesh
  values: dict[str, Array]  # metrics of the policy before the update


class Learner:
  """Packs samples, scores them and takes optimizer steps.

  One learner per objective: RL has one, the warm start has another.
  """

  def __init__(
    self,
    model: LanguageModel,
    algorithm: algorithms.Algorithm,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    pool: ExecutablePool,
    *,
    sampling: Sampling,
    learning: LearningConfig,
    shape: BatchShape,
    name: str,
    seed: int = 0,
    is_off_policy: bool = False,
    critic: Critic | None = None,
    teacher: Teacher | None = None,
  ) -> None:
    """Prepares a learner; nothing is compiled yet.

    Args:
      model: the policy's.
      algorithm: the objective.
      optimizer: the policy's.
      mesh: where batches and states lie.
      pool: of compiled programs.
      sampling: the law under which tokens are scored.
      learning: frozen section.
      shape: of packed batches.
      name: tells its executables apart.
      seed: of the run; it draws the diagnosed samples.
      is_off_policy: whether a batch may hold tokens of an earlier policy.
      critic: for objectives that have one.
      teacher: for objectives that have one.
    """
    self._model = model
    self._mesh = mesh
    self._pool = pool
    self._shape = shape
    self._seed = seed
    self._is_off_policy = is_off_policy
    self._critic = critic
    self._teacher = teacher
    self._reads = token_credit.reads(algorithm)
    self._algorithm = algorithm
    self._optimizer = optimizer
    self._name = name
    self._learning = learning
    self._config = updates.UpdateConfig(
      algorithm=algorithm,
      sampling=sampling,
      chunk=learning.score_chunk,
      old_is_current=self.old_is_current,
      old_logprobs=learning.old_logprobs,
    )

  @property
  def old_is_current(self) -> bool:
    """Whether old log-probabilities are those of the update itself."""
    return (
      self._learning.minibatches == 1
      and self._learning.old_logprobs != 'sampler'
    )

  def pack(
    self, samples: Sequence[Sample], *, skip_without_signal: bool = False
  ) -> Batch:
    """Returns one optimizer batch, on the host.

    Args:
      samples: the whole optimizer batch.
      skip_without_signal: leave out samples of advantage 0. They count in the
        denominators; their gradient is 0, so the update is the same.
    """
    keep = None
    if skip_without_signal and self._algorithm.linear_in_advantage:
      keep = np.array([s.advantage != 0 or s.rehearsed for s in samples])
    return batches.make_batch(
      samples,
      reduction=self._algorithm.reduction,
      constant=self._shape.max_new_tokens,
      row_length=self._shape.row_length,
      microbatch_rows=self._learning.microbatch_rows,
      keep=keep,
      extra=token_credit.carried(self._algorithm),
    )

  def put(self, batch: Batch) -> Batch:
    """Puts a batch on the mesh."""
    return sharding.put_batch(batch, self._mesh)

  def score(self, params: Params, batch: Batch) -> Array:
    """Returns log-probabilities of the batch's tokens, nats, on the mesh."""
    return self._pass(batch, params, 'score', updates.score_batch, self._model)

  def _pass(
    self,
    batch: Batch,
    params: Params,
    name: str,
    function: Callable[..., Any],
    model: LanguageModel,
    **static: Any,
  ) -> Any:
    """Runs a pass over a batch; its arrays come out placed as the batch is."""
    return self._pool(
      (name, self._name, self._config, batch.tokens.shape, *static.values()),
      functools.partial(function, model=model, config=self._config, **static),
      params,
      batch,
      out_shardings=sharding.microbatches(self._mesh),
    )

  def score_samples(
    self, params: Params, samples: Sequence[Sample]
  ) -> list[np.ndarray]:
    """Returns the log-probabilities of each completion's tokens, nats."""
    scores = self.score(params, self.put(self.pack(samples)))
    return batches.unpack(processes.whole(scores), samples)

  @property
  def reads_sampler(self) -> bool:
    """Whether a stale token's log-probability when it was sampled is read."""
    return (
      self._learning.old_logprobs == 'scored'
      or token_credit.reads_sampler(self._algorithm)
    )

  def diagnose(
    self,
    params: Params,
    samples: Sequence[Sample],
    fresh: Sequence[np.ndarray],
    step: int,
  ) -> Diagnosis:
    """Scores a random subset of samples, of a fixed shape.

    As many are drawn as fit into one microbatch whatever their lengths.

    Args:
      params: the policy's, before the update.
      samples: of one step.
      fresh: bool[c] of each sample: the tokens that `params` sampled.
      step: from 0.
    """
    longest = self._shape.prompt_length + self._shape.max_new_tokens
    rows = self._learning.microbatch_rows
    chosen = diagnostics.choose(
      len(samples),
      rows * (self._shape.row_length // longest),
      seed=self._seed,
      step=step,
    )
    batch = self.put(
      batches.make_batch(
        [
          dataclasses.replace(
            samples[i], trained=True, extra={diagnostics.FRESH: fresh[i]}
          )
          for i in chosen
        ],
        reduction='token_mean',
        constant=self._shape.max_new_tokens,
        row_length=self._shape.row_length,
        microbatch_rows=rows,
        extra=(diagnostics.FRESH,),
      )
    )
    scores = self._diagnostic_scores(params, batch)
    values = self._pool(
      ('before_update', batch.tokens.shape),
      diagnostics.before_update,
      batch,
      scores['logprobs'],
      scores['entropy'],
      out_shardings=sharding.replicated(self._mesh),
    )
    if not any(fresh[i].any() for i in chosen):
      del values['policy/behaviour_gap_max']
    return Diagnosis(batch, scores['logprobs'], values)

  def diagnose_update(
    self, params: Params, diagnosis: Diagnosis, reference: Params | None
  ) -> dict[str, float]:
    """Returns the metrics of a diagnosis, and those of the update after it.

    Args:
      params: the policy's, after the update.
      diagnosis: from `diagnose`.
      reference: for the divergence from it; None: there is none.
    """
    batch = diagnosis.batch
    if reference is not None:
      reference = self._diagnostic_scores(
        self._whole(reference, params), batch
      )['logprobs']
    values = self._pool(
      (
        'after_update',
        self._name,
        self._config,
        batch.tokens.shape,
        reference is None,
      ),
      functools.partial(diagnostics.after_update, config=self._config),
      batch,
      diagnosis.logprobs,
      self._diagnostic_scores(params, batch)['logprobs'],
      reference,
      out_shardings=sharding.replicated(self._mesh),
    )
    if self._is_off_policy and not self.reads_sampler:
      # Its stale tokens were not scored when they were sampled.
      del values['policy/effective_tokens']
    found = jax.device_get(diagnosis.values | values)
    return {name: float(value) for name, value in found.items()}

  def _diagnostic_scores(
    self, params: Params, batch: Batch
  ) -> dict[str, Array]:
    return self._pass(
      batch,
      params,
      'diagnose',
      updates.score_pass,
      self._model,
      names=('logprobs', 'entropy'),
    )

  def _whole(self, reference: Params, params: Params) -> Params:
    """Returns a reference policy whose gaps hold the policy's frozen ones."""
    frozen = lora.split(params, self._model.trainable(params))[1]
    return lora.join(reference, frozen)

  def update(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step; donates the state."""
    return self.compile_update(state, batch)(state, batch)

  def compile_update(self, state: TrainState, batch: Batch) -> Any:
    """Returns the executable of `update` for arrays, or for their shapes."""
    return self._pool.compile(
      ('update', self._name, self._config, batch.tokens.shape),
      functools.partial(
        updates.update,
        model=self._model,
        optimizer=self._optimizer,
        config=self._config,
      ),
      state,
      batch,
      donate_argnums=(0,),
      out_shardings=(self._placement(state), sharding.replicated(self._mesh)),
    )

  def _placement(self, state: TrainState) -> Any:
    """Returns the shardings of a state, those it came with."""
    return jax.tree.map(lambda x: x.sharding, state)

  def prepare(
    self,
    params: Params,
    samples: Sequence[Sample],
    reference: Params | None,
    *,
    critic: Params | None = None,
    rehearsed: Sequence[Sample] = (),
  ) -> tuple[list[Batch], float]:
    """Packs and scores the optimizer batches of one batch of rollouts.

    Args:
      params: the policy's, before the first of the optimizer steps: old
        log-probabilities are all scored before any step moves them.
      samples: whole groups, in order; as many of them in each of
        `learning.minibatches` optimizer steps.
      reference: parameters for the KL term, if the objective has one, or
        None; gaps stand for frozen ones, which are the policy's.
      critic: its parameters, where there is one.
      rehearsed: of the initial policy, dealt to the optimizer steps.

    Returns:
      (batches on the mesh, share of the computed positions without a token).
    """
    steps = self._learning.minibatches
    packed = [
      self.pack([*part, *rehearsed[i::steps]], skip_without_signal=True)
      for i, part in enumerate(_split(samples, steps))
    ]
    padding = float(np.mean([batches.padding_fraction(b) for b in packed]))
    placed = [self._score_old(params, self.put(b)) for b in packed]
    if reference is not None and self._algorithm.kl_coefficient:
      reference = self._whole(reference, params)
      placed = [
        b.replace(reference_logprobs=self.score(reference, b)) for b in placed
      ]
    if token_credit.is_shaped(self._algorithm):
      placed = [self.shape(params, b, critic) for b in placed]
    return jax.block_until_ready(placed), padding

  def _score_old(self, params: Params, batch: Batch) -> Batch:
    """Returns the batch with old log-probabilities, where they are read."""
    if self._learning.old_logprobs == 'sampler':
      return batch.replace(old_logprobs=batch.behaviour_logprobs)
    if self.old_is_current and 'old_logprobs' not in self._reads:
      return batch
    return batch.replace(old_logprobs=self.score(params, batch))

  def shape(self, params: Params, batch: Batch, critic: Params | None) -> Batch:
    """Returns the batch with what the objective reads of it as a whole.

    Args:
      params: the policy's, before the first step on the batch.
      batch: on the mesh; with old log-probabilities where they are read.
      critic: its parameters, where there is one.
    """
    extra = dict(batch.extra)
    of_policy = tuple(sorted(self._reads & {'entropy', 'confidence'}))
    if of_policy:
      extra |= self._pass(
        batch, params, 'score', updates.score_pass, self._model, names=of_policy
      )
    if 'squared_norms' in self._reads:
      extra['squared_norms'] = self._pass(
        batch,
        params,
        'gradient_norms',
        gradient_norms.squared_norms,
        self._model,
      )
    if 'values' in self._reads:
      assert self._critic is not None, 'the objective has a critic'
      extra['values'] = self._pool(
        ('values', self._name, batch.tokens.shape),
        functools.partial(critics.value_batch, model=self._critic.model),
        critic,
        batch,
        out_shardings=sharding.microbatches(self._mesh),
      )
    if 'teacher_logprobs' in self._reads:
      assert self._teacher is not None, 'the objective has a teacher'
      extra['teacher_logprobs'] = self._pass(
        batch,
        self._teacher.params,
        'teacher',
        updates.score_batch,
        self._teacher.model,
      )
    batch = batch.replace(extra=extra)
    shape = functools.partial(token_credit.shape, algorithm=self._algorithm)
    placement = lambda: jax.tree.map(
      lambda x: (
        sharding.microbatches(self._mesh)
        if x.ndim
        else sharding.replicated(self._mesh)
      ),
      jax.eval_shape(shape, batch),
    )
    return self._pool(
      ('shape', self._name, self._config, batch.tokens.shape),
      shape,
      batch,
      out_shardings=placement,
    )

  def learn(
    self, state: TrainState, prepared: Sequence[Batch]
  ) -> tuple[TrainState, dict[str, float]]:
    """Takes one optimizer step of the policy on each batch.

    Args:
      state: donated.
      prepared: from `prepare`.

    Returns:
      (state, training values: extremes where the name says so, else means over
      the optimizer steps).
    """
    return _each(self.update, state, prepared)

  def learn_all(
    self, states: Mapping[str, TrainState], prepared: Sequence[Batch], step: int
  ) -> tuple[dict[str, TrainState], dict[str, float]]:
    """Takes the optimizer steps of everything that is trained.

    Args:
      states: by name; donated.
      prepared: from `prepare`.
      step: RL steps before this one; in the first ones of a warm-up the
        critic learns alone.

    Returns:
      (states, training values).
    """
    states = dict(states)
    values: dict[str, float] = {}
    if self._algorithm.has_critic:
      states['critic'], values = _each(
        self._update_critic, states['critic'], prepared
      )
    if step >= self._algorithm.critic_warmup:
      states['policy'], more = self.learn(states['policy'], prepared)
      values |= more
    skipped = values.get('learning/skipped', 0.0)
    values['learning/skipped'] = max(skipped, values.pop('critic/skipped', 0.0))
    return states, values

  def _update_critic(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step of the critic; donates its state."""
    assert self._critic is not None, 'the objective has a critic'
    return self._pool(
      ('update_critic', self._name, self._config, batch.tokens.shape),
      functools.partial(
        critics.update,
        model=self._critic.model,
        optimizer=self._critic.optimizer,
        algorithm=self._algorithm,
      ),
      state,
      batch,
      donate_argnums=(0,),
      out_shardings=(self._placement(state), sharding.replicated(self._mesh)),
    )


def _split(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
  """Returns the samples in parts of equally many groups, in order.

  Raises:
    ValueError: the groups cannot be divided.
  """
  starts = [
    i
    for i, sample in enumerate(samples)
    if not i or sample.group != samples[i - 1].group
  ]
  if len(starts) % parts:
    raise ValueError(
      f'{len(starts)} groups cannot be divided over '
      f'learning.minibatches={parts}'
    )
  cuts = [*starts[:: len(starts) // parts], len(samples)]
  return [samples[a:b] for a, b in zip(cuts, cuts[1:])]


def _each(
  update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
  state: TrainState,
  prepared: Sequence[Batch],
) -> tuple[TrainState, dict[str, float]]:
  """Takes an optimizer step on each batch; see `Learner.learn`."""
  steps = []
  for batch in prepared:
    state, values = update(state, batch)
    steps.append(values)
  fetched = jax.device_get(steps)
  over = lambda name: (
    np.max
    if name.endswith('_max')
    else np.min
    if name.endswith('_min')
    else np.mean
  )
  return state, {
    name: float(over(name)([values[name] for values in fetched]))
    for name in fetched[0]
  }
