"""LoRA: low-rank adapters on frozen matrices.

"LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685: y = x W + (alpha / r) (x A) B, with W frozen.
B starts at 0, so that the adapted model starts as its base. The base is never
copied: gradients, optimizer state and the reference policy hold adapters only.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from rlax_llm.config import LoRAConfig
from rlax_llm.models import precision as precisions
from rlax_llm.types import Array
from rlax_llm.types import Params

PREFIX = 'lora_'  # of the adapters' names in the tree


class Adapter(nn.Module):
  """(alpha / r) (x A) B of one matrix; float32 parameters.

  Attributes:
    shape: axes of the result.
    config: rank r >= 1 and alpha.
    dtype: of the maths.
  """

  shape: tuple[int, ...]
  config: LoRAConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    rank, width = self.config.rank, x.shape[-1]
    # Uniform in +-1 / sqrt(width), as PEFT initialises A.
    init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    a = self.param('a', init, (width, rank), jnp.float32)
    b = self.param('b', nn.initializers.zeros, (rank, *self.shape), jnp.float32)
    precision = precisions.of_products(self.dtype)
    low = jnp.matmul(x, a.astype(self.dtype), precision=precision)
    scale = jnp.asarray(self.config.alpha / rank, self.dtype)
    return jnp.tensordot(
      low * scale, b.astype(self.dtype), axes=1, precision=precision
    )


def trainable(params: Params) -> Any:
  """Returns the tree with True for adapters; for all if there are none."""
  adapter = jax.tree_util.tree_map_with_path(
    lambda path, leaf: any(str(part.key).startswith(PREFIX) for part in path),
    params,
  )
  if not any(jax.tree.leaves(adapter)):
    return jax.tree.map(lambda leaf: True, params)
  return adapter


def split(params: Params, trained: Any) -> tuple[Params, Params]:
  """Returns (what is trained, what is frozen): trees with gaps.

  Args:
    params: a tree.
    trained: the same tree of bools.
  """
  gap = optax.MaskedNode()
  pick = lambda wanted: jax.tree.map(
    lambda leaf, is_trained: leaf if is_trained == wanted else gap,
    params,
    trained,
  )
  return pick(True), pick(False)


def join(first: Params, second: Params) -> Params:
  """Undoes `split`; takes the leaves of `second` in the gaps of `first`."""
  is_gap = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(
    lambda a, b: b if is_gap(a) else a, first, second, is_leaf=is_gap
  )


def merge(params: Params, config: LoRAConfig) -> Params:
  """Returns the base with the adapters added to its matrices.

  W + (alpha / r) A B in float32, rounded once to W's dtype. The tree is that
  of a model without adapters.

  Args:
    params: of `make_transformer` with the same config.
    config: rank and alpha.
  """
  if not config.rank:
    return params
  scale = config.alpha / config.rank
  return {
    name: _merge_layer(tree, scale) if name.startswith('layer_') else tree
    for name, tree in params.items()
  }


def _merge_layer(layer: Params, scale: float) -> Params:
  """Merges the adapters of one layer."""
  delta = {
    name.removeprefix(PREFIX): scale
    * jnp.tensordot(tree['a'], tree['b'], axes=1)
    for name, tree in layer.items()
    if name.startswith(PREFIX)
  }
  base = {k: v for k, v in layer.items() if not k.startswith(PREFIX)}

  def add(name: str, change: Array) -> None:
    kernel = base[name]['kernel']
    total = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    base[name] = base[name] | {'kernel': total}

  for name, joined in (
    ('query_key_value', join_query_key_value),
    ('gate_up', join_gate_up),
  ):
    change = joined(delta, base[name]['kernel'].shape)
    if change is not None:
      add(name, change)
  for target, name in (('o_proj', 'output'), ('down_proj', 'down')):
    if target in delta:
      add(name, delta[target])
  return base


def join_query_key_value(
  parts: dict[str, Array], shape: tuple[int, ...]
) -> Array | None:
  """Returns the parts as the joint projection has them; None: no part.

  Args:
    parts: q_proj [.., KH, G, HD], k_proj and v_proj [.., KH, HD], some of
      them; absent ones are 0.
    shape: [.., KH, G + 2, HD].
  """
  names = ('q_proj', 'k_proj', 'v_proj')
  if not any(name in parts for name in names):
    return None
  dtype = next(parts[n] for n in names if n in parts).dtype
  lead, queries, dim = shape[:-2], shape[-2] - 2, shape[-1]
  none = {
    name: jnp.zeros((*lead, queries if name == 'q_proj' else 1, dim), dtype)
    for name in names
  }
  given = {
    name: part if name == 'q_proj' else part[..., None, :]
    for name, part in parts.items()
    if name in names
  }
  return jnp.concatenate([(none | given)[name] for name in names], axis=-2)


def join_gate_up(
  parts: dict[str, Array], shape: tuple[int, ...]
) -> Array | None:
  """Returns gate_proj and up_proj [.., F] as [.., 2, F]; None: no part."""
  names = ('gate_proj', 'up_proj')
  found = [parts[name] for name in names if name in parts]
  if not found:
    return None
  none = jnp.zeros((*shape[:-2], shape[-1]), found[0].dtype)
  return jnp.stack([parts.get(name, none) for name in names], axis=-2)
