"""The device side of the engine: one executable for each boundary step."""

import functools
from typing import Any, Mapping, Sequence

import jax
from jax.sharding import Mesh
import numpy as np

from rlax_llm import sharding
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.executables import ExecutablePool
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout import slots as slot_ops
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Slots


class Executor:
  """Runs the pure functions of `slots` and `segment`, compiled by shape."""

  def __init__(self, model: LanguageModel, *, config: segments.SegmentConfig,
               seed: int, mesh: Mesh, pool: ExecutablePool) -> None:
    self._model = model
    self._config = config
    self._seed = seed
    self._rows = sharding.rows(mesh)
    self._replicated = sharding.replicated(mesh)
    self.pool = pool

  def empty(self, rows: int, capacity: int) -> Slots:
    """Returns slots that hold nothing."""
    return self.pool(('empty', rows, capacity),
                     functools.partial(slot_ops.empty_slots, self._model, rows,
                                       capacity),
                     out_shardings=self._rows)

  def prefill(self, params: Params, prompts: Sequence[np.ndarray], rows: int,
              capacity: int) -> slot_ops.PromptBlock:
    """Prefills at most `rows` prompts of at most `capacity` tokens."""
    tokens = np.zeros((rows, capacity), np.int32)
    length = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, :len(prompt)] = prompt
      length[row] = len(prompt)
    tokens, length = jax.device_put((tokens, length), self._replicated)
    return self.pool(('prefill', rows, capacity),
                     functools.partial(slot_ops.prefill, model=self._model),
                     params, tokens, length)

  def admit(self, slots: Slots, block: slot_ops.PromptBlock,
            taken: Mapping[int, tuple[int, Request,
                                      int]], max_new_tokens: int) -> Slots:
    """Puts samples into slots.

    Args:
      slots: donated.
      block: prefilled prompts.
      taken: slot -> (row of the block, request, index of the sample).
      max_new_tokens: T.
    """
    rows, capacity = slots.text.shape
    fields: Any = np.zeros((6, rows), np.int32)
    take: Any = np.zeros(rows, bool)
    for slot, (source, request, index) in taken.items():
      take[slot] = True
      fields[:, slot] = (source, max_new_tokens, request.domain, request.step,
                         request.request, index)
    admission = jax.device_put(slot_ops.Admission(take, *fields), self._rows)
    key = ('admit', rows, capacity, *block.tokens.shape, self._seed)
    return self.pool(key,
                     functools.partial(slot_ops.admit, seed=self._seed),
                     slots,
                     block,
                     admission,
                     donate_argnums=(0,),
                     out_shardings=self._rows)

  def grow(self, slots: Slots, capacity: int) -> Slots:
    """Returns the slots with a larger S."""
    rows, old = slots.text.shape
    return self.pool(('grow', rows, old, capacity),
                     functools.partial(slot_ops.grow, capacity=capacity),
                     slots,
                     out_shardings=self._rows)

  def gather(self, slots: Slots, order: Sequence[int]) -> Slots:
    """Returns the named rows, in that order."""
    old, capacity = slots.text.shape
    index = jax.device_put(np.asarray(order, np.int32), self._replicated)
    return self.pool(('gather', old, len(order), capacity),
                     slot_ops.gather,
                     slots,
                     index,
                     out_shardings=self._rows)

  def decode(self, params: Params, slots: Slots, drafter: Drafter, *,
             forwards: int, done_rows: int) -> tuple[Slots, segments.Counters]:
    """Runs one segment; the slots are donated."""
    rows, capacity = slots.text.shape

    def run(params: Params, slots: Slots,
            limits: segments.Limits) -> tuple[Slots, Any]:
      state = drafter.init(params, slots)
      slots, _, counters = segments.segment(params,
                                            slots,
                                            state,
                                            limits,
                                            model=self._model,
                                            drafter=drafter,
                                            config=self._config)
      return slots, counters

    limits = segments.Limits(
        *jax.device_put((np.int32(forwards),
                         np.int32(done_rows)), self._replicated))
    return self.pool(('segment', rows, capacity, drafter, self._config),
                     run,
                     params,
                     slots,
                     limits,
                     donate_argnums=(1,),
                     out_shardings=(self._rows, self._replicated))
