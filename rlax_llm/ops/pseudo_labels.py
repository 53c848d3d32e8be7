"""Labels from the policy's own answers. Host side."""

import collections
from collections.abc import Hashable
from collections.abc import Sequence
from typing import NamedTuple


class Vote(NamedTuple):
  """The answer that most samples gave."""

  answer: Hashable | None  # None: no sample had an answer
  share: float  # of all samples, those without an answer included


def majority_vote(answers: Sequence[Hashable | None]) -> Vote:
  """Returns the most common answer; ties go to the one seen first.

  TTRL, "Test-Time Reinforcement Learning",
  https://arxiv.org/abs/2504.16084; of k answers this is also maj@k.

  Args:
    answers: in canonical form, in the order sampled; None: none was found.
  """
  counts = collections.Counter(a for a in answers if a is not None)
  if not counts:
    return Vote(None, 0.0)
  answer, count = counts.most_common(1)[0]
  return Vote(answer, count / len(answers))


def majority_rewards(answers: Sequence[Hashable | None]) -> list[float]:
  """Returns 1 for the answers that agree with the majority, else 0.

  Args:
    answers: as in `majority_vote`. Without any answer all rewards are 0.
  """
  majority = majority_vote(answers).answer
  return [float(a is not None and a == majority) for a in answers]
