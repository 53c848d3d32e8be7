"""Groups of samples, and what a run keeps of them from step to step."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any
from typing import ClassVar
from typing import NamedTuple

import numpy as np

from rlax_llm.learning import filters
from rlax_llm.learning.allocation import SuccessHistory
from rlax_llm.learning.length_ranker import LengthHistory
from rlax_llm.learning.quality_head import QualityHead
from rlax_llm.rollout import records
from rlax_llm.tasks.task import Problem
from rlax_llm.types import Request
from rlax_llm.types import Rollout


class Labels(NamedTuple):
  """What is learned from G samples; see `Group`."""

  rewards: np.ndarray  # float32[G]
  correctness: np.ndarray  # float32[G]
  known: np.ndarray  # bool[G]


# (texts, the verifier's rewards, unscorable, parts) -> labels; see
# `advantages.judge`.
Judge = Callable[
  [Sequence[str], np.ndarray, np.ndarray, Mapping[str, np.ndarray]], Labels
]


@dataclasses.dataclass(frozen=True)
class Group:
  """The samples of one problem, scored.

  `unscorable` and `parts` are the verifier's. `rewards`, `correctness` and
  `known` are the labels that are learned from; see `advantages.judge`.
  Advantages are made of the rewards. Signal, hardness and replay go by
  correctness, which shaping does not touch. Whatever is not known is 0, and
  enters no statistic.
  """

  problem: Problem
  rollouts: tuple[Rollout, ...]
  texts: tuple[str, ...]  # the rollouts' tokens, decoded
  rewards: np.ndarray  # float32[G], weighted sums
  correctness: np.ndarray  # float32[G]
  known: np.ndarray  # bool[G]: reward and correctness are known
  unscorable: np.ndarray  # bool[G]: the verifier gave no reward
  parts: dict[str, np.ndarray]  # float32[G] by name; 0 where unscorable
  number: int = 0  # of the problem, in the run's stream of them
  replayed: bool = False  # was trained on before
  # Of each sample, metrics of the user's own by name; (): none has any.
  metrics: tuple[Mapping[str, float], ...] = ()

  @property
  def tokens(self) -> int:
    return int(self.lengths.sum())

  @property
  def lengths(self) -> np.ndarray:
    """int32[G], tokens."""
    return np.array([rollout.length for rollout in self.rollouts], np.int32)

  @property
  def request(self) -> Request:
    return self.rollouts[0].request

  @property
  def success(self) -> np.ndarray:
    """float32[known samples], their correctness clipped to [0, 1]."""
    return np.clip(self.correctness[self.known], 0, 1)

  @property
  def accuracy(self) -> float | None:
    """Mean success as if no sample had been pruned; None: nothing is known."""
    if not self.known.any():
      return None
    chances = np.array([rollout.survival for rollout in self.rollouts])
    return float(np.average(self.success, weights=1 / chances[self.known]))

  @property
  def age_order(self) -> tuple[int, int]:
    """Sorts groups by when they were requested."""
    return self.request.step, self.request.request

  def only(self, chosen: np.ndarray) -> 'Group':
    """Returns the group of some of its samples; chosen: bool[G]."""
    pick = lambda items: tuple(x for x, keep in zip(items, chosen) if keep)
    return dataclasses.replace(
      self,
      rollouts=pick(self.rollouts),
      texts=pick(self.texts),
      rewards=self.rewards[chosen],
      correctness=self.correctness[chosen],
      known=self.known[chosen],
      unscorable=self.unscorable[chosen],
      parts={name: value[chosen] for name, value in self.parts.items()},
      metrics=pick(self.metrics),
    )

  @property
  def has_signal(self) -> bool:
    """Whether the known correctness differs."""
    return bool(filters.has_signal(self.correctness, self.known))


def mean_known(
  values: Sequence[np.ndarray], known: Sequence[np.ndarray]
) -> float:
  """Returns the mean of the known values of all groups; NaN if none is.

  Args:
    values: [G] of each group.
    known: bool[G] of each group.
  """
  found = np.concatenate(values)[np.concatenate(known)]
  return float(np.mean(found)) if found.size else math.nan


@dataclasses.dataclass(frozen=True)
class PartialGroup:
  """A group that is asked for and not complete."""

  number: int  # see `Group`
  request: Request
  rollouts: tuple[Rollout, ...] = ()  # as far as they got
  replayed: ClassVar[bool] = False

  @property
  def tokens(self) -> int:
    return sum(rollout.length for rollout in self.rollouts)

  @property
  def age_order(self) -> tuple[int, int]:
    """Sorts groups by when they were requested."""
    return self.request.step, self.request.request

  @property
  def complete(self) -> bool:
    """Whether every sample is at its end."""
    return bool(self.rollouts) and not any(r.suspended for r in self.rollouts)

  @property
  def survivors(self) -> tuple[Rollout, ...]:
    """The samples that were not pruned."""
    return tuple(r for r in self.rollouts if r.survival > 0)


@dataclasses.dataclass(frozen=True)
class Buffer:
  """What coming steps learn from, besides what they will sample.

  Training values, a part of the checkpoint.
  """

  cursor: int = 0  # problems taken from the run's stream
  pending: tuple[PartialGroup, ...] = ()  # oldest first
  surplus: tuple[Group, ...] = ()  # complete, not trained on yet; oldest first
  # Batches of coming steps, the next one first.
  queue: tuple[tuple[Group, ...], ...] = ()
  past: tuple[Group, ...] = ()  # trained on, may be replayed; oldest first
  # The initial policy's right samples of what it solved.
  rehearsal: tuple[Group, ...] = ()
  head: QualityHead = dataclasses.field(default_factory=QualityHead)
  lengths: LengthHistory = dataclasses.field(default_factory=LengthHistory)
  successes: SuccessHistory = dataclasses.field(default_factory=SuccessHistory)
  sampled_tokens: int = 0
  trained_tokens: int = 0  # once for each token, however often it is replayed
  dropped_tokens: int = 0  # of groups that are never trained on

  @property
  def buffered_tokens(self) -> int:
    """Tokens that were sampled and wait to be trained on."""
    waiting: list[Group | PartialGroup] = [*self.pending, *self.surplus]
    waiting += [group for batch in self.queue for group in batch]
    return sum(group.tokens for group in waiting if not group.replayed)


def dump(state: Buffer) -> dict[str, Any]:
  """Returns the state as JSON can hold it; `restore` undoes it."""

  def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: records.pack_array(x) for name, x in arrays.items()}

  def group(item: Group | PartialGroup) -> dict[str, Any]:
    record: dict[str, Any] = {'number': item.number}
    if item.rollouts:
      record['rollouts'] = records.pack_rollouts(item.rollouts)
    if isinstance(item, Group):
      record['replayed'] = item.replayed
      record['rewards'] = records.pack_array(item.rewards)
      record['unscorable'] = records.pack_array(item.unscorable)
      record['parts'] = pack(item.parts)
      if item.metrics:
        record['metrics'] = list(item.metrics)
    else:
      request = item.request
      record['request'] = [request.samples, request.step, request.request]
    return record

  record: dict[str, Any] = {}
  for field in dataclasses.fields(state):
    value = getattr(state, field.name)
    if field.name == 'queue':
      value = [[group(g) for g in batch] for batch in value]
    elif isinstance(value, QualityHead):
      value = {
        'steps': value.steps,
        'counts': records.pack_array(value.counts),
        'weights': pack(value.weights),
        'moments': pack(value.moments),
      }
    elif isinstance(value, (LengthHistory, SuccessHistory)):
      value = value.dump()
    elif isinstance(value, tuple):
      value = [group(g) for g in value]
    record[field.name] = value
  return record


def restore(
  record: Mapping[str, Any],
  problem: Callable[[int], Problem],
  encode: Callable[[str], Sequence[int]],
  decode: Callable[[Any], str],
  judge: Judge,
  domain: int,
) -> Buffer:
  """Returns the state that `dump` took apart.

  Args:
    record: from `dump`.
    problem: returns a problem of the run's stream by its number.
    encode: returns the token ids of a prompt.
    decode: returns the text of token ids.
    judge: gives the labels of a group's samples.
    domain: of the requests.
  """

  def unpack(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: records.unpack_array(x) for name, x in arrays.items()}

  def prompt(item: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(encode(problem(item['number']).prompt), np.int32)

  def group(item: Mapping[str, Any]) -> Group:
    rollouts = records.unpack_rollouts(item['rollouts'], prompt(item))
    texts = tuple(decode(r.tokens) for r in rollouts)
    unscorable = records.unpack_array(item['unscorable'])
    parts = unpack(item['parts'])
    labels = judge(
      texts, records.unpack_array(item['rewards']), unscorable, parts
    )
    return Group(
      problem=problem(item['number']),
      rollouts=rollouts,
      texts=texts,
      **labels._asdict(),
      unscorable=unscorable,
      parts=parts,
      number=item['number'],
      replayed=item['replayed'],
      metrics=tuple(item.get('metrics', ())),
    )

  def pending(item: Mapping[str, Any]) -> PartialGroup:
    samples, step, number = item['request']
    rollouts: tuple[Rollout, ...] = ()
    if 'rollouts' in item:
      rollouts = records.unpack_rollouts(item['rollouts'], prompt(item))
    return PartialGroup(
      item['number'],
      Request(prompt(item), samples, domain, step, number),
      rollouts,
    )

  many = lambda name: tuple(map(group, record[name]))
  return Buffer(
    pending=tuple(map(pending, record['pending'])),
    surplus=many('surplus'),
    queue=tuple(tuple(map(group, batch)) for batch in record['queue']),
    past=many('past'),
    rehearsal=many('rehearsal'),
    lengths=LengthHistory.restore(record['lengths']),
    successes=SuccessHistory.restore(record['successes']),
    head=QualityHead(
      unpack(record['head']['weights']),
      unpack(record['head']['moments']),
      record['head']['steps'],
      records.unpack_array(record['head']['counts']),
    ),
    **{
      name: record[name]
      for name in (
        'cursor',
        'sampled_tokens',
        'trained_tokens',
        'dropped_tokens',
      )
    },
  )
