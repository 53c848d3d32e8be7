"""What a step learns from: problems -> rollouts -> rewards, by group."""

import dataclasses
from typing import Sequence

import numpy as np

from rlax_llm import processes
from rlax_llm.config import ConfigError
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.progression import Stopwatch
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.run import Run
from rlax_llm.tasks.task import Problem
from rlax_llm.tasks.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Rollout
from rlax_llm.types import TRAIN


@dataclasses.dataclass(frozen=True)
class Group:
  """The samples of one problem, scored."""
  problem: Problem
  rollouts: tuple[Rollout, ...]
  texts: tuple[str, ...]  # the rollouts' tokens, decoded
  rewards: np.ndarray  # float32[G]
  unscorable: np.ndarray  # bool[G]: the verifier gave no reward
  parts: dict[str, np.ndarray]  # float32[G] by name, what rewards are made of

  @property
  def lengths(self) -> np.ndarray:
    """int32[G], tokens."""
    return np.array([rollout.length for rollout in self.rollouts], np.int32)


class Collector:
  """Samples and scores the groups of a step."""

  def __init__(self, run: Run, engine: RolloutEngine, verifier: Verifier,
               store: RolloutStore) -> None:
    """Makes a collector.

    Args:
      run: the run.
      engine: of the law that the policy is trained under.
      verifier: gives rewards.
      store: past rollouts, drafted from.
    """
    self._run = run
    self._engine = engine
    self._verifier = verifier
    self._store = store

  def collect(self,
              params: Params,
              step: int,
              watch: Stopwatch,
              *,
              drafter_params: Params = ()) -> list[Group]:
    """Returns the groups that a step learns from, in the order of requests.

    Args:
      params: the policy's.
      step: from 0.
      watch: told of rollout and reward.
      drafter_params: see `RolloutEngine.generate`.
    """
    problems = self._run.problems(step)
    requests = self._requests(problems, step)
    rollouts, _ = self._engine.generate(params,
                                        requests,
                                        RolloutState(version=step,
                                                     store=self._store),
                                        ahead=self._coming(step + 1),
                                        drafter_params=drafter_params)
    self._store.drop_hints(step)
    watch.lap('rollout')
    groups = self._score(problems, rollouts)
    watch.lap('reward')
    return groups

  def metrics(self) -> dict[str, float]:
    """Returns the speed values of the last `collect`."""
    parts = processes.gather([self._store.bytes, len(self._store)])
    kept, prompts = (sum(values) for values in zip(*parts))
    return self._engine.stats.metrics() | {
        'rollout/cache_bytes': kept,
        'rollout/cached_prompts': prompts,
    }

  def _requests(self, problems: Sequence[Problem], step: int) -> list[Request]:
    return self._run.requests(
        problems,
        samples=self._run.config.rollout.samples_per_prompt,
        domain=TRAIN,
        step=step)

  def _coming(self, step: int) -> list[Request]:
    """Returns the requests of a coming step, if any use can be made of them.

    They are for hints only: whatever is wrong with them is reported in their
    own step, not here.
    """
    if not self._engine.runs_ahead or step >= self._run.config.num_steps:
      return []
    try:
      return self._requests(self._run.problems(step), step)
    except ConfigError:
      return []

  def _score(self, problems: Sequence[Problem],
             rollouts: Sequence[Rollout]) -> list[Group]:
    """Returns the groups of rollouts, in the order of their problems."""
    decode = self._run.tokenizer.decode
    texts = [decode(rollout.tokens) for rollout in rollouts]
    size = len(rollouts) // len(problems)
    names: tuple[str, ...] = ()

    def reward(mine: Sequence[int]) -> list[list[float]]:
      nonlocal names
      scores = self._verifier.reward(
          [problems[i // size] for i in mine], [texts[i] for i in mine],
          tokens=[rollouts[i].length for i in mine],
          finished=[rollouts[i].finished for i in mine])
      names = tuple(scores.parts)
      columns = scores.rewards, scores.unscorable, *scores.parts.values()
      return np.stack(columns, axis=1).tolist()

    rows = processes.share(reward, range(len(rollouts)))
    rewards, unscorable, *values = np.asarray(rows, np.float32).T
    groups = []
    for i, problem in enumerate(problems):
      mine = slice(i * size, (i + 1) * size)
      groups.append(
          Group(problem=problem,
                rollouts=tuple(rollouts[mine]),
                texts=tuple(texts[mine]),
                rewards=rewards[mine],
                unscorable=unscorable[mine].astype(bool),
                parts={
                    name: value[mine] for name, value in zip(names, values)
                }))
    return groups
