"""One `generate` under way: replicas that share a queue, in logical time."""

from collections.abc import Callable
from collections.abc import Sequence

from jax.sharding import Mesh

from rlax_llm.rollout import control
from rlax_llm.rollout.outcomes import Outcomes
from rlax_llm.rollout.parts import Parts
from rlax_llm.rollout.replica import Replica
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import Queue
from rlax_llm.types import DraftParams
from rlax_llm.types import Request

# Given the devices of a replica that has nothing to do, starts some work there.
IdleWork = Callable[[Mesh], None]


class Generation:
  """All replicas of one `generate`, from the first prompt to the last token.

  A replica that runs dry takes from the queue, then from what another has
  claimed and not begun, then from what the fullest decodes: so one long answer
  holds up one replica only.
  """

  def __init__(
    self,
    parts: Sequence[Parts],
    params: Sequence[DraftParams],
    requests: Sequence[Request],
    state: RolloutState,
    stats: RolloutStats,
    *,
    ahead: Sequence[Request],
    policies: Sequence[control.StopPolicy] = (),
    limit: int | None = None,
    idle: IdleWork = lambda mesh: None,
  ) -> None:
    """Begins with empty slots; nothing is decoded yet.

    Args:
      parts: of every replica.
      params: the policy's and the drafter's, placed on the devices of each
        replica and rounded for many forwards.
      requests: as for `RolloutEngine.generate`.
      state: as for `RolloutEngine.generate`.
      stats: counted into.
      ahead: requests of a coming step; those that do not fit are left out: a
        hint must not fail a step.
      policies: as for `RolloutEngine.generate`.
      limit: as for `RolloutEngine.generate`.
      idle: as for `RolloutEngine.generate`.
    """
    first = parts[0]
    self._state = state
    self._stats = stats
    self._idle = idle
    most = first.rollout.max_new_tokens
    self._queue = Queue(requests, most=most, earlier=state.earlier, limit=limit)
    fit = [r for r in ahead if first.fits(r)] if first.runs_ahead else []
    coming = Queue(
      fit if state.store is not None else [], most=most, ahead=True
    )
    self._samples = tuple(self._queue.samples)
    self.outcomes = Outcomes(state.earlier, state.version, most)
    self._policies = policies
    slots = sum(p.rollout.slots for p in parts)
    self._time = control.LogicalTime(
      requests,
      [s.number for s in self._samples],
      first.control.logical_slots or slots,
    )
    self._stopped = False
    corpus = first.widest.corpus
    self._hints = state.store if corpus and corpus.hints else None
    self._replicas = [
      Replica(own, placed, self._queue, coming, self.outcomes, state, stats)
      for own, placed in zip(parts, params)
    ]

  def admit(self) -> bool:
    """Fills free slots; returns whether a sample is being decoded."""
    if self._stopped:
      return False
    for replica in self._replicas:
      if not replica.flying:
        replica.admit()
    if len(self._replicas) > 1:
      self._balance()
    return any(replica.decoding for replica in self._replicas)

  def _balance(self) -> None:
    """Gives replicas without work some of that of others."""
    if not any(replica.decoding for replica in self._replicas):
      return
    for dry in self._replicas:
      if dry.decoding:
        continue
      fullest = max(self._replicas, key=lambda r: (len(r.waiting), r.decoding))
      given = fullest.give_waiting() if fullest.waiting else []
      if not given and not fullest.flying:
        given = fullest.give_decoding()
      if given:
        dry.expect(given)
        dry.admit()
      else:
        self._idle(dry.mesh)

  def decode(self) -> None:
    """Starts a segment wherever none runs, and ends the first that is done."""
    busy = [r for r in self._replicas if r.decoding]
    for replica in busy:
      if not replica.flying:
        replica.start()
    landed = [r for r in busy if r.landed]
    # Waits for the one that began first if none is done: it stands first.
    ended = (landed or busy)[0]
    ended.finish()
    self._replicas.sort(key=lambda r: r is ended)
    if self._policies and self._stops():
      for replica in busy:
        if replica.flying:
          replica.finish()
      self._suspend()

  def _stops(self) -> bool:
    """Goes through logical time; returns whether a policy stops at its tick."""
    views = self._time.advance(
      [s.length - s.begin for s in self._samples],
      [s.done for s in self._samples],
    )
    return any(policy(view) for view in views for policy in self._policies)

  def _suspend(self) -> None:
    """Cuts every sample to what it has at the tick of logical time."""
    self._stopped = True
    for replica in self._replicas:
      replica.suspend()
    for order, sample in enumerate(self._samples):
      tokens = self._time.tokens_at_tick(order)
      if tokens is None:
        continue
      more = self.outcomes.cut(sample, tokens)
      self._stats.discarded_tokens += max(
        sample.length - sample.begin - tokens, 0
      )
      if more is not None and self._hints is not None:
        self._hints.add_hint(sample.request, sample.index, more)
