"""What a step learns from: problems -> rollouts -> rewards, by group.

By default a step asks for its groups, samples them and takes them. `control`
changes which groups a step takes: APRIL defers groups that are not complete
when enough are, dynamic sampling discards groups that are all right or all
wrong, a queue makes steps learn from an earlier policy, and past groups may
come again. All of them work on one state, `groups.Buffer`, and decide on
training values alone.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience import advantages
from rlax_llm.experience import groups as records
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.experience.progress_rewards import ForcedAnswers
from rlax_llm.experience.sampler import GroupRequest
from rlax_llm.experience.sampler import GroupSampler
from rlax_llm.learning import length_ranker
from rlax_llm.learning.batch import Sample
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.generation import IdleWork
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.rollout.table import sample_key
from rlax_llm.runtime import processes
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.types import REHEARSE
from rlax_llm.types import Rollout
from rlax_llm.types import TRAIN
from rlax_llm.workdir.run_statistics import Stopwatch

# (params, samples) -> the log-probability of each token of each completion.
Score = Callable[[Params, Sequence[Sample]], list[np.ndarray]]

_FADING = 0.7  # weight of what an epoch ago told of a prompt's lengths


class Collector:
  """Samples and scores the groups of a step."""

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
      engine: of the law that the policy is trained under.
      verifier: gives rewards.
      store: past rollouts, drafted from.
      score: gives the log-probabilities of what a later step trains on.
      reads_sampler: whether the objective reads them.
    """
    self._run = run
    self._control = run.config.control
    self._sampler = GroupSampler(run, engine, verifier, store)
    self._store = store
    self._score = score
    self._reads_sampler = reads_sampler
    self._force = ForcedAnswers(run, engine, verifier).progress
    self._state = Buffer()  # after the last step that was learned
    self._next = self._state  # after the one under way
    # Of the last `collect`: metrics, and every complete group that it sampled.
    self._values: dict[str, float] = {}
    self.sampled: list[Group] = []

  @property
  def experience(self) -> Buffer:
    """State after the last step that was learned."""
    return self._state

  def restore(self, record: Mapping[str, Any]) -> Buffer:
    """Takes over the buffer that `groups.dump` of an earlier process wrote."""
    self._state = self._next = records.restore(
      record,
      self._sampler.problem,
      lambda prompt: self._run.encode(prompt, prompt=True),
      self._run.tokenizer.decode,
      functools.partial(advantages.judge, self._run),
      TRAIN,
    )
    return self._state

  def collect(
    self,
    params: Params,
    step: int,
    watch: Stopwatch,
    *,
    drafter_params: Params = (),
    idle: IdleWork = lambda mesh: None,
  ) -> list[Group]:
    """Returns the groups that a step learns from, the oldest first.

    Nothing is remembered of it before `learned` says that it was learned: a
    step that is given up is collected again.

    Args:
      params: the policy's.
      step: from 0.
      watch: told of rollout, reward and score.
      drafter_params: see `RolloutEngine.generate`.
      idle: likewise.
    """
    self._next, self._values = self._state, {'rollout/refills': 0}
    seen: list[Group] = []
    self._sampler.begin(drafter_params, idle)
    if self._run.algorithm.rehearsal != 'none':
      if not self._next.rehearsal:
        self._update(rehearsal=self._solved(params, watch))
      self._values['rollout/rehearsal_samples'] = len(self._rehearsal())
    # No step would use batches beyond the last one.
    left = max(self._run.config.num_steps - 1 - step, 0)
    ahead = min(self._control.staleness, left)
    while len(self._next.queue) <= ahead:
      batch, new = self._round(
        params, step, step + len(self._next.queue), watch
      )
      seen += new
      self._update(queue=(*self._next.queue, batch))
    self.sampled = seen
    batch, *queue = self._next.queue
    fresh = sum(group.tokens for group in batch if not group.replayed)
    self._update(
      queue=tuple(queue),
      past=self._past(batch, step),
      trained_tokens=self._next.trained_tokens + fresh,
    )
    self._observe_lengths([g for g in batch if not g.replayed])
    # Not before the end of the step: what it asks for is decided by then.
    if self._control.extra_samples:
      known = [
        (g.request.prompt, accuracy)
        for g in seen
        if (accuracy := g.accuracy) is not None
      ]
      self._update(
        successes=self._next.successes.observe(
          [p for p, _ in known], [a for _, a in known]
        )
      )
    groups = self._keep_scores(params, step, batch)
    watch.lap('score')
    self._values |= self._sampler.values | {
      'rollout/left_out_prompts': len(self.left_out),
      'rollout/sampled_tokens': self._next.sampled_tokens
      - self._state.sampled_tokens,
      'rollout/trained_tokens': fresh,
      'rollout/buffered_tokens': self._next.buffered_tokens,
      'rollout/dropped_tokens': self._next.dropped_tokens
      - self._state.dropped_tokens,
      'rollout/pending_groups': len(self._next.pending),
    }
    return groups

  def solved_at_first(self, groups: Sequence[Group]) -> np.ndarray:
    """Returns bool[B]: groups of problems that the initial policy solved."""
    known = {group.problem.prompt_id for group in self._next.rehearsal}
    return np.array([group.problem.prompt_id in known for group in groups])

  def rehearsed(self, step: int) -> list[Sample]:
    """Returns what a step rehearses: other samples of the kept in each step.

    Args:
      step: from 0.
    """
    kept, config = self._rehearsal(), self._run.config
    share = self._run.algorithm.rehearsal_share
    count = math.ceil(
      share * config.task.prompts_per_step * config.rollout.samples_per_prompt
    )
    rng = np.random.default_rng([config.seed, REHEARSE, step])
    return [
      Sample(
        prompt=rollout.request.prompt,
        completion=rollout.tokens,
        scored_logprobs=rollout.scored_logprobs,
        extra={'rehearsed': 1.0},
      )
      for rollout in (kept[i] for i in rng.permutation(len(kept))[:count])
    ]

  def progress(
    self,
    params: Params,
    step: int,
    groups: Sequence[Group],
    watch: Stopwatch,
    *,
    drafter_params: Params = (),
  ) -> list[dict[str, np.ndarray]]:
    """Returns what each episode of each sample added, where that is read.

    Args:
      params: the policy's.
      step: from 0.
      groups: of the step.
      watch: told of the time.
      drafter_params: see `RolloutEngine.generate`.
    """
    if self._run.algorithm.credit != 'progress':
      return []
    found, values = self._force(
      params, groups, step, drafter_params=drafter_params
    )
    self._values |= values
    watch.lap('progress')
    return [{'progress': array} for array in found]

  @property
  def sampling_stats(self) -> RolloutStats:
    """Speed values of the last `collect`."""
    return self._sampler.stats

  @property
  def left_out(self) -> Sequence[str]:
    """Why prompts could not be sampled from in the last `collect`."""
    return self._sampler.left_out

  def learned(self) -> Buffer:
    """Says that the step of the last `collect` was learned."""
    self._state = self._next
    return self._state

  def metrics(self) -> dict[str, float]:
    """Returns what the last `collect` tells besides its groups."""
    parts = processes.gather([self._store.bytes, len(self._store)])
    kept, prompts = (sum(values) for values in zip(*parts))
    return (
      self._sampler.stats.metrics()
      | self._values
      | {'rollout/cache_bytes': kept, 'rollout/cached_prompts': prompts}
    )

  def _update(self, **changes: Any) -> None:
    self._next = dataclasses.replace(self._next, **changes)

  # ---- Rehearsal -------------------------------------------------------------
  def _rehearsal(self) -> list[Rollout]:
    return [r for group in self._next.rehearsal for r in group.rollouts]

  def _solved(self, params: Params, watch: Stopwatch) -> tuple[Group, ...]:
    """Returns the right samples of what a policy solves, with their scores.

    Raises:
      ConfigError: it solves nothing.
    """
    algorithm = self._run.algorithm
    solved = []
    for group in self._sampler.sample_apart(
      params, algorithm.rehearsal_prompts, REHEARSE, watch
    ):
      right = group.known & (group.correctness >= 1)
      if right.any() and (
        group.correctness[group.known].mean() >= algorithm.rehearsal_least
      ):
        solved.append(group.only(right))
    if not solved:
      raise ConfigError(
        f'the policy before RL solves none of {algorithm.rehearsal_prompts} '
        f'problems with a mean score of {algorithm.rehearsal_least}, so that '
        'there is nothing to rehearse; lower algorithm.rehearsal_least or '
        'raise algorithm.rehearsal_prompts'
      )
    logprobs = iter(
      self._score(
        params,
        [
          Sample(prompt=r.request.prompt, completion=r.tokens)
          for group in solved
          for r in group.rollouts
        ],
      )
    )
    watch.lap('score')
    return tuple(
      dataclasses.replace(
        group,
        rollouts=tuple(
          dataclasses.replace(r, scored_logprobs=next(logprobs))
          for r in group.rollouts
        ),
      )
      for group in solved
    )

  # ---- Who is taken ----------------------------------------------------------
  def _round(
    self, params: Params, step: int, number: int, watch: Stopwatch
  ) -> tuple[tuple[Group, ...], list[Group]]:
    """Returns (the batch of a step, the groups that were sampled for it).

    Args:
      params: the policy's.
      step: their version.
      number: the step that the batch is for; its requests carry it.
      watch: told of rollout and reward.
    """
    again = self._replayed(number)
    wanted = self._run.config.task.prompts_per_step - len(again)
    limit = self._control.dynamic_sampling
    chosen = list(self._next.surplus)
    new: list[Group] = []
    without: list[Group] = []  # signal
    first = refills = 0
    while len(chosen) < wanted and refills <= limit:
      missing = wanted - len(chosen)
      seen = len(chosen) + len(without)
      if refills and chosen:  # As few of those to come will have a signal.
        missing = math.ceil(missing * seen / len(chosen))
      before = self._next.cursor
      demand = GroupRequest(step, number, first, min(missing, wanted))
      self._next, got = self._sampler.sample(params, self._next, demand, watch)
      first += self._next.cursor - before
      new += got
      for group in got:
        (without if limit and not group.has_signal else chosen).append(group)
      refills += 1
    oldest_first = lambda group: group.age_order
    chosen.sort(key=oldest_first)
    without.sort(key=oldest_first)
    short = max(wanted - len(chosen), 0)
    batch = sorted(chosen[:wanted] + without[:short], key=oldest_first)
    self._values['rollout/refills'] += max(refills - 1, 0)
    self._update(
      surplus=tuple(chosen[wanted:]),
      dropped_tokens=self._next.dropped_tokens
      + sum(group.tokens for group in without[short:]),
    )
    return (*batch, *again), new

  def _replayed(self, number: int) -> list[Group]:
    """Returns past groups for the batch of a step."""
    past = [group for group in self._next.past if group.has_signal]
    count = min(self._control.replay, len(past))
    rng = np.random.default_rng([self._run.config.seed, number, count])
    chosen = sorted(rng.permutation(len(past))[:count])
    return [dataclasses.replace(past[i], replayed=True) for i in chosen]

  def _past(self, batch: Sequence[Group], step: int) -> tuple[Group, ...]:
    """Returns the groups that may be replayed after a step."""
    if not self._control.replay:
      return ()
    least = step + 1 - self._control.replay_steps
    known = [*self._next.past, *(g for g in batch if not g.replayed)]
    return tuple(g for g in known if g.request.step >= least)

  def _observe_lengths(self, batch: Sequence[Group]) -> None:
    """Compares predicted lengths with those of new groups; learns from them."""
    if self._control.order == 'arrival':
      return
    prompts = [group.request.prompt for group in batch]
    lengths = [group.lengths for group in batch]
    known = self._next.lengths
    self._values['rollout/length_tau'] = length_ranker.kendall_tau(
      known.predict(prompts), np.array([np.mean(x) for x in lengths])
    )
    self._update(lengths=known.observe(prompts, lengths, keep=_FADING))

  # ---- Log-probabilities -----------------------------------------------------
  def _keep_scores(
    self, params: Params, step: int, batch: Sequence[Group]
  ) -> list[Group]:
    """Scores what this step sampled and a later one may train on.

    It is scored under the weights that sampled it, before they change. In the
    batch of this step that is needed where older tokens stand beside new ones:
    what is on-policy as a whole needs no scores. Neither does anything where
    the objective does not read by which policy a token was sampled.
    """
    if not self._reads_sampler:
      return list(batch)
    state = self._next
    kept: list[Group | PartialGroup] = [
      *state.pending,
      *state.surplus,
      *state.past,
    ]
    kept += [group for queued in state.queue for group in queued]
    rollouts = [r for group in kept for r in group.rollouts]
    rollouts += [
      r
      for group in batch
      for r in group.rollouts
      if (r.token_version < step).any()
    ]
    missing = {
      sample_key(r.request, r.index): r
      for r in rollouts
      if r.length > _scored(r) and r.survival > 0
    }
    if not missing:
      return list(batch)
    logprobs = self._score(
      params,
      [
        Sample(prompt=r.request.prompt, completion=r.tokens)
        for r in missing.values()
      ],
    )
    for (key, rollout), new in zip(missing.items(), logprobs):
      old = rollout.scored_logprobs
      old, known = new[:0] if old is None else old, _scored(rollout)
      if (rollout.token_version[known:] != step).any():
        raise AssertionError(f'{key} has unscored tokens of an earlier policy')
      missing[key] = dataclasses.replace(
        rollout, scored_logprobs=np.concatenate([old, new[known:]])
      )
    renewed = lambda groups: tuple(_with(group, missing) for group in groups)
    self._update(
      pending=renewed(state.pending),
      surplus=renewed(state.surplus),
      past=renewed(state.past),
      queue=tuple(map(renewed, state.queue)),
    )
    return list(renewed(batch))


def _scored(rollout: Rollout) -> int:
  """Returns how many tokens of a rollout have been scored."""
  return 0 if rollout.scored_logprobs is None else len(rollout.scored_logprobs)


def _with(group: Any, scored: Mapping[tuple, Rollout]) -> Any:
  """Returns a group, complete or not, with the rollouts that were scored."""
  return dataclasses.replace(
    group,
    rollouts=tuple(
      scored.get(sample_key(r.request, r.index), r) for r in group.rollouts
    ),
  )
