"""What a strategy chooses from: an arm says how a segment drafts."""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

from rlax_llm.config import ControlConfig
from rlax_llm.config import list_widths
from rlax_llm.config import RolloutConfig
from rlax_llm.config import SOURCES


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


def source_sets(
  drafter: str, enabled: Sequence[str] = SOURCES
) -> list[tuple[str, ...]]:
  """Returns what a drafter can draft from: a combination for each arm.

  Args:
    drafter: `rollout.drafter`.
    enabled: sources of the hybrid that are on, `drafter.sources`. It can do
      without any of them; the last combination is all of them.
  """
  if drafter == 'none':
    return []
  if drafter != 'hybrid':
    return [(drafter,)]
  on = [source for source in SOURCES if source in enabled]
  sizes = range(1, len(on) + 1)
  return [chosen for n in sizes for chosen in itertools.combinations(on, n)]


def arms_of_width(
  rollout: RolloutConfig,
  control: ControlConfig,
  width: int,
  enabled: Sequence[str] = SOURCES,
) -> tuple[Arm, ...]:
  """Returns the arms of one W: every shape and all sources that a config has.

  Where nothing chooses, the last is used.

  Args:
    rollout: names the drafter; its branching, or 0 for those of `control`.
    control: frozen section.
    width: W.
    enabled: sources of the hybrid that are on.
  """
  if width == 1:
    return (PLAIN,)
  listed = (rollout.branching,) if rollout.branching else control.branchings
  # A node cannot have more children than there are nodes.
  shapes = sorted({min(branching, width - 1) for branching in listed})
  return tuple(
    Arm(width, branching, sources)
    for branching in shapes
    for sources in source_sets(rollout.drafter, enabled)
  )


def list_arms(
  rollout: RolloutConfig,
  control: ControlConfig,
  enabled: Sequence[str] = SOURCES,
) -> tuple[Arm, ...]:
  """Returns every arm that a config can lead to, narrowest first."""
  return tuple(
    arm
    for width in list_widths(rollout, control)
    for arm in arms_of_width(rollout, control, width, enabled)
  )
