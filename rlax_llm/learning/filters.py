"""Which samples of a group are trained on. Host side."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


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
# `experience/advantages.py`.
FILTERS: dict[str, Callable[[Outcomes], np.ndarray]] = {
  'none': lambda outcomes: np.ones(outcomes.known.shape, bool),
  'signal': _signal,
  'finished': lambda outcomes: outcomes.finished,
  'unrehearsed': lambda outcomes: ~outcomes.rehearsed,
}

# Values of `algorithm.labels`; `experience.labels` implements them.
LABELS = ('verifier', 'majority')
