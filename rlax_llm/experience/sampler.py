"""Groups of samples for a step: asked for, sampled, pruned, rewarded."""

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
from rlax_llm.experience import advantages
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.experience.pruning import Pruner
from rlax_llm.ops import rewards as reward_ops
from rlax_llm.rollout import control
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.generation import IdleWork
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import sample_key
from rlax_llm.runtime import processes
from rlax_llm.tasks.task import Problem
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import TRAIN
from rlax_llm.workdir.run_statistics import Stopwatch


@dataclasses.dataclass(frozen=True)
class GroupRequest:
  """What a step asks for."""

  step: int  # the version of the parameters that sample
  number: int  # the step that will learn from it; its requests carry it
  first: int  # number of its first new request
  groups: int  # wanted


class GroupSampler:
  """Samples and rewards groups; what it leaves open goes on in the next call.

  Attributes:
    stats: speed values since `begin`.
    values: metrics that are training values, likewise.
    left_out: why prompts that were due since then could not be sampled from.
  """

  def __init__(
    self,
    run: Run,
    engine: RolloutEngine,
    verifier: Verifier,
    store: RolloutStore,
  ) -> None:
    """Makes a sampler.

    Args:
      run: the run.
      engine: of the law that the policy is trained under.
      verifier: gives rewards.
      store: past rollouts, drafted from.
    """
    self._run = run
    self._control = run.config.control
    self._samples = run.config.rollout.samples_per_prompt
    self._engine = engine
    self._verifier = verifier
    self._store = store
    self._pruner = Pruner(run) if self._control.prune_at else None
    # A step's problems are drawn together.
    self._problems = functools.lru_cache(4)(run.problems)
    self.begin()

  def begin(
    self, drafter_params: Params = (), idle: IdleWork = lambda mesh: None
  ) -> None:
    """Begins to count anew.

    Args:
      drafter_params: see `RolloutEngine.generate`; for the calls to come.
      idle: likewise.
    """
    self._drafter_params = drafter_params
    self._idle = idle
    self.stats = RolloutStats()
    self.values: dict[str, float] = {}
    self.left_out: list[str] = []

  def sample(
    self, params: Params, state: Buffer, demand: GroupRequest, watch: Stopwatch
  ) -> tuple[Buffer, list[Group]]:
    """Returns complete groups: as many as wanted, or more that came with the
    last, and what is known after them.

    Args:
      params: the policy's.
      state: what is known before.
      demand: what is asked for.
      watch: told of rollout, reward and score.
    """
    pending, over = state.pending, self._control.over_provision
    # Rounded: 1.1 * 10 is above 11.
    asked = math.ceil(round(over * demand.groups, 6))
    new, cursor, left_out = self._pending(
      state, demand, max(asked - len(pending), 0)
    )
    self.left_out += left_out
    new = self._ordered(new, state)
    if self._control.extra_samples:
      extra = sum(p.request.samples - self._samples for p in new)
      self.values['rollout/extra_samples'] = extra + self.values.get(
        'rollout/extra_samples', 0
      )
    rollouts = RolloutState(version=demand.step, store=self._store)
    if self._pruner:
      new = self._generate(params, new, rollouts, limit=self._control.prune_at)
      new = self._pruner.prune(params, state.head, new)
    policies = []
    if over > 1:
      policies.append(
        control.stop_at_groups(
          min(demand.groups, len(pending) + len(new)),
          demand.number + 1 - self._control.max_staleness,
        )
      )
    groups = self._generate(
      params,
      [*pending, *new],
      rollouts,
      ahead=self._coming(
        dataclasses.replace(state, cursor=cursor), demand.number + 1
      ),
      policies=policies,
    )
    left = [group for group in groups if not group.complete]
    left.sort(key=lambda g: (g.request.step, g.request.request))
    sampled = sum(g.tokens for g in groups) - sum(g.tokens for g in pending)
    self._store.drop_hints(demand.number, [group.request for group in left])
    watch.lap('rollout')
    complete = [group for group in groups if group.complete]
    rewarded = self._reward(complete)
    pruned = sum(g.tokens for g in complete) - sum(g.tokens for g in rewarded)
    watch.lap('reward')
    head = state.head
    if self._pruner and rewarded:
      head, values = self._pruner.learn(params, head, rewarded)
      self.values |= values
      watch.lap('score')
    return dataclasses.replace(
      state,
      cursor=cursor,
      pending=tuple(left),
      head=head,
      sampled_tokens=state.sampled_tokens + sampled,
      dropped_tokens=state.dropped_tokens + pruned,
    ), rewarded

  def sample_apart(
    self, params: Params, count: int, domain: int, watch: Stopwatch
  ) -> list[Group]:
    """Returns groups of the run's first problems that no step asks for.

    Args:
      params: the policy's.
      count: how many problems.
      domain: of the requests.
      watch: told of rollout and reward.
    """
    # What is left out here is counted in the step whose turn it is.
    numbers, prompts, _ = self._usable(0, count)
    pending = [
      PartialGroup(number, Request(prompt, self._samples, domain, 0, i))
      for i, (number, prompt) in enumerate(zip(numbers, prompts))
    ]
    groups = self._generate(params, pending, RolloutState())
    watch.lap('rollout')
    rewarded = self._reward(groups)
    watch.lap('reward')
    return rewarded

  def problem(self, number: int) -> Problem:
    """Returns a problem of the stream that the steps' problems make up."""
    count = self._run.config.task.prompts_per_step
    return self._problems(number // count)[number % count]

  def _generate(
    self,
    params: Params,
    groups: Sequence[PartialGroup],
    state: RolloutState,
    **options: Any,
  ) -> list[PartialGroup]:
    """Returns groups as far as they get; see `RolloutEngine.generate`."""
    earlier = {
      sample_key(r.request, r.index): r
      for group in groups
      for r in group.rollouts
    }
    rollouts, _ = self._engine.generate(
      params,
      [group.request for group in groups],
      dataclasses.replace(state, earlier=earlier),
      drafter_params=self._drafter_params,
      idle=self._idle,
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

  def _pending(
    self, state: Buffer, demand: GroupRequest, count: int
  ) -> tuple[list[PartialGroup], int, list[str]]:
    """Returns new requests of a step, for the next problems of the stream.

    Returns:
      (requests, the cursor after them, why problems between them were left
      out).
    """
    numbers, prompts, left_out = self._usable(state.cursor, count)
    new = [
      PartialGroup(
        number,
        self._with_extra(
          Request(
            prompt, self._samples, TRAIN, demand.number, demand.first + i
          ),
          state,
        ),
      )
      for i, (number, prompt) in enumerate(zip(numbers, prompts))
    ]
    return new, numbers[-1] + 1 if numbers else state.cursor, left_out

  def _with_extra(self, request: Request, state: Buffer) -> Request:
    """Returns a request with the samples that its prompt is to get.

    The first of them have the noise, and so the tokens, that they would have
    without more.
    """
    accuracy = state.successes.accuracy(request.prompt)
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
    self, new: Sequence[PartialGroup], state: Buffer
  ) -> list[PartialGroup]:
    """Returns new groups in the order in which they are sampled."""
    order = self._control.order
    if order == 'arrival' or not new:
      return list(new)
    lengths = state.lengths.predict([p.request.prompt for p in new])
    sign = -1 if order == 'longest_first' else 1
    return [new[i] for i in np.argsort(sign * lengths, kind='stable')]

  def _coming(self, state: Buffer, number: int) -> list[Request]:
    """Returns the requests of a coming step, if any use can be made of them.

    They are for hints only: whatever is wrong with them is reported in their
    own step, not here.
    """
    config = self._run.config
    if not self._engine.runs_ahead or number >= config.num_steps:
      return []
    count = config.task.prompts_per_step
    try:
      new, _, _ = self._pending(
        state, GroupRequest(number, number, 0, count), count
      )
    except ConfigError:
      return []
    return [pending.request for pending in new]

  def _reward(self, complete: Sequence[PartialGroup]) -> list[Group]:
    """Returns complete groups with their rewards, without what was pruned."""
    if not complete:
      return []
    decode = self._run.tokenizer.decode
    problems = [self.problem(pending.number) for pending in complete]
    sizes = [len(pending.survivors) for pending in complete]
    rollouts = [r for pending in complete for r in pending.survivors]
    texts = [decode(rollout.tokens) for rollout in rollouts]
    puzzles = [p for p, size in zip(problems, sizes) for _ in range(size)]
    names: tuple[str, ...] = ()

    def reward(mine: Sequence[int]) -> list[list[Any]]:
      nonlocal names
      scores = self._verifier.reward(
        [puzzles[i] for i in mine],
        [texts[i] for i in mine],
        tokens=[rollouts[i].length for i in mine],
        finished=[rollouts[i].finished for i in mine],
      )
      names = tuple(scores.parts)
      columns = scores.rewards, scores.unscorable, *scores.parts.values()
      rows = np.stack(columns, axis=1).tolist()
      return [
        [row, sorted(own.items())]  # pairs, as JSON has them
        for row, own in zip(rows, scores.metrics)
      ]

    found = processes.share(reward, range(len(rollouts)))
    rewards, unscorable, *values = np.asarray(
      [row for row, _ in found], np.float32
    ).T
    metrics = tuple(dict(own) for _, own in found)
    groups = []
    for pending, problem, end in zip(complete, problems, np.cumsum(sizes)):
      mine = slice(end - len(pending.survivors), end)
      lost = unscorable[mine].astype(bool)
      parts = {name: value[mine] for name, value in zip(names, values)}
      labels = advantages.judge(
        self._run, texts[mine], rewards[mine], lost, parts
      )
      groups.append(
        Group(
          problem=problem,
          rollouts=pending.survivors,
          texts=tuple(texts[mine]),
          **labels._asdict(),
          unscorable=lost,
          parts=parts,
          number=pending.number,
          metrics=metrics[mine] if any(metrics) else (),
        )
      )
    return groups
