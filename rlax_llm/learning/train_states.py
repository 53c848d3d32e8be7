"""The train states of a run: shapes, placement, initialisation, restoring."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import LearningConfig
from rlax_llm.config import ModelConfig
from rlax_llm.drafting.drafters import Learned
from rlax_llm.learning import algorithms
from rlax_llm.learning import auxiliary
from rlax_llm.learning import update
from rlax_llm.models import heads
from rlax_llm.models import lora
from rlax_llm.models.draft_model import DraftModel
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.models.pretrained import loading
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import Array
from rlax_llm.types import Params
from rlax_llm.types import TrainState
from rlax_llm.workdir import checkpoint

# States that a checkpoint may lack: a run may begin to use them.
OPTIONAL = ('drafter',)
_DRAFTER_WARMUP = 20  # updates over which its learning rate rises


def drafter_params(states: Mapping[str, TrainState]) -> Params:
  """Returns the drafter's parameters; () if nothing learned drafts."""
  return states['drafter'].params if 'drafter' in states else ()


@dataclasses.dataclass(frozen=True)
class States:
  """Makes the states of a run and says where they lie."""

  config: Config  # frozen
  algorithm: algorithms.Algorithm
  mesh: Mesh
  model: LanguageModel
  pool: ExecutablePool
  draft_model: DraftModel | None = None  # None: no network drafts

  def rollout_placement(self) -> Params | None:
    """Returns where rollouts read parameters; None: as they are."""
    abstract = self.abstract_params()
    rounded = jax.eval_shape(self.model.rounded, abstract)
    same = jax.tree.all(
      jax.tree.map(lambda a, b: a.dtype == b.dtype, abstract, rounded)
    )
    if same and not self._gathers:
      return None
    return self.params_placement(self._rollout_table)

  @property
  def _gathers(self) -> bool:
    """Whether rollouts read parameters gathered over fsdp."""
    return self.mesh.shape['fsdp'] > 1 and self.config.mesh.gather_for_rollout

  @property
  def _rollout_table(self) -> sharding.Table:
    return sharding.ROLLOUT_TABLE if self._gathers else sharding.TABLE

  @property
  def model_config(self) -> ModelConfig:
    """The model's section, with its vocabulary."""
    return dataclasses.replace(
      self.config.model, vocabulary=self.model.vocabulary
    )

  def check_pretrained(self) -> dict[str, Any]:
    """Checks the weights that `init_params` will read; reads headers only.

    Returns:
      What the manifest records of them; {} without `model.pretrained`.

    Raises:
      ConfigError: they do not fit the model.
    """
    folder = self.config.model.pretrained
    if not folder:
      return {}
    loading.find_tensors(folder, self.model_config)
    return {'pretrained': loading.fingerprint(folder)}

  def init_params(self) -> Params:
    """Returns the parameters a run begins with, on the mesh.

    They are those of `model.pretrained`, or fresh ones.

    Raises:
      ConfigError: the weights do not fit the model.
    """
    folder = self.config.model.pretrained
    abstract = self.abstract_state().params
    if not folder:
      return self._fresh(abstract)
    if not self.config.model.lora.rank:
      return loading.load_params(folder, self.model_config, abstract)
    adapters, base = lora.split(abstract, self.model.trainable(abstract))
    return lora.join(
      self._fresh(adapters),
      loading.load_params(folder, self.model_config, base),
    )

  def _fresh(self, abstract: Params) -> Params:
    """Returns fresh parameters, those that are not gaps."""

    def init(key: Array) -> Params:
      params = self.model.init(key)
      if len(jax.tree.leaves(abstract)) == len(jax.tree.leaves(params)):
        return params
      return lora.split(params, self.model.trainable(params))[0]

    return self.pool(
      ('init',),
      init,
      jax.random.key(self.config.seed),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )

  def abstract_params(self) -> Params:
    """Returns shapes and dtypes of the parameters."""
    return jax.eval_shape(self.model.init, jax.random.key(0))

  def params_placement(
    self,
    table: sharding.Table = sharding.TABLE,
    model: LanguageModel | None = None,
  ) -> Params:
    """Returns a sharding for every parameter.

    Args:
      table: of `sharding`.
      model: None: the policy's.
    """
    model = model or self.model
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return sharding.place_tree(abstract, model.axes(abstract), self.mesh, table)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """The policy's optimizer."""
    learning = self.config.learning
    return update.make_optimizer(learning, self._policy_steps)

  @property
  def _policy_steps(self) -> int:
    """Optimizer steps of the policy in the whole run."""
    steps = self.config.num_steps - self.algorithm.critic_warmup
    return steps * self.config.learning.minibatches

  @functools.cached_property
  def critic_model(self) -> LanguageModel:
    """The critic: the policy's trunk with a head of its own."""
    return heads.make_critic(self.model)

  @functools.cached_property
  def critic_optimizer(self) -> optax.GradientTransformation:
    """The critic's optimizer: the policy's with another rate."""
    learning = self.config.learning
    rate = self.algorithm.critic_learning_rate or learning.learning_rate
    # A learning rate is a field of a frozen section.
    own = freeze(dataclasses.replace(learning, learning_rate=rate))
    return update.make_optimizer(
      own, self.config.num_steps * learning.minibatches
    )

  def init_state(
    self,
    params: Params,
    optimizer: optax.GradientTransformation | None = None,
    name: str = 'policy',
    model: LanguageModel | None = None,
  ) -> TrainState:
    """Returns the state before the first step; donates the parameters.

    Args:
      params: on the mesh.
      optimizer: None: the policy's.
      name: of the objective, tells executables apart.
      model: None: the policy's.
    """
    optimizer = optimizer or self.optimizer
    placement = jax.tree.map(
      lambda x: x.sharding, self.abstract_state(optimizer, model)
    )
    return self.pool(
      ('init_state', name),
      functools.partial(
        update.init_state, model=model or self.model, optimizer=optimizer
      ),
      params,
      donate_argnums=(0,),
      out_shardings=placement,
    )

  def abstract_state(
    self,
    optimizer: optax.GradientTransformation | None = None,
    model: LanguageModel | None = None,
  ) -> TrainState:
    """Returns shapes, dtypes and shardings of a state.

    Args:
      optimizer: None: the policy's. What it keeps for a parameter lies where
        the parameter lies.
      model: None: the policy's.
    """
    optimizer, model = optimizer or self.optimizer, model or self.model
    params = jax.eval_shape(model.init, jax.random.key(0))
    make = functools.partial(
      update.init_state, model=model, optimizer=optimizer
    )
    state = jax.eval_shape(make, params)
    placement = self.params_placement(model=model)
    trained, _ = lora.split(placement, model.trainable(params))
    return self._placed(state, placement, trained, optimizer)

  def _placed(
    self,
    state: TrainState,
    placement: Params,
    trained: Params,
    optimizer: optax.GradientTransformation,
  ) -> TrainState:
    """Returns the shapes of a state with their shardings.

    Args:
      state: shapes.
      placement: a sharding for every parameter.
      trained: those of the parameters that the optimizer knows.
      optimizer: what it keeps for a parameter lies where the parameter lies.
    """
    place = lambda x, where: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=where
    )
    anywhere = sharding.replicated(self.mesh)
    return TrainState(
      step=place(state.step, anywhere),  # type: ignore
      params=jax.tree.map(place, state.params, placement),
      opt_state=optax.tree_map_params(
        optimizer,
        place,
        state.opt_state,
        trained,
        transform_non_params=lambda x: place(x, anywhere),
      ),
    )

  @functools.cached_property
  def draft_learning(self) -> auxiliary.DraftLearning:
    """The static facts of the drafter's training."""
    assert self.draft_model is not None
    drafter = self.config.drafter
    # A constant rate behind a short warm-up: the policy it follows moves on.
    settings = LearningConfig(
      learning_rate=drafter.learning_rate, warmup_steps=_DRAFTER_WARMUP
    )
    return auxiliary.DraftLearning(
      model=self.model,
      draft_model=self.draft_model,
      optimizer=update.make_optimizer(settings, 0),
      chunk=self.config.learning.score_chunk,
      passes=drafter.passes,
    )

  def abstract_drafter(self) -> TrainState:
    """Returns shapes, dtypes and shardings of the drafter's state."""
    learning = self.draft_learning
    state = jax.eval_shape(
      functools.partial(auxiliary.init_drafter, learning=learning),
      jax.random.key(0),
    )
    axes = learning.draft_model.axes(state.params)
    placement = sharding.place_tree(state.params, axes, self.mesh)
    return self._placed(state, placement, placement, learning.optimizer)

  def init_drafter(self) -> TrainState:
    """Returns a fresh drafter, on the mesh."""
    return self.pool(
      ('init_drafter',),
      functools.partial(auxiliary.init_drafter, learning=self.draft_learning),
      jax.random.key(self.config.seed),
      out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_drafter()),
    )

  def learned(self) -> Learned | None:
    """Returns what rollouts draft with; None: no network."""
    if self.draft_model is None:
      return None
    params = self.abstract_drafter().params
    axes = self.draft_model.axes(params)
    return Learned(
      self.draft_model,
      depth=self.config.drafter.depth,
      sources=self.config.drafter.sources,
      placement=sharding.place_tree(
        params, axes, self.mesh, self._rollout_table
      ),
    )

  def abstract_all(self) -> dict[str, TrainState]:
    """Returns shapes, dtypes and shardings of all states, by name."""
    states = {'policy': self.abstract_state()}
    if self.algorithm.has_critic:
      states['critic'] = self.abstract_state(
        self.critic_optimizer, self.critic_model
      )
    if self.draft_model is not None:
      states['drafter'] = self.abstract_drafter()
    return states

  def init_all(self, params: Params) -> dict[str, TrainState]:
    """Returns all states before the first step; donates the parameters.

    The critic's trunk starts as the policy's parameters, copied.
    """
    states = {}
    if self.algorithm.has_critic:
      model = self.critic_model
      placement = self.params_placement(model=model)
      begun = self.pool(
        ('init_critic',),
        functools.partial(heads.with_value, model),
        params,
        out_shardings=placement,
      )
      states['critic'] = self.init_state(
        begun, self.critic_optimizer, 'critic', model
      )
    return self.completed({'policy': self.init_state(params)} | states)

  def completed(self, states: dict[str, TrainState]) -> dict[str, TrainState]:
    """Returns the states with fresh ones for those in OPTIONAL they lack."""
    if self.draft_model is not None and 'drafter' not in states:
      return states | {'drafter': self.init_drafter()}
    return states

  def restore_params(
    self, workdir: str, *, step: int | None = None, drafter: bool = False
  ) -> tuple[int, Params, Params]:
    """Returns (step, the policy's parameters, the drafter's) of a checkpoint.

    No state of an optimizer is read.

    Args:
      workdir: the run's folder.
      step: which; None: the newest whole one.
      drafter: whether the drafter's are wanted; where the checkpoint has none,
        they are fresh. Without one they are ().

    Raises:
      ConfigError: there is no checkpoint, or it is another model's.
      ReadError: it cannot be read.
    """
    wanted = {'policy/params': self.abstract_state().params}
    if drafter and self.draft_model is not None:
      wanted['drafter/params'] = self.abstract_drafter().params
    with checkpoint.Checkpoints(
      workdir, keep=self.config.checkpoint.keep
    ) as saved:
      optional = [f'{name}/params' for name in OPTIONAL]
      found = saved.restore(wanted, step=step, optional=optional)
    if found is None:
      raise ConfigError(
        f'{workdir!r} holds no checkpoint; run '
        'rlax_llm.train with this --workdir first'
      )
    step, params, _ = found
    drafts: Params = params.get('drafter/params', ())
    if wanted.keys() - params.keys():
      drafts = self.init_drafter().params
    return step, params['policy/params'], drafts

  def learning_rate(self, step: int) -> float:
    """Returns the policy's learning rate at the end of an RL step."""
    step -= self.algorithm.critic_warmup
    if step < 0:
      return 0.0
    learning = self.config.learning
    schedule = update.make_schedule(learning, self._policy_steps)
    last = (step + 1) * learning.minibatches - 1
    return float(schedule(jnp.asarray(last)))

  def reference(self, workdir: str, params: Params, step: int) -> Params | None:
    """Returns the reference policy: the parameters before RL; or None.

    What is trained is saved apart, once, because no checkpoint of a later step
    holds it. What is frozen is the policy's own and has a gap here: with LoRA
    the reference is adapters, and takes no memory to speak of.

    Args:
      workdir: the run's folder.
      params: the policy's, copied if step is 0.
      step: RL steps taken so far.
    """
    if not self.algorithm.has_reference:
      return None
    abstract = self.abstract_state().params
    trained = self.model.trainable(abstract)
    abstract, _ = lora.split(abstract, trained)
    with checkpoint.Checkpoints(f'{workdir}/reference', keep=1) as saved:
      if step == 0:
        copy = self.pool(
          ('copy',),
          lambda p: jax.tree.map(jnp.copy, p),
          lora.split(params, trained)[0],
          out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
        )
        if not saved.steps():
          saved.save(0, {'reference': copy}, {})
        return copy
      found = saved.restore({'reference': abstract})
    if found is None:
      raise ConfigError(
        f'{workdir}/reference is missing; the KL term of a '
        'continued run needs it: restore it or start again'
      )
    return found[1]['reference']
