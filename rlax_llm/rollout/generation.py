"""One `generate` under way: admit, compact, grow, decode, collect.

The host acts only between segments, reads the device once for each, and
decides nothing that a token depends on.
"""

import dataclasses
from typing import Callable, Sequence

import jax
import numpy as np

from rlax_llm import processes
from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting import store as stores
from rlax_llm.drafting.arms import Arm
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.rollout import control
from rlax_llm.rollout.drafts import Drafts
from rlax_llm.rollout.executor import Executor
from rlax_llm.rollout.executor import Seat
from rlax_llm.rollout.outcomes import Outcomes
from rlax_llm.rollout.prompts import Places
from rlax_llm.rollout.prompts import Text
from rlax_llm.rollout.read import SegmentRead
from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import Queue
from rlax_llm.rollout.table import Table
from rlax_llm.types import DraftParams
from rlax_llm.types import Request


@dataclasses.dataclass(frozen=True)
class Parts:
  """What all generations of one engine share."""
  rollout: RolloutConfig
  control: ControlConfig
  executor: Executor
  drafters: dict[Arm, Drafter]
  strategy: Strategy
  capacities: list[int]  # values of S, ascending
  row_counts: list[int]  # values of N, descending
  block_rows: int  # prompts prefilled together
  clock: Callable[[], float]
  # The (N, S, arm) whose executable has run.
  warm: set[tuple[int, int, Arm]] = dataclasses.field(default_factory=set)

  @property
  def widest(self) -> Drafter:
    """The drafter whose state all arms share."""
    return self.drafters[max(self.drafters)]

  def arms(self, rows: int) -> list[Arm]:
    """Returns the arms that segments of N rows can have."""
    # A batch that would fit a smaller N is compacted.
    fewer = [n for n in self.row_counts if self.ahead_rows <= n < rows]
    return sorted(set(self.strategy.reachable(max(fewer, default=0) + 1, rows)))

  @property
  def runs_ahead(self) -> bool:
    """Whether `generate` makes use of the requests of a coming step."""
    corpus = self.widest.corpus
    return bool(self.control.run_ahead_rows and corpus and corpus.hints)

  @property
  def ahead_rows(self) -> int:
    """The N at and below which free slots run ahead."""
    if not self.runs_ahead:
      return 0
    wanted = self.control.run_ahead_rows
    # Never below the least N that compaction can reach.
    return max([n for n in self.row_counts if n <= wanted],
               default=self.row_counts[-1])

  def fits(self, request: Request) -> bool:
    """Whether the request's prompt is one that slots can hold."""
    return 0 < len(request.prompt) <= self.rollout.prompt_length


class Generation:
  """The slots of one `generate`, from the first prompt to the last token."""

  def __init__(self,
               parts: Parts,
               params: DraftParams,
               requests: Sequence[Request],
               state: RolloutState,
               stats: RolloutStats,
               *,
               ahead: Sequence[Request],
               policies: Sequence[control.StopPolicy] = (),
               limit: int | None = None) -> None:
    """Begins with empty slots; nothing is decoded yet.

    Args:
      parts: of the engine.
      params: the policy's and the drafter's, placed and rounded for many
        forwards.
      requests: as for `RolloutEngine.generate`.
      state: as for `RolloutEngine.generate`.
      stats: counted into.
      ahead: requests of a coming step; those that do not fit are left out: a
        hint must not fail a step.
      policies: as for `RolloutEngine.generate`.
      limit: as for `RolloutEngine.generate`.
    """
    self._parts = parts
    self._params = params
    self._state = state
    self._stats = stats
    slots = parts.executor.empty(parts.rollout.slots, parts.capacities[0])
    self._table = Table(slots,
                        Drafts(parts.executor, parts.widest, params, slots),
                        [None] * parts.rollout.slots)
    corpus = parts.widest.corpus
    self._places = Places(corpus.prompts) if corpus else None
    most = parts.rollout.max_new_tokens
    self._queue = Queue(requests,
                        parts.block_rows,
                        self._prefill,
                        most=most,
                        earlier=state.earlier,
                        limit=limit)
    fit = [r for r in ahead if parts.fits(r)] if parts.runs_ahead else []
    self._coming = Queue(fit if state.store is not None else [],
                         parts.block_rows,
                         self._prefill,
                         most=most,
                         ahead=True)
    self._samples = tuple(self._queue.samples)
    self.outcomes = Outcomes(state.earlier, state.version, most)
    self._policies = policies
    self._time = control.LogicalTime(
        requests, [s.number for s in self._samples],
        parts.control.logical_slots or parts.rollout.slots)
    self._stopped = False

  def admit(self) -> bool:
    """Fills free slots; returns whether a sample is being decoded."""
    if self._stopped:
      return False
    self._admit(self._queue)
    return any(o and not o.ahead for o in self._table.owners)

  def decode(self) -> None:
    """Decodes one segment, with as many slots and as much room as it needs."""
    if not self._queue.samples:
      self._compact()
      if len(self._table.owners) <= self._parts.ahead_rows:
        self._admit(self._coming)
    self._grow()
    self._segment()

  def _prefill(self, ahead: bool, members: Sequence[Text]) -> PromptBlock:
    """Prefills a block of texts."""
    corpus, places = self._parts.widest.corpus, self._places
    rows = self._parts.block_rows
    if places and corpus:
      counts = (self._coming if ahead else self._queue).counts
      taken, requests = [], []
      for text in members:
        group = (ahead, text.number)
        if group not in places:
          taken.append(places.take(group, counts[text.number]))
          requests.append(text.request)
      taken += [corpus.prompts] * (rows - len(taken))
      self._table.drafts.load(lambda: (taken, *stores.corpus_texts(
          self._state.store, requests, rows, corpus, merge=processes.merge)))
    longest = max(len(text.tokens) for text in members)
    capacity = self._parts.rollout.prompt_length
    if longest > capacity:
      capacity = min(c for c in self._parts.capacities if c >= longest)
    return self._parts.executor.prefill(self._params.policy,
                                        [t.tokens for t in members], rows,
                                        capacity,
                                        self._table.drafts.wants_hidden)

  def _admit(self, queue: Queue) -> None:
    """Fills free slots from a queue, in order."""
    table, places = self._table, self._places
    waiting, blocks = queue.samples, queue.blocks
    while waiting and None in table.owners:
      blocks.advance_to(waiting[0].text)
      taken = {}
      for slot, owner in enumerate(table.owners):
        if owner is None and waiting and waiting[0].text in blocks:
          sample = waiting.popleft()
          table.owners[slot] = sample
          place = places.of(sample.group) if places else 0
          taken[slot] = Seat(blocks.row(sample.text), sample.request,
                             sample.index, sample.limit, place)
          if sample.begin > len(sample.request.prompt):
            table.drafts.fall_behind()
      self._grow_to(blocks.block.tokens.shape[1])
      table.slots = self._parts.executor.admit(table.slots, blocks.block, taken)
      table.drafts.admit(table.slots, blocks.block, {
          slot: seat.row for slot, seat in taken.items()
      })

  def _speed_view(self) -> control.SpeedView:
    table, parts = self._table, self._parts
    return control.SpeedView(rows=len(table.owners),
                             decoding=sum(
                                 bool(o and not o.ahead) for o in table.owners),
                             counted=int(np.sum(table.counted())),
                             pending=bool(self._queue.samples),
                             row_counts=parts.row_counts,
                             ahead_rows=parts.ahead_rows,
                             refill_threshold=parts.control.refill_threshold)

  def _compact(self) -> None:
    """Shrinks N as far as `control.compacted_rows` says.

    Rows that run ahead stay as far as there is room for them then.
    """
    table, places = self._table, self._places
    target = control.compacted_rows(self._speed_view())
    if target < len(table.owners):
      main = [i for i, o in enumerate(table.owners) if o and not o.ahead]
      ahead = [i for i, o in enumerate(table.owners) if o and o.ahead]
      free = [i for i, owner in enumerate(table.owners) if owner is None]
      kept = (main + ahead + free)[:target]
      for slot in set(ahead) - set(kept):
        owner = table.owners[slot]
        if places and owner:
          places.collect(owner.group)
      table.slots = self._parts.executor.gather(table.slots, kept)
      table.drafts.gather(kept)
      table.owners = [table.owners[i] for i in kept]

  def _grow(self) -> None:
    """Enlarges S until every row has room for one more forward."""
    longest = max(o.length for o in self._table.owners if o is not None)
    self._grow_to(longest + self._parts.widest.width)

  def _grow_to(self, needed: int) -> None:
    """Enlarges S to the least value that holds so many tokens."""
    table = self._table
    if needed > table.slots.text.shape[1]:
      target = min(c for c in self._parts.capacities if c >= needed)
      table.slots = self._parts.executor.grow(table.slots, target)
      table.drafts.grow(target)

  def _now(self) -> float:
    """Returns seconds on a clock that stands still while XLA compiles."""
    return self._parts.clock() - self._parts.executor.pool.seconds

  def _segment(self) -> None:
    """Runs one segment, reads it once, collects the samples that ended."""
    table, parts = self._table, self._parts
    rows, capacity = table.slots.text.shape
    running = sum(o is not None and not o.ahead for o in table.owners)
    occupancy = Occupancy(running, rows, capacity)
    arm, limit, timed = parts.strategy.choose(occupancy,
                                              parts.rollout.segment_forwards)
    # It reads clocks, which differ between processes: the first one's decide.
    arms = list(parts.drafters)
    place, limit, timed = processes.broadcast([arms.index(arm), limit, timed])
    arm = arms[place]
    width = arm.width
    # The first run of an executable warms up and tells nothing of its cost.
    timed = timed and (rows, capacity, arm) in parts.warm
    parts.warm.add((rows, capacity, arm))
    if timed:  # What was dispatched before is no cost of this segment's.
      jax.block_until_ready(table.slots)
    begin = self._now()
    drafts = table.drafts.take(width, table.slots)
    if timed:
      jax.block_until_ready(drafts)
    start = self._now()
    table.slots, drafts, packed = parts.executor.decode(
        self._params,
        table.slots,
        drafts,
        parts.drafters[arm],
        forwards=limit,
        done_rows=control.done_rows(self._speed_view()),
        counted=table.counted())
    table.drafts.put(width, drafts)
    read = SegmentRead.unpack(jax.device_get(packed), rows, capacity)
    seconds = self._now() - start
    spent = read.counters
    forwards, row_forwards = int(spent.forwards), int(spent.row_forwards)
    self._stats.segments += 1
    self._stats.reads += 1
    self._stats.segment_seconds += seconds
    self._stats.forwards += forwards
    self._stats.node_forwards += forwards * width
    self._stats.row_forwards += row_forwards
    self._stats.slot_forwards += forwards * rows
    self._stats.tokens += int(spent.tokens)
    self._stats.ahead_tokens += int(spent.ahead_tokens)
    parts.strategy.observe(
        occupancy, arm,
        Spent(seconds=seconds if timed else None,
              preparation=start - begin,
              forwards=forwards,
              row_forwards=row_forwards,
              accepted=spent.accepted.tolist()))
    self._collect(read)

  def _collect(self, read: SegmentRead) -> None:
    """Books what ended, and hints; stops where a policy says so."""
    table, places = self._table, self._places
    for slot, owner in enumerate(table.owners):
      if owner is None:
        continue
      owner.length, owner.done = int(read.length[slot]), bool(read.done[slot])
      if owner.ahead:
        assert self._state.store is not None
        self._state.store.add_hint(
            owner.request, owner.index,
            read.text[slot, owner.begin:owner.length].copy())
      elif owner.done:
        self.outcomes.book(owner, slot, read)
    if self._policies and self._stops():
      self._suspend(read)
    for slot, owner in enumerate(table.owners):
      if owner is not None and owner.done:
        table.owners[slot] = None
        if places:
          places.collect(owner.group)

  def _stops(self) -> bool:
    """Goes through logical time; returns whether a policy stops at its tick."""
    views = self._time.advance([s.length - s.begin for s in self._samples],
                               [s.done for s in self._samples])
    return any(policy(view) for view in views for policy in self._policies)

  def _suspend(self, read: SegmentRead) -> None:
    """Cuts every sample to what it has at the tick of logical time."""
    self._stopped = True
    for slot, owner in enumerate(self._table.owners):
      if owner is not None and not owner.ahead and not owner.done:
        self.outcomes.book(owner, slot, read)
    store, corpus = self._state.store, self._parts.widest.corpus
    for order, sample in enumerate(self._samples):
      tokens = self._time.tokens_at_tick(order)
      if tokens is None:
        continue
      more = self.outcomes.cut(sample, tokens)
      self._stats.discarded_tokens += max(sample.length - sample.begin - tokens,
                                          0)
      if more is not None and store is not None and corpus and corpus.hints:
        store.add_hint(sample.request, sample.index, more)
