"""Which policy ends the sampling of a batch: a name or an import path."""

from rlax_llm.config import ConfigError
from rlax_llm.config import ControlConfig
from rlax_llm.rollout import control
from rlax_llm.rollout.control import StopPolicy
from rlax_llm.tasks.task import imported


def find(config: ControlConfig) -> StopPolicy:
  """Returns the policy that `control.stop_policy` names.

  Args:
    config: `stop_policy` is 'april', which stops as soon as sampling may stop,
      or 'module:function', a function of `control.SampleView`.

  Raises:
    ConfigError: there is no such function.
  """
  if config.stop_policy == 'april':
    return control.at_once
  policy = imported(
    config.stop_policy, 'control.stop_policy', 'april or module:function'
  )
  if not callable(policy):
    raise ConfigError(
      f'control.stop_policy={config.stop_policy!r} is no function; it is '
      'called with a rlax_llm.rollout.control.SampleView'
    )
  return policy
