"""The drafter's state of one `generate`, brought up to date when needed."""

from typing import Any, Callable

from rlax_llm.drafting.drafter import Drafter
from rlax_llm.rollout.executor import Executor
from rlax_llm.types import Params
from rlax_llm.types import Slots


class Drafts:
  """Nobody drafts at W = 1: what the state then misses waits.

  So segments of W = 1 cost what they cost without a drafter: texts of prompts
  are loaded, and what rows sampled meanwhile is taken up, when a wider segment
  comes.
  """

  def __init__(self, executor: Executor, drafter: Drafter, params: Params,
               slots: Slots) -> None:
    """Makes the state before anything is sampled.

    Args:
      executor: runs the drafter's functions.
      drafter: the widest; all widths share its state.
      params: the policy's.
      slots: N rows.
    """
    self._executor = executor
    self._drafter = drafter
    self._params = params
    self._state = executor.draft_state(params, slots, drafter)
    self._loads: list[Callable[[], tuple]] = []
    self._behind = False

  def load(self, texts: Callable[[], tuple]) -> None:
    """Gives the drafter texts of prompts that begin to be sampled.

    Args:
      texts: returns (places, texts, lengths) as `Drafter.load` takes them.
    """
    self._loads.append(texts)

  def fall_behind(self) -> None:
    """Notes that rows hold tokens that the drafter has not seen."""
    self._behind = True

  def take(self, width: int, slots: Slots) -> Any:
    """Returns the state for a segment of this width; `put` it back after it.

    Args:
      width: W.
      slots: N rows, as the segment finds them.
    """
    if width == 1:
      self._behind = True
      return ()
    for texts in self._loads:
      self._state = self._executor.load(self._params, self._state,
                                        self._drafter, *texts())
    self._loads.clear()
    if self._behind:
      self._state = self._executor.sync(self._params, self._state,
                                        self._drafter, slots)
      self._behind = False
    return self._state

  def put(self, width: int, state: Any) -> None:
    """Keeps what a segment of this width made of the state."""
    if width > 1:
      self._state = state
