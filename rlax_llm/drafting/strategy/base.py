"""The interface of strategies: what they see, what they say.

A strategy chooses the arm of every segment: width, shape and sources of the
draft. It sees speed values and decides speed values: which tokens are sampled
does not depend on it.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import Protocol

from rlax_llm.config.draft_configs import Arm


class Occupancy(NamedTuple):
  """What the coming segment finds.

  Attributes:
    running: n, rows that decode samples of this step.
    rows: N, slots. A forward costs what N rows cost, whoever sits in them:
      seconds belong to N, tokens to n.
    capacity: S.
  """

  running: int
  rows: int
  capacity: int


class Choice(NamedTuple):
  """How the coming segment runs.

  Attributes:
    arm: how it drafts.
    forwards: it spends at most.
    timed: whether its seconds are wanted. A clock on the device's work makes
      the host wait for what was dispatched before.
  """

  arm: Arm
  forwards: int
  timed: bool


class Spent(NamedTuple):
  """What a segment took and gave.

  Attributes:
    seconds: it took, compilation apart; None: it was not timed, or it was the
      first run of its executable, which warms up and tells nothing.
    preparation: seconds before it that its draft made necessary.
    forwards: it spent.
    row_forwards: summed over the forwards, the rows that decoded.
    accepted: W numbers: of the row forwards, how many committed the token
      after that node of the draft. The first is the root's, all of them.
      Chains list nodes by depth, so that as many row forwards committed more
      tokens than the node's number; trees the most probable first.
  """

  seconds: float | None
  preparation: float
  forwards: int
  row_forwards: int
  accepted: Sequence[int]

  @property
  def tokens(self) -> int:
    """Committed tokens: one after every node that was reached."""
    return sum(self.accepted)


class Strategy(Protocol):
  """Chooses an arm for every segment."""

  def choose(self, occupancy: Occupancy, forwards: int) -> Choice:
    """Returns how the coming segment runs.

    Args:
      occupancy: that the segment finds.
      forwards: that it may spend.
    """

  def observe(self, occupancy: Occupancy, arm: Arm, spent: Spent) -> None:
    """Learns from the segment that ended.

    Args:
      occupancy: that the segment found.
      arm: that it ran.
      spent: what it took and gave.
    """

  def reachable(self, min_rows: int, max_rows: int) -> Sequence[Arm]:
    """Returns the arms that `choose` can return for these n."""

  def dump(self) -> dict[str, Any]:
    """Returns everything that was learned, as JSON can hold it."""

  def restore(self, saved: dict[str, Any]) -> None:
    """Takes up what `dump` returned.

    These are speed values: what was said by another kind of strategy, or about
    arms that are not there, is of no use and is left out.
    """
