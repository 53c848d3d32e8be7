"""Which groups a step learns from: planned, sampled, rewarded, taken.

By default a step requests its groups, samples them and takes them. `control`
changes which groups a step takes: APRIL defers incomplete groups, dynamic
sampling discards groups whose samples are all right or all wrong, with
staleness a step learns from an earlier policy's samples, and replay takes past
groups again. All of them work on one value, `groups.Buffer`, and decide on
training values alone.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from rlax_llm.components import Run
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience import rehearsal
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.experience.progress_rewards import ForcedAnswers
from rlax_llm.experience.rewards import reward_groups
from rlax_llm.experience.sampler import GroupRequest
from rlax_llm.experience.sampler import GroupSampler
from rlax_llm.experience.sampler import Policy
from rlax_llm.experience.stale_scores import Score
from rlax_llm.experience.stale_scores import score_stale
from rlax_llm.learning import length_ranker
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.generation import IdleWork
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.runtime import processes
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.types import REHEARSE

_LENGTH_DECAY = 0.7  # weight of an epoch-old observation of a prompt's lengths


class Collector:
  """Collects the groups of a step.

  A step calls `publish`, then `dispatch` and `reward` for whatever `plan`
  yields, then `take`. The buffer is a value: a step that is given up is
  collected again from the buffer before it.
  """

  def __init__(
    self,
    run: Run,
    engine: RolloutEngine,
    verifier: Verifier,
    store: RolloutStore,
    score: Score,
    *,
    reads_sampler: bool = True,
  ) -> None:
    """Makes a collector.

    Args:
      run: the run.
      engine: of the distribution that the policy is trained under.
      verifier: gives rewards.
      store: past rollouts, drafted from.
      score: gives the log-probabilities of what a later step trains on.
      reads_sampler: whether the objective reads them.
    """
    self._run = run
    self._control = run.config.control
    self._sampler = GroupSampler(run, engine, store)
    self._verifier = verifier
    self._store = store
    self._score = score
    self._reads_sampler = reads_sampler
    self._force = ForcedAnswers(run, engine, verifier).progress
    # Of the step under way.
    self._begin = self._buffer = Buffer()
    self._wanted: GroupRequest | None = None
    self._complete: list[PartialGroup] = []  # dispatched and not rewarded
    self._rewarded: list[Group] = []
    self._values: dict[str, float] = {}
    self.sampled: list[Group] = []  # every group that the step completed

  def publish(
    self,
    version: int,
    params: Params,
    *,
    drafter_params: Params = (),
    idle: IdleWork = lambda mesh: None,
  ) -> None:
    """Sets the parameters that sample from now on.

    Args:
      version: the step that they are of.
      params: the policy's.
      drafter_params: see `RolloutEngine.generate`.
      idle: likewise.
    """
    self._sampler.publish(Policy(version, params, drafter_params, idle))

  def plan(
    self, buffer: Buffer, step: int
  ) -> Iterator[tuple[int, list[PartialGroup]]]:
    """Yields what to dispatch until every batch that is due has its groups.

    Due is the batch of every step up to `step + control.staleness`. Dynamic
    sampling and APRIL let a batch depend on what came of the one before, so
    each item must be dispatched and rewarded before the next is drawn.

    Args:
      buffer: before the step.
      step: from 0.

    Yields:
      (the step that will learn from the groups, groups to sample).
    """
    self._begin = self._buffer = buffer
    self._values, self.sampled = {'rollout/refills': 0}, []
    if self._run.algorithm.rehearsal != 'none':
      if not buffer.rehearsal:
        self._update(rehearsal=self._solved())
      self._values['rollout/rehearsal_samples'] = len(
        rehearsal.rollouts(self._buffer)
      )
    # No step would use batches beyond the last one.
    left = max(self._run.config.num_steps - 1 - step, 0)
    ahead = min(self._control.staleness, left)
    while len(self._buffer.queue) <= ahead:
      yield from self._fill(step + len(self._buffer.queue))

  def dispatch(
    self, batch: int, version: int, groups: Sequence[PartialGroup]
  ) -> None:
    """Samples groups: draft, extend, verify and commit until they are complete.

    Args:
      batch: the step that will learn from them.
      version: of the parameters, as published.
      groups: from `plan`.
    """
    wanted = self._wanted
    if wanted is None or wanted.batch != batch:
      raise ValueError(f'batch {batch} is not the one that `plan` yielded')
    if version != self._sampler.policy.version:
      raise ValueError(
        f'version {version} is not published; {self._sampler.policy.version} is'
      )
    tokens = sum(group.tokens for group in groups)
    sampled = self._sampler.sample(self._buffer, groups, wanted)
    pending = [group for group in sampled if not group.complete]
    pending.sort(key=lambda group: group.age_order)
    self._complete = [group for group in sampled if group.complete]
    self._rewarded = []
    self._update(
      pending=tuple(pending),
      sampled_tokens=self._buffer.sampled_tokens
      + sum(group.tokens for group in sampled)
      - tokens,
    )

  def reward(self, batch: int) -> None:
    """Rewards the complete groups of a dispatch; teaches the pruning head.

    Args:
      batch: the step that will learn from them.
    """
    if self._wanted is None or self._wanted.batch != batch:
      raise ValueError(f'batch {batch} is not the one that was dispatched')
    complete, self._complete = self._complete, []
    groups = reward_groups(
      self._run, self._verifier, complete, self._sampler.problem
    )
    pruned = sum(g.tokens for g in complete) - sum(g.tokens for g in groups)
    self._update(dropped_tokens=self._buffer.dropped_tokens + pruned)
    pruner = self._sampler.pruner
    if pruner and groups:
      head, values = pruner.learn(
        self._sampler.policy.params, self._buffer.head, groups
      )
      self._update(head=head)
      self._values |= values
    self._rewarded = groups

  def take(self, step: int) -> tuple[list[Group], Buffer]:
    """Returns the groups that a step learns from, and the buffer after it.

    Args:
      step: from 0; its plan is exhausted.

    Returns:
      (groups, the oldest first; the buffer once the step is learned).
    """
    batch, *queue = self._buffer.queue
    fresh = [group for group in batch if not group.replayed]
    tokens = sum(group.tokens for group in fresh)
    self._update(
      queue=tuple(queue),
      past=self._past(fresh, step),
      trained_tokens=self._buffer.trained_tokens + tokens,
    )
    self._observe_lengths(fresh)
    # At the end of the step: its own requests must not depend on it.
    if self._control.extra_samples:
      known = [
        (g.request.prompt, accuracy)
        for g in self.sampled
        if (accuracy := g.accuracy) is not None
      ]
      self._update(
        successes=self._buffer.successes.observe(
          [p for p, _ in known], [a for _, a in known]
        )
      )
    groups = list(batch)
    if self._reads_sampler:
      self._buffer, groups = score_stale(
        self._buffer,
        batch,
        step=step,
        params=self._sampler.policy.params,
        score=self._score,
      )
    self._values |= self._sampler.values | {
      'rollout/left_out_prompts': len(self.left_out),
      'rollout/sampled_tokens': self._buffer.sampled_tokens
      - self._begin.sampled_tokens,
      'rollout/trained_tokens': tokens,
      'rollout/buffered_tokens': self._buffer.buffered_tokens,
      'rollout/dropped_tokens': self._buffer.dropped_tokens
      - self._begin.dropped_tokens,
      'rollout/pending_groups': len(self._buffer.pending),
    }
    return groups, self._buffer

  def progress(
    self, step: int, groups: Sequence[Group]
  ) -> list[dict[str, np.ndarray]]:
    """Returns the progress of each episode of each sample, where it is read.

    Args:
      step: from 0.
      groups: of the step.
    """
    if self._run.algorithm.credit != 'progress':
      return []
    policy = self._sampler.policy
    found, values = self._force(
      policy.params, groups, step, drafter_params=policy.drafter_params
    )
    self._values |= values
    return [{'progress': array} for array in found]

  @property
  def stats(self) -> RolloutStats:
    """Speed values since `publish`."""
    return self._sampler.stats

  @property
  def left_out(self) -> Sequence[str]:
    """Why due prompts could not be sampled from since `publish`."""
    return self._sampler.left_out

  def metrics(self) -> dict[str, float]:
    """Returns the metrics of the last step besides those of its groups."""
    stores = processes.gather([self._store.bytes, len(self._store)])
    kept, prompts = (sum(values) for values in zip(*stores))
    return (
      self.stats.metrics()
      | self._values
      | {'rollout/cache_bytes': kept, 'rollout/cached_prompts': prompts}
    )

  def _update(self, **changes: Any) -> None:
    self._buffer = dataclasses.replace(self._buffer, **changes)

  def _solved(self) -> tuple[Group, ...]:
    """Returns the right samples of what the initial policy solves."""
    complete = self._sampler.sample_apart(
      self._run.algorithm.rehearsal_prompts, REHEARSE
    )
    groups = reward_groups(
      self._run, self._verifier, complete, self._sampler.problem
    )
    return rehearsal.solved(
      self._run, groups, self._score, self._sampler.policy.params
    )

  def _fill(self, batch: int) -> Iterator[tuple[int, list[PartialGroup]]]:
    """Yields dispatches until a batch has its groups, then queues it."""
    replayed = self._replayed(batch)
    wanted = self._run.config.task.prompts_per_step - len(replayed)
    rounds = self._control.dynamic_sampling
    chosen = list(self._buffer.surplus)
    rejected: list[Group] = []  # groups without a signal
    first = refills = 0
    while len(chosen) < wanted and refills <= rounds:
      missing = wanted - len(chosen)
      seen = len(chosen) + len(rejected)
      if refills and chosen:  # Expects as small a share with a signal.
        missing = math.ceil(missing * seen / len(chosen))
      self._wanted = GroupRequest(batch, first, min(missing, wanted))
      before = self._buffer.cursor
      self._buffer, groups = self._sampler.request(self._buffer, self._wanted)
      first += self._buffer.cursor - before
      yield batch, groups
      self._wanted = None
      for group in self._rewarded:
        keep = group.has_signal or not rounds
        (chosen if keep else rejected).append(group)
      self.sampled += self._rewarded
      refills += 1
    oldest_first = lambda group: group.age_order
    chosen.sort(key=oldest_first)
    rejected.sort(key=oldest_first)
    short = max(wanted - len(chosen), 0)
    taken = sorted(chosen[:wanted] + rejected[:short], key=oldest_first)
    self._values['rollout/refills'] += max(refills - 1, 0)
    self._update(
      surplus=tuple(chosen[wanted:]),
      queue=(*self._buffer.queue, (*taken, *replayed)),
      dropped_tokens=self._buffer.dropped_tokens
      + sum(group.tokens for group in rejected[short:]),
    )

  def _replayed(self, batch: int) -> list[Group]:
    """Returns past groups for a batch."""
    past = [group for group in self._buffer.past if group.has_signal]
    count = min(self._control.replay, len(past))
    rng = np.random.default_rng([self._run.config.seed, batch, count])
    chosen = sorted(rng.permutation(len(past))[:count])
    return [dataclasses.replace(past[i], replayed=True) for i in chosen]

  def _past(self, fresh: Sequence[Group], step: int) -> tuple[Group, ...]:
    """Returns the groups that may be replayed after a step."""
    if not self._control.replay:
      return ()
    oldest = step + 1 - self._control.replay_steps
    known = (*self._buffer.past, *fresh)
    return tuple(g for g in known if g.request.step >= oldest)

  def _observe_lengths(self, groups: Sequence[Group]) -> None:
    """Compares predicted lengths with those of new groups; learns from them."""
    if self._control.order == 'arrival':
      return
    prompts = [group.request.prompt for group in groups]
    lengths = [group.lengths for group in groups]
    known = self._buffer.lengths
    self._values['rollout/length_tau'] = length_ranker.kendall_tau(
      known.predict(prompts), np.array([np.mean(x) for x in lengths])
    )
    self._update(lengths=known.observe(prompts, lengths, keep=_LENGTH_DECAY))
