"""The drafter's state of one `generate`, brought up to date when needed."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlax_llm.drafting.drafter import Drafter
from rlax_llm.rollout.executor import Executor
from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.types import DraftParams
from rlax_llm.types import Slots


class Drafts:
  """Nobody drafts at W = 1: what the state then misses waits.

  So segments of W = 1 cost what they cost without a drafter: texts of prompts
  are loaded, and what rows sampled meanwhile is taken up, when a wider segment
  comes. Rows that took a sample meanwhile are among those that are behind.
  """

  def __init__(
    self,
    executor: Executor,
    drafter: Drafter,
    params: DraftParams,
    slots: Slots,
  ) -> None:
    """Makes the state before anything is sampled.

    Args:
      executor: runs the drafter's functions.
      drafter: the widest; all widths share its state.
      params: the policy's and the drafter's.
      slots: N rows.
    """
    self._executor = executor
    self._drafter = drafter
    self._params = params
    self._state = executor.draft_state(params, slots, drafter)
    self._loads: list[Callable[[], tuple]] = []
    self._behind = False

  @property
  def wants_hidden(self) -> bool:
    """Whether `admit` reads the hidden states of prompts."""
    return self._drafter.rows is not None

  def load(self, texts: Callable[[], tuple]) -> None:
    """Gives the drafter texts of prompts that begin to be sampled.

    Args:
      texts: returns (places, texts, lengths) as `Drafter.load` takes them.
    """
    self._loads.append(texts)

  def fall_behind(self) -> None:
    """Notes that rows hold tokens that the drafter has not seen."""
    self._behind = True

  def admit(
    self, slots: Slots, block: PromptBlock, sources: Mapping[int, int]
  ) -> None:
    """Notes the samples that rows begin.

    Args:
      slots: N rows, after the admission.
      block: prefilled prompts.
      sources: slot -> row of the block.
    """
    if self._drafter.rows is None or self._behind:
      return
    source = np.full(slots.length.shape, -1, np.int32)
    source[list(sources)] = list(sources.values())
    self._state = self._executor.draft_admit(
      self._params, self._state, self._drafter, slots, block, source
    )

  def gather(self, order: Sequence[int]) -> None:
    """Keeps the named rows, in that order."""
    if self._drafter.rows is not None:
      self._state = self._executor.draft_gather(
        self._state, self._drafter, order
      )

  def grow(self, capacity: int) -> None:
    """Enlarges S."""
    if self._drafter.rows is not None:
      self._state = self._executor.draft_grow(
        self._state, self._drafter, capacity
      )

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
      self._state = self._executor.load(
        self._params, self._state, self._drafter, *texts()
      )
    self._loads.clear()
    if self._behind:
      self._state = self._executor.sync(
        self._params, self._state, self._drafter, slots
      )
      self._behind = False
    return self._state

  def put(self, width: int, state: Any) -> None:
    """Keeps what a segment of this width made of the state."""
    if width > 1:
      self._state = state
