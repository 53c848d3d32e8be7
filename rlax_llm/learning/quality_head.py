"""A head that predicts the success of a sample from its first tokens.

It reads the policy's hidden states at a logical position, from a pass of fixed
shape. Success is correctness in [0, 1], not the weighted reward. The head
learns from the samples that were not pruned and whose correctness is known,
each weighted by the inverse of its survival probability.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlax_llm.models.language_model import LanguageModel
from rlax_llm.types import Array
from rlax_llm.types import Params

_WIDTH = 64
_TAIL = 16  # hidden states are averaged over so many last tokens
_BINS = 10
_FORGET = 0.95  # of the bins' counts, by step
_STEPS, _RATE, _BETAS = 8, 1e-2, (0.9, 0.999)  # Adam


def pack_beginnings(
  prompts: Sequence[np.ndarray],
  beginnings: Sequence[np.ndarray],
  *,
  length: int,
  rows: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens int32[M, R, L], spans int32[M, R, 2]), a sample a row.

  Args:
    prompts: n of them, int32[p].
    beginnings: the first tokens of each sample's completion.
    length: L, which holds the longest of both together.
    rows: R. M is a power of two, so that few shapes occur.
  """
  count = max(1, -(-len(prompts) // rows))
  count = 1 << (count - 1).bit_length()
  tokens = np.zeros((count * rows, length), np.int32)
  spans = np.zeros((count * rows, 2), np.int32)
  for row, (prompt, more) in enumerate(zip(prompts, beginnings)):
    end = len(prompt) + len(more)
    tokens[row, :end] = np.concatenate([prompt, more])
    spans[row] = max(len(prompt), end - _TAIL), end
  return tokens.reshape(count, rows, length), spans.reshape(count, rows, 2)


def features(
  params: Params, tokens: Array, spans: Array, *, model: LanguageModel
) -> Array:
  """Returns float32[M, R, D]: hidden states averaged over each row's span.

  Args:
    params: the policy's.
    tokens: int32[M, R, L].
    spans: int32[M, R, 2], first and behind the last token that counts.
    model: static.
  """
  order = jnp.arange(tokens.shape[2], dtype=jnp.int32)

  def one(part: tuple[Array, Array]) -> Array:
    tokens, spans = part
    segments = (order[None] < spans[:, 1:]).astype(jnp.int32)
    hidden = model.hidden(
      params, tokens, jnp.broadcast_to(order[None], tokens.shape), segments
    )
    inside = (order[None] >= spans[:, :1]) & (order[None] < spans[:, 1:])
    total = jnp.sum(
      jnp.where(inside[..., None], hidden, 0), axis=1, dtype=jnp.float32
    )
    return total / jnp.maximum(jnp.sum(inside, axis=1), 1)[:, None]

  return jax.lax.map(one, (tokens, spans))


@dataclasses.dataclass(frozen=True)
class QualityHead:
  """An MLP with its optimizer and calibration; JSON-able.

  Attributes:
    weights: float64 arrays by name; {} before the first sample.
    moments: of Adam, by name.
    steps: optimizer steps taken.
    counts: float64[2, bins]: failures and successes by the head's score,
      fading; Beta(1, 1) before.
  """

  weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  moments: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  steps: int = 0
  counts: np.ndarray = dataclasses.field(
    default_factory=lambda: np.ones((2, _BINS))
  )

  def success(self, inputs: np.ndarray) -> np.ndarray:
    """Returns float64[n]: probabilities of success, by calibrated bins.

    Args:
      inputs: float32[n, D], from `features`.
    """
    bins = self._bins(inputs)
    return (self.counts[1] / self.counts.sum(axis=0))[bins]

  def learn(
    self, inputs: np.ndarray, labels: np.ndarray, weights: np.ndarray, seed: int
  ) -> 'QualityHead':
    """Returns the head after a step's samples: calibrated, then trained.

    Args:
      inputs: float32[n, D].
      labels: float[n], successes in [0, 1].
      weights: float[n], inverse probabilities of having gone on.
      seed: of the first weights.
    """
    head = self if self.weights else _new(inputs.shape[1], seed)
    bins = head._bins(inputs)
    seen = np.zeros_like(head.counts)
    np.add.at(seen[0], bins, weights * (1 - labels))
    np.add.at(seen[1], bins, weights * labels)
    counts = 1 + _FORGET * (head.counts - 1) + seen
    values, moments = dict(head.weights), dict(head.moments)
    for step in range(head.steps + 1, head.steps + 1 + _STEPS):
      for name, slope in _gradients(values, inputs, labels, weights).items():
        for kind, power, beta in zip('mv', (1, 2), _BETAS):
          key = f'{kind}_{name}'
          moments[key] = beta * moments[key] + (1 - beta) * slope**power
        mean, square = (
          moments[f'{kind}_{name}'] / (1 - beta**step)
          for kind, beta in zip('mv', _BETAS)
        )
        values[name] = values[name] - _RATE * mean / (np.sqrt(square) + 1e-8)
    return QualityHead(values, moments, head.steps + _STEPS, counts)

  def loss(self, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean logistic loss, nats."""
    if not self.weights:
      return float(np.log(2))
    z = _forward(self.weights, inputs)[1]
    return float(np.mean(np.logaddexp(0, z) - labels * z))

  def _bins(self, inputs: np.ndarray) -> np.ndarray:
    if not self.weights:
      return np.full(len(inputs), _BINS // 2)
    score = _sigmoid(_forward(self.weights, inputs)[1])
    return np.minimum((score * _BINS).astype(int), _BINS - 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _new(size: int, seed: int) -> QualityHead:
  rng = np.random.default_rng([seed, size])
  weights = {
    'inner': rng.normal(size=(size, _WIDTH)) / np.sqrt(size),
    'inner_bias': np.zeros(_WIDTH),
    'outer': np.zeros(_WIDTH),
    'outer_bias': np.zeros(1),
  }
  moments = {
    f'{kind}_{name}': np.zeros_like(x)
    for kind in 'mv'
    for name, x in weights.items()
  }
  return QualityHead(weights, moments)


def _forward(
  weights: Mapping[str, np.ndarray], inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (inner layer, logits)."""
  inner = np.tanh(inputs @ weights['inner'] + weights['inner_bias'])
  return inner, inner @ weights['outer'] + weights['outer_bias'][0]


def _gradients(
  values: Mapping[str, np.ndarray],
  inputs: np.ndarray,
  labels: np.ndarray,
  weights: np.ndarray,
) -> dict[str, np.ndarray]:
  """Returns the gradient of the weighted mean logistic loss."""
  inner, z = _forward(values, inputs)
  slope = weights * (_sigmoid(z) - labels) / np.sum(weights)
  back = slope[:, None] * values['outer'][None] * (1 - inner**2)
  return {
    'inner': inputs.T @ back,
    'inner_bias': back.sum(axis=0),
    'outer': slope @ inner,
    'outer_bias': slope.sum(keepdims=True),
  }
