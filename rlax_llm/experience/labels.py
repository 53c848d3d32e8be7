"""Where rewards come from: the verifier, or the votes of a group."""

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from rlax_llm.ops import pseudo_labels
from rlax_llm.tasks import answer_text


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
