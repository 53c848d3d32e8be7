"""How many samples a prompt gets, by what its last group came to.

Host side. The counts of a step are decided from what earlier steps sampled, so
they are training values, and independent of the samples that they count: the
gradient of a group stays the policy's.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from rlax_llm.learning.length_ranker import KEPT_PROMPTS
from rlax_llm.learning.length_ranker import prompt_key
from rlax_llm.learning.length_ranker import restored_keys


@dataclasses.dataclass(frozen=True)
class SuccessHistory:
  """What is known of prompts' successes; JSON-able. `observe` returns the next.

  Attributes:
    accuracies: by prompt, the mean correctness in [0, 1] of the last group of
      which anything is known.
  """

  accuracies: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def accuracy(self, prompt: np.ndarray) -> float | None:
    """Returns the accuracy of a prompt; None: it was never sampled.

    Args:
      prompt: int32[length].
    """
    return self.accuracies.get(prompt_key(prompt))

  def observe(
    self, prompts: Sequence[np.ndarray], accuracies: Sequence[float]
  ) -> 'SuccessHistory':
    """Returns the history with the groups of a step, in order.

    Args:
      prompts: n of them.
      accuracies: of the group of each.
    """
    known = dict(self.accuracies)
    for prompt, accuracy in zip(prompts, accuracies):
      known.pop(prompt_key(prompt), None)
      known[prompt_key(prompt)] = accuracy
    for key in list(known)[:-KEPT_PROMPTS]:
      del known[key]
    return SuccessHistory(known)

  def dump(self) -> dict[str, Any]:
    """Returns it as JSON can hold it."""
    return dataclasses.asdict(self)

  @classmethod
  def restore(cls, record: Mapping[str, Any]) -> 'SuccessHistory':
    """Undoes `dump`."""
    return cls(restored_keys(record['accuracies']))
