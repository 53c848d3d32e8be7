"""The teacher of on-policy distillation: published weights, or another run."""

import dataclasses
import functools
import pathlib

from rlax_llm.components import Run
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


def find_teacher(run: Run) -> States | None:
  """Returns the states that the teacher's parameters are of; reads no weights.

  Args:
    run: names the teacher.

  Returns:
    None for an objective without a teacher.

  Raises:
    ConfigError: the folder holds neither weights nor a run, or its model reads
      other tokens.
  """
  folder = run.algorithm.teacher
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
  config = _of_run(folder) if is_run else _of_weights(folder, run)
  mine, theirs = run.config.model.tokenizer, config.model.tokenizer
  if is_run and mine != theirs:
    raise ConfigError(
      f'algorithm.teacher={folder!r} reads the tokens of {theirs!r}, and '
      f'model.tokenizer={mine!r}; a teacher scores the same tokens'
    )
  vocabulary = config.model.vocabulary or run.tokenizer.vocab_size
  if vocabulary != run.model.vocabulary:
    raise ConfigError(
      f'algorithm.teacher={folder!r} has {vocabulary} tokens and the model '
      f'{run.model.vocabulary}; a teacher scores the same tokens'
    )
  if config.model.max_positions < run.config.rollout.prompt_length + (
    run.config.rollout.max_new_tokens
  ):
    raise ConfigError(
      f'algorithm.teacher={folder!r} has {config.model.max_positions} '
      'positions, fewer than rollout.prompt_length + max_new_tokens; shorten '
      'them'
    )
  model_config = dataclasses.replace(config.model, vocabulary=vocabulary)
  sharding.check_model(model_config, run.mesh)
  model = make_transformer(
    model_config,
    run.config.learning.precision,
    constrain=functools.partial(sharding.constrain, mesh=run.mesh),
  )
  algorithm = algorithms.resolve(config.algorithm)
  return States(config, algorithm, run.mesh, model, ExecutablePool(run.clock))


def _of_run(folder: str) -> Config:
  """Returns the config that a run recorded."""
  recorded = manifest.read_manifest(folder)
  assert recorded is not None, 'the caller saw the file'
  return validate(from_dict(recorded['config']))


def _of_weights(folder: str, run: Run) -> Config:
  """Returns a config with the architecture of published weights."""
  config = dataclasses.replace(
    Config(),
    model=ModelConfig(pretrained=folder, tokenizer=run.config.model.tokenizer),
  )
  return validate(loading.resolve(config))


def load_teacher(run: Run, states: States | None) -> Teacher | None:
  """Returns the teacher, its parameters on the mesh; None: there is none.

  Args:
    run: names the teacher.
    states: from `find_teacher`.

  Raises:
    ConfigError: its weights cannot be read, or do not fit its config.
  """
  if states is None:
    return None
  if states.config.model.pretrained == run.algorithm.teacher:
    return Teacher(states.model, states.init_params())
  _, params, _ = states.restore_params(run.algorithm.teacher)
  return Teacher(states.model, params)
