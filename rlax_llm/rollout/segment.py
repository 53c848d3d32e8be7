"""The jitted decode loop: draft -> extend -> verify -> commit.

Nothing here knows what a drafter or a policy is made of. W = 1 is plain
sampling by the same path.
"""

from typing import Any
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rlax_llm.drafting.drafter import Drafter
from rlax_llm.models import kv_cache
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.ops import verification
from rlax_llm.ops.sampling import Sampling
from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import DraftTree
from rlax_llm.types import Params
from rlax_llm.types import Path
from rlax_llm.types import Slots


class Limits(flax.struct.PyTreeNode):
  """When a segment ends, besides all rows being done or S being reached.

  Arrays, not static: other limits do not compile another executable.
  """

  forwards: Array  # int32: forwards spent
  done_rows: Array  # int32: this many of the counted rows are done
  counted: Array  # bool[N]: not a row that runs ahead of its step


class Counters(flax.struct.PyTreeNode):
  """Speed values of one segment."""

  forwards: Array  # int32
  row_forwards: Array  # int32: sum over forwards of the rows that decoded
  tokens: Array  # int32: tokens committed
  ahead_tokens: Array  # int32: committed by rows that do not count
  # int32[W]: by node, how often the token after it was committed. In a chain
  # node d is the one at depth d.
  accepted: Array


class SegmentConfig(NamedTuple):
  """The static facts of a segment."""

  sampling: Sampling
  eos_ids: tuple[int, ...]


class Draft(NamedTuple):
  """Draft trees of N rows and the geometry of their nodes."""

  tree: DraftTree
  node_mask: Array  # bool[N, W, W], or bool[W, W] where all rows share it
  depth: Array  # int32[N, W]: edges from the root


class Verification(NamedTuple):
  """Outcome of verification, before the limits of a row are applied."""

  log_law: Array  # float32[N, W, V]: the law of the token after each node
  path: Path  # N rows


def draft(
  params: DraftParams, state: Any, slots: Slots, *, drafter: Drafter
) -> tuple[Draft, Any]:
  """Proposes one tree per row.

  Args:
    params: the policy's and the drafter's.
    state: the drafter's.
    slots: N rows.
    drafter: static.

  Returns:
    (Draft, the drafter's state).
  """
  tree, state = drafter.propose(params, state, slots)
  ancestors = verification.ancestors
  # A chain's parents have no row axis: its mask is then a constant.
  if tree.parents.ndim == 2:
    ancestors = jax.vmap(ancestors)
  node_mask = ancestors(tree.parents)
  depth = verification.depths(node_mask)
  depth = jnp.broadcast_to(depth, tree.tokens.shape)
  return Draft(tree, node_mask, depth), state


def extend(
  params: Params, slots: Slots, proposal: Draft, *, model: LanguageModel
) -> tuple[Array, kv_cache.KVNodes]:
  """Runs the policy's forward over all nodes; the cache is only read.

  Args:
    params: the policy's.
    slots: N rows; every row that is not done has room for W tokens.
    proposal: node 0 of each tree is the row's last token.
    model: static.

  Returns:
    (hidden states [N, W, D], keys and values of the nodes).
  """
  return model.extend(
    params,
    proposal.tree.tokens,
    slots.length[:, None] - 1 + proposal.depth,
    proposal.node_mask,
    slots.cache,
  )


def verify(
  params: Params,
  slots: Slots,
  proposal: Draft,
  hidden: Array,
  *,
  model: LanguageModel,
  sampling: Sampling,
) -> Verification:
  """Samples the token after each node and follows it down the tree.

  Args:
    params: the policy's.
    slots: N rows.
    proposal: the trees.
    hidden: [N, W, D], from `extend`.
    model: static.
    sampling: static.

  Returns:
    Verification.
  """
  log_law = sampling_ops.log_law(model.logits(params, hidden), sampling)
  # The noise of a token belongs to its position in the completion: nodes of
  # one depth share it.
  start = (slots.length - slots.prompt_length)[:, None]
  position = start + proposal.depth
  race = jax.vmap(jax.vmap(sampling_ops.race, (None, 0, 0)))
  target = race(slots.key, position, log_law)
  parents_axis: Any = 0 if proposal.tree.parents.ndim == 2 else None
  axes: Any = DraftTree(**{'tokens': 0, 'parents': parents_axis})
  path = jax.vmap(verification.follow, (axes, 0))(proposal.tree, target)
  return Verification(log_law, path)


def commit(
  slots: Slots,
  nodes: kv_cache.KVNodes,
  outcome: Verification,
  *,
  eos_ids: tuple[int, ...],
) -> tuple[Slots, Path]:
  """Appends the verified tokens, up to the first EOS or the row's limit.

  Args:
    slots: N rows.
    nodes: keys and values, from `extend`.
    outcome: from `verify`.
    eos_ids: static.

  Returns:
    (the slots with the tokens appended, the committed Path of each row); its
    length is 0 for rows that were done.
  """
  path = outcome.path
  rows = jnp.arange(path.nodes.shape[0])[:, None]
  order = jnp.arange(path.nodes.shape[1])[None]
  room = slots.limit - slots.length
  kept = jnp.where(slots.done, 0, jnp.minimum(path.length, room))
  is_eos = jnp.isin(path.tokens, jnp.asarray(eos_ids, jnp.int32))
  is_eos = is_eos & (order < kept[:, None])
  has_eos = jnp.any(is_eos, axis=-1)
  kept = jnp.where(has_eos, jnp.argmax(is_eos, axis=-1) + 1, kept)
  kept = kept.astype(jnp.int32)
  committed = Path(nodes=path.nodes, tokens=path.tokens, length=kept)

  # Writes cover all W positions: entries beyond `length` hold no meaning, and
  # rows that are done may stand at the capacity, where writes are dropped.
  write = lambda old, new: old.at[rows, slots.length[:, None] + order].set(
    new, mode='drop', unique_indices=True, indices_are_sorted=True
  )
  logprobs = outcome.log_law[rows, path.nodes, path.tokens]
  length = slots.length + kept
  slots = slots.replace(
    text=write(slots.text, path.tokens),
    logprobs=write(slots.logprobs, logprobs),
    drafted=write(slots.drafted, order < path.length[:, None] - 1),
    length=length,
    forwards=slots.forwards + ~slots.done,
    finished=slots.finished | has_eos,
    done=slots.done | has_eos | (length >= slots.limit),
    cache=kv_cache.commit(slots.cache, nodes, committed),
  )
  return slots, committed


def count_nodes(path: Path, counted: Array) -> Array:
  """Returns int32[W]: how many of the counted rows reached each node.

  Args:
    path: of N rows.
    counted: bool[N].
  """
  node = jnp.arange(path.nodes.shape[1])
  kept = node[None] < jnp.where(counted, path.length, 0)[:, None]
  reached = (path.nodes[:, :, None] == node[None, None]) & kept[:, :, None]
  return jnp.sum(reached, axis=(0, 1), dtype=jnp.int32)


def segment(
  params: Params,
  slots: Slots,
  drafter_state: Any,
  limits: Limits,
  own: Params = (),
  *,
  model: LanguageModel,
  drafter: Drafter,
  config: SegmentConfig,
) -> tuple[Slots, Any, Counters]:
  """Decodes until the limits are reached: one `while_loop`, no host.

  A segment ends when every row is done, when `limits.forwards` forwards are
  spent, when `limits.done_rows` rows are done, or when a row that decodes has
  no room for W more tokens.

  Args:
    params: the policy's.
    slots: N rows.
    drafter_state: what the drafter's `init` or the last segment returned.
    limits: when to return to the host.
    own: the drafter's parameters, if it has any.
    model: static.
    drafter: static; gives W.
    config: static; the sampling law and the EOS ids.

  Returns:
    (Slots, drafter state, Counters); the counters of tokens and rows are
    those of counted rows, where they do not say otherwise.
  """
  capacity = slots.text.shape[1]
  draft_params = DraftParams(params, own)

  def proceed(carry: tuple) -> Array:
    slots, _, counters = carry
    fits = slots.done | (slots.length + drafter.width <= capacity)
    return (
      jnp.all(fits)
      & (counters.forwards < limits.forwards)
      & (jnp.sum(slots.done & limits.counted) < limits.done_rows)
      & ~jnp.all(slots.done)
    )

  def body(carry: tuple) -> tuple:
    slots, state, counters = carry
    proposal, state = draft(draft_params, state, slots, drafter=drafter)
    hidden, nodes = extend(params, slots, proposal, model=model)
    outcome = verify(
      params, slots, proposal, hidden, model=model, sampling=config.sampling
    )
    after, path = commit(slots, nodes, outcome, eos_ids=config.eos_ids)
    state = drafter.observe(draft_params, state, after, path, hidden)
    add = lambda x: jnp.sum(x, dtype=jnp.int32)
    counters = Counters(
      forwards=counters.forwards + 1,
      row_forwards=counters.row_forwards + add(~slots.done & limits.counted),
      tokens=counters.tokens + add(path.length * limits.counted),
      ahead_tokens=counters.ahead_tokens + add(path.length * ~limits.counted),
      accepted=counters.accepted + count_nodes(path, limits.counted),
    )
    return after, state, counters

  zero = jnp.zeros((), jnp.int32)
  counters = Counters(
    zero, zero, zero, zero, jnp.zeros(drafter.width, jnp.int32)
  )
  return jax.lax.while_loop(proceed, body, (slots, drafter_state, counters))
