"""The slots of one replica: admit, compact, grow, decode, collect.

A replica is a part of the mesh that decodes on its own: N slots, an S, and a
drafter's state. The host acts on it only between its segments, reads its
devices once for each, and decides nothing that a token depends on.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from rlax_llm.config.draft_configs import Arm
from rlax_llm.drafting import store as stores
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent
from rlax_llm.rollout import control
from rlax_llm.rollout.drafts import Drafts
from rlax_llm.rollout.executor import Seat
from rlax_llm.rollout.outcomes import Outcomes
from rlax_llm.rollout.parts import Parts
from rlax_llm.rollout.prompts import Places
from rlax_llm.rollout.prompts import Prefilled
from rlax_llm.rollout.prompts import Text
from rlax_llm.rollout.read import SegmentRead
from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import Queue
from rlax_llm.rollout.table import Sample
from rlax_llm.rollout.table import Table
from rlax_llm.runtime import processes
from rlax_llm.types import DraftParams


class _Flight(NamedTuple):
  """A segment that runs."""

  packed: jax.Array  # what `SegmentRead.unpack` takes
  occupancy: Occupancy
  arm: Arm
  timed: bool
  begin: float  # before the drafts were prepared
  start: float


class _Line:
  """A queue as one replica works on it."""

  def __init__(self, queue: Queue, prefill: Callable) -> None:
    self.queue = queue
    self.waiting: list[Sample] = []  # claimed, in order
    self.prefilled = Prefilled(prefill)

  @property
  def pending(self) -> bool:
    return bool(self.waiting or self.queue.samples)


class Replica:
  """The slots of one part of the mesh, for one `generate`."""

  def __init__(
    self,
    parts: Parts,
    params: DraftParams,
    queue: Queue,
    coming: Queue,
    outcomes: Outcomes,
    state: RolloutState,
    stats: RolloutStats,
  ) -> None:
    """Begins with empty slots; nothing is decoded yet.

    Args:
      parts: of the replica.
      params: the policy's and the drafter's, on its devices.
      queue: samples of this step, shared by all replicas.
      coming: samples of the coming step, likewise.
      outcomes: where samples are booked.
      state: as for `RolloutEngine.generate`.
      stats: counted into.
    """
    self._parts = parts
    self._params = params
    self._outcomes = outcomes
    self._state = state
    self._stats = stats
    slots = parts.executor.empty(parts.rollout.slots, parts.capacities[0])
    self._table = Table(
      slots,
      Drafts(parts.executor, parts.widest, params, slots),
      [None] * parts.rollout.slots,
    )
    corpus = parts.widest.corpus
    self._places = Places(corpus.prompts) if corpus else None
    self._main = _Line(queue, self._prefill)
    self._coming = _Line(coming, self._prefill)
    self._flight: _Flight | None = None
    self._read: SegmentRead | None = None

  @property
  def mesh(self) -> Mesh:
    return self._parts.mesh

  @property
  def decoding(self) -> int:
    """Samples of this step in its slots."""
    return sum(o is not None and not o.ahead for o in self._table.owners)

  @property
  def waiting(self) -> list[Sample]:
    """Samples that it has claimed and not begun."""
    return self._main.waiting

  @property
  def flying(self) -> bool:
    """Whether a segment runs."""
    return self._flight is not None

  @property
  def landed(self) -> bool:
    """Whether the segment that runs can be read without waiting."""
    packed: Any = self._flight and self._flight.packed
    return packed is not None and packed.is_ready()

  def expect(self, samples: Sequence[Sample]) -> None:
    """Takes samples over, behind those that wait."""
    self.waiting.extend(samples)
    self._expect(samples)

  def _expect(self, samples: Sequence[Sample]) -> None:
    for sample in samples if self._places else ():
      assert self._places is not None
      self._places.expect(sample.group)

  def give_waiting(self) -> list[Sample]:
    """Gives up the later half of those that wait."""
    keep = len(self.waiting) // 2
    given = self.waiting[keep:]
    del self.waiting[keep:]
    self._forget(given)
    return given

  def give_decoding(self) -> list[Sample]:
    """Gives up samples that decode, if the rest fit a smaller N.

    They are suspended where they stand, under weights that stay: what goes on
    elsewhere are the same tokens. Not while a segment runs.
    """
    table, decoding = self._table, self.decoding
    fewer = [
      n
      for n in self._parts.row_counts
      if decoding / 2 <= n < min(decoding, len(table.owners))
    ]
    if not fewer:
      return []
    seated = [i for i, o in enumerate(table.owners) if o and not o.ahead]
    kept, moved = seated[: fewer[0]], seated[fewer[0] :]
    given = []
    for slot in moved:
      sample = table.owners[slot]
      assert sample is not None
      if sample.length > sample.base:
        assert self._read is not None
        tokens = self._outcomes.carry(sample, slot, self._read)
        prompt = sample.request.prompt
        sample.text = Text(
          np.concatenate([prompt, tokens]),
          len(tokens),
          sample.number,
          sample.request,
        )
      given.append(sample)
    for owner in table.owners:
      if owner and owner.ahead:
        self._forget([owner])
    self._forget(given)
    self._keep(kept)
    return given

  def _forget(self, samples: Sequence[Sample]) -> None:
    """Notes that samples end here, or go on elsewhere."""
    for sample in samples if self._places else ():
      assert self._places is not None
      self._places.collect(sample.group)

  def admit(self) -> None:
    """Fills free slots."""
    self._admit(self._main)

  def start(self) -> None:
    """Starts a segment, with as many slots and as much room as it needs."""
    if not self._main.pending:
      self._compact()
      if len(self._table.owners) <= self._parts.ahead_rows:
        self._admit(self._coming)
    self._grow()
    self._segment()

  def _prefill(self, members: Sequence[Text]) -> PromptBlock:
    """Prefills a block of texts; places of their prompts were taken."""
    longest = max(len(text.tokens) for text in members)
    capacity = self._parts.rollout.prompt_length
    if longest > capacity:
      capacity = min(c for c in self._parts.capacities if c >= longest)
    return self._parts.executor.prefill(
      self._params.policy,
      [t.tokens for t in members],
      self._parts.block_rows,
      capacity,
      self._table.drafts.wants_hidden,
    )

  def _place(self, ahead: bool, members: Sequence[Text]) -> None:
    """Gives the prompts of texts places, and the drafter what it knows."""
    corpus, places = self._parts.widest.corpus, self._places
    rows = self._parts.block_rows
    if not (places and corpus):
      return
    taken, requests = [], []
    for text in members:
      group = (ahead, text.number)
      if group not in places:
        taken.append(places.take(group))
        requests.append(text.request)
    taken += [corpus.prompts] * (rows - len(taken))
    self._table.drafts.load(
      lambda: (
        taken,
        *stores.corpus_texts(
          self._state.store, requests, rows, corpus, merge=processes.merge
        ),
      )
    )

  def _admit(self, line: _Line) -> None:
    """Fills free slots from a queue, in order."""
    table, places = self._table, self._places
    while None in table.owners:
      if not line.waiting:
        line.waiting += line.queue.claim(self._parts.block_rows)
        self._expect(line.waiting)
      if not line.waiting:
        return
      if line.prefilled.row(line.waiting[0].text) is None:
        # Texts of samples in a row; no text twice.
        texts = list({id(s.text): s.text for s in line.waiting}.values())
        members = texts[: self._parts.block_rows]
        self._place(line.waiting[0].ahead, members)
        line.prefilled.fill(members)
      taken = {}
      for slot, owner in enumerate(table.owners):
        row = line.prefilled.row(line.waiting[0].text) if line.waiting else None
        if owner is None and row is not None:
          sample = line.waiting.pop(0)
          table.owners[slot] = sample
          if places and sample.group not in places:
            # All of its samples were given up, and some came back.
            self._place(sample.ahead, [sample.text])
          place = places.of(sample.group) if places else 0
          left = sample.begin + sample.limit - sample.base
          taken[slot] = Seat(row, sample.request, sample.index, left, place)
          if sample.base > len(sample.request.prompt):
            table.drafts.fall_behind()
      block = line.prefilled.block
      self._grow_to(block.tokens.shape[1])
      table.slots = self._parts.executor.admit(table.slots, block, taken)
      table.drafts.admit(
        table.slots, block, {slot: seat.row for slot, seat in taken.items()}
      )

  def _speed_view(self) -> control.SpeedView:
    table, parts = self._table, self._parts
    return control.SpeedView(
      rows=len(table.owners),
      decoding=self.decoding,
      counted=int(np.sum(table.counted())),
      pending=self._main.pending,
      row_counts=parts.row_counts,
      ahead_rows=parts.ahead_rows,
      refill_threshold=parts.control.refill_threshold,
    )

  def _compact(self) -> None:
    """Shrinks N as far as `control.compacted_rows` says.

    Rows that run ahead stay as far as there is room for them then.
    """
    table = self._table
    target = control.compacted_rows(self._speed_view())
    if target < len(table.owners):
      main = [i for i, o in enumerate(table.owners) if o and not o.ahead]
      ahead = [i for i, o in enumerate(table.owners) if o and o.ahead]
      free = [i for i, owner in enumerate(table.owners) if owner is None]
      kept = (main + ahead + free)[:target]
      dropped = [table.owners[slot] for slot in set(ahead) - set(kept)]
      self._forget([owner for owner in dropped if owner])
      self._keep(kept)

  def _keep(self, kept: Sequence[int]) -> None:
    """Keeps the named rows, in that order."""
    table = self._table
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
    """Starts one segment."""
    table, parts = self._table, self._parts
    rows, capacity = table.slots.text.shape
    running = sum(o is not None and not o.ahead for o in table.owners)
    occupancy = Occupancy(running, rows, capacity)
    arm, limit, timed = parts.strategy.choose(
      occupancy, parts.rollout.segment_forwards
    )
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
      counted=table.counted(),
    )
    table.drafts.put(width, drafts)
    self._flight = _Flight(packed, occupancy, arm, timed, begin, start)

  def finish(self) -> None:
    """Waits for the segment that runs, reads it once, books what it tells."""
    flight, self._flight = self._flight, None
    assert flight is not None
    rows, capacity = self._table.slots.text.shape
    read = SegmentRead.unpack(jax.device_get(flight.packed), rows, capacity)
    seconds = self._now() - flight.start
    self._read = read
    spent = read.counters
    forwards, row_forwards = int(spent.forwards), int(spent.row_forwards)
    self._stats.segments += 1
    self._stats.reads += 1
    self._stats.segment_seconds += seconds
    self._stats.forwards += forwards
    self._stats.node_forwards += forwards * flight.arm.width
    self._stats.row_forwards += row_forwards
    self._stats.slot_forwards += forwards * rows
    self._stats.tokens += int(spent.tokens)
    self._stats.ahead_tokens += int(spent.ahead_tokens)
    self._parts.strategy.observe(
      flight.occupancy,
      flight.arm,
      Spent(
        seconds=seconds if flight.timed else None,
        preparation=flight.start - flight.begin,
        forwards=forwards,
        row_forwards=row_forwards,
        accepted=spent.accepted.tolist(),
      ),
    )
    self._collect(read)

  def _collect(self, read: SegmentRead) -> None:
    """Books what ended, and hints; frees slots."""
    table = self._table
    for slot, owner in enumerate(table.owners):
      if owner is None:
        continue
      owner.length, owner.done = int(read.length[slot]), bool(read.done[slot])
      if owner.ahead:
        assert self._state.store is not None
        self._state.store.add_hint(
          owner.request,
          owner.index,
          read.text[slot, owner.base : owner.length].copy(),
        )
      elif owner.done:
        self._outcomes.book(owner, slot, read)
    for slot, owner in enumerate(table.owners):
      if owner is not None and owner.done:
        table.owners[slot] = None
        self._forget([owner])

  def suspend(self) -> None:
    """Books what the samples in its slots have come to; all have decoded."""
    for slot, owner in enumerate(self._table.owners):
      if owner is not None and not owner.ahead and not owner.done:
        assert self._read is not None
        self._outcomes.book(owner, slot, self._read)
