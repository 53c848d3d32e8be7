"""Unbiased accuracy statistics of repeated samples."""

import math


def pass_at_k(samples: int, correct: int, k: int) -> float:
  """Returns 1 - C(n - c, k) / C(n, k): the chance that k of n hold a success.

  Unbiased, unlike 1 - (1 - c / n)^k. "Evaluating Large Language Models
  Trained on Code", https://arxiv.org/abs/2107.03374.

  Args:
    samples: n.
    correct: c, of the n.
    k: at most n.

  Raises:
    ValueError: if k is not in [1, n].
  """
  if not 1 <= k <= samples:
    raise ValueError(f'pass@{k} needs 1 <= k <= {samples} samples')
  return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
