"""One `generate` under way: admit, compact, grow, decode, collect.

The host acts only between segments, reads the device once for each, and
decides nothing that a token depends on.
"""

import dataclasses
import math
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
from rlax_llm.rollout.drafts import Drafts
from rlax_llm.rollout.executor import Executor
from rlax_llm.rollout.prompts import Places
from rlax_llm.rollout.read import SegmentRead
from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import Queue
from rlax_llm.rollout.table import Sample
from rlax_llm.rollout.table import Table
from rlax_llm.types import DraftParams
from rlax_llm.types import Request
from rlax_llm.types import Rollout


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

  def __init__(self, parts: Parts, params: DraftParams,
               requests: Sequence[Request], state: RolloutState,
               stats: RolloutStats, *, ahead: Sequence[Request]) -> None:
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
    self._queue = Queue(requests, parts.block_rows, False, self._prefill)
    fit = [r for r in ahead if parts.fits(r)] if parts.runs_ahead else []
    self._coming = Queue(fit if state.store is not None else [],
                         parts.block_rows, True, self._prefill)
    self.results: list[Rollout | None] = [None] * len(self._queue.samples)

  def admit(self) -> bool:
    """Fills free slots; returns whether a sample is being decoded."""
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

  def _prefill(self, ahead: bool, first: int,
               members: Sequence[Request]) -> PromptBlock:
    """Prefills a block of prompts, the first of that number in its queue."""
    corpus, places = self._parts.widest.corpus, self._places
    rows = self._parts.block_rows
    if places and corpus:
      taken = [
          places.take((ahead, first + i), request.samples)
          for i, request in enumerate(members)
      ]
      taken += [corpus.prompts] * (rows - len(members))
      self._table.drafts.load(lambda: (taken, *stores.corpus_texts(
          self._state.store, members, rows, corpus, merge=processes.merge)))
    return self._parts.executor.prefill(self._params.policy,
                                        [r.prompt for r in members], rows,
                                        self._parts.rollout.prompt_length,
                                        self._table.drafts.wants_hidden)

  def _admit(self, queue: Queue) -> None:
    """Fills free slots from a queue, in order."""
    table, places = self._table, self._places
    waiting, blocks = queue.samples, queue.blocks
    while waiting and None in table.owners:
      blocks.advance_to(waiting[0].number)
      taken = {}
      for slot, owner in enumerate(table.owners):
        if owner is None and waiting and waiting[0].number in blocks:
          sample = waiting.popleft()
          table.owners[slot] = sample
          place = places.of(sample.group) if places else 0
          taken[slot] = (blocks.row(sample.number), sample.request,
                         sample.index, place)
      table.slots = self._parts.executor.admit(
          table.slots, blocks.block, taken, self._parts.rollout.max_new_tokens)
      table.drafts.admit(table.slots, blocks.block, {
          slot: entry[0] for slot, entry in taken.items()
      })

  def _compact(self) -> None:
    """Shrinks N to the least count that holds the rows still decoding.

    Rows that run ahead stay as far as there is room for them then.
    """
    table, places = self._table, self._places
    rows = len(table.owners)
    main = [i for i, o in enumerate(table.owners) if o and not o.ahead]
    least = max(len(main), min(self._parts.ahead_rows, rows))
    target = min(n for n in self._parts.row_counts if least <= n <= rows)
    if target < rows:
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
    """Doubles S until every row has room for one more forward."""
    table = self._table
    capacity = table.slots.text.shape[1]
    longest = max(o.length for o in table.owners if o is not None)
    needed = longest + self._parts.widest.width
    if needed > capacity:
      target = min(c for c in self._parts.capacities if c >= needed)
      table.slots = self._parts.executor.grow(table.slots, target)
      table.drafts.grow(target)

  def _done_rows(self) -> int:
    """Returns how many counted rows may be done before the host should act."""
    table = self._table
    rows = len(table.owners)
    if self._queue.samples:
      return max(1, math.ceil(self._parts.control.refill_threshold * rows))
    fewer = [
        n for n in self._parts.row_counts if self._parts.ahead_rows <= n < rows
    ]
    # Free slots are done, and count.
    counted = int(np.sum(table.counted()))
    return min(rows - max(fewer), counted) if fewer else counted

  def _now(self) -> float:
    """Returns seconds on a clock that stands still while XLA compiles."""
    return self._parts.clock() - self._parts.executor.pool.seconds

  def _segment(self) -> None:
    """Runs one segment, reads it once, collects the samples that ended."""
    table, places = self._table, self._places
    parts = self._parts
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
        done_rows=self._done_rows(),
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
    for slot, owner in enumerate(table.owners):
      if owner is not None:
        owner.length = int(read.length[slot])
        self._collect(slot, owner, read)
        if read.done[slot]:
          table.owners[slot] = None
          if places:
            places.collect(owner.group)

  def _collect(self, slot: int, owner: Sample, read: SegmentRead) -> None:
    """Books what a slot came to: a rollout when done, a hint at any time."""
    span = slice(len(owner.request.prompt), owner.length)
    if owner.ahead:
      assert self._state.store is not None
      self._state.store.add_hint(owner.request, owner.index,
                                 read.text[slot, span].copy())
    elif read.done[slot]:
      tokens = read.text[slot, span].copy()
      self.results[owner.order] = Rollout(
          tokens=tokens,
          length=len(tokens),
          finished=bool(read.finished[slot]),
          token_version=np.full(len(tokens), self._state.version, np.int32),
          behaviour_logprobs=read.logprobs[slot, span].copy(),
          drafted=read.drafted[slot, span].copy(),
          forwards=int(read.forwards[slot]),
          request=owner.request,
          index=owner.index)
