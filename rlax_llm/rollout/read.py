"""What the host reads of a segment: one array, taken apart on the host."""

from __future__ import annotations

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlax_llm.rollout import segment as segments
from rlax_llm.types import Array
from rlax_llm.types import Slots


class SegmentRead(NamedTuple):
  """What the host reads of one segment: `Slots` and `Counters`, one array."""

  text: np.ndarray  # int32[N, S]
  logprobs: np.ndarray  # float32[N, S]
  drafted: np.ndarray  # bool[N, S]
  length: np.ndarray  # int32[N]
  done: np.ndarray  # bool[N]
  finished: np.ndarray  # bool[N]
  forwards: np.ndarray  # int32[N]
  counters: segments.Counters

  @classmethod
  def unpack(cls, packed: np.ndarray, rows: int, capacity: int) -> SegmentRead:
    """Undoes `pack_read` for N rows of capacity S."""
    size = rows * capacity
    wide = packed[: 3 * size].reshape(3, rows, capacity)
    narrow = packed[3 * size : 3 * size + 4 * rows].reshape(4, rows)
    counts = packed[3 * size + 4 * rows :]
    counters: Any = (*counts[:4], counts[4:])
    return cls(
      wide[0],
      wide[1].view(np.float32),
      wide[2].astype(bool),
      narrow[0],
      narrow[1].astype(bool),
      narrow[2].astype(bool),
      narrow[3],
      segments.Counters(*counters),
    )


def pack_read(slots: Slots, counters: segments.Counters) -> Array:
  """Returns what `SegmentRead` holds in int32[3 N S + 4 N + 4 + W]."""
  logprobs = jax.lax.bitcast_convert_type(slots.logprobs, jnp.int32)
  parts = (
    slots.text,
    logprobs,
    slots.drafted,
    slots.length,
    slots.done,
    slots.finished,
    slots.forwards,
    *jax.tree.leaves(counters),
  )
  return jnp.concatenate([x.astype(jnp.int32).ravel() for x in parts])
