"""Who waits, and who sits in which slot."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import numpy as np

from rlax_llm.rollout.drafts import Drafts
from rlax_llm.rollout.prompts import Text
from rlax_llm.types import Request
from rlax_llm.types import Rollout
from rlax_llm.types import Slots


@dataclasses.dataclass
class Sample:
  """One sample, from the queue to its rollout."""

  order: int  # place among the samples of the queue
  request: Request
  number: int  # of the request, in its queue
  index: int
  text: Text  # what its slot begins with
  begin: int  # prompt and completion, before this `generate`
  limit: int  # most new tokens behind them
  length: int  # prompt and completion, as of the last boundary
  ahead: bool  # for a coming step: a hint to its drafts, no result
  done: bool = False

  @property
  def group(self) -> tuple[bool, int]:
    """Identifies the samples of one request."""
    return self.ahead, self.number

  @property
  def base(self) -> int:
    """Tokens that its slot began with."""
    return len(self.text.tokens)


class Queue:
  """Samples that wait, in order."""

  def __init__(
    self,
    requests: Sequence[Request],
    *,
    most: int,
    ahead: bool = False,
    earlier: Mapping[tuple, Rollout] | None = None,
    limit: int | None = None,
  ) -> None:
    """Lines up every sample that is not at its end.

    Args:
      requests: in the order in which they are sampled.
      most: T, most tokens of a completion.
      ahead: whether they are requests of a coming step.
      earlier: what samples came to before, by `state.sample_key`.
      limit: most new tokens of each sample; None: up to T.
    """
    earlier = earlier or {}
    self.samples: collections.deque[Sample] = collections.deque()
    for number, request in enumerate(requests):
      # What begins with the prompt alone comes behind what goes on: a text is
      # prefilled once, for samples in a row.
      parts = [(_known(earlier, request, i), i) for i in range(request.samples)]
      going = [(known, i) for known, i in parts if known is not None]
      prompt = Text(request.prompt, 0, number, request)
      for known, index in sorted(going, key=lambda part: part[0].size == 0):
        text = prompt
        if known.size:
          text = Text(
            np.concatenate([request.prompt, known]), known.size, number, request
          )
        begin, rest = len(text.tokens), most - known.size
        self.samples.append(
          Sample(
            len(self.samples),
            request,
            number,
            index,
            text,
            begin,
            min(rest, limit or rest),
            begin,
            ahead,
          )
        )

  def claim(self, texts: int) -> list[Sample]:
    """Takes the samples of the next texts out of the queue.

    Args:
      texts: how many, at most.
    """
    taken: list[Sample] = []
    while self.samples:
      if not taken or self.samples[0].text is not taken[-1].text:
        if not texts:
          break
        texts -= 1
      taken.append(self.samples.popleft())
    return taken


def _known(
  earlier: Mapping[tuple, Rollout], request: Request, index: int
) -> np.ndarray | None:
  """Returns the tokens that a sample has; None: it is at its end."""
  before = earlier.get(sample_key(request, index))
  if before is None:
    return np.zeros(0, np.int32)
  return before.tokens if before.suspended else None


def sample_key(request: Request, index: int) -> tuple[int, int, int, int]:
  """Identifies a sample among all samples of a run."""
  return request.domain, request.step, request.request, index


@dataclasses.dataclass
class Table:
  """The slots and who sits in them; None is a free slot."""

  slots: Slots
  drafts: Drafts
  owners: list[Sample | None]

  def counted(self) -> np.ndarray:
    """Returns bool[N]: not a row that runs ahead; free slots count."""
    return np.array([o is None or not o.ahead for o in self.owners])
