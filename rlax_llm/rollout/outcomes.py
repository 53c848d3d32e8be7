"""What the samples of one `generate` come to."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import numpy as np

from rlax_llm.rollout.read import SegmentRead
from rlax_llm.rollout.table import Sample
from rlax_llm.rollout.table import sample_key
from rlax_llm.types import Request
from rlax_llm.types import Rollout

_NOTHING = np.zeros(0, np.int32)


class Outcomes:
  """The rollouts of samples: at their end, or as far as they got."""

  def __init__(
    self, earlier: Mapping[tuple, Rollout], version: int, longest: int
  ) -> None:
    """Begins with what samples came to before.

    Args:
      earlier: by `sample_key`.
      version: of the policy that samples.
      longest: T.
    """
    self._earlier = dict(earlier)
    self._version = version
    self._longest = longest
    self._made: dict[tuple, Rollout] = {}

  def book(self, sample: Sample, slot: int, read: SegmentRead) -> None:
    """Notes what a sample in a slot has come to."""
    new = slice(sample.base, int(read.length[slot]))
    begun = self._begun(sample.request, sample.index)
    tokens = read.text[slot, new].copy()
    version = np.full(len(tokens), self._version, np.int32)
    join = lambda old, more: np.concatenate([old, more])
    finished = bool(read.finished[slot])
    length = begun.length + len(tokens)
    self._made[sample_key(sample.request, sample.index)] = Rollout(
      tokens=join(begun.tokens, tokens),
      length=length,
      finished=finished,
      token_version=join(begun.token_version, version),
      behaviour_logprobs=join(
        begun.behaviour_logprobs, read.logprobs[slot, new]
      ),
      drafted=join(begun.drafted, read.drafted[slot, new]),
      forwards=begun.forwards + int(read.forwards[slot]),
      request=sample.request,
      index=sample.index,
      suspended=not finished and length < self._longest,
      scored_logprobs=begun.scored_logprobs,
      survival=begun.survival,
      weight=begun.weight,
    )

  def carry(self, sample: Sample, slot: int, read: SegmentRead) -> np.ndarray:
    """Notes what a sample has come to, which will go on in another slot.

    Returns:
      All tokens of its completion.
    """
    self.book(sample, slot, read)
    key = sample_key(sample.request, sample.index)
    self._earlier[key] = self._made[key]
    return self._earlier[key].tokens

  def cut(self, sample: Sample, tokens: int) -> np.ndarray | None:
    """Takes back what a sample has beyond `tokens` new ones, and suspends it.

    Returns:
      All of its tokens, if there were more; else None.
    """
    key = sample_key(sample.request, sample.index)
    made = self._made.get(key)
    if made is None:
      return None
    length = sample.begin - len(sample.request.prompt) + tokens
    self._made[key] = _shortened(made, length)
    return made.tokens if made.length > length else None

  def new(self, requests: Sequence[Request]) -> list[Rollout]:
    """Returns what came to its end here, in order."""
    return [
      r
      for r in self.rollouts(requests)
      if not r.suspended and sample_key(r.request, r.index) in self._made
    ]

  def rollouts(self, requests: Sequence[Request]) -> list[Rollout]:
    """Returns every rollout, in the order of requests and of samples."""
    return [
      self._made.get(sample_key(request, i), self._begun(request, i))
      for request in requests
      for i in range(request.samples)
    ]

  def _begun(self, request: Request, index: int) -> Rollout:
    """Returns what a sample came to before."""
    before = self._earlier.get(sample_key(request, index))
    if before is not None:
      return before
    return Rollout(
      _NOTHING,
      0,
      False,
      _NOTHING,
      np.zeros(0, np.float32),
      np.zeros(0, bool),
      0,
      request,
      index,
      suspended=True,
    )


def _shortened(rollout: Rollout, length: int) -> Rollout:
  """Returns a rollout up to a length, suspended."""
  return dataclasses.replace(
    rollout,
    tokens=rollout.tokens[:length],
    length=length,
    finished=False,
    token_version=rollout.token_version[:length],
    behaviour_logprobs=rollout.behaviour_logprobs[:length],
    drafted=rollout.drafted[:length],
    suspended=True,
  )
