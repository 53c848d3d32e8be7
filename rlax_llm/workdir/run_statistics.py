"""What a run accumulates besides its parameters, and where its time goes."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import hashlib
import math

import numpy as np

from rlax_llm.runtime import executables
from rlax_llm.types import Rollout


@dataclasses.dataclass(frozen=True)
class RunStatistics:
  """What a run accumulates besides its parameters; in the checkpoint."""

  tokens_sampled: int = 0
  tokens_sha256: str = ''  # of all tokens so far, step by step
  reward_first: float | None = None
  reward_last: float | None = None
  accuracy_before: float | None = None
  accuracy_after: float | None = None
  evaluated_step: int | None = None  # the last one with an evaluation
  wall_seconds: float = 0.0

  def with_step(
    self, rollouts: Sequence[Rollout], reward: float
  ) -> 'RunStatistics':
    """Returns the statistics after a step.

    Args:
      rollouts: that the step learned from.
      reward: the mean reward; NaN where no reward is known, kept as None. The
        first reward is that of the first step with one.
    """
    digest = hashlib.sha256(self.tokens_sha256.encode())
    for rollout in rollouts:
      digest.update(np.int32(rollout.length).tobytes())
      digest.update(rollout.tokens.astype('<i4').tobytes())
    last = None if math.isnan(reward) else reward
    return dataclasses.replace(
      self,
      tokens_sampled=self.tokens_sampled + sum(r.length for r in rollouts),
      tokens_sha256=digest.hexdigest(),
      reward_last=last,
      reward_first=last if self.reward_first is None else self.reward_first,
    )

  def with_accuracy(self, step: int, accuracy: float) -> 'RunStatistics':
    """Returns the statistics after an evaluation; the first is before RL."""
    before = self.accuracy_before
    return dataclasses.replace(
      self,
      evaluated_step=step,
      accuracy_after=accuracy,
      accuracy_before=accuracy if before is None else before,
    )


class Stopwatch:
  """Seconds by name, for `time/*`, and the compilations meanwhile.

  Attributes:
    seconds: by metric name, of the laps so far.
  """

  def __init__(self, clock: Callable[[], float]) -> None:
    self._clock = clock
    self._begin = self._last = clock()
    self._compiled = executables.compile_totals()
    self.seconds: dict[str, float] = {}

  def elapsed(self) -> float:
    """Returns seconds since the start."""
    return self._clock() - self._begin

  def compiled(self) -> tuple[int, float]:
    """Returns (compilations, seconds spent on them) since the start."""
    count, seconds = executables.compile_totals()
    return count - self._compiled[0], seconds - self._compiled[1]

  def lap(self, name: str) -> None:
    """Books the time since the last lap; adds to what the name has."""
    now = self._clock()
    name = f'time/{name}'
    self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
    self._last = now
