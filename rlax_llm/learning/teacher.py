"""The teacher of on-policy distillation: published weights, or another run."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib

from jax.sharding import Mesh

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import from_dict
from rlax_llm.config import ModelConfig
from rlax_llm.config.validation import validate
from rlax_llm.learning import algorithms
from rlax_llm.learning.learner import Teacher
from rlax_llm.learning.train_states import States
from rlax_llm.models.pretrained import loading
from rlax_llm.models.transformer import make_transformer
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.workdir import manifest


def find_teacher(
  config: Config,
  algorithm: algorithms.Algorithm,
  *,
  vocabulary: int,
  tokens: int,
  mesh: Mesh,
  clock: Callable[[], float],
) -> States | None:
  """Returns the states that the teacher's parameters are of; reads no weights.

  Args:
    config: of the run, frozen.
    algorithm: names the teacher.
    vocabulary: of the policy.
    tokens: of the tokenizer, which published weights may exceed.
    mesh: where the teacher lies.
    clock: seconds.

  Returns:
    None for an objective without a teacher.

  Raises:
    ConfigError: the folder holds neither weights nor a run, or its model reads
      other tokens.
  """
  folder = algorithm.teacher
  if not folder:
    return None
  path = pathlib.Path(folder)
  is_run = (path / manifest.MANIFEST_FILE).is_file()
  if not is_run and not (path / loading.CONFIG_FILE).is_file():
    raise ConfigError(
      f'algorithm.teacher={folder!r} has no {manifest.MANIFEST_FILE} and no '
      f"{loading.CONFIG_FILE}; give a run's workdir or the folder of a "
      'published model'
    )
  own = config
  config = _of_run(folder) if is_run else _of_weights(folder, own)
  mine, theirs = own.model.tokenizer, config.model.tokenizer
  if is_run and mine != theirs:
    raise ConfigError(
      f'algorithm.teacher={folder!r} reads the tokens of {theirs!r}, and '
      f'model.tokenizer={mine!r}; a teacher scores the same tokens'
    )
  known = config.model.vocabulary or tokens
  if known != vocabulary:
    raise ConfigError(
      f'algorithm.teacher={folder!r} has {known} tokens and the model '
      f'{vocabulary}; a teacher scores the same tokens'
    )
  if config.model.max_positions < own.rollout.prompt_length + (
    own.rollout.max_new_tokens
  ):
    raise ConfigError(
      f'algorithm.teacher={folder!r} has {config.model.max_positions} '
      'positions, fewer than rollout.prompt_length + max_new_tokens; shorten '
      'them'
    )
  model_config = dataclasses.replace(config.model, vocabulary=known)
  sharding.check_model(model_config, mesh)
  model = make_transformer(
    model_config,
    own.learning.precision,
    constrain=functools.partial(sharding.constrain, mesh=mesh),
  )
  resolved = algorithms.resolve(config.algorithm)
  return States(config, resolved, mesh, model, ExecutablePool(clock))


def _of_run(folder: str) -> Config:
  """Returns the config that a run recorded."""
  recorded = manifest.read_manifest(folder)
  assert recorded is not None, 'the caller saw the file'
  return validate(from_dict(recorded['config']))


def _of_weights(folder: str, own: Config) -> Config:
  """Returns a config with the architecture of published weights."""
  config = dataclasses.replace(
    Config(),
    model=ModelConfig(pretrained=folder, tokenizer=own.model.tokenizer),
  )
  return validate(loading.resolve(config))


def load_teacher(folder: str, states: States | None) -> Teacher | None:
  """Returns the teacher, its parameters on the mesh; None: there is none.

  Args:
    folder: `algorithm.teacher`.
    states: from `find_teacher`.

  Raises:
    ConfigError: its weights cannot be read, or do not fit its config.
  """
  if states is None:
    return None
  if states.config.model.pretrained == folder:
    return Teacher(states.model, states.init_params())
  _, params, _ = states.restore_params(folder)
  return Teacher(states.model, params)
