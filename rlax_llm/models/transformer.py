"""A decoder-only transformer in flax: Llama, Qwen2 and Qwen3 from one config.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional biases on
queries, keys and values (Qwen2), optional RMSNorm on queries and keys
(Qwen3), tied or untied head.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rlax_llm.config import ModelConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.models import attention
from rlax_llm.models import kv_cache
from rlax_llm.models import lora
from rlax_llm.models import precision as precisions
from rlax_llm.models.kv_cache import KVCache
from rlax_llm.models.kv_cache import KVNodes
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.models.rotary import RopeScaling
from rlax_llm.models.rotary import rotary_table
from rlax_llm.models.rotary import rotate
from rlax_llm.types import Array
from rlax_llm.types import Params

# Logical axes by the end of a parameter's path; `sharding.py` places them.
_AXES: dict[str, tuple[str | None, ...]] = {
  'embedding': ('vocabulary', 'embed'),
  'head': ('embed', 'vocabulary'),
  'query_key_value/kernel': ('embed', 'kv_heads', None, None),
  'query_key_value/bias': ('kv_heads', None, None),
  'output/kernel': ('heads', 'embed'),
  'gate_up/kernel': ('embed', None, 'mlp'),
  'down/kernel': ('mlp', 'embed'),
  'scale': (None,),
  'join/kernel': ('embed', None),  # models/draft_model.py
  'lora_q_proj/a': ('embed', None),
  'lora_k_proj/a': ('embed', None),
  'lora_v_proj/a': ('embed', None),
  'lora_q_proj/b': (None, 'kv_heads', None, None),
  'lora_k_proj/b': (None, 'kv_heads', None),
  'lora_v_proj/b': (None, 'kv_heads', None),
  'lora_o_proj/a': ('heads', None),
  'lora_o_proj/b': (None, 'embed'),
  'lora_gate_proj/a': ('embed', None),
  'lora_gate_proj/b': (None, 'mlp'),
  'lora_up_proj/a': ('embed', None),
  'lora_up_proj/b': (None, 'mlp'),
  'lora_down_proj/a': ('mlp', None),
  'lora_down_proj/b': (None, 'embed'),
}


def logical_axes(params: Params) -> Any:
  """Returns the parameters' tree with a tuple of axis names for each leaf."""

  def name(path: tuple, leaf: Any) -> tuple[str | None, ...]:
    del leaf
    full = '/'.join(str(part.key) for part in path)
    return next(v for k, v in _AXES.items() if full.endswith(k))

  return jax.tree_util.tree_map_with_path(name, params)


Constrain = Callable[[Array, tuple], Array]


def anywhere(x: Array, axes: tuple) -> Array:
  """A `Constrain` that leaves the placement of values to the compiler."""
  del axes
  return x


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32."""

  epsilon: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
      'scale', nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon
    )
    scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return (x * scale).astype(self.dtype)


_STREAM = ('rows', None, None)  # axes of the residual stream


class Layer(nn.Module):
  """Attention and SwiGLU, each with an RMSNorm on its input and a residual."""

  config: ModelConfig
  precision: PrecisionConfig
  constrain: Constrain

  def setup(self) -> None:
    c = self.config
    head_dim = c.head_dim or c.width // c.heads
    dtype = jnp.dtype(self.precision.compute)
    param_dtype = jnp.dtype(self.precision.parameters)
    norm = functools.partial(RMSNorm, c.norm_epsilon, dtype, param_dtype)
    # Output layers are scaled down by depth, as in GPT-2, so that the
    # residual stream keeps its variance.
    dense = functools.partial(
      nn.DenseGeneral,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precisions.of_products(dtype),
    )
    init = nn.initializers.variance_scaling(c.init_scale, 'fan_in', 'normal')
    init_out = nn.initializers.variance_scaling(
      c.init_scale / (2 * c.layers), 'fan_in', 'normal'
    )
    self.attention_norm = norm()
    # What reads one input is one matrix: a KV head's queries, its key and its
    # value; gate and up. Side by side they would compete for the cores.
    self.query_key_value = dense(
      (c.kv_heads, c.heads // c.kv_heads + 2, head_dim),
      use_bias=c.qkv_bias,
      kernel_init=init,
    )
    self.output = dense(c.width, use_bias=False, kernel_init=init_out)
    if c.qk_norm:
      self.query_norm = norm()
      self.key_norm = norm()
    self.mlp_norm = norm()
    self.gate_up = dense((2, c.mlp_width), use_bias=False, kernel_init=init)
    self.down = dense(c.width, use_bias=False, kernel_init=init_out)
    shapes = {
      'q_proj': (c.kv_heads, c.heads // c.kv_heads, head_dim),
      'k_proj': (c.kv_heads, head_dim),
      'v_proj': (c.kv_heads, head_dim),
      'o_proj': (c.width,),
      'gate_proj': (c.mlp_width,),
      'up_proj': (c.mlp_width,),
      'down_proj': (c.width,),
    }
    # By published name; each module is named in the tree as its attribute.
    targets = c.lora.targets if c.lora.rank else ()
    for name in targets:
      setattr(
        self, lora.PREFIX + name, lora.Adapter(shapes[name], c.lora, dtype)
      )
    self.targets = targets

  def adapt(self, x: Array, *names: str) -> dict[str, Array]:
    """Returns what the adapters among the named ones add, for one input."""
    return {
      name: getattr(self, lora.PREFIX + name)(x)
      for name in names
      if name in self.targets
    }

  def project(
    self, x: Array, table: tuple[Array, Array]
  ) -> tuple[Array, Array, Array]:
    """Returns queries [.., L, H, HD] and keys and values [.., KH, L, HD]."""
    y = self.attention_norm(x)
    joint = self.query_key_value(y)
    more = lora.join_query_key_value(
      self.adapt(y, 'q_proj', 'k_proj', 'v_proj'), joint.shape
    )
    if more is not None:
      joint = joint + more
    queries, keys, values = (
      joint[..., :-2, :],
      joint[..., -2, :],
      joint[..., -1, :],
    )
    queries = queries.reshape(*x.shape[:-1], -1, queries.shape[-1])
    queries = self.constrain(queries, ('rows', None, 'heads', None))
    if self.config.qk_norm:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    return (
      rotate(queries, table),
      rotate(keys, table).swapaxes(1, 2),
      values.swapaxes(1, 2),
    )

  def finish(self, x: Array, attended: Array) -> Array:
    """Adds the attention's and the MLP's output to the stream."""
    out = self.output(attended)
    for change in self.adapt(attended, 'o_proj').values():
      out = out + change
    x = self.constrain(x + out, _STREAM)
    y = self.mlp_norm(x)
    gate_up = self.gate_up(y)
    more = lora.join_gate_up(
      self.adapt(y, 'gate_proj', 'up_proj'), gate_up.shape
    )
    if more is not None:
      gate_up = gate_up + more
    inner = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
    out = self.down(inner)
    for change in self.adapt(inner, 'down_proj').values():
      out = out + change
    return self.constrain(x + out, _STREAM)

  def packed(self, x: Array, table: tuple[Array, Array], mask: Array) -> Array:
    queries, keys, values = self.project(x, table)
    return self.finish(
      x, attention.packed_attention(queries, keys, values, mask)
    )

  def cached(
    self,
    x: Array,
    table: tuple[Array, Array],
    node_mask: Array,
    cache: KVCache,
    place: int,
    earlier: KVNodes | None = None,
  ) -> tuple[Array, Array, Array]:
    """Runs the layer at a place of the cache over the nodes of a forward."""
    queries, keys, values = self.project(x, table)
    all_keys, all_values = keys, values
    if earlier is not None:
      all_keys = jnp.concatenate([earlier.keys[place], keys], axis=2)
      all_values = jnp.concatenate([earlier.values[place], values], axis=2)
    attended = attention.cached_attention(
      queries,
      all_keys,
      all_values,
      cache.keys[place],
      cache.values[place],
      cache.length,
      node_mask,
    )
    return self.finish(x, attended), keys, values


def position_table(
  config: ModelConfig, positions: Array
) -> tuple[Array, Array]:
  """Returns the rotary angles of positions, as `rotary_table` does."""
  c = config
  return rotary_table(
    positions,
    c.head_dim or c.width // c.heads,
    c.rope_theta,
    RopeScaling(
      c.rope_scaling, c.rope_factor, c.rope_low, c.rope_high, c.rope_original
    ),
  )


def packed_mask(segments: Array) -> Array:
  """Returns bool[R, L, L]: earlier positions of one's own segment."""
  order = jnp.arange(segments.shape[1])
  causal = (order[:, None] >= order[None])[None]
  return causal & (segments[:, :, None] == segments[:, None])


class Transformer(nn.Module):
  """Embedding, layers, final norm and head."""

  config: ModelConfig
  precision: PrecisionConfig
  remat: bool
  constrain: Constrain

  def setup(self) -> None:
    c = self.config
    param_dtype = jnp.dtype(self.precision.parameters)
    self.embedding = self.param(
      'embedding',
      nn.initializers.normal(c.width**-0.5),
      (c.vocabulary, c.width),
      param_dtype,
    )
    # Only the uncached pass has a backward pass to recompute for.
    layer = nn.remat(Layer, methods=['packed']) if self.remat else Layer
    self.layers = [
      layer(c, self.precision, self.constrain, name=f'layer_{i}')
      for i in range(c.layers)
    ]
    self.final_norm = RMSNorm(
      c.norm_epsilon, jnp.dtype(self.precision.compute), param_dtype
    )
    if not c.tied_head:
      self.head = self.param(
        'head',
        nn.initializers.variance_scaling(c.init_scale, 'fan_in', 'normal'),
        (c.width, c.vocabulary),
        param_dtype,
      )

  def embed(self, tokens: Array) -> Array:
    embedding = self.embedding.astype(self.precision.compute)
    return self.constrain(embedding[tokens], _STREAM)

  def hidden(self, tokens: Array, positions: Array, segments: Array) -> Array:
    mask = packed_mask(segments)
    x, table = self.embed(tokens), position_table(self.config, positions)
    for layer in self.layers:
      x = layer.packed(x, table, mask)
    return self.final_norm(x)

  def extend(
    self,
    tokens: Array,
    positions: Array,
    node_mask: Array,
    cache: KVCache,
    earlier: KVNodes | None = None,
  ) -> tuple[Array, KVNodes]:
    x, table = self.embed(tokens), position_table(self.config, positions)
    keys, values = [], []
    for i, layer in enumerate(self.layers):
      x, k, v = layer.cached(x, table, node_mask, cache, i, earlier)
      keys.append(k)
      values.append(v)
    return self.final_norm(x), KVNodes(tuple(keys), tuple(values))

  def logits(self, hidden: Array) -> Array:
    dtype = jnp.dtype(self.precision.head)
    head = self.embedding.T if self.config.tied_head else self.head
    return jnp.matmul(
      hidden.astype(dtype),
      head.astype(dtype),
      precision=precisions.of_products(dtype),
      preferred_element_type=jnp.float32,
    )

  def __call__(self, tokens: Array, positions: Array, segments: Array) -> Array:
    return self.logits(self.hidden(tokens, positions, segments))


def round_params(
  params: Params, *, config: ModelConfig, precision: PrecisionConfig
) -> Params:
  """Returns parameters in the dtypes to which a forward rounds them."""
  compute, head = jnp.dtype(precision.compute), jnp.dtype(precision.head)

  def cast(path: tuple, leaf: Array) -> Array:
    name, dtype = path[-1].key, leaf.dtype
    if name in ('kernel', 'bias', 'a', 'b'):
      dtype = compute
    elif name == 'head':
      dtype = head
    # A tied embedding is read in both dtypes; norms compute in float32.
    elif name == 'embedding' and (head == compute or not config.tied_head):
      dtype = compute
    return leaf.astype(dtype) if dtype.itemsize < leaf.dtype.itemsize else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def make_transformer(
  config: ModelConfig,
  precision: PrecisionConfig,
  *,
  remat: bool = False,
  constrain: Constrain = anywhere,
) -> LanguageModel:
  """Returns the transformer that a frozen config describes.

  Args:
    config: frozen; `vocabulary` is set.
    precision: frozen; dtypes of parameters, trunk and head.
    remat: recompute each layer in the backward pass.
    constrain: says where a value with the named logical axes lies; see
      `sharding.constrain`.
  """
  module = Transformer(config, precision, remat, constrain)
  head_dim = config.head_dim or config.width // config.heads

  def init(key: Array) -> Params:
    dummy = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, dummy, dummy, dummy + 1)['params']

  def init_cache(rows: int, capacity: int) -> KVCache:
    return kv_cache.empty(
      rows,
      capacity,
      layers=config.layers,
      kv_heads=config.kv_heads,
      head_dim=head_dim,
      dtype=jnp.dtype(precision.compute),
    )

  def hidden(
    params: Params, tokens: Array, positions: Array, segments: Array
  ) -> Any:
    return module.apply(
      {'params': params}, tokens, positions, segments, method='hidden'
    )

  def extend(
    params: Params,
    tokens: Array,
    positions: Array,
    node_mask: Array,
    cache: KVCache,
    earlier: KVNodes | None = None,
  ) -> Any:
    return module.apply(
      {'params': params},
      tokens,
      positions,
      node_mask,
      cache,
      earlier,
      method='extend',
    )

  def embed(params: Params, tokens: Array) -> Any:
    return module.apply({'params': params}, tokens, method='embed')

  def logits(params: Params, hidden: Array) -> Any:
    return module.apply({'params': params}, hidden, method='logits')

  def place(tree: Params) -> Params:
    return jax.tree.map(constrain, tree, logical_axes(tree))

  rounded = functools.partial(round_params, config=config, precision=precision)

  return LanguageModel(
    init=init,
    init_cache=init_cache,
    hidden=hidden,
    extend=extend,
    logits=logits,
    embed=embed,
    axes=logical_axes,
    place=place,
    trainable=lora.trainable,
    rounded=rounded,
    vocabulary=config.vocabulary,
    max_positions=config.max_positions,
  )
