"""Who of a group goes on: survival probabilities, and the draw. Host side.

ARRoL, "Prune as You Generate: Online Rollout Pruning for Faster and Better
RLVR", https://arxiv.org/abs/2603.24840; the formulas are not published there,
these are our own.
"""

import numpy as np

_ITERATIONS = 50  # of a bisection, to 1e-12
_SLOPE = 1e3  # of survival by probability of success, at most


def survival_probabilities(
  success: np.ndarray, *, keep: float, share: float, least: float
) -> np.ndarray:
  """Returns the probability with which each sample goes on.

  The closest to uniform that keeps `keep n` samples, of which a share succeeds
  as is wanted, in expectation:

    min sum (s_i - K)^2  with  sum s_i = K n,  sum s_i p_i = rho K n,
    least <= s_i <= 1,

  which is a clipped line in p: s_i = clip(K + a + b (p_i - mean p), least, 1).
  Where the share is out of reach, b ends at its bound: all of the rare kind
  are kept, and the rest as evenly as may be.

  Args:
    success: float[n], in [0, 1].
    keep: K, in (0, 1].
    share: rho, of the samples that go on.
    least: smallest probability, below K.

  Returns:
    float64[n], of sum K n.
  """
  centred = success - np.mean(success)
  count = keep * len(success)

  def line(slope: float) -> np.ndarray:
    low, high = -1.0 - slope, 1.0 + slope
    low, high = min(low, high), max(low, high)
    for _ in range(_ITERATIONS):
      middle = (low + high) / 2
      found = np.clip(keep + middle + slope * centred, least, 1)
      low, high = (middle, high) if found.sum() < count else (low, middle)
    return np.clip(keep + high + slope * centred, least, 1)

  low, high = -_SLOPE, _SLOPE
  for _ in range(_ITERATIONS):
    middle = (low + high) / 2
    enough = np.sum(line(middle) * success) >= share * count
    low, high = (low, middle) if enough else (middle, high)
  return line((low + high) / 2)


def draw_survivors(probabilities: np.ndarray, place: float) -> np.ndarray:
  """Returns bool[n]: a systematic sample, of fixed size.

  Sample i is taken if a point of {place + 0, 1, 2, ...} falls into its piece
  of the line on which the probabilities lie end to end, so that each is taken
  with its probability and their number is the sum of all.

  Args:
    probabilities: float64[n], of integer sum.
    place: in [0, 1), uniform.
  """
  total = round(float(np.sum(probabilities)))
  ends = np.cumsum(probabilities) * (total / np.sum(probabilities))
  ends[-1] = total  # rounding must not lose the last one
  points = np.floor(ends - place)
  return np.diff(points, prepend=np.floor(-place)) > 0
