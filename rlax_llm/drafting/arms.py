"""What a strategy chooses from: an arm says how a segment drafts."""

from typing import NamedTuple

from rlax_llm.config import ControlConfig
from rlax_llm.config import list_widths
from rlax_llm.config import RolloutConfig


class Arm(NamedTuple):
  """How a segment drafts, as data.

  Attributes:
    width: W, nodes verified in one forward.
    branching: children of a node at most; 1: a chain.
    sources: what proposes the nodes, by name.
  """
  width: int
  branching: int = 1
  sources: tuple[str, ...] = ()


PLAIN = Arm(1)  # no speculation

# What each `rollout.drafter` can draft from: a combination for each arm; where
# nothing chooses, the last.
SOURCES: dict[str, tuple[tuple[str, ...], ...]] = {
    'none': (),
    'prompt_lookup': (('prompt_lookup',),),
    'tree_cache': (('tree_cache',),),
    'model': (('model',),),
    'hybrid': (('tree_cache', 'model'),),
}


def arms_of_width(rollout: RolloutConfig, control: ControlConfig,
                  width: int) -> tuple[Arm, ...]:
  """Returns the arms of one W: every shape and every source that a config has.

  Args:
    rollout: names the drafter; its branching, or 0 for those of `control`.
    control: frozen section.
    width: W.
  """
  if width == 1:
    return (PLAIN,)
  listed = (rollout.branching,) if rollout.branching else control.branchings
  # A node cannot have more children than there are nodes.
  shapes = sorted({min(branching, width - 1) for branching in listed})
  return tuple(
      Arm(width, branching, sources)
      for branching in shapes
      for sources in SOURCES[rollout.drafter])


def list_arms(rollout: RolloutConfig,
              control: ControlConfig) -> tuple[Arm, ...]:
  """Returns every arm that a config can lead to, narrowest first."""
  return tuple(arm for width in list_widths(rollout, control)
               for arm in arms_of_width(rollout, control, width))
