"""The host loop around segments: admit, grow, compact, collect.

The host acts only between segments, reads the device once for each, and
decides nothing that a token depends on.
"""

import math
import time
from typing import Any, Callable, Sequence

import jax
from jax.sharding import Mesh
import numpy as np

from rlax_llm import sharding
from rlax_llm.config import check_positions
from rlax_llm.config import ConfigError
from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting import drafters
from rlax_llm.drafting import store as stores
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.strategy import WidthPolicy
from rlax_llm.executables import ExecutablePool
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout import shapes
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
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Rollout


class RolloutEngine:
  """Generates rollouts. One engine serves one model, config and mesh."""

  def __init__(self,
               model: LanguageModel,
               *,
               rollout: RolloutConfig,
               control: ControlConfig,
               sampling: Sampling,
               eos_ids: tuple[int, ...],
               seed: int,
               mesh: Mesh,
               clock: Callable[[], float] = time.perf_counter,
               drafter: Drafter | None = None,
               params_placement: Any = None,
               pool: ExecutablePool | None = None) -> None:
    """Prepares an engine; nothing is compiled yet.

    Args:
      model: the policy.
      rollout: frozen section.
      control: frozen section.
      sampling: the law to sample from.
      eos_ids: tokens that finish a completion.
      seed: the run's seed.
      mesh: from `sharding.make_mesh`.
      clock: seconds; read for statistics only.
      drafter: overrides `rollout.drafter`, for instance with your own.
      params_placement: a sharding for every parameter, to which `generate`
        brings them first, rounded to what a forward reads; None: used as they
        are.
      pool: where executables are kept; None makes one.

    Raises:
      ConfigError: if slots do not divide over the mesh, or prompt, completion
        and draft do not fit the model's positions.
    """
    self._rollout = rollout
    self._control = control
    self._clock = clock
    self._params_placement = params_placement
    self._ways = sharding.ways(mesh)
    if rollout.slots % self._ways:
      raise ConfigError(f'rollout.slots={rollout.slots} is not divisible by '
                        f'{self._ways} devices; make it a multiple')
    # One block of prompts fills the slots once.
    self._block_rows = math.ceil(rollout.slots / rollout.samples_per_prompt)
    # Every slot may hold the last sample of another prompt while a whole block
    # of new prompts comes in.
    self._places = rollout.slots + self._block_rows
    width = drafter.width if drafter else drafters.widest(rollout, control)
    self._capacities = shapes.list_capacities(rollout, width)
    self._drafters = (drafters.by_width(drafter) if drafter else
                      drafters.make_drafters(rollout,
                                             control,
                                             places=self._places,
                                             capacity=self._capacities[-1]))
    check_positions(rollout, width, model.max_positions)
    self._check_corpus(rollout)
    self._row_counts = shapes.list_row_counts(rollout.slots, control,
                                              self._ways)
    # A width that the config fixes is not chosen.
    self._policy = None if drafter or rollout.width else WidthPolicy(
        list(self._drafters))
    self._executor = Executor(model,
                              config=segments.SegmentConfig(
                                  sampling, tuple(eos_ids)),
                              seed=seed,
                              mesh=mesh,
                              pool=pool or ExecutablePool(clock))
    self.pool = self._executor.pool
    self.stats = RolloutStats()
    self.reads = 0  # device-to-host reads since the start

  def _check_corpus(self, rollout: RolloutConfig) -> None:
    """Refuses a drafter of yours whose corpus cannot hold what is sampled."""
    corpus = self._widest.corpus
    if corpus is None:
      return
    places = self._places
    if corpus.prompts < places or corpus.capacity < rollout.prompt_length:
      raise ConfigError(
          f"the drafter's corpus has {corpus.prompts} places of "
          f'{corpus.capacity} tokens; {rollout.slots} slots need {places} '
          f'places of at least {rollout.prompt_length}: enlarge its shape')

  @property
  def _widest(self) -> Drafter:
    return self._drafters[max(self._drafters)]

  def _widths(self) -> list[int]:
    """Returns the values of W that segments can have."""
    return sorted(self._drafters) if self._policy else [self._widest.width]

  def reachable_keys(self) -> list[tuple[int, int, int]]:
    """Returns every (N, S, W) whose segment this engine can compile."""
    return [(rows, capacity, width)
            for rows in self._row_counts
            for capacity in self._capacities
            for width in self._widths()]

  def compile_largest(self, params: Params) -> None:
    """Compiles the segment of the largest N, S and W from shapes alone.

    Args:
      params: shapes, dtypes and shardings, as `generate` is given them.
    """
    if self._params_placement is not None:
      params = self._executor.gathered_shapes(params, self._params_placement)
    self._executor.compile_decode(params, self._rollout.slots,
                                  self._capacities[-1], self._widest)

  def generate(
      self,
      params: Params,
      requests: Sequence[Request],
      state: RolloutState,
      *,
      ahead: Sequence[Request] = ()) -> tuple[list[Rollout], RolloutState]:
    """Samples every request `request.samples` times.

    Args:
      params: the policy's, on the engine's mesh.
      requests: prompts of at most `rollout.prompt_length` tokens.
      state: of the run; its version marks the tokens, its store is drafted
        from and takes up the rollouts.
      ahead: requests of the coming step. With `control.run_ahead_rows`, slots
        that would idle sample them; what they come to is kept in the store as
        hints to the drafts of that step and goes nowhere else.

    Returns:
      (rollouts in the order of requests and of their samples, state). Speed
      values are in `self.stats`.

    Raises:
      ConfigError: if a prompt is empty or longer than
        `rollout.prompt_length`.
    """
    self._check(requests)
    start, compiled = self._clock(), self.pool.seconds
    self.stats = RolloutStats()
    if self._params_placement is not None:
      params = self._executor.gather_params(params, self._params_placement)
      jax.block_until_ready(params)
      self.stats.reshard_seconds = (self._clock() - start -
                                    (self.pool.seconds - compiled))
    slots = self._executor.empty(self._rollout.slots, self._capacities[0])
    table = Table(slots, Drafts(self._executor, self._widest, params, slots),
                  [None] * self._rollout.slots)
    corpus = self._widest.corpus
    places = Places(corpus.prompts) if corpus else None

    def prefill(ahead: bool, first: int,
                members: Sequence[Request]) -> PromptBlock:
      if places and corpus:
        taken = [
            places.take((ahead, first + i), request.samples)
            for i, request in enumerate(members)
        ]
        taken += [corpus.prompts] * (self._block_rows - len(members))

        table.drafts.load(lambda: (taken, *stores.corpus_texts(
            state.store, members, self._block_rows, corpus)))
      return self._executor.prefill(params, [r.prompt for r in members],
                                    self._block_rows,
                                    self._rollout.prompt_length)

    queue = Queue(requests, self._block_rows, False, prefill)
    # A hint must not fail a step: what does not fit is left to its own step.
    fit = [r for r in ahead if self._fits(r)] if self.runs_ahead else []
    coming = Queue(fit if state.store is not None else [], self._block_rows,
                   True, prefill)
    results: list[Rollout | None] = [None] * len(queue.samples)
    while True:
      self._admit(table, queue, places)
      if not any(o and not o.ahead for o in table.owners):
        break
      if not queue.samples:
        self._compact(table, places)
        if len(table.owners) <= self._ahead_rows:
          self._admit(table, coming, places)
      self._grow(table)
      self._decode(params, table, bool(queue.samples), state, results, places)
    if state.store is not None:
      state.store.add(results)  # type: ignore[arg-type]
    self.stats.seconds = self._clock() - start
    self.stats.compile_seconds = self.pool.seconds - compiled
    return results, state  # type: ignore[return-value]

  @property
  def runs_ahead(self) -> bool:
    """Whether `generate` makes use of the requests of a coming step."""
    return bool(self._control.run_ahead_rows and self._widest.corpus and
                self._widest.corpus.hints)

  @property
  def _ahead_rows(self) -> int:
    """Returns the N at and below which free slots run ahead."""
    if not self.runs_ahead:
      return 0
    wanted = self._control.run_ahead_rows
    # Never below the least N that compaction can reach.
    return max([n for n in self._row_counts if n <= wanted],
               default=self._row_counts[-1])

  def _fits(self, request: Request) -> bool:
    return 0 < len(request.prompt) <= self._rollout.prompt_length

  def _check(self, requests: Sequence[Request]) -> None:
    longest = self._rollout.prompt_length
    for request in requests:
      if not self._fits(request):
        raise ConfigError(
            f'request {request.request} of step {request.step} has '
            f'{len(request.prompt)} prompt tokens; rollout.prompt_length '
            f'allows 1 to {longest}: raise it or shorten the prompts')

  def _admit(self, table: Table, queue: Queue, places: Places | None) -> None:
    """Fills free slots from a queue, in order."""
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
      table.slots = self._executor.admit(table.slots, blocks.block, taken,
                                         self._rollout.max_new_tokens)

  def _compact(self, table: Table, places: Places | None) -> None:
    """Shrinks N to the least count that holds the rows still decoding.

    Rows that run ahead stay as far as there is room for them then.
    """
    rows = len(table.owners)
    main = [i for i, o in enumerate(table.owners) if o and not o.ahead]
    least = max(len(main), min(self._ahead_rows, rows))
    target = min(n for n in self._row_counts if least <= n <= rows)
    if target < rows:
      ahead = [i for i, o in enumerate(table.owners) if o and o.ahead]
      free = [i for i, owner in enumerate(table.owners) if owner is None]
      kept = (main + ahead + free)[:target]
      for slot in set(ahead) - set(kept):
        owner = table.owners[slot]
        if places and owner:
          places.collect(owner.group)
      table.slots = self._executor.gather(table.slots, kept)
      table.owners = [table.owners[i] for i in kept]

  def _grow(self, table: Table) -> None:
    """Doubles S until every row has room for one more forward."""
    capacity = table.slots.text.shape[1]
    longest = max(o.length for o in table.owners if o is not None)
    needed = longest + self._widest.width
    if needed > capacity:
      target = min(c for c in self._capacities if c >= needed)
      table.slots = self._executor.grow(table.slots, target)

  def _done_rows(self, table: Table, pending: bool) -> int:
    """Returns how many counted rows may be done before the host should act."""
    rows = len(table.owners)
    if pending:
      return max(1, math.ceil(self._control.refill_threshold * rows))
    fewer = [n for n in self._row_counts if self._ahead_rows <= n < rows]
    # Free slots are done, and count.
    counted = int(np.sum(table.counted()))
    return min(rows - max(fewer), counted) if fewer else counted

  def _choose_width(self, rows: int, capacity: int) -> tuple[int, int]:
    """Returns (W, forwards) of the next segment."""
    forwards = self._rollout.segment_forwards
    if self._policy is None:
      return self._widest.width, forwards
    return self._policy.choose(rows, capacity, forwards)

  def _decode(self, params: Params, table: Table, pending: bool,
              state: RolloutState, results: list[Rollout | None],
              places: Places | None) -> None:
    """Runs one segment, reads it once, collects the samples that ended."""
    rows, capacity = table.slots.text.shape
    width, limit = self._choose_width(rows, capacity)
    timed = self._policy and self._policy.times(rows, capacity, width)
    if timed:  # What was dispatched before is no cost of this segment's.
      jax.block_until_ready(table.slots)
    begin, compiled = self._clock(), self.pool.seconds
    drafts = table.drafts.take(width, table.slots)
    if timed:
      jax.block_until_ready(drafts)
    start = self._clock()
    preparation = start - begin - (self.pool.seconds - compiled)
    compiled = self.pool.seconds
    table.slots, drafts, packed = self._executor.decode(
        params,
        table.slots,
        drafts,
        self._drafters[width],
        forwards=limit,
        done_rows=self._done_rows(table, pending),
        counted=table.counted())
    table.drafts.put(width, drafts)
    read = SegmentRead.unpack(jax.device_get(packed), rows, capacity)
    seconds = self._clock() - start - (self.pool.seconds - compiled)
    self.reads += 1
    spent = read.counters
    forwards, row_forwards = int(spent.forwards), int(spent.row_forwards)
    self.stats.segments += 1
    self.stats.segment_seconds += seconds
    self.stats.forwards += forwards
    self.stats.node_forwards += forwards * width
    self.stats.row_forwards += row_forwards
    self.stats.slot_forwards += forwards * rows
    self.stats.tokens += int(spent.tokens)
    self.stats.ahead_tokens += int(spent.ahead_tokens)
    if self._policy:
      self._policy.observe(rows,
                           capacity,
                           width,
                           seconds=seconds if timed else None,
                           preparation=preparation,
                           forwards=forwards,
                           row_forwards=row_forwards,
                           tokens=int(spent.tokens))
    for slot, owner in enumerate(table.owners):
      if owner is not None:
        owner.length = int(read.length[slot])
        self._collect(slot, owner, read, state, results)
        if read.done[slot]:
          table.owners[slot] = None
          if places:
            places.collect(owner.group)

  def _collect(self, slot: int, owner: Sample, read: SegmentRead,
               state: RolloutState, results: list[Rollout | None]) -> None:
    """Books what a slot came to: a rollout when done, a hint at any time."""
    span = slice(len(owner.request.prompt), owner.length)
    if owner.ahead:
      assert state.store is not None
      state.store.add_hint(owner.request, owner.index, read.text[slot,
                                                                 span].copy())
    elif read.done[slot]:
      tokens = read.text[slot, span].copy()
      results[owner.order] = Rollout(
          tokens=tokens,
          length=len(tokens),
          finished=bool(read.finished[slot]),
          token_version=np.full(len(tokens), state.version, np.int32),
          behaviour_logprobs=read.logprobs[slot, span].copy(),
          drafted=read.drafted[slot, span].copy(),
          forwards=int(read.forwards[slot]),
          request=owner.request,
          index=owner.index)
