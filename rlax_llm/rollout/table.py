"""Who waits, and who sits in which slot."""

import collections
import dataclasses
import functools
from typing import Callable, Mapping, Sequence

import numpy as np

from rlax_llm.rollout.drafts import Drafts
from rlax_llm.rollout.prompts import PromptBlocks
from rlax_llm.rollout.prompts import Text
from rlax_llm.rollout.slots import PromptBlock
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
  text: int  # of the queue's texts: what it begins with
  begin: int  # tokens of that text
  limit: int  # most new tokens
  length: int  # prompt and completion, as of the last boundary
  ahead: bool  # for a coming step: a hint to its drafts, no result
  done: bool = False

  @property
  def group(self) -> tuple[bool, int]:
    """Identifies the samples of one request."""
    return self.ahead, self.number


class Queue:
  """Samples that wait, in order, and the texts they begin with."""

  def __init__(self,
               requests: Sequence[Request],
               size: int,
               prefill: Callable[..., PromptBlock],
               *,
               most: int,
               ahead: bool = False,
               earlier: Mapping[tuple, Rollout] | None = None,
               limit: int | None = None) -> None:
    """Lines up every sample that is not at its end.

    Args:
      requests: in the order in which they are sampled.
      size: texts of one prefilled block.
      prefill: (ahead, number of the first, texts) -> block.
      most: T, most tokens of a completion.
      ahead: whether they are requests of a coming step.
      earlier: what samples came to before, by `state.sample_key`.
      limit: most new tokens of each sample; None: up to T.
    """
    earlier = earlier or {}
    texts: list[Text] = []
    self.samples: collections.deque[Sample] = collections.deque()
    # Samples of a request that have not been collected, by its number.
    self.counts: collections.Counter[int] = collections.Counter()
    for number, request in enumerate(requests):
      # Blocks come once, in order: what begins with the prompt alone comes
      # behind what goes on.
      parts = [(_known(earlier, request, i), i) for i in range(request.samples)]
      going = [(known, i) for known, i in parts if known is not None]
      for known, index in sorted(going, key=lambda part: part[0].size == 0):
        if known.size or not self.counts[number] or texts[-1].known:
          tokens = request.prompt
          if known.size:
            tokens = np.concatenate([tokens, known])
          texts.append(Text(tokens, known.size, number, request))
        self.counts[number] += 1
        begin, rest = len(texts[-1].tokens), most - known.size
        self.samples.append(
            Sample(len(self.samples), request, number, index,
                   len(texts) - 1, begin, min(rest, limit or rest), begin,
                   ahead))
    self.blocks = PromptBlocks(texts, size, functools.partial(prefill, ahead))


def _known(earlier: Mapping[tuple, Rollout], request: Request,
           index: int) -> np.ndarray | None:
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
