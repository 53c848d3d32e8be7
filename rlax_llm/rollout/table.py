"""Who waits, and who sits in which slot."""

import collections
import dataclasses
import functools
from typing import Callable, Sequence

import numpy as np

from rlax_llm.rollout.drafts import Drafts
from rlax_llm.rollout.prompts import PromptBlocks
from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.types import Request
from rlax_llm.types import Slots


@dataclasses.dataclass
class Sample:
  """One sample, from the queue to its rollout."""
  order: int  # place in the result
  request: Request
  number: int  # of the request, in its queue
  index: int
  length: int  # prompt and completion, as of the last boundary
  ahead: bool  # for a coming step: a hint to its drafts, no result

  @property
  def group(self) -> tuple[bool, int]:
    """Identifies the samples of one request."""
    return self.ahead, self.number


class Queue:
  """Samples that wait, in order, and their prompts."""

  def __init__(self, requests: Sequence[Request], size: int, ahead: bool,
               prefill: Callable[..., PromptBlock]) -> None:
    self.blocks = PromptBlocks(requests, size,
                               functools.partial(prefill, ahead))
    self.samples: collections.deque[Sample] = collections.deque()
    for number, request in enumerate(requests):
      for index in range(request.samples):
        self.samples.append(
            Sample(len(self.samples), request, number, index,
                   len(request.prompt), ahead))


@dataclasses.dataclass
class Table:
  """The slots and who sits in them; None is a free slot."""
  slots: Slots
  drafts: Drafts
  owners: list[Sample | None]

  def counted(self) -> np.ndarray:
    """Returns bool[N]: not a row that runs ahead; free slots count."""
    return np.array([o is None or not o.ahead for o in self.owners])
