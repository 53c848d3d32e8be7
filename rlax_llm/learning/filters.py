"""Which samples are trained on, and whom their rewards are from. Host side."""

from typing import Callable, NamedTuple, Sequence

import numpy as np

from rlax_llm import answer_text
from rlax_llm.ops import pseudo_labels


class Outcomes(NamedTuple):
  """What is known of the samples of a group, or of groups: [..., G]."""
  rewards: np.ndarray  # float32
  unscorable: np.ndarray  # bool: the verifier gave no reward
  finished: np.ndarray  # bool: emitted EOS
  rehearsed: np.ndarray  # bool: of a problem that the initial policy solved


def _signal(outcomes: Outcomes) -> np.ndarray:
  """Groups whose rewards differ; DAPO, https://arxiv.org/abs/2503.14476."""
  differ = np.ptp(outcomes.rewards, axis=-1, keepdims=True) > 0
  return np.broadcast_to(differ, outcomes.rewards.shape)


# Samples that a filter drops are out of the loss and of its denominators.
FILTERS: dict[str, Callable[[Outcomes], np.ndarray]] = {
    'none': lambda outcomes: np.ones(outcomes.rewards.shape, bool),
    'scorable': lambda outcomes: ~outcomes.unscorable,
    'signal': _signal,
    'finished': lambda outcomes: outcomes.finished,
    'unrehearsed': lambda outcomes: ~outcomes.rehearsed,
}


def canonical(answer: str | None) -> str | None:
  """Returns an answer in the form that votes are counted in; None: no answer.

  Equal numbers are one vote, and so are texts that differ in capitals and in
  whitespace between other characters than those of words and numbers: see
  `answer_text.canonical`.

  Args:
    answer: what a completion gives as its answer.
  """
  return None if answer is None else answer_text.canonical(answer) or None


def _majority(answers: Sequence[str | None], rewards: np.ndarray) -> np.ndarray:
  del rewards
  return np.array(
      pseudo_labels.majority_rewards([canonical(a) for a in answers]),
      np.float32)


# (answers of a group of G samples, the verifier's rewards) -> float32[G].
LABELS: dict[str, Callable[[Sequence[str | None], np.ndarray], np.ndarray]] = {
    'verifier': lambda answers, rewards: rewards,
    'majority': _majority,
}
