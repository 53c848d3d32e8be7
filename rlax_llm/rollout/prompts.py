"""Prompts of one `generate`: prefilled, and placed in the drafter's state."""

import collections
from typing import Callable, NamedTuple, Sequence

import numpy as np

from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.types import Request


class Places:
  """Places of prompts in the drafter's state, given out and taken back."""

  def __init__(self, count: int) -> None:
    self._free = collections.deque(range(count))
    self._left: dict[tuple, int] = {}  # samples not yet collected
    self._place: dict[tuple, int] = {}

  def __contains__(self, group: tuple) -> bool:
    return group in self._place

  def take(self, group: tuple, samples: int) -> int:
    """Gives a group the place that has been free for longest.

    Args:
      group: identifies it.
      samples: how many will be collected, at least 1.
    """
    self._left[group] = samples
    self._place[group] = self._free.popleft()
    return self._place[group]

  def of(self, group: tuple) -> int:
    return self._place[group]

  def collect(self, group: tuple) -> None:
    """Notes that one sample has ended; frees the place after the last."""
    self._left[group] -= 1
    if not self._left[group]:
      self._free.append(self._place.pop(group))


class Text(NamedTuple):
  """What samples begin with: a prompt, or one with a part of a completion."""
  tokens: np.ndarray  # int32[length]
  known: int  # of them, of a completion
  number: int  # of the request, in its queue
  request: Request


class PromptBlocks:
  """Prefills texts in order, a block at a time, a prompt once for its group."""

  def __init__(self, texts: Sequence[Text], size: int,
               prefill: Callable[[Sequence[Text]], PromptBlock]) -> None:
    """Prepares the blocks; nothing is computed yet.

    Args:
      texts: in the order in which samples will begin with them.
      size: texts of one block.
      prefill: makes a block of at most `size` texts.
    """
    self._texts = texts
    self._size = size
    self._prefill = prefill
    self._first = -size  # of the current block
    self._block: PromptBlock | None = None

  @property
  def block(self) -> PromptBlock:
    """The block that the last `advance_to` made current."""
    assert self._block is not None
    return self._block

  def __contains__(self, number: int) -> bool:
    return self._first <= number < self._first + self._size

  def row(self, number: int) -> int:
    """Returns the row of the block that holds a text."""
    return number - self._first

  def advance_to(self, number: int) -> None:
    """Makes the block that holds a text the current one."""
    while number not in self:
      self._first += self._size
      members = self._texts[self._first:self._first + self._size]
      self._block = self._prefill(members)
