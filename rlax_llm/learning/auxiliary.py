"""Training of the drafter: regression to the target, in hidden states and law.

The loss of TLT's spot trainer ("Taming the Long Tail: Efficient Reasoning RL
Training with Adaptive Drafter", https://arxiv.org/abs/2511.16665), as EAGLE's
(https://arxiv.org/abs/2401.15077): on the tokens of responses

  L = 0.5 SmoothL1(h', h) + 0.5 CE(softmax(W h), softmax(W h'))

with the target's hidden state h, its head W, and the drafter's estimate h'. The
target is frozen here.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlax_llm.models.draft_model import DraftModel
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.models.language_model import map_chunks
from rlax_llm.ops.masking import select_masked
from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import Params
from rlax_llm.types import TrainState


@dataclasses.dataclass(frozen=True)
class DraftLearning:
  """The static facts of an update of the drafter."""

  model: LanguageModel
  draft_model: DraftModel
  optimizer: optax.GradientTransformation
  chunk: int  # positions whose logits exist at one time
  passes: int = 1


class DraftWindow(flax.struct.PyTreeNode):
  """Packed rows to learn from; as in `Batch`."""

  tokens: Array  # int32[R, L]
  positions: Array  # int32[R, L]
  segments: Array  # int32[R, L]
  targets: Array  # bool[R, L]: tokens of responses


def init_drafter(key: Array, learning: DraftLearning) -> TrainState:
  """Returns a fresh drafter."""
  params = learning.draft_model.init(key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=learning.optimizer.init(params),
  )


def _features(hidden: Array, segments: Array) -> Array:
  """Returns [R, L, D]: the hidden state before each token; 0 at the first."""
  before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  same = segments[:, 1:] == segments[:, :-1]
  same = jnp.pad(same, ((0, 0), (1, 0)))
  return jnp.where(same[..., None], before, 0)


def drafter_loss(
  own: Params,
  policy: Params,
  hidden: Array,
  window: DraftWindow,
  learning: DraftLearning,
) -> Array:
  """Returns the mean loss per token of the responses.

  With several passes each of them reads the estimates of the one before in
  place of the target's hidden states, as drafts of several tokens do ("Learning
  Harmonized Representations for Speculative Sampling",
  https://arxiv.org/abs/2408.15766).

  Args:
    own: the drafter's parameters.
    policy: the target's.
    hidden: [R, L, D], the target's hidden states of the window.
    window: packed rows.
    learning: static.
  """
  params = DraftParams(policy, own)
  segments = window.segments
  # A position counts if the token after it is one of the response.
  counts = window.targets[:, 1:] & (segments[:, 1:] == segments[:, :-1])
  counts = jnp.pad(counts, ((0, 0), (0, 1)))

  def cross_entropy(policy: Params, hidden: Array, estimate: Array) -> Array:
    logits = lambda x: learning.model.logits(policy, x)
    target = jax.nn.softmax(logits(hidden))
    return -jnp.sum(target * jax.nn.log_softmax(logits(estimate)), axis=-1)

  total = jnp.zeros(())
  known = hidden
  for _ in range(learning.passes):
    estimate = learning.draft_model.hidden(
      params,
      window.tokens,
      _features(known, segments),
      window.positions,
      segments,
    )
    gap = estimate.astype(jnp.float32) - hidden.astype(jnp.float32)
    distance = jnp.mean(optax.losses.huber_loss(gap), axis=-1)
    entropy = map_chunks(
      cross_entropy, policy, (hidden, estimate), chunk=learning.chunk
    )
    loss = 0.5 * distance + 0.5 * entropy
    total = total + jnp.sum(select_masked(counts, loss))
    known = jax.lax.stop_gradient(estimate)
  number = jnp.sum(counts, dtype=jnp.float32) * learning.passes
  return total / jnp.maximum(number, 1.0)


def update_drafter(
  state: TrainState,
  policy: Params,
  window: DraftWindow,
  *,
  learning: DraftLearning,
) -> tuple[TrainState, Array]:
  """Takes one optimizer step.

  The target's hidden states are computed here, under its newest parameters.

  Args:
    state: the drafter's; donated by the caller.
    policy: the target's parameters.
    window: packed rows.
    learning: static.

  Returns:
    (state, the loss).
  """
  hidden = learning.model.hidden(
    policy, window.tokens, window.positions, window.segments
  )
  loss, gradient = jax.value_and_grad(drafter_loss)(
    state.params, policy, hidden, window, learning
  )
  changes, opt_state = learning.optimizer.update(
    gradient, state.opt_state, state.params
  )
  return TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, changes),
    opt_state=opt_state,
  ), loss
