"""The device side of the engine: one executable for each boundary step."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from rlax_llm.drafting.drafter import Drafter
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout import slots as slot_ops
from rlax_llm.rollout.read import pack_read
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Slots


class Seat(NamedTuple):
  """What a slot takes."""

  row: int  # of the block
  request: Request
  sample: int  # which of the request's
  limit: int  # most new tokens
  place: int  # the prompt's, in the drafter's state


class Executor:
  """Runs the pure functions of `slots` and `segment`, compiled by shape."""

  def __init__(
    self,
    model: LanguageModel,
    *,
    config: segments.SegmentConfig,
    seed: int,
    mesh: Mesh,
    pool: ExecutablePool,
  ) -> None:
    self._model = model
    self._config = config
    self._seed = seed
    self.mesh = mesh
    self._slots = _slots_placement(model, mesh)
    self._replicated = sharding.replicated(mesh)
    self._gathered: dict[tuple, list] = {}  # shapes, by network
    self.pool = pool

  def _run(
    self,
    name: str,
    shape: tuple,
    function: Callable,
    *args: Any,
    **jit_options: Any,
  ) -> Any:
    """Runs a function of this model on this mesh through the pool."""
    # A pool may be shared by engines of several models of equal shapes.
    key = (name, *shape, self._model, self.mesh)
    return self.pool(key, function, *args, **jit_options)

  def gather_params(
    self, params: Params, placement: Any, rounded: Callable | None = None
  ) -> Params:
    """Returns parameters for many forwards: rounded, and where they are said
    to lie.

    Args:
      params: the policy's, or with `rounded` another network's.
      placement: a sharding for each.
      rounded: as `LanguageModel.rounded`; None: the policy's.
    """
    leaves, tree = jax.tree.flatten(params)
    if (rounded, tree) not in self._gathered:  # It takes a trace.
      self._gathered[rounded, tree] = jax.tree.leaves(
        self.gathered_shapes(params, placement, rounded)
      )
    wanted = self._gathered[rounded, tree]
    # What stays as it is is not copied: the base of adapters, for instance.
    moved = [
      i
      for i, (x, want) in enumerate(zip(leaves, wanted))
      if x.dtype != want.dtype
      or not x.sharding.is_equivalent_to(want.sharding, x.ndim)
    ]
    dtypes = [wanted[i].dtype for i in moved]
    new = self._run(
      'gather_params',
      (rounded,),
      lambda old: [x.astype(d) for x, d in zip(old, dtypes)],
      [leaves[i] for i in moved],
      out_shardings=[wanted[i].sharding for i in moved],
    )
    for i, leaf in zip(moved, new):
      leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)

  def gathered_shapes(
    self, params: Params, placement: Any, rounded: Callable | None = None
  ) -> Params:
    """Returns the shapes of what `gather_params` makes of such parameters."""
    place = lambda x, where: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=where
    )
    rounded = rounded or self._model.rounded
    return jax.tree.map(place, jax.eval_shape(rounded, params), placement)

  def empty(self, rows: int, capacity: int) -> Slots:
    """Returns slots that hold nothing."""
    return self._run(
      'empty',
      (rows, capacity),
      functools.partial(slot_ops.empty_slots, self._model, rows, capacity),
      out_shardings=self._slots,
    )

  def prefill(
    self,
    params: Params,
    prompts: Sequence[np.ndarray],
    rows: int,
    capacity: int,
    keep_hidden: bool = False,
  ) -> slot_ops.PromptBlock:
    """Prefills at most `rows` prompts of at most `capacity` tokens."""
    packed = np.zeros((rows, capacity + 1), np.int32)
    packed[:, -1] = 1
    for row, prompt in enumerate(prompts):
      packed[row, : len(prompt)] = prompt
      packed[row, -1] = len(prompt)
    return self._run(
      'prefill',
      (rows, capacity, keep_hidden),
      functools.partial(_prefill, model=self._model, keep_hidden=keep_hidden),
      params,
      packed,
    )

  def admit(
    self, slots: Slots, block: slot_ops.PromptBlock, taken: Mapping[int, Seat]
  ) -> Slots:
    """Puts samples into slots.

    Args:
      slots: donated.
      block: prefilled prompts.
      taken: by slot.
    """
    rows, capacity = slots.text.shape
    fields = np.zeros((9, rows), np.int32)
    for slot, seat in taken.items():
      r = seat.request
      fields[:, slot] = (
        True,
        seat.row,
        len(r.prompt),
        seat.limit,
        r.domain,
        r.step,
        r.request,
        seat.sample,
        seat.place,
      )
    shape = (rows, capacity, *block.tokens.shape, self._seed)
    return self._run(
      'admit',
      shape,
      functools.partial(_admit, seed=self._seed),
      slots,
      block.replace(hidden=None),
      fields,
      donate_argnums=(0,),
      out_shardings=self._slots,
    )

  def grow(self, slots: Slots, capacity: int) -> Slots:
    """Returns the slots with a larger S."""
    rows, old = slots.text.shape
    return self._run(
      'grow',
      (rows, old, capacity),
      functools.partial(slot_ops.grow, capacity=capacity),
      slots,
      out_shardings=self._slots,
    )

  def gather(self, slots: Slots, order: Sequence[int]) -> Slots:
    """Returns the named rows, in that order."""
    old, capacity = slots.text.shape
    index = np.asarray(order, np.int32)
    return self._run(
      'gather',
      (old, len(order), capacity),
      slot_ops.gather,
      slots,
      index,
      out_shardings=self._slots,
    )

  def draft_state(
    self, params: DraftParams, slots: Slots, drafter: Drafter
  ) -> Any:
    """Returns the drafter's state before anything is sampled."""
    return self._run(
      'draft_state',
      (drafter.init, slots.text.shape),
      drafter.init,
      params,
      slots,
      out_shardings=lambda: self._draft_placement(params, slots, drafter),
    )

  def _draft_placement(
    self, params: DraftParams, slots: Slots, drafter: Drafter
  ) -> Any:
    """Returns the shardings of the drafter's state."""
    state = jax.eval_shape(drafter.init, params, slots)
    return sharding.place_tree(state, drafter.axes(state), self.mesh)

  def _run_draft(
    self,
    name: str,
    shape: tuple,
    function: Callable,
    state: Any,
    *args: Any,
    donate: bool = True,
  ) -> Any:
    """Runs a function of the drafter's state, which is donated unless said."""
    shapes = tuple(x.shape for x in jax.tree.leaves(state))
    return self._run(
      name,
      (*shape, shapes),
      function,
      state,
      *args,
      donate_argnums=(0,) if donate else (),
      out_shardings=jax.tree.map(lambda x: x.sharding, state),
    )

  def draft_admit(
    self,
    params: DraftParams,
    state: Any,
    drafter: Drafter,
    slots: Slots,
    block: slot_ops.PromptBlock,
    source: np.ndarray,
  ) -> Any:
    """Gives rows of the drafter's state, donated, samples of prompts.

    Args:
      params: the policy's and the drafter's.
      state: of N rows.
      drafter: has row operations.
      slots: N rows, after the admission.
      block: prefilled prompts, with their hidden states.
      source: int32[N], rows of the block; below 0 where a row takes nothing.
    """
    assert drafter.rows is not None
    return self._run_draft(
      'draft_admit',
      (drafter.rows.admit, *slots.text.shape, *block.tokens.shape),
      functools.partial(_draft_admit, admit=drafter.rows.admit),
      state,
      params,
      slots,
      block.replace(nodes=None),
      source,
    )

  def draft_gather(
    self, state: Any, drafter: Drafter, order: Sequence[int]
  ) -> Any:
    """Returns the named rows of the drafter's state, in that order."""
    assert drafter.rows is not None
    index = np.asarray(order, np.int32)
    return self._run_draft(
      'draft_gather',
      (drafter.rows.gather, index.shape),
      drafter.rows.gather,
      state,
      index,
      donate=False,
    )

  def draft_grow(self, state: Any, drafter: Drafter, capacity: int) -> Any:
    """Returns the drafter's state with a larger S."""
    assert drafter.rows is not None
    return self._run_draft(
      'draft_grow',
      (drafter.rows.grow, capacity),
      functools.partial(drafter.rows.grow, capacity=capacity),
      state,
      donate=False,
    )

  def load(
    self,
    params: DraftParams,
    state: Any,
    drafter: Drafter,
    places: Sequence[int],
    texts: np.ndarray,
    length: np.ndarray,
  ) -> Any:
    """Gives the drafter the texts of prompts; its state is donated."""
    packed = np.concatenate(
      [np.asarray(places, np.int32), length.ravel(), texts.ravel()]
    )
    return self._run_draft(
      'load',
      (drafter.load, texts.shape),
      functools.partial(_load, load=drafter.load, shape=texts.shape),
      state,
      params,
      packed,
    )

  def sync(
    self, params: DraftParams, state: Any, drafter: Drafter, slots: Slots
  ) -> Any:
    """Brings the drafter's state, donated, up to date with the slots."""
    return self._run_draft(
      'sync',
      (drafter.sync, slots.text.shape),
      functools.partial(_sync, sync=drafter.sync),
      state,
      params,
      slots,
    )

  def decode(
    self,
    params: DraftParams,
    slots: Slots,
    state: Any,
    drafter: Drafter,
    *,
    forwards: int,
    done_rows: int,
    counted: np.ndarray,
  ) -> tuple[Slots, Any, Array]:
    """Runs one segment; the slots and the drafter's state are donated.

    Returns:
      (slots, the drafter's state, what `SegmentRead.unpack` takes).

    Args:
      params: the policy's and the drafter's.
      slots: N rows.
      state: the drafter's.
      drafter: gives W.
      forwards: see `segments.Limits`.
      done_rows: see `segments.Limits`.
      counted: bool[N], see `segments.Limits`.
    """
    limits = np.empty(2 + len(counted), np.int32)
    limits[:2], limits[2:] = (forwards, done_rows), counted
    if drafter.width == 1:
      params = params.replace(own=())
    run = self._segment(params, slots, state, drafter, limits)
    return run(params, slots, state, limits)

  def compile_decode(
    self, params: DraftParams, rows: int, capacity: int, drafter: Drafter
  ) -> None:
    """Compiles a segment from shapes alone.

    Args:
      params: shapes, dtypes and shardings.
      rows: N.
      capacity: S.
      drafter: gives W.
    """
    place = lambda x, where: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=where
    )
    slots = jax.eval_shape(
      functools.partial(slot_ops.empty_slots, self._model, rows, capacity)
    )
    slots = jax.tree.map(place, slots, self._slots)
    state = jax.tree.map(
      place,
      jax.eval_shape(drafter.init, params, slots),
      self._draft_placement(params, slots, drafter),
    )
    self._segment(params, slots, state, drafter, np.zeros(2 + rows, np.int32))

  def segment_bytes(self) -> dict[tuple[int, int, Drafter], int]:
    """Returns bytes on one device by (N, S, drafter), of this model."""
    mine = (self._config, self._model, self.mesh)
    found = self.pool.memory_by_key('segment')
    return {
      key[1:4]: size  # type: ignore[index]
      for key, size in found.items()
      if key[4:] == mine  # type: ignore[index]
    }

  def _segment(
    self,
    params: DraftParams,
    slots: Slots,
    state: Any,
    drafter: Drafter,
    limits: np.ndarray,
  ) -> Any:
    """Returns the executable of a segment."""
    key = (
      'segment',
      *slots.text.shape,
      drafter,
      self._config,
      self._model,
      self.mesh,
    )
    placement = jax.tree.map(lambda x: x.sharding, state)
    return self.pool.compile(
      key,
      functools.partial(
        _segment, model=self._model, drafter=drafter, config=self._config
      ),
      params,
      slots,
      state,
      limits,
      donate_argnums=(1, 2),
      out_shardings=(self._slots, placement, self._replicated),
    )


def _slots_placement(model: LanguageModel, mesh: Mesh) -> Any:
  """Returns the shardings of Slots: rows, and the cache's heads."""
  slots = jax.eval_shape(
    functools.partial(slot_ops.empty_slots, model, sharding.ways(mesh), 8)
  )
  rows = sharding.rows(mesh)
  place = lambda x: sharding.heads(mesh, x.shape[1])
  cache = slots.cache.replace(
    keys=jax.tree.map(place, slots.cache.keys),
    values=jax.tree.map(place, slots.cache.values),
    length=rows,
  )
  return jax.tree.map(lambda x: rows, slots.replace(cache=None)).replace(
    cache=cache
  )


# What the host sends at a boundary is one array, an argument as it is: on CPU
# `device_put` to a mesh costs as much as a forward of few rows. What the host
# reads of a segment is one array as well. Every one of several processes sends
# and reads the same.


def _prefill(
  params: Params, packed: Array, **static: Any
) -> slot_ops.PromptBlock:
  return slot_ops.prefill(params, packed[:, :-1], packed[:, -1], **static)


def _admit(
  slots: Slots, block: slot_ops.PromptBlock, fields: Array, *, seed: int
) -> Slots:
  admission = slot_ops.Admission(fields[0].astype(bool), *fields[1:])
  return slot_ops.admit(slots, block, admission, seed=seed)


def _draft_admit(
  state: Any,
  params: DraftParams,
  slots: Slots,
  block: slot_ops.PromptBlock,
  source: Array,
  *,
  admit: Callable,
) -> Any:
  return admit(
    params,
    state,
    slots,
    block.tokens,
    block.length,
    block.hidden,
    source >= 0,
    jnp.maximum(source, 0),
  )


def _load(
  state: Any,
  params: DraftParams,
  packed: Array,
  *,
  load: Callable,
  shape: tuple[int, int, int],
) -> Any:
  count, texts, _ = shape
  ends = (count, count + count * texts)
  places, length, tokens = jnp.split(packed, ends)
  return load(
    params, state, places, tokens.reshape(shape), length.reshape(count, texts)
  )


def _sync(
  state: Any, params: DraftParams, slots: Slots, *, sync: Callable
) -> Any:
  return sync(params, state, slots)


def _segment(
  params: DraftParams, slots: Slots, state: Any, limits: Array, **static: Any
) -> tuple[Slots, Any, Array]:
  slots, state, counters = segments.segment(
    params.policy,
    slots,
    state,
    segments.Limits(limits[0], limits[1], limits[2:].astype(bool)),
    params.own,
    **static,
  )
  return slots, state, pack_read(slots, counters)
