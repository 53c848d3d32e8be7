"""What is done with the entropy of the policy: penalties, masks, shaping.

The entropy itself is `sampling.entropy`, in nats, by token.
"""

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import batch_advantages
from rlax_llm.ops import masking
from rlax_llm.types import Array


def shaped_advantages(
  advantages: Array,
  entropy: Array,
  confidence: Array,
  mask: Array,
  *,
  entropy_weight: float = 1.0,
  confidence_weight: float = 1.0,
  largest: float = 2.0,
  strength: float = 0.1,
) -> Array:
  """Returns A (1 + strength S): uncertain tokens are credited more.

  S = clip(a z(H) + b z(1 - C), +-largest), z whitening over the batch's
  tokens. ECHO, https://arxiv.org/abs/2602.02150.

  Args:
    advantages: float[...].
    entropy: float[...], H, nats.
    confidence: float[...], C in [0, 1], as the mean probability of the five
      likeliest tokens.
    mask: bool[...]; the others are arbitrary where it is False.
    entropy_weight: a, static.
    confidence_weight: b, static.
    largest: static.
    strength: static.

  Returns:
    float[...], constant, 0 where the mask is False.
  """
  chex.assert_equal_shape([advantages, entropy, confidence, mask])
  score = entropy_weight * batch_advantages.whiten(
    entropy, mask
  ) + confidence_weight * batch_advantages.whiten(1 - confidence, mask)
  score = jax.lax.stop_gradient(jnp.clip(score, -largest, largest))
  return masking.select_masked(mask, advantages * (1 + strength * score))


def tail_confidence(
  confidence: Array,
  mask: Array,
  *,
  window: int = 16,
  segments: Array | None = None,
) -> Array:
  """Returns at each position the mean over its sample's last tokens.

  Args:
    confidence: float[..., L], arbitrary where the mask is False.
    mask: bool[..., L].
    window: tokens, static; a shorter sample is averaged whole.
    segments: int[..., L] as in `Batch`; None: a row is one sample.
  """
  tail = mask & (masking.tokens_left(mask, segments) <= window)
  return masking.sample_mean(tail, confidence, segments)


def confidence_clip(
  tail: Array, *, least: float = 0.05, most: float = 0.2, steepness: float = 4.0
) -> Array:
  """Returns least + (most - least) sigmoid(steepness (1 - tail)).

  ECHO's clip range, https://arxiv.org/abs/2602.02150, for both sides of
  `losses.clipped_surrogate`: the surer the end of an answer, the tighter. As
  the argument is at least 0, the range starts at the middle of [least, most].

  Args:
    tail: float[...], `tail_confidence`, in [0, 1].
    least: static.
    most: static.
    steepness: static.
  """
  return least + (most - least) * jax.nn.sigmoid(steepness * (1 - tail))
