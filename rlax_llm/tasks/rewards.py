"""What a completion is worth: named rewards, weighted and summed."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import inspect
import math
from typing import Any
from typing import NamedTuple

from rlax_llm import config as config_lib
from rlax_llm.tasks import extract
from rlax_llm.tasks import task as task_lib
from rlax_llm.workdir import metric_names

# A reward: (problem, completion, tokens, finished) -> float, or `task.Score`: a
# float and metrics to log beside it.
#   problem: `task.Problem`; of a mixture, its entry is {'task', 'entry'}.
#   completion: the text the model wrote, without the prompt.
#   tokens: int, the completion's length, EOS included.
#   finished: bool, whether it emitted EOS.
# It is a function of these alone: a resumed run must see the same rewards. It
# runs in the verifier's processes, within `task.verifier_seconds`; where it
# raises, or returns no finite number, the sample is unscorable.
Reward = Callable[[task_lib.Problem, str, int, bool], float | task_lib.Score]

BUILT_IN = ('correct', 'format', 'length')
_LARGEST = 3e38  # a reward is kept as float32


class Result(NamedTuple):
  """What the rewards say of a sample."""

  total: float  # sum of weight * reward, rounded once: whatever the order
  parts: dict[str, float]  # every reward by name
  metrics: dict[str, float]  # of the user's own, by name
  faults: dict[str, str]  # why metrics were left out, by kind


def soft_overlong(tokens: int, limit: int, cache: int) -> float:
  """Returns DAPO's soft overlong punishment.

      0                              where tokens <= limit - cache
      (limit - cache - tokens) / cache   up to limit
      -1                             beyond

  DAPO: An Open-Source LLM Reinforcement Learning System at Scale, equation 13
  (https://arxiv.org/abs/2503.14476), with limit = L_max, cache = L_cache.

  Args:
    tokens: the completion's length.
    limit: tokens, at which it reaches -1.
    cache: tokens over which it falls, from 1.
  """
  return max(-1.0, min(0.0, (limit - cache - tokens) / cache))


@dataclasses.dataclass(frozen=True)
class Rewards:
  """Rewards by name, and their weights. `correct` is always among them."""

  functions: Mapping[str, Reward]
  weights: Mapping[str, float]

  def only_correct(self) -> 'Rewards':
    """Returns the reward of the task's verifier alone."""
    return Rewards({'correct': self.functions['correct']}, {'correct': 1.0})

  def __call__(
    self,
    problem: task_lib.Problem,
    completion: str,
    tokens: int,
    finished: bool,
  ) -> Result:
    """Returns what the rewards say of a completion.

    A metric that cannot be logged is left out; the reward beside it stands.

    Raises:
      ValueError: a reward, or the sum, that is no finite number.
    """
    values: dict[str, float] = {}
    metrics: dict[str, float] = {}
    faults: dict[str, str] = {}
    for name, function in self.functions.items():
      found = function(problem, completion, tokens, finished)
      if not isinstance(found, task_lib.Score):
        found = task_lib.Score(found)
      values[name] = _finite(f'reward {name!r}', found.reward)
      _add_metrics(metrics, faults, found.metrics, name)
    total = math.fsum(w * values[name] for name, w in self.weights.items())
    if not abs(total) < _LARGEST:
      raise ValueError(
        f'the weighted rewards {values} sum to {total}; lower task.rewards'
      )
    return Result(total, values, metrics, faults)


def _finite(what: str, value: Any) -> float:
  """Returns a number that the user's code returned; raises ValueError."""
  try:
    if isinstance(value, (str, bytes)):
      raise TypeError('text')  # which float() would read
    number = float(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f'{what} returned {str(value)[:80]!r}, a '
      f'{type(value).__name__}; return a finite '
      'number'
    ) from error
  if not abs(number) < _LARGEST:
    raise ValueError(f'{what} returned {number}; return a finite number')
  return number


def _add_metrics(
  known: dict[str, float], faults: dict[str, str], found: Any, reward: str
) -> None:
  """Adds the metrics of one reward that can be logged.

  Args:
    known: of the rewards before; added to.
    faults: by kind, why one cannot be logged; added to.
    found: what the reward returned as its metrics.
    reward: its name.
  """
  if not isinstance(found, Mapping):
    faults[f'{reward} type'] = (
      f'reward {reward!r} returned the metrics {str(found)[:80]!r}, a '
      f'{type(found).__name__}; return numbers by name'
    )
    return
  for name, value in found.items():
    if not isinstance(name, str) or not metric_names.is_user_name(name):
      faults[f'{reward} name'] = (
        f'reward {reward!r} returned the metric {str(name)[:120]!r}; name it '
        'with letters, digits and _ . - /, at most '
        f'{metric_names.LONGEST_NAME} of them'
      )
    elif name in known:
      faults[f'{reward} {name} again'] = (
        f'reward {reward!r} returned the metric {name!r}, as another reward '
        'does; give each a name of its own'
      )
    else:
      try:
        known[name] = _finite(
          f'the metric {name!r} of reward {reward!r}', value
        )
      except ValueError as error:
        faults[f'{reward} {name}'] = str(error)


def make_rewards(config: config_lib.TaskConfig, task: task_lib.Task) -> Rewards:
  """Returns the rewards of a config.

  Args:
    config: `rewards`, `answer_format`, `length_limit` and `length_cache` are
      read.
    task: its `score` is the reward `correct`.

  Raises:
    ConfigError: an unknown name, or a reward that the rest of the config does
      not fit.
  """
  if not config.rewards:
    raise config_lib.ConfigError(
      "task.rewards is empty; the default is {'correct': 1.0}"
    )
  functions = {'correct': _correct(task)}
  for name in config.rewards:
    if name != 'correct':
      functions[name] = _make_reward(name, config)
  unused = config.length_limit or config.length_cache
  if unused and 'length' not in config.rewards:
    raise config_lib.ConfigError(
      f'task.length_limit={config.length_limit} and length_cache='
      f"{config.length_cache} are for the reward 'length', which is not in "
      'task.rewards; add it, or set both to 0'
    )
  return Rewards(functions, dict(config.rewards))


def _make_reward(name: str, config: config_lib.TaskConfig) -> Reward:
  if name == 'format':
    return _format(config.answer_format)
  if name == 'length':
    return _length(config.length_limit, config.length_cache)
  if ':' not in name:
    raise config_lib.ConfigError(
      f'task.rewards[{name!r}] is unknown'
      f'{config_lib.nearest(name, BUILT_IN)}; use {", ".join(BUILT_IN)} or '
      "'module:function'"
    )
  function = task_lib.imported(name, 'task.rewards', 'module:function')
  try:
    inspect.signature(function).bind(None, '', 0, True)
  except (TypeError, ValueError) as error:
    raise config_lib.ConfigError(
      f'task.rewards[{name!r}] does not take (problem, completion, tokens, '
      f'finished): {error}'
    ) from error
  return function


def _correct(task: task_lib.Task) -> Reward:

  def correct(
    problem: task_lib.Problem, completion: str, tokens: int, finished: bool
  ) -> float | task_lib.Score:
    del tokens, finished
    return task.score(problem.entry, completion)

  return correct


def _format(answer_format: str) -> Reward:
  """Returns the reward 1.0 for an answer, right or wrong, in its place."""
  if answer_format not in extract.MARKED:
    raise config_lib.ConfigError(
      f"task.rewards['format'] does not fit task.answer_format="
      f'{answer_format!r}, which every text has; use one of '
      f'{", ".join(extract.MARKED)}, or remove the reward'
    )

  def has_answer(
    problem: task_lib.Problem, completion: str, tokens: int, finished: bool
  ) -> float:
    del problem, tokens, finished
    answer = extract.extract_answer(completion, answer_format)
    return float(answer is not None)

  return has_answer


def _length(limit: int, cache: int) -> Reward:
  if not 1 <= cache <= limit:
    raise config_lib.ConfigError(
      f"task.rewards['length'] falls over task.length_cache={cache} tokens "
      f'to -1 at task.length_limit={limit}; set both, the cache from 1 to '
      'the limit'
    )

  def length(
    problem: task_lib.Problem, completion: str, tokens: int, finished: bool
  ) -> float:
    del problem, completion, finished
    return soft_overlong(tokens, limit, cache)

  return length
