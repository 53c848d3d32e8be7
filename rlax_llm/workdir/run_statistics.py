"""What a run accumulates besides its parameters, and where its time goes."""

from collections.abc import Callable
import dataclasses
import hashlib
import math

import numpy as np

from rlax_llm.types import Rollout


@dataclasses.dataclass
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

  def add_tokens(self, rollouts: list[Rollout]) -> None:
    digest = hashlib.sha256(self.tokens_sha256.encode())
    for rollout in rollouts:
      digest.update(np.int32(rollout.length).tobytes())
      digest.update(rollout.tokens.astype('<i4').tobytes())
    self.tokens_sha256 = digest.hexdigest()
    self.tokens_sampled += sum(r.length for r in rollouts)

  def add_reward(self, mean: float) -> None:
    """Notes the mean reward of a step; NaN, of no reward, as None.

    The first is that of the first step with a reward.
    """
    self.reward_last = None if math.isnan(mean) else mean
    if self.reward_first is None:
      self.reward_first = self.reward_last

  def add_accuracy(self, step: int, accuracy: float) -> None:
    """Notes the held-out accuracy after a step; the first is before RL."""
    self.evaluated_step = step
    self.accuracy_after = accuracy
    if self.accuracy_before is None:
      self.accuracy_before = accuracy


class Stopwatch:
  """Seconds by name, for `time/*`."""

  def __init__(self, clock: Callable[[], float]) -> None:
    self._clock = clock
    self._last = clock()
    self.seconds: dict[str, float] = {}

  def lap(self, name: str) -> None:
    """Books the time since the last lap; adds to what the name has."""
    now = self._clock()
    name = f'time/{name}'
    self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
    self._last = now
