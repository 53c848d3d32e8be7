"""The engine: what can be prepared and checked before anything is sampled."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
import time
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from rlax_llm.config import check_positions
from rlax_llm.config import ConfigError
from rlax_llm.config import ControlConfig
from rlax_llm.config import freeze
from rlax_llm.config import list_widths
from rlax_llm.config import RolloutConfig
from rlax_llm.config.draft_configs import Arm
from rlax_llm.drafting import drafters
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.strategy import table
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.drafting.strategy.make import make_strategy
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout import shapes
from rlax_llm.rollout.control import StopPolicy
from rlax_llm.rollout.executor import Executor
from rlax_llm.rollout.generation import Generation
from rlax_llm.rollout.generation import IdleWork
from rlax_llm.rollout.parts import Parts
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import DraftParams
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Rollout


class Networks(NamedTuple):
  """What forwards of rollouts run, bound to a mesh."""

  model: LanguageModel
  learned: drafters.Learned | None = None  # what drafts


class RolloutEngine:
  """Generates rollouts. One engine serves one model, config and mesh."""

  def __init__(
    self,
    model: LanguageModel,
    *,
    rollout: RolloutConfig,
    control: ControlConfig,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    seed: int,
    mesh: Mesh,
    clock: Callable[[], float] = time.perf_counter,
    on_boundary: Callable[[], None] = lambda: None,
    drafter: Drafter | None = None,
    learned: drafters.Learned | None = None,
    strategy: Strategy | None = None,
    params_placement: Any = None,
    pool: ExecutablePool | None = None,
    replicas: int = 1,
    on_mesh: Callable[[Mesh], Networks] | None = None,
  ) -> None:
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
      on_boundary: called between segments; to give up a `generate`, it
        raises.
      drafter: overrides `rollout.drafter`, for instance with your own.
      learned: the network that `rollout.drafter` drafts with, if it does.
      strategy: overrides `control.strategy`; its arms are the config's, or
        those of the drafter.
      params_placement: a sharding for every parameter, to which `generate`
        brings them first, rounded to what a forward reads; None: used as they
        are.
      pool: where executables are kept; None makes one.
      replicas: parts of the data ways that decode independently, with their
        shares of the slots and one queue.
      on_mesh: makes the networks for a part of the mesh; None: they are bound
        to none, or there is one replica.

    Raises:
      ConfigError: if slots or replicas do not divide over the mesh, or prompt,
        completion and draft do not fit the model's positions.
    """
    self._clock = clock
    self._on_boundary = on_boundary
    self._params_placement = params_placement
    self._learned = learned
    ways = sharding.ways(mesh)
    if rollout.slots % ways:
      raise ConfigError(
        f'rollout.slots={rollout.slots} is not divisible by '
        f'{ways} devices; make it a multiple'
      )
    width = drafter.width if drafter else max(list_widths(rollout, control))
    check_positions(rollout, width, model.max_positions)
    self.pool = pool or ExecutablePool(clock)
    self._make_executor = functools.partial(
      Executor,
      config=segments.SegmentConfig(sampling, tuple(eos_ids)),
      seed=seed,
      pool=self.pool,
    )
    self._executor = self._make_executor(model, mesh=mesh)
    if strategy is None:
      strategy = (
        table.fixed(max(drafters.given(drafter)))
        if drafter
        else make_strategy(
          rollout, control, seed=seed, sources=drafters.enabled_sources(learned)
        )
      )
    self.strategy = strategy
    own = freeze(dataclasses.replace(rollout, slots=rollout.slots // replicas))
    self._parts = []
    for part in sharding.split(mesh, replicas):
      networks = Networks(model, learned)
      if replicas > 1 and on_mesh:
        networks = on_mesh(part)
      self._parts.append(
        self._make_part(part, networks, own, control, sampling, drafter, width)
      )
    self.stats = RolloutStats()

  def _make_part(
    self,
    mesh: Mesh,
    networks: Networks,
    rollout: RolloutConfig,
    control: ControlConfig,
    sampling: Sampling,
    drafter: Drafter | None,
    width: int,
  ) -> Parts:
    """Returns what a replica is made of.

    Args:
      mesh: of the replica.
      networks: for this mesh.
      rollout: with the replica's share of the slots.
      control: frozen section.
      sampling: the law.
      drafter: overrides the config's.
      width: W, the largest.
    """
    # One block of prompts fills the slots once.
    block_rows = math.ceil(rollout.slots / rollout.samples_per_prompt)
    # Every slot may hold the last sample of another prompt while a whole block
    # of new prompts comes in.
    places = rollout.slots + block_rows
    capacities = shapes.list_capacities(rollout, width)
    by_arm = (
      drafters.given(drafter)
      if drafter
      else drafters.make_drafters(
        rollout,
        control,
        places=places,
        capacity=capacities[-1],
        target=drafters.Target(networks.model, sampling),
        learned=networks.learned,
      )
    )
    _check_corpus(by_arm[max(by_arm)], rollout, places)
    executor = self._executor
    if mesh != executor.mesh:
      executor = self._make_executor(networks.model, mesh=mesh)
    return Parts(
      mesh=mesh,
      rollout=rollout,
      control=control,
      executor=executor,
      drafters=by_arm,
      strategy=self.strategy,
      capacities=capacities,
      row_counts=shapes.list_row_counts(
        rollout.slots, control, sharding.ways(mesh)
      ),
      block_rows=block_rows,
      clock=self._clock,
    )

  def reachable_keys(self) -> list[tuple[int, int, Arm]]:
    """Returns every (N, S, arm) whose segment this engine can compile."""
    first = self._parts[0]
    return [
      (rows, capacity, arm)
      for rows in first.row_counts
      for capacity in first.capacities
      for arm in first.arms(rows)
    ]

  def segment_bytes(self) -> dict[tuple[int, int, Arm], int]:
    """Returns bytes on one device by (N, S, arm), of the segments compiled."""
    found = {}
    for part in self._parts:
      names = {drafter: arm for arm, drafter in part.drafters.items()}
      for (
        rows,
        capacity,
        drafter,
      ), size in part.executor.segment_bytes().items():
        if drafter in names:
          found[rows, capacity, names[drafter]] = size
    return found

  def compile_largest(
    self, params: Params, drafter_params: Params = ()
  ) -> None:
    """Compiles the largest segments from shapes alone.

    Of the largest N and S, and of fewer rows as far as they draft more nodes.

    Args:
      params: shapes, dtypes and shardings, as `generate` is given them.
      drafter_params: likewise.
    """
    placed = self._brought(
      self._executor.gathered_shapes, params, drafter_params
    )
    for part in self._parts:
      widest = 0
      own = sharding.on_part(placed, part.mesh)
      for rows in part.row_counts:
        arm = max(part.arms(rows))
        if arm.width > widest:
          widest = arm.width
          part.executor.compile_decode(
            own, rows, part.capacities[-1], part.drafters[arm]
          )

  def generate(
    self,
    params: Params,
    requests: Sequence[Request],
    state: RolloutState,
    *,
    ahead: Sequence[Request] = (),
    policies: Sequence[StopPolicy] = (),
    limit: int | None = None,
    drafter_params: Params = (),
    idle: IdleWork = lambda mesh: None,
  ) -> tuple[list[Rollout], RolloutState]:
    """Samples every request `request.samples` times.

    What `state.earlier` holds of a sample is not sampled again: a suspended
    one is continued where it stands, its keys and values computed anew by one
    forward over the prompt and what it has; its noise goes on by position.

    Args:
      params: the policy's, on the engine's mesh.
      requests: prompts of at most `rollout.prompt_length` tokens.
      state: of the run; its version marks the tokens, its store is drafted
        from and takes up the rollouts.
      ahead: requests of the coming step. With `control.run_ahead_rows`, slots
        that would idle sample them; what they come to is kept in the store as
        hints to the drafts of that step and goes nowhere else.
      policies: each may stop the sampling, at a tick of logical time; samples
        that are not at their end then are suspended there.
      limit: most new tokens of a sample; one that reaches it is suspended.
      drafter_params: the drafter's own, if it has any; they change drafts and
        no token.
      idle: given the devices of a replica that has nothing to do, at every
        boundary at which it has not; what it starts there may go on while
        others decode.

    Returns:
      (rollouts in the order of requests and of their samples, state); those
      that are `suspended` can be given back in a later `state.earlier`. Speed
      values are in `self.stats`.

    Raises:
      ConfigError: if a prompt is empty or longer than
        `rollout.prompt_length`.
      ValueError: if a network drafts and its parameters are missing.
    """
    self._check(requests)
    if (
      self._learned
      and self._learned.placement is not None
      and not jax.tree.leaves(drafter_params)
    ):
      raise ValueError(
        'rollouts are drafted by a network, and `generate` is '
        'given no drafter_params; give them'
      )
    start, compiled = self._clock(), self.pool.seconds
    self.stats = RolloutStats()
    placed = self._brought(self._executor.gather_params, params, drafter_params)
    if placed.policy is not params:
      jax.block_until_ready(placed)
      self.stats.reshard_seconds = (
        self._clock() - start - (self.pool.seconds - compiled)
      )
    generation = Generation(
      self._parts,
      [sharding.on_part(placed, p.mesh) for p in self._parts],
      requests,
      state,
      self.stats,
      ahead=ahead,
      policies=policies,
      limit=limit,
      idle=idle,
    )
    while generation.admit():
      self._on_boundary()
      generation.decode()
    if state.store is not None:
      state.store.add(generation.outcomes.new(requests))
    self.stats.seconds = self._clock() - start
    self.stats.compile_seconds = self.pool.seconds - compiled
    self.stats.executables = len(self.segment_bytes())
    rollouts = generation.outcomes.rollouts(requests)
    self.stats.nonfinite_samples = sum(
      not np.isfinite(r.behaviour_logprobs).all() for r in rollouts
    )
    return rollouts, state

  def _brought(
    self, bring: Callable, params: Params, drafter_params: Params
  ) -> DraftParams:
    """Returns what rollouts read, brought in place by a way of the executor."""
    if self._params_placement is not None:
      params = bring(params, self._params_placement)
    learned = self._learned
    if learned and learned.placement is not None:
      drafter_params = bring(
        drafter_params, learned.placement, learned.draft_model.rounded
      )
    return DraftParams(params, drafter_params)

  @property
  def runs_ahead(self) -> bool:
    """Whether `generate` makes use of the requests of a coming step."""
    return self._parts[0].runs_ahead

  def _check(self, requests: Sequence[Request]) -> None:
    longest = self._parts[0].rollout.prompt_length
    for request in requests:
      if not self._parts[0].fits(request):
        raise ConfigError(
          f'request {request.request} of step {request.step} has '
          f'{len(request.prompt)} prompt tokens; rollout.prompt_length '
          f'allows 1 to {longest}: raise it or shorten the prompts'
        )


def _check_corpus(
  drafter: Drafter, rollout: RolloutConfig, places: int
) -> None:
  """Refuses a drafter of yours whose corpus cannot hold what is sampled."""
  corpus = drafter.corpus
  if corpus and (
    corpus.prompts < places or corpus.capacity < rollout.prompt_length
  ):
    raise ConfigError(
      f"the drafter's corpus has {corpus.prompts} places of "
      f'{corpus.capacity} tokens; {rollout.slots} slots need {places} '
      f'places of at least {rollout.prompt_length}: enlarge its shape'
    )
