"""Which task a config names."""

from collections.abc import Callable
import inspect
from typing import Any

from rlax_llm import config as config_lib
from rlax_llm.tasks.task import FiniteTask
from rlax_llm.tasks.task import imported
from rlax_llm.tasks.task import Task


def make_task(config: config_lib.TaskConfig, seed: int) -> Task:
  """Returns the task of a config.

  Args:
    config: `name` is a reasoning-gym name, 'jsonl', 'tfds', 'gsm8k',
      'mixture', or 'module:Class', constructed as Class(config, seed).
    seed: the run's seed; problems are a function of it.

  Raises:
    ValueError: an unknown name, or a config the task cannot be made from.
  """
  task = _make_task(config, seed)
  if not config.epoch_prompts:
    return task
  available = task.num_problems('train')
  if available is not None and available < config.epoch_prompts:
    raise ValueError(
      f'task.epoch_prompts={config.epoch_prompts}, but {config.name!r} has '
      f'{available} training problems; lower task.epoch_prompts'
    )
  return FiniteTask(task, config.epoch_prompts)


def _make_task(config: config_lib.TaskConfig, seed: int) -> Task:
  # Imported here: runs need one of them, and reasoning-gym is slow.
  # pylint: disable=g-import-not-at-top
  if config.name == 'jsonl':
    from rlax_llm.tasks import jsonl

    return jsonl.JsonlTask(config, seed)
  if config.name in ('tfds', 'gsm8k'):
    from rlax_llm.tasks import tfds

    return tfds.TfdsTask(config, seed)
  if config.name == 'mixture':
    from rlax_llm.tasks import mixture

    return mixture.MixtureTask(config, seed, make_task)
  if ':' in config.name:
    return _imported_task(config, seed)
  from rlax_llm.tasks.reasoning_gym.task import ReasoningGymTask

  return ReasoningGymTask(config, seed)


def _imported_task(config: config_lib.TaskConfig, seed: int) -> Task:
  """Returns an instance of the class that 'module:Class' names."""
  task_class = imported(config.name, 'task.name', 'module:Class')
  missing = [
    name
    for name in ('problem', 'score', 'num_problems')
    if not callable(getattr(task_class, name, None))
  ]
  if missing:
    raise ValueError(
      f'task.name {config.name!r} lacks {", ".join(missing)}; a task has '
      'the methods of rlax_llm.tasks.task.Task'
    )
  _check_call(task_class, f'task.name {config.name!r}', config, seed)
  task = task_class(config, seed)
  for name, arguments in (
    ('problem', ('train', 0)),
    ('score', ({}, '')),
    ('num_problems', ('train',)),
  ):
    _check_call(
      getattr(task, name), f'{name} of task.name {config.name!r}', *arguments
    )
  return task


def _check_call(
  function: Callable[..., Any], what: str, *arguments: Any
) -> None:
  """Refuses a callable that does not accept the arguments."""
  try:
    inspect.signature(function).bind(*arguments)
  except (TypeError, ValueError) as error:
    raise config_lib.ConfigError(
      f'{what} takes other arguments ({error}); a task is constructed as '
      'Class(config, seed) and has the methods of rlax_llm.tasks.task.Task'
    ) from error
