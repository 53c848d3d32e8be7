"""Returns, generalised advantages and the value loss, by token.

A row may hold several samples; nothing flows between them. Entries behind the
mask (prompts, observations, padding) are skipped: the successor of a token is
the next masked token of its sample, so a gap costs neither discount nor trace.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlax_llm.ops import masking
from rlax_llm.types import Array


class Advantages(NamedTuple):
  """What a critic is trained towards, and what a policy is trained with."""

  advantages: Array  # float[..., L]
  returns: Array  # float[..., L], before any whitening


class ValueLoss(NamedTuple):
  """The loss of a critic, by token."""

  loss: Array  # float[...]
  clipped: Array  # bool[...]: the clipped branch was the larger one


def generalised_advantages(
  rewards: Array,
  values: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  segments: Array | None = None,
) -> Advantages:
  """Returns A_t = sum_k (discount * trace)^k delta_{t+k}, and A_t + V_t.

  With delta_t = r_t + discount V_{t+1} - V_t and V = 0 after the last token,
  truncated samples included. "High-Dimensional Continuous Control Using
  Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438.

  Args:
    rewards: float[..., L].
    values: float[..., L], of the state before each token.
    mask: bool[..., L]; the others are arbitrary where it is False.
    discount: gamma, static.
    trace: lambda, static. Below 1 a long answer's reward never reaches its
      first tokens.
    segments: int[..., L] as in `Batch`; None: a row is one sample.

  Returns:
    Constants (no gradient flows into them); 0 where the mask is False.
  """
  chex.assert_equal_shape([rewards, values, mask])
  rewards = masking.select_masked(mask, rewards)
  values = jax.lax.stop_gradient(masking.select_masked(mask, values))
  if segments is None:
    segments = jnp.ones(mask.shape, jnp.int32)

  def back(carry: tuple, token: tuple) -> tuple:
    segment, value, advantage = carry
    here, reward, own, valid = token
    same = segment == here
    value = jnp.where(same, value, 0)
    advantage = jnp.where(same, advantage, 0)
    new = reward + discount * (value + trace * advantage) - own
    advantage = jnp.where(valid, new, advantage)
    return (here, jnp.where(valid, own, value), advantage), advantage

  move = lambda x: jnp.moveaxis(x, -1, 0)
  nothing = jnp.zeros_like(rewards[..., 0])
  start = (jnp.zeros_like(segments[..., 0]), nothing, nothing)
  tokens = (move(segments), move(rewards), move(values), move(mask))
  scanned: Array = jax.lax.scan(back, start, tokens, reverse=True)[1]
  advantages = masking.select_masked(mask, jnp.moveaxis(scanned, 0, -1))
  return Advantages(advantages, advantages + values)


def returns_to_go(
  rewards: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  segments: Array | None = None,
) -> Array:
  """Returns R_t = r_t + discount R_{t+1} over masked tokens, else 0.

  Args:
    rewards: float[..., L].
    mask: bool[..., L].
    discount: gamma, static.
    segments: int[..., L] as in `Batch`; None: a row is one sample.
  """
  return generalised_advantages(
    rewards, jnp.zeros_like(rewards), mask, discount=discount, segments=segments
  ).returns


def value_loss(
  values: Array, old_values: Array, returns: Array, *, clip: float | None = None
) -> ValueLoss:
  """Returns max((V - R)^2, (clip(V, V_old +- c) - R)^2) / 2.

  As in PPO's code, https://arxiv.org/abs/1707.06347: beyond the range the
  critic learns only where clipping would lower its loss.

  Args:
    values: float[...], of the current critic.
    old_values: float[...], constants: of the critic before the update.
    returns: float[...], constants, never whitened.
    clip: c, static; None gives (V - R)^2 / 2.
  """
  chex.assert_equal_shape([values, old_values, returns])
  free = jnp.square(values - returns)
  if clip is None:
    return ValueLoss(free / 2, jnp.zeros(free.shape, bool))
  near = jnp.clip(values, old_values - clip, old_values + clip)
  held = jnp.square(near - returns)
  return ValueLoss(jnp.maximum(free, held) / 2, held > free)


def agent_advantages(
  rewards: Array,
  values: Array,
  bootstrap: Array,
  alive: Array,
  *,
  discount: float = 0.99,
  trace: float = 0.95,
) -> Advantages:
  """Returns generalised advantages over agents that act one after another.

  The successor of an agent is the next agent of the same step, that of the
  last agent the first of the next step; every hop costs discount and trace.
  MARFT, "Multi-Agent Reinforcement Fine-Tuning",
  https://arxiv.org/abs/2504.16129, at the level of actions (messages).

  Args:
    rewards: float[T, N], of T steps and N agents.
    values: float[T, N].
    bootstrap: float[], the value after the last step.
    alive: bool[T + 1, N]: whether the episode reached that state.
    discount: gamma, static.
    trace: lambda, static.

  Returns:
    Advantages of [T, N], constants.
  """
  chex.assert_equal_shape([rewards, values, alive[:-1]])
  hops = rewards.size
  reached = alive.reshape(-1)[1 : hops + 1].astype(rewards.dtype)
  flat = jax.lax.stop_gradient(values).reshape(-1)
  successors = jnp.append(flat[1:], bootstrap)
  deltas = rewards.reshape(-1) + discount * successors * reached - flat

  def back(advantage: Array, hop: tuple) -> tuple:
    delta, reached = hop
    advantage = delta + discount * trace * reached * advantage
    return advantage, advantage

  scanned: Array = jax.lax.scan(
    back, jnp.zeros_like(flat[0]), (deltas, reached), reverse=True
  )[1]
  advantages = scanned.reshape(rewards.shape)
  return Advantages(advantages, advantages + values)
