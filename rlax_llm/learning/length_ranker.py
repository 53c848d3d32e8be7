"""Which prompts get long answers: their history, or a ranker of prompts.

Host side, numpy. The predictions of a step come from what earlier steps were
trained on, so they are training values.
"""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

_BUCKETS = 64  # features: hashed tokens
_RATE = 0.1  # of the ranker's steps
_SHRINKAGE = 2.0  # rollouts that the prediction for an unseen prompt counts for
KEPT_PROMPTS = 1 << 16
# Of a prompt's key: 2^16 prompts share one with a probability of 1e-29. As a
# text its length is no multiple of 8, unlike that of tokens in hexadecimal.
_KEY_BYTES, _KEY_LENGTH = 16, 22


def list_mle(scores: np.ndarray) -> tuple[float, np.ndarray]:
  """Returns the ListMLE loss of items sorted by rank, and its gradient.

    L = sum_i [log sum_{j >= i} exp(s_j) - s_i] / n

  "Efficient LLM Scheduling by Learning to Rank",
  https://arxiv.org/abs/2408.15792.

  Args:
    scores: float64[n], of the item that should be first, second, ...

  Returns:
    (loss in nats, float64[n]).
  """
  exps = np.exp(scores - scores.max())
  tails = np.cumsum(exps[::-1])[::-1]
  count = len(scores)
  loss = np.mean(np.log(tails) + scores.max() - scores)
  return float(loss), (exps * np.cumsum(1 / tails) - 1) / count


def features(prompt: np.ndarray) -> np.ndarray:
  """Returns float64[_BUCKETS + 1]: hashed token counts, and the length.

  Args:
    prompt: int32[length].
  """
  counts = np.bincount(prompt % _BUCKETS, minlength=_BUCKETS)
  return np.r_[counts / np.sqrt(len(prompt)), np.log(len(prompt))]


@dataclasses.dataclass(frozen=True)
class LengthHistory:
  """What is known of answers' lengths; JSON-able. `observe` returns the next.

  Attributes:
    prompts: by prompt, (rollouts, sum of log lengths), fading.
    weights: of the ranker, by feature.
    squares: sums of its squared gradients (Adagrad).
    line: sums of (1, s, y, s s, s y) over groups, fading: log length y by the
      ranker's score s.
  """

  prompts: Mapping[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )
  weights: tuple[float, ...] = (0.0,) * (_BUCKETS + 1)
  squares: tuple[float, ...] = (0.0,) * (_BUCKETS + 1)
  line: tuple[float, ...] = (0.0,) * 5

  def predict(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns float64[n], log lengths to be expected.

    A prompt's own rollouts, shrunken towards what the ranker says of prompts
    like it: (sum log L + kappa mu) / (m + kappa).

    Args:
      prompts: n of them, int32[length].
    """
    guesses = self._line(self._scores(prompts))
    found = []
    for prompt, guess in zip(prompts, guesses):
      count, total = self.prompts.get(prompt_key(prompt), (0.0, 0.0))
      found.append((total + _SHRINKAGE * guess) / (count + _SHRINKAGE))
    return np.array(found)

  def observe(
    self,
    prompts: Sequence[np.ndarray],
    lengths: Sequence[np.ndarray],
    *,
    keep: float,
  ) -> 'LengthHistory':
    """Returns the history with the groups of a step.

    Args:
      prompts: n of them.
      lengths: of the rollouts of each, tokens.
      keep: the weight of what was known of a prompt.
    """
    logs = [np.log(np.maximum(x, 1)) for x in lengths]
    means = np.array([x.mean() for x in logs])
    known = dict(self.prompts)
    for prompt, x in zip(prompts, logs):
      count, total = known.pop(prompt_key(prompt), (0.0, 0.0))
      known[prompt_key(prompt)] = (
        keep * count + len(x),
        keep * total + float(x.sum()),
      )
    for key in list(known)[:-KEPT_PROMPTS]:
      del known[key]
    scores = self._scores(prompts)
    order = np.argsort(-means, kind='stable')
    _, slope = list_mle(scores[order])
    gradient = slope @ np.stack([features(prompts[i]) for i in order])
    squares = np.array(self.squares) + gradient**2
    step = _RATE * gradient / np.sqrt(squares + 1e-12)
    moments = [np.ones_like(means), scores, means, scores**2, scores * means]
    line = 0.9 * np.array(self.line) + np.sum(moments, axis=1)
    return LengthHistory(
      known,
      tuple((np.array(self.weights) - step).tolist()),
      tuple(squares.tolist()),
      tuple(line.tolist()),
    )

  def dump(self) -> dict[str, Any]:
    """Returns it as JSON can hold it."""
    return dataclasses.asdict(self)

  @classmethod
  def restore(cls, record: Mapping[str, Any]) -> 'LengthHistory':
    """Undoes `dump`."""
    return cls(
      {k: (v[0], v[1]) for k, v in restored_keys(record['prompts']).items()},
      *(tuple(record[name]) for name in ('weights', 'squares', 'line')),
    )

  def _scores(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([features(p) for p in prompts]) @ np.array(self.weights)

  def _line(self, scores: np.ndarray) -> np.ndarray:
    """Returns the log lengths that go with scores."""
    count, s, y, ss, sy = self.line
    if not count:
      return np.zeros_like(scores)
    variance = ss / count - (s / count) ** 2
    slope = (sy / count - s * y / count**2) / (variance + 1e-3)
    return y / count + max(slope, 0.0) * (scores - s / count)


def prompt_key(prompt: np.ndarray) -> str:
  """Returns a text that stands for a prompt, int32[length], in JSON.

  A digest of the tokens, 22 characters for a prompt of any length.
  """
  return _key_of(np.asarray(prompt, '<i4').tobytes())


def restored_keys(known: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a history by prompt as it was dumped, in today's keys.

  Earlier versions wrote the tokens themselves, 8 hexadecimal digits each.

  Args:
    known: by key, of either kind.
  """
  return {
    key if len(key) == _KEY_LENGTH else _key_of(bytes.fromhex(key)): value
    for key, value in known.items()
  }


def _key_of(tokens: bytes) -> str:
  digest = hashlib.blake2b(tokens, digest_size=_KEY_BYTES).digest()
  return base64.urlsafe_b64encode(digest).decode().rstrip('=')


def kendall_tau(predicted: np.ndarray, actual: np.ndarray) -> float:
  """Returns Kendall's tau-b: agreement of two orders, in [-1, 1]; 0 for none.

    tau = (concordant - discordant) / sqrt(pairs untied in one * in the other)

  Args:
    predicted: float[n].
    actual: float[n].
  """
  one = np.sign(predicted[:, None] - predicted[None])
  two = np.sign(actual[:, None] - actual[None])
  untied = np.sqrt(np.sum(one**2) * np.sum(two**2))
  return float(np.sum(one * two) / untied) if untied else 0.0
