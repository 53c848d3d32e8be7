"""The train states of a run: shapes, placement, initialisation, restoring."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from rlax_llm import checkpoint
from rlax_llm import pretrained
from rlax_llm import sharding
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import ModelConfig
from rlax_llm.executables import ExecutablePool
from rlax_llm.learning import algorithms
from rlax_llm.learning import update
from rlax_llm.models import lora
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.types import Array
from rlax_llm.types import Params
from rlax_llm.types import TrainState


@dataclasses.dataclass(frozen=True)
class States:
  """Makes the states of a run and says where they lie."""
  config: Config  # frozen
  algorithm: algorithms.Algorithm
  mesh: Mesh
  model: LanguageModel
  pool: ExecutablePool

  def rollout_placement(self) -> Params | None:
    """Returns where rollouts read parameters; None: as they are."""
    abstract = self.abstract_params()
    rounded = jax.eval_shape(self.model.rounded, abstract)
    same = jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype, abstract, rounded))
    gather = (self.mesh.shape['fsdp'] > 1 and
              self.config.mesh.gather_for_rollout)
    if same and not gather:
      return None
    return self.params_placement(
        sharding.ROLLOUT_TABLE if gather else sharding.TABLE)

  @property
  def model_config(self) -> ModelConfig:
    """The model's section, with its vocabulary."""
    return dataclasses.replace(self.config.model,
                               vocabulary=self.model.vocabulary)

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
    pretrained.find_tensors(folder, self.model_config)
    return {'pretrained': pretrained.fingerprint(folder)}

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
      return pretrained.load_params(folder, self.model_config, abstract)
    adapters, base = lora.split(abstract, self.model.trainable(abstract))
    return lora.join(self._fresh(adapters),
                     pretrained.load_params(folder, self.model_config, base))

  def _fresh(self, abstract: Params) -> Params:
    """Returns fresh parameters, those that are not gaps."""

    def init(key: Array) -> Params:
      params = self.model.init(key)
      if len(jax.tree.leaves(abstract)) == len(jax.tree.leaves(params)):
        return params
      return lora.split(params, self.model.trainable(params))[0]

    return self.pool(('init',),
                     init,
                     jax.random.key(self.config.seed),
                     out_shardings=jax.tree.map(lambda x: x.sharding, abstract))

  def abstract_params(self) -> Params:
    """Returns shapes and dtypes of the parameters."""
    return jax.eval_shape(self.model.init, jax.random.key(0))

  def params_placement(self, table: sharding.Table = sharding.TABLE) -> Params:
    """Returns a sharding for every parameter."""
    abstract = self.abstract_params()
    return sharding.place_tree(abstract, self.model.axes(abstract), self.mesh,
                               table)

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """The policy's optimizer."""
    learning = self.config.learning
    return update.make_optimizer(learning,
                                 self.config.num_steps * learning.minibatches)

  def init_state(self,
                 params: Params,
                 optimizer: optax.GradientTransformation | None = None,
                 name: str = 'policy') -> TrainState:
    """Returns the state before the first step; donates the parameters.

    Args:
      params: on the mesh.
      optimizer: None: the policy's.
      name: of the objective, tells executables apart.
    """
    optimizer = optimizer or self.optimizer
    placement = jax.tree.map(lambda x: x.sharding,
                             self.abstract_state(optimizer))
    return self.pool(('init_state', name),
                     functools.partial(update.init_state,
                                       model=self.model,
                                       optimizer=optimizer),
                     params,
                     donate_argnums=(0,),
                     out_shardings=placement)

  def abstract_state(
      self,
      optimizer: optax.GradientTransformation | None = None) -> TrainState:
    """Returns shapes, dtypes and shardings of the state.

    Args:
      optimizer: None: the policy's. What it keeps for a parameter lies where
        the parameter lies.
    """
    optimizer = optimizer or self.optimizer
    params = self.abstract_params()
    make = functools.partial(update.init_state,
                             model=self.model,
                             optimizer=optimizer)
    state = jax.eval_shape(make, params)
    place = lambda x, where: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=where)
    placement = self.params_placement()
    trained, _ = lora.split(placement, self.model.trainable(params))
    anywhere = sharding.replicated(self.mesh)
    return TrainState(
        step=place(state.step, anywhere),  # type: ignore
        params=jax.tree.map(place, state.params, placement),
        opt_state=optax.tree_map_params(
            optimizer,
            place,
            state.opt_state,
            trained,
            transform_non_params=lambda x: place(x, anywhere)))

  def abstract_all(self) -> dict[str, TrainState]:
    """Returns shapes, dtypes and shardings of all states, by name."""
    return {'policy': self.abstract_state()}

  def init_all(self, params: Params) -> dict[str, TrainState]:
    """Returns all states before the first step; donates the parameters."""
    return {'policy': self.init_state(params)}

  def restore(self,
              workdir: str,
              *,
              step: int | None = None) -> tuple[int, TrainState, dict]:
    """Returns (step, the policy's state, host state) of a checkpoint.

    Args:
      workdir: the run's folder.
      step: which; None: the newest readable one.

    Raises:
      ConfigError: if there is none, or it is another model's.
    """
    with checkpoint.Checkpoints(workdir,
                                keep=self.config.checkpoint.keep) as saved:
      found = saved.restore({'policy': self.abstract_state()}, step=step)
    if found is None:
      raise ConfigError(f'{workdir!r} holds no checkpoint; run '
                        'rlax_llm.train with this --workdir first')
    return found[0], found[1]['policy'], found[2]

  def learning_rate(self, step: int) -> float:
    """Returns the learning rate at the end of an RL step."""
    learning = self.config.learning
    schedule = update.make_schedule(
        learning, self.config.num_steps * learning.minibatches)
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
    if not self.algorithm.kl_coefficient:
      return None
    abstract = self.abstract_state().params
    trained = self.model.trainable(abstract)
    abstract, _ = lora.split(abstract, trained)
    with checkpoint.Checkpoints(f'{workdir}/reference', keep=1) as saved:
      if step == 0:
        copy = self.pool(('copy',),
                         lambda p: jax.tree.map(jnp.copy, p),
                         lora.split(params, trained)[0],
                         out_shardings=jax.tree.map(lambda x: x.sharding,
                                                    abstract))
        if not saved.steps():
          saved.save(0, {'reference': copy}, {})
        return copy
      found = saved.restore({'reference': abstract})
    if found is None:
      raise ConfigError(f'{workdir}/reference is missing; the KL term of a '
                        'continued run needs it: restore it or start again')
    return found[1]['reference']
