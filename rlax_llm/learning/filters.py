"""Which samples are trained on, and whom their rewards are from. Host side."""

from typing import Callable, NamedTuple, Sequence

import numpy as np

from rlax_llm import answer_text
from rlax_llm.ops import pseudo_labels


class Outcomes(NamedTuple):
  """The outcomes of the samples of a group, or of groups: [..., G]."""
  correctness: np.ndarray  # float32
  known: np.ndarray  # bool: whether reward and correctness are known
  finished: np.ndarray  # bool: emitted EOS
  rehearsed: np.ndarray  # bool: of a problem that the initial policy solved


def has_signal(correctness: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Returns bool[...]: whether the known correctness of a group differs.

  Dynamic sampling of DAPO, https://arxiv.org/abs/2503.14476.

  Args:
    correctness: float32[..., G], arbitrary where it is not known.
    known: bool[..., G].
  """
  most = np.where(known, correctness, -np.inf).max(axis=-1)
  return most > np.where(known, correctness, np.inf).min(axis=-1)


def _signal(outcomes: Outcomes) -> np.ndarray:
  found = has_signal(outcomes.correctness, outcomes.known)
  return np.broadcast_to(found[..., None], outcomes.known.shape)


# Samples that a filter drops are out of the loss and of its denominators.
# Those whose reward is missing are out in any case; see `trained_samples` in
# `credit.py`.
FILTERS: dict[str, Callable[[Outcomes], np.ndarray]] = {
    'none': lambda outcomes: np.ones(outcomes.known.shape, bool),
    'signal': _signal,
    'finished': lambda outcomes: outcomes.finished,
    'unrehearsed': lambda outcomes: ~outcomes.rehearsed,
}


def canonical(answer: str | None) -> str | None:
  """Returns an answer in the form that votes are counted in; None: no answer.

  Equal numbers count as one vote. So do texts that differ only in case, or in
  whitespace that does not separate two words or numbers: see
  `answer_text.canonical`.

  Args:
    answer: what a completion gives as its answer.
  """
  return None if answer is None else answer_text.canonical(answer) or None


def _majority(answers: Sequence[str | None], rewards: np.ndarray) -> np.ndarray:
  del rewards
  votes = answer_text.with_units([canonical(a) for a in answers])
  return np.array(pseudo_labels.majority_rewards(votes), np.float32)


# (answers of a group of G samples, the verifier's rewards) -> float32[G].
LABELS: dict[str, Callable[[Sequence[str | None], np.ndarray], np.ndarray]] = {
    'verifier': lambda answers, rewards: rewards,
    'majority': _majority,
}
