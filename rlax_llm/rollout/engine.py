"""The host loop around segments: admit, grow, compact, collect.

The host acts only between segments, reads the device once for each, and
decides nothing that a token depends on.
"""

import collections
import dataclasses
import math
import time
from typing import Callable, Sequence

import jax
from jax.sharding import Mesh
import numpy as np

from rlax_llm import sharding
from rlax_llm.config import ConfigError
from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.executables import ExecutablePool
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout.executor import Executor
from rlax_llm.rollout.slots import PromptBlock
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Rollout
from rlax_llm.types import Slots


@dataclasses.dataclass(frozen=True)
class RolloutState:
  """What rollouts of later steps may depend on; host side, checkpointed."""
  version: int = 0  # policy version: the step whose parameters sample


@dataclasses.dataclass
class RolloutStats:
  """Speed values of one `generate`."""
  tokens: int = 0
  forwards: int = 0
  row_forwards: int = 0  # sum over forwards of the rows that decoded
  slot_forwards: int = 0  # sum over forwards of N
  segments: int = 0
  seconds: float = 0.0
  compile_seconds: float = 0.0

  def metrics(self) -> dict[str, float]:
    """Returns the metrics under their fixed names."""
    decoding = max(self.seconds - self.compile_seconds, 1e-9)
    return {
        'rollout/tokens': self.tokens,
        'rollout/tokens_per_second': self.tokens / decoding,
        'rollout/accept_length': self.tokens / max(self.row_forwards, 1),
        'rollout/forwards': self.forwards,
        'rollout/occupancy': self.row_forwards / max(self.slot_forwards, 1),
        'rollout/segments': self.segments,
    }


@dataclasses.dataclass
class _Sample:
  """One sample, from the queue to its rollout."""
  order: int  # place in the result
  request: Request
  index: int
  length: int  # prompt and completion, as of the last boundary


@dataclasses.dataclass
class _Table:
  """The slots and who sits in them; None is a free slot."""
  slots: Slots
  owners: list[_Sample | None]

  def busy(self) -> list[int]:
    return [i for i, owner in enumerate(self.owners) if owner is not None]


DRAFTERS: dict[str, Callable[[RolloutConfig], Drafter]] = {
    'none': lambda config: drafting.no_drafter(),
    'prompt_lookup': lambda config: drafting.prompt_lookup(config.width),
}


def make_drafter(config: RolloutConfig) -> Drafter:
  """Returns the drafter that a validated config names."""
  if config.width == 1:
    return drafting.no_drafter()
  return DRAFTERS[config.drafter](config)


def list_capacities(config: RolloutConfig, width: int) -> list[int]:
  """Returns the values of S: doubling, the last one just large enough."""
  # Multiples of 8 keep the inner loops of attention whole.
  round_up = lambda n: -(-n // 8) * 8
  total = round_up(config.prompt_length + config.max_new_tokens + width)
  capacity = round_up(max(config.min_capacity, config.prompt_length + width))
  capacities = []
  # A capacity just below the last would cost an executable and save little.
  while capacity * 5 / 4 < total:
    capacities.append(capacity)
    capacity *= 2
  return capacities + [total]


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
      pool: where executables are kept; None makes one.

    Raises:
      ConfigError: if slots do not divide over the mesh, or prompt, completion
        and draft do not fit the model's positions.
    """
    self._rollout = rollout
    self._control = control
    self._clock = clock
    self._drafter = drafter or make_drafter(rollout)
    self._ways = sharding.ways(mesh)
    if rollout.slots % self._ways:
      raise ConfigError(f'rollout.slots={rollout.slots} is not divisible by '
                        f'{self._ways} devices; make it a multiple')
    total = (rollout.prompt_length + rollout.max_new_tokens +
             self._drafter.width)
    if total > model.max_positions:
      raise ConfigError(
          f'prompt {rollout.prompt_length} + new tokens '
          f'{rollout.max_new_tokens} + width {self._drafter.width} = {total} '
          f'exceed model.max_positions={model.max_positions}; shorten one of '
          'them')
    self._capacities = list_capacities(rollout, self._drafter.width)
    self._row_counts = self._list_row_counts()
    # One block of prompts fills the slots once.
    self._block_rows = math.ceil(rollout.slots / rollout.samples_per_prompt)
    self._executor = Executor(model,
                              config=segments.SegmentConfig(
                                  sampling, tuple(eos_ids)),
                              seed=seed,
                              mesh=mesh,
                              pool=pool or ExecutablePool(clock))
    self.pool = self._executor.pool
    self.stats = RolloutStats()
    self.reads = 0  # device-to-host reads since the start

  def _list_row_counts(self) -> list[int]:
    """Returns the values of N that compaction can reach, largest first."""
    counts = [self._rollout.slots]
    least = max(self._control.min_slots, self._ways)
    while (self._control.compact and counts[-1] // 2 >= least and
           counts[-1] % (2 * self._ways) == 0):
      counts.append(counts[-1] // 2)
    return counts

  def _drafter_for(self, rows: int) -> Drafter:
    """Returns the drafter of a batch of so many rows."""
    limit = self._control.draft_max_rows
    return self._drafter if not 0 < limit < rows else drafting.no_drafter()

  def reachable_keys(self) -> list[tuple[int, int, int]]:
    """Returns every (N, S, W) whose segment this engine can compile."""
    return [(rows, capacity, self._drafter_for(rows).width)
            for rows in self._row_counts
            for capacity in self._capacities]

  def generate(self, params: Params, requests: Sequence[Request],
               state: RolloutState) -> tuple[list[Rollout], RolloutState]:
    """Samples every request `request.samples` times.

    Args:
      params: the policy's, on the engine's mesh.
      requests: prompts of at most `rollout.prompt_length` tokens.
      state: of the run; its version marks the tokens.

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
    queue: collections.deque[_Sample] = collections.deque()
    for request in requests:
      for index in range(request.samples):
        queue.append(_Sample(len(queue), request, index, len(request.prompt)))
    results: list[Rollout | None] = [None] * len(queue)
    table = _Table(
        self._executor.empty(self._rollout.slots, self._capacities[0]),
        [None] * self._rollout.slots)
    prompts = _PromptBlocks(self._executor, params, requests, self._block_rows,
                            self._rollout.prompt_length)
    while True:
      self._admit(table, queue, prompts)
      if not table.busy():
        break
      if not queue:
        self._compact(table)
      self._grow(table)
      self._decode(params, table, bool(queue), state, results)
    self.stats.seconds = self._clock() - start
    self.stats.compile_seconds = self.pool.seconds - compiled
    return results, state  # type: ignore[return-value]

  def _check(self, requests: Sequence[Request]) -> None:
    longest = self._rollout.prompt_length
    for request in requests:
      if not 0 < len(request.prompt) <= longest:
        raise ConfigError(
            f'request {request.request} of step {request.step} has '
            f'{len(request.prompt)} prompt tokens; rollout.prompt_length '
            f'allows 1 to {longest}: raise it or shorten the prompts')

  def _admit(self, table: _Table, queue: collections.deque[_Sample],
             prompts: '_PromptBlocks') -> None:
    """Fills free slots from the queue, in order."""
    while queue and None in table.owners:
      prompts.advance_to(queue[0].request)
      taken = {}
      for slot, owner in enumerate(table.owners):
        if owner is None and queue and queue[0].request in prompts:
          sample = queue.popleft()
          table.owners[slot] = sample
          taken[slot] = (prompts.row(sample.request), sample.request,
                         sample.index)
      table.slots = self._executor.admit(table.slots, prompts.block, taken,
                                         self._rollout.max_new_tokens)

  def _compact(self, table: _Table) -> None:
    """Shrinks N to the least count that holds the rows still decoding."""
    busy, rows = table.busy(), len(table.owners)
    target = min(n for n in self._row_counts if len(busy) <= n <= rows)
    if target < rows:
      free = [i for i, owner in enumerate(table.owners) if owner is None]
      kept = (busy + free)[:target]
      table.slots = self._executor.gather(table.slots, kept)
      table.owners = [table.owners[i] for i in kept]

  def _grow(self, table: _Table) -> None:
    """Doubles S until every row has room for one more forward."""
    rows, capacity = table.slots.text.shape
    longest = max(o.length for o in table.owners if o is not None)
    needed = longest + self._drafter_for(rows).width
    if needed > capacity:
      target = min(c for c in self._capacities if c >= needed)
      table.slots = self._executor.grow(table.slots, target)

  def _done_rows(self, rows: int, pending: bool) -> int:
    """Returns how many rows may be done before the host should act."""
    if pending:
      return max(1, math.ceil(self._control.refill_threshold * rows))
    fewer = [n for n in self._row_counts if n < rows]
    return rows - max(fewer) if fewer else rows

  def _decode(self, params: Params, table: _Table, pending: bool,
              state: RolloutState, results: list[Rollout | None]) -> None:
    """Runs one segment, reads it once, collects the samples that ended."""
    rows = len(table.owners)
    table.slots, counters = self._executor.decode(
        params,
        table.slots,
        self._drafter_for(rows),
        forwards=self._rollout.segment_forwards,
        done_rows=self._done_rows(rows, pending))
    s = table.slots
    text, logprobs, drafted, length, done, finished, forwards, spent = (
        jax.device_get((s.text, s.logprobs, s.drafted, s.length, s.done,
                        s.finished, s.forwards, counters)))
    self.reads += 1
    self.stats.segments += 1
    self.stats.forwards += int(spent.forwards)
    self.stats.row_forwards += int(spent.row_forwards)
    self.stats.slot_forwards += int(spent.forwards) * rows
    self.stats.tokens += int(spent.tokens)
    for slot, owner in enumerate(table.owners):
      if owner is None:
        continue
      owner.length = int(length[slot])
      if done[slot]:
        span = slice(len(owner.request.prompt), owner.length)
        tokens = text[slot, span].copy()
        results[owner.order] = Rollout(
            tokens=tokens,
            length=len(tokens),
            finished=bool(finished[slot]),
            token_version=np.full(len(tokens), state.version, np.int32),
            behaviour_logprobs=logprobs[slot, span].copy(),
            drafted=drafted[slot, span].copy(),
            forwards=int(forwards[slot]),
            request=owner.request,
            index=owner.index)
        table.owners[slot] = None


class _PromptBlocks:
  """Prefills the requests in order, a block at a time, once for each group."""

  def __init__(self, executor: Executor, params: Params,
               requests: Sequence[Request], size: int, capacity: int) -> None:
    self._executor = executor
    self._params = params
    self._requests = requests
    self._size = size
    self._capacity = capacity
    self._first = 0
    self._rows: dict[int, int] = {}
    self._block: PromptBlock | None = None

  @property
  def block(self) -> PromptBlock:
    """The block that the last `advance_to` made current."""
    assert self._block is not None
    return self._block

  def __contains__(self, request: Request) -> bool:
    return id(request) in self._rows

  def row(self, request: Request) -> int:
    return self._rows[id(request)]

  def advance_to(self, request: Request) -> None:
    """Makes the block that holds the request the current one."""
    while request not in self:
      members = self._requests[self._first:self._first + self._size]
      self._block = self._executor.prefill(self._params,
                                           [r.prompt for r in members],
                                           self._size, self._capacity)
      self._rows = {id(r): row for row, r in enumerate(members)}
      self._first += self._size
