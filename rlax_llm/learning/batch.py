"""From samples to packed microbatches. Host side, numpy, deterministic."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from rlax_llm.ops import masking
from rlax_llm.types import Batch


@dataclasses.dataclass(frozen=True)
class Sample:
  """One training sample: a prompt and the tokens that are trained on."""

  prompt: np.ndarray  # int32[p]
  completion: np.ndarray  # int32[c], EOS included
  advantage: float = 0.0
  behaviour_logprobs: np.ndarray | None = None  # float32[c], nats
  scored_logprobs: np.ndarray | None = None  # float32[c]; see `Rollout`
  weight: float = 1.0  # of its loss, as the inverse of a survival probability
  group: int = 0  # samples of one prompt share it; from 0
  trained: bool = True  # False: out of the loss and of its denominators
  # By name, what the objective reads of its tokens: float32[c], or one number
  # for all of them; see `token_credit.carried`.
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def rehearsed(self) -> bool:
    """Whether it is the initial policy's, for the rehearsal's term alone."""
    return 'rehearsed' in self.extra


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """Assigns sequences to rows, first-fit decreasing.

  Args:
    lengths: tokens of each sequence, none above row_length.
    row_length: L.

  Returns:
    For each row the indices of its sequences, longest first.
  """
  order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  rows: list[list[int]] = []
  room: list[int] = []
  first_open = 0  # rows before it cannot hold even the shortest sequence
  shortest = min(lengths, default=0)
  for i in order:
    while first_open < len(rows) and room[first_open] < shortest:
      first_open += 1
    for row in range(first_open, len(rows)):
      if room[row] >= lengths[i]:
        break
    else:
      row = len(rows)
      rows.append([])
      room.append(row_length)
    rows[row].append(i)
    room[row] -= lengths[i]
  return rows


def deal(
  rows: Sequence[list[int]], microbatch_rows: int
) -> Iterator[tuple[int, list[int]]]:
  """Yields (place, sequences) of each row of `pack` among the microbatches.

  Rows are dealt to microbatches in turn, so that all are equally full.
  """
  count = max(1, -(-len(rows) // microbatch_rows))
  for place, members in enumerate(rows):
    yield (place % count) * microbatch_rows + place // count, members


def unpack(values: np.ndarray, sequences: Sequence[Sample]) -> list[np.ndarray]:
  """Returns what a packed array holds for each sequence's completion.

  Args:
    values: [M, R, L], of a batch that `make_batch` packed from the sequences,
      all of them kept.
    sequences: those.
  """
  _, microbatch_rows, length = values.shape
  flat = values.reshape(-1, length)
  found = {}
  rows = pack([len(s.prompt) + len(s.completion) for s in sequences], length)
  for row, members in deal(rows, microbatch_rows):
    start = 0
    for i in members:
      end = start + len(sequences[i].prompt) + len(sequences[i].completion)
      found[i] = flat[row, start + len(sequences[i].prompt) : end].copy()
      start = end
  return [found[i] for i in range(len(sequences))]


def make_batch(
  sequences: Sequence[Sample],
  *,
  reduction: str,
  constant: int,
  row_length: int,
  microbatch_rows: int,
  keep: np.ndarray | None = None,
  extra: Sequence[str] = (),
) -> Batch:
  """Packs sequences into microbatches of fixed shape.

  Args:
    sequences: the whole optimizer batch: loss denominators are computed over
      all of them, before any split.
    reduction: a name of `masking.REDUCTIONS`.
    constant: T, for the reduction that divides by it.
    row_length: L.
    microbatch_rows: R, rows of one forward and backward pass.
    keep: bool[len(sequences)]; what is not kept counts in the denominators
      but is not computed. None keeps all.
    extra: names of `Sample.extra` that the batch holds, 0 where a sample lacks
      them.

  Returns:
    Batch of numpy arrays [M, R, L]. M is the next power of two, so that few
    shapes occur; only `count` microbatches hold anything and are computed.

  Raises:
    ValueError: if a sequence is longer than a row.
  """
  # What is rehearsed has denominators of its own.
  rehearsed = np.array([s.rehearsed for s in sequences])
  lengths = np.array([len(s.completion) * s.trained for s in sequences])
  weigh = lambda part: masking.token_weights(
    lengths * part, reduction=reduction, constant=constant
  )
  weights = np.where(rehearsed, weigh(rehearsed), weigh(~rehearsed))
  kept = [
    i
    for i, s in enumerate(sequences)
    if s.trained and (keep is None or keep[i])
  ]
  # Numbered by appearance: never more of them than tokens.
  groups: dict[int, int] = {}
  for i in kept:
    groups.setdefault(sequences[i].group, len(groups) + 1)
  sizes = [
    len(sequences[i].prompt) + len(sequences[i].completion) for i in kept
  ]
  if max(sizes, default=0) > row_length:
    raise ValueError(
      f'a sequence of {max(sizes)} tokens exceeds '
      f'learning.row_length={row_length}; raise it'
    )
  rows = pack(sizes, row_length)
  count = max(1, -(-len(rows) // microbatch_rows))
  microbatches = 1 << (count - 1).bit_length()
  flat = (microbatches * microbatch_rows, row_length)
  ints = {
    name: np.zeros(flat, np.int32)
    for name in ('tokens', 'positions', 'segments', 'groups')
  }
  floats = {
    name: np.zeros(flat, np.float32)
    for name in (
      'weights',
      'advantages',
      'old_logprobs',
      'behaviour_logprobs',
      'reference_logprobs',
      'scored_logprobs',
      *extra,
    )
  }
  bools = {name: np.zeros(flat, bool) for name in ('targets', 'scored')}
  for row, members in deal(rows, microbatch_rows):
    start = 0
    for segment, member in enumerate(members, start=1):
      i = kept[member]
      s = sequences[i]
      middle = start + len(s.prompt)
      end = middle + len(s.completion)
      ints['tokens'][row, start:middle] = s.prompt
      ints['tokens'][row, middle:end] = s.completion
      ints['positions'][row, start:end] = np.arange(end - start)
      ints['segments'][row, start:end] = segment
      ints['groups'][row, start:end] = groups[s.group]
      bools['targets'][row, middle:end] = True
      floats['weights'][row, middle:end] = weights[i] * s.weight
      floats['advantages'][row, middle:end] = s.advantage
      if s.behaviour_logprobs is not None:
        floats['behaviour_logprobs'][row, middle:end] = s.behaviour_logprobs
      if s.scored_logprobs is not None:
        floats['scored_logprobs'][row, middle:end] = s.scored_logprobs
        bools['scored'][row, middle:end] = True
      for name in extra:
        floats[name][row, middle:end] = s.extra.get(name, 0.0)
      start = end
  shape = (microbatches, microbatch_rows, row_length)
  host: dict[str, Any] = {**ints, **floats, **bools}
  host = {name: array.reshape(shape) for name, array in host.items()}
  host['count'] = np.int32(count)
  host['extra'] = {name: host.pop(name) for name in extra}
  return Batch(**host)


def padding_fraction(batch: Batch) -> float:
  """Returns the share of computed positions that hold no token."""
  computed = batch.segments[: int(batch.count)]
  return 1.0 - float(np.mean(computed > 0))
