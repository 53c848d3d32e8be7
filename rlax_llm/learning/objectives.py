"""Losses by name, and what is done about tokens of another policy.

All are functions of (algorithm, tokens) on the rows of one microbatch. To add
a loss, write it in `ops/losses.py`, enter it in `LOSSES` and name it in a
preset.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlax_llm.config.algorithm import Algorithm
from rlax_llm.ops import coverage
from rlax_llm.ops import importance
from rlax_llm.ops import losses
from rlax_llm.ops import masking
from rlax_llm.ops.losses import TokenLoss
from rlax_llm.types import Array


class Tokens(NamedTuple):
  """What a loss is made of, by token; 0 where nothing is trained on."""

  logprobs: Array  # float32[R, L], nats, of the current policy
  old_logprobs: Array  # float32[R, L], nats, of the policy before the update
  # float32[R, L], nats, of the policy that sampled: `old_logprobs` itself
  # where the sample is on-policy.
  behaviour_logprobs: Array
  advantages: Array  # float32[R, L]
  mask: Array  # bool[R, L]: tokens that are trained on
  segments: Array  # int32[R, L], samples of a row; see `Batch`
  extra: Mapping[str, Array]  # of `Batch.extra`, what has a value by token


def _clipped(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  # By token where the range is adapted, else the preset's.
  clip = tokens.extra.get('clip')
  return losses.clipped_surrogate(
    tokens.logprobs,
    tokens.old_logprobs,
    tokens.advantages,
    clip_low=algorithm.clip_low if clip is None else clip,
    clip_high=algorithm.clip_high if clip is None else clip,
    dual_clip=algorithm.dual_clip or None,
  )


def _sequence_clipped(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  return losses.sequence_clipped_surrogate(
    tokens.logprobs,
    tokens.old_logprobs,
    tokens.advantages,
    tokens.mask,
    clip_low=algorithm.clip_low,
    clip_high=algorithm.clip_high,
    segments=tokens.segments,
  )


def _truncated(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  return losses.truncated_reinforce(
    tokens.logprobs,
    tokens.old_logprobs,
    tokens.advantages,
    ratio_high=1 + algorithm.clip_high,
  )


def _coverage(algorithm: Algorithm, tokens: Tokens) -> TokenLoss:
  """A sample's -A log(1 - (1 - p)^N), divided among its tokens."""
  whole = masking.sample_sum(tokens.mask, tokens.logprobs, tokens.segments)
  loss = tokens.advantages * coverage.coverage_loss(
    whole, samples=algorithm.coverage_samples
  )
  count = masking.sample_sum(tokens.mask, jnp.ones_like(whole), tokens.segments)
  ratio = losses.importance_ratio(tokens.logprobs, tokens.old_logprobs)
  return TokenLoss(
    loss / jnp.maximum(count, 1),
    jax.lax.stop_gradient(ratio),
    jnp.zeros(loss.shape, bool),
  )


def _plain(loss: Callable[[Array, Array, Array], TokenLoss]) -> 'Loss':
  """Returns a loss that reads nothing of the preset."""
  return lambda algorithm, t: loss(t.logprobs, t.old_logprobs, t.advantages)


Loss = Callable[[Algorithm, Tokens], TokenLoss]
LOSSES: dict[str, Loss] = {
  'clipped': _clipped,
  'sequence_clipped': _sequence_clipped,
  'truncated': _truncated,
  'coverage': _coverage,
  'soft_gated': _plain(losses.soft_gated_surrogate),
  'surrogate': _plain(losses.surrogate),
  'reinforce': _plain(losses.reinforce),
  'negative_log_likelihood': lambda algorithm, t: (
    losses.negative_log_likelihood(t.logprobs)
  ),
}


# ---- Tokens that another policy sampled --------------------------------------
def _weights(
  level: str, masked: bool, algorithm: Algorithm, tokens: Tokens
) -> Array:
  weights = importance.importance_weights(
    tokens.old_logprobs,
    tokens.behaviour_logprobs,
    tokens.mask,
    level=level,
    segments=tokens.segments,
  )
  if masked:
    return importance.zero_outside(
      weights, lower=algorithm.weight_low, upper=algorithm.weight_high
    )
  return importance.truncate(weights, upper=algorithm.weight_high)


# The measure's weight, pi_old / pi_behaviour: by token, or of the whole sample
# (their product or geometric mean); truncated at weight_high, or with `mask` 0
# outside of [weight_low, weight_high].
CORRECTIONS: dict[str, Callable[[Algorithm, Tokens], Array] | None] = {
  'none': None
}
CORRECTIONS |= {
  f'{level}{"_mask" * masked}': functools.partial(_weights, level, masked)
  for level in importance.LEVELS
  for masked in (False, True)
}


def _rejected(
  statistic: str, over: str, algorithm: Algorithm, tokens: Tokens
) -> Array:
  lower = algorithm.reject_low if statistic == 'k1' else None
  return importance.reject(
    tokens.old_logprobs,
    tokens.behaviour_logprobs,
    tokens.mask,
    statistic=statistic,
    over=over,
    upper=algorithm.reject_high,
    lower=lower,
    segments=tokens.segments,
  ).keep


def _stale_failures(algorithm: Algorithm, tokens: Tokens) -> Array:
  return importance.reject_stale_failures(
    jax.lax.stop_gradient(tokens.logprobs),
    tokens.behaviour_logprobs,
    tokens.advantages,
    tokens.mask,
    largest_gap=algorithm.reject_high,
    segments=tokens.segments,
  )


# Which tokens are kept; loss denominators count the others too.
REJECTIONS: dict[str, Callable[[Algorithm, Tokens], Array] | None] = {
  'none': None,
  'stale_failures': _stale_failures,
}
REJECTIONS |= {
  f'{over}_{statistic}': functools.partial(_rejected, statistic, over)
  for over in importance.OVER
  for statistic in importance.STATISTICS
}


class Corrected(NamedTuple):
  """A loss, and what was done about the policy that sampled."""

  token: TokenLoss
  weights: Array  # float32[R, L], constant; 0 where rejected or masked
  rejected: Array  # bool[R, L]


def token_loss(algorithm: Algorithm, tokens: Tokens) -> Corrected:
  """Returns the loss of a preset by token, corrected for its sampler.

  sg(w) [kept] l(pi, pi_old, A) with w = pi_old / pi_behaviour bounded as the
  preset says; decoupled PPO. On-policy w is exactly 1.

  Args:
    algorithm: static.
    tokens: of one microbatch.
  """
  token = LOSSES[algorithm.loss](algorithm, tokens)
  weights = tokens.mask.astype(jnp.float32)
  correct = CORRECTIONS[algorithm.correction]
  if correct is not None:
    weights = correct(algorithm, tokens)
  reject = REJECTIONS[algorithm.rejection]
  if reject is not None:
    weights = masking.select_masked(reject(algorithm, tokens), weights)
  if correct is not None or reject is not None:
    token = losses.weighted(token, weights)
  return Corrected(token, weights, tokens.mask & (weights == 0))
