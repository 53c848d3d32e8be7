"""Rotary position embedding, and how published models stretch it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlax_llm.types import Array


class RopeScaling(NamedTuple):
  """How rotary frequencies are stretched; the fields `rope_*` of the config."""

  kind: str = 'none'  # none | linear | llama3
  factor: float = 1.0
  low: float = 1.0  # turns within `original` positions
  high: float = 4.0  # turns within `original` positions
  original: int = 8192  # positions


def rotary_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling = RopeScaling()
) -> Array:
  """Returns the angle that each pair turns by per position.

  f_i = theta^(-2i / head_dim). `linear` divides all of them by the factor
  ("Extending Context Window of Large Language Models via Positional
  Interpolation", https://arxiv.org/abs/2306.15595). `llama3` ("The Llama 3 Herd
  of Models", https://arxiv.org/abs/2407.21783, as released) divides those that
  turn r = original * f / 2 pi < low times, keeps those of r > high and blends
  between: f * (1 - s) / factor + f * s with s = (r - low) / (high - low).

  Args:
    head_dim: even.
    theta: base of the wavelengths.
    scaling: static.

  Returns:
    float32[head_dim / 2], radians per position.
  """
  half = head_dim // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling.kind == 'none':
    return frequencies
  stretched = frequencies / scaling.factor
  if scaling.kind == 'linear':
    return stretched
  turns = scaling.original * frequencies / (2 * math.pi)
  keep = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
  return stretched * (1 - keep) + frequencies * keep


def rotary_table(
  positions: Array,
  head_dim: int,
  theta: float,
  scaling: RopeScaling = RopeScaling(),
) -> tuple[Array, Array]:
  """Returns (cos, signed sin) of the rotary angles, [..., L, 1, head_dim].

  Angles are float32 whatever the model is: bfloat16 cannot tell positions
  above 256 apart.

  Args:
    positions: int32[..., L].
    head_dim: even.
    theta: base of the wavelengths.
    scaling: static.
  """
  frequencies = rotary_frequencies(head_dim, theta, scaling)
  angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  # Behind the barrier the table is computed once; else XLA computes sines
  # again for every element of every layer's queries and keys.
  return jax.lax.optimization_barrier(
    (jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))
  )


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
  """Applies rotary position embedding (https://arxiv.org/abs/2104.09864).

  Halves are rotated against each other (the Hugging Face convention), in
  float32.

  Args:
    x: [..., L, heads, head_dim].
    table: from `rotary_table`.

  Returns:
    As x.
  """
  cos, sin = table
  wide = x.astype(jnp.float32)
  # Equal to the bit. Slices and concatenations keep XLA's CPU backend from
  # vectorising what is around them; a GPU would multiply for longer than the
  # rest of a layer's elementwise work takes.
  other = jax.lax.platform_dependent(
    wide, cpu=_swap_by_product, default=_swap_by_slices
  )
  return (wide * cos + other * sin).astype(x.dtype)


def _swap_by_product(x: Array) -> Array:
  """Swaps the halves of the last axis by a permutation matrix, exactly."""
  half = x.shape[-1] // 2
  swap = jnp.roll(jnp.eye(x.shape[-1], dtype=x.dtype), half, axis=0)
  return jnp.matmul(x, swap, precision=jax.lax.Precision.HIGHEST)


def _swap_by_slices(x: Array) -> Array:
  """As `_swap_by_product`."""
  half = x.shape[-1] // 2
  return jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
