"""What samples begin with: prefilled, and placed in the drafter's state."""

import collections
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.types import Request


class Places:
  """Places of prompts in the drafter's state, given out and taken back."""

  def __init__(self, count: int) -> None:
    self._free = collections.deque(range(count))
    # Samples that are expected and not yet collected.
    self._left: collections.Counter[tuple] = collections.Counter()
    self._place: dict[tuple, int] = {}

  def __contains__(self, group: tuple) -> bool:
    return group in self._place

  def expect(self, group: tuple) -> None:
    """Notes a sample that will be collected."""
    self._left[group] += 1

  def take(self, group: tuple) -> int:
    """Gives a group the place that has been free for longest."""
    self._place[group] = self._free.popleft()
    return self._place[group]

  def of(self, group: tuple) -> int:
    return self._place[group]

  def collect(self, group: tuple) -> None:
    """Notes that one sample has ended; frees the place after the last."""
    self._left[group] -= 1
    if not self._left[group] and group in self._place:
      self._free.append(self._place.pop(group))


class Text(NamedTuple):
  """What samples begin with: a prompt, or one with a part of a completion."""

  tokens: np.ndarray  # int32[length]
  known: int  # of them, of a completion
  number: int  # of the request, in its queue
  request: Request


class Prefilled:
  """The block of texts that was prefilled last: a prompt once for its group."""

  def __init__(self, prefill: Callable[[Sequence[Text]], PromptBlock]) -> None:
    """Holds nothing.

    Args:
      prefill: makes a block of texts.
    """
    self._prefill = prefill
    self._texts: list[Text] = []
    self._block: PromptBlock | None = None

  @property
  def block(self) -> PromptBlock:
    assert self._block is not None
    return self._block

  def row(self, text: Text) -> int | None:
    """Returns the row of the block that holds a text; None: it does not."""
    for row, held in enumerate(self._texts):
      if held is text:
        return row
    return None

  def fill(self, texts: Sequence[Text]) -> None:
    """Replaces the block."""
    self._block = self._prefill(texts)
    self._texts = list(texts)
