"""Groups of samples for a batch: requested from the task, then sampled."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from rlax_llm import config as config_lib
from rlax_llm.components import MAX_LEFT_OUT
from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience import stop_policies
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.experience.pruning import Pruner
from rlax_llm.ops import rewards as reward_ops
from rlax_llm.rollout import control
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.generation import IdleWork
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import sample_key
from rlax_llm.tasks.task import Problem
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import TRAIN


def problem_stream(run: Run) -> Callable[[int], Problem]:
  """Returns the problems of all steps, one after another, by their number."""
  count = run.config.task.prompts_per_step
  # A step's problems are drawn together.
  problems = functools.lru_cache(4)(run.problems)
  return lambda number: problems(number // count)[number % count]


@dataclasses.dataclass(frozen=True)
class GroupRequest:
  """The groups that a batch still lacks."""

  batch: int  # the step that will learn from them; their requests carry it
  first: int  # number of the first new request of the batch
  groups: int  # complete groups that are wanted


@dataclasses.dataclass(frozen=True)
class Policy:
  """The parameters that sample."""

  version: int = 0  # the step that they are of
  params: Params = ()
  drafter_params: Params = ()  # see `RolloutEngine.generate`
  idle: IdleWork = lambda mesh: None  # likewise


class GroupSampler:
  """Requests groups and samples them.

  Attributes:
    stats: speed values since `publish`.
    values: metrics that are training values, since `publish`.
    left_out: why due prompts could not be sampled from, since `publish`.
  """

  def __init__(
    self, run: Run, engine: RolloutEngine, store: RolloutStore
  ) -> None:
    """Makes a sampler.

    Args:
      run: the run.
      engine: of the distribution that the policy is trained under.
      store: past rollouts, drafted from.
    """
    self._run = run
    self._control = run.config.control
    self._samples = run.config.rollout.samples_per_prompt
    self._engine = engine
    self._store = store
    self.pruner = Pruner(run) if self._control.prune_at else None
    self._stop_policy = stop_policies.find(self._control)
    self.problem = problem_stream(run)
    self.publish(Policy())

  def publish(self, policy: Policy) -> None:
    """Sets the parameters that sample from now on; resets the statistics."""
    self.policy = policy
    self.stats = RolloutStats()
    self.values: dict[str, float] = {}
    self.left_out: list[str] = []

  def request(
    self, buffer: Buffer, wanted: GroupRequest
  ) -> tuple[Buffer, list[PartialGroup]]:
    """Returns the groups to sample: those left incomplete, then new ones.

    Args:
      buffer: before.
      wanted: how many groups the batch lacks.

    Returns:
      (buffer with the cursor after the new problems, groups).
    """
    # Rounded: 1.1 * 10 is above 11.
    count = math.ceil(round(self._control.over_provision * wanted.groups, 6))
    new, cursor, left_out = self._new_groups(
      buffer, wanted, max(count - len(buffer.pending), 0)
    )
    self.left_out += left_out
    new = self._ordered(new, buffer)
    if self._control.extra_samples:
      extra = sum(p.request.samples - self._samples for p in new)
      self.values['rollout/extra_samples'] = extra + self.values.get(
        'rollout/extra_samples', 0
      )
    return dataclasses.replace(buffer, cursor=cursor), [*buffer.pending, *new]

  def sample(
    self, buffer: Buffer, groups: Sequence[PartialGroup], wanted: GroupRequest
  ) -> list[PartialGroup]:
    """Samples groups until the stop policy ends it, or all are complete.

    Args:
      buffer: its head prunes new groups; its cursor is that of the next batch.
      groups: from `request`.
      wanted: what they were requested for.

    Returns:
      The groups as far as they were sampled.
    """
    rollouts = RolloutState(version=self.policy.version, store=self._store)
    if self.pruner:
      known = [group for group in groups if group.rollouts]
      new = [group for group in groups if not group.rollouts]
      new = self._generate(new, rollouts, limit=self._control.prune_at)
      new = self.pruner.prune(self.policy.params, buffer.head, new)
      groups = [*known, *new]
    policies = []
    if self._control.over_provision > 1:
      policies.append(
        control.stop_at_groups(
          min(wanted.groups, len(groups)),
          wanted.batch + 1 - self._control.max_staleness,
          self._stop_policy,
        )
      )
    sampled = self._generate(
      groups,
      rollouts,
      ahead=self._coming(buffer, wanted.batch + 1),
      policies=policies,
    )
    self._store.drop_hints(
      wanted.batch, [g.request for g in sampled if not g.complete]
    )
    return sampled

  def sample_apart(self, count: int, domain: int) -> list[PartialGroup]:
    """Returns groups of the run's first problems, outside of any batch.

    Args:
      count: how many problems.
      domain: of the requests.
    """
    # What is left out here is counted in the step that requests it.
    numbers, prompts, _ = self._usable(0, count)
    return self._generate(
      [
        PartialGroup(number, Request(prompt, self._samples, domain, 0, i))
        for i, (number, prompt) in enumerate(zip(numbers, prompts))
      ],
      RolloutState(),
    )

  def _generate(
    self, groups: Sequence[PartialGroup], state: RolloutState, **options: Any
  ) -> list[PartialGroup]:
    """Returns groups as far as they get; see `RolloutEngine.generate`."""
    earlier = {
      sample_key(r.request, r.index): r
      for group in groups
      for r in group.rollouts
    }
    rollouts, _ = self._engine.generate(
      self.policy.params,
      [group.request for group in groups],
      dataclasses.replace(state, earlier=earlier),
      drafter_params=self.policy.drafter_params,
      idle=self.policy.idle,
      **options,
    )
    self.stats += self._engine.stats
    left = iter(rollouts)
    return [
      dataclasses.replace(
        group, rollouts=tuple(itertools.islice(left, group.request.samples))
      )
      for group in groups
    ]

  def _usable(
    self, cursor: int, count: int
  ) -> tuple[list[int], list[np.ndarray], list[str]]:
    """Returns the next problems of the stream that can be sampled from.

    A generated problem may be longer than `rollout.prompt_length`; the next
    one of the stream then takes its place.

    Args:
      cursor: the first number to look at.
      count: how many.

    Returns:
      (their numbers, their prompts, why others were left out).

    Raises:
      ConfigError: none of `MAX_LEFT_OUT` problems in a row can be used.
    """
    numbers: list[int] = []
    prompts: list[np.ndarray] = []
    left_out: list[str] = []
    last = cursor - 1  # the last one that can be used
    while len(numbers) < count:
      tokens, fault = self._run.prompt_tokens(self.problem(cursor))
      if not fault:
        last = cursor
        numbers.append(cursor)
        prompts.append(tokens)
      elif cursor - last == MAX_LEFT_OUT:
        raise ConfigError(
          f'{MAX_LEFT_OUT} prompts in a row cannot be used: {fault}'
        )
      else:
        left_out.append(fault)
      cursor += 1
    return numbers, prompts, left_out

  def _new_groups(
    self, buffer: Buffer, wanted: GroupRequest, count: int
  ) -> tuple[list[PartialGroup], int, list[str]]:
    """Returns new groups of a batch, for the next problems of the stream.

    Returns:
      (groups, the cursor after them, why problems between them were left
      out).
    """
    numbers, prompts, left_out = self._usable(buffer.cursor, count)
    new = [
      PartialGroup(
        number,
        self._with_extra(
          Request(prompt, self._samples, TRAIN, wanted.batch, wanted.first + i),
          buffer,
        ),
      )
      for i, (number, prompt) in enumerate(zip(numbers, prompts))
    ]
    return new, numbers[-1] + 1 if numbers else buffer.cursor, left_out

  def _with_extra(self, request: Request, buffer: Buffer) -> Request:
    """Returns a request with the samples that its prompt is to get.

    The first of them have the noise, and so the tokens, that they would have
    without more.
    """
    accuracy = buffer.successes.accuracy(request.prompt)
    if not self._control.extra_samples or accuracy is None:
      return request
    extra = reward_ops.extra_rollouts(
      accuracy,
      samples=self._samples,
      most=config_lib.largest_group(self._run.config.rollout, self._control),
      hardness_weighted=self._control.extra_by_hardness,
      scaled=self._run.algorithm.advantage in ('group', 'group_population'),
    )
    return dataclasses.replace(request, samples=self._samples + extra)

  def _ordered(
    self, new: Sequence[PartialGroup], buffer: Buffer
  ) -> list[PartialGroup]:
    """Returns new groups in the order in which they are sampled."""
    order = self._control.order
    if order == 'arrival' or not new:
      return list(new)
    lengths = buffer.lengths.predict([p.request.prompt for p in new])
    sign = -1 if order == 'longest_first' else 1
    return [new[i] for i in np.argsort(sign * lengths, kind='stable')]

  def _coming(self, buffer: Buffer, batch: int) -> list[Request]:
    """Returns the requests of a coming batch, if free slots can sample them.

    They yield draft hints only: whatever is wrong with them is reported when
    their own batch is requested.
    """
    config = self._run.config
    if not self._engine.runs_ahead or batch >= config.num_steps:
      return []
    count = config.task.prompts_per_step
    try:
      new, _, _ = self._new_groups(buffer, GroupRequest(batch, 0, count), count)
    except ConfigError:
      return []
    return [group.request for group in new]
