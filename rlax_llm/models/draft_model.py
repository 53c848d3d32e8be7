"""The network of a learned drafter: one layer on the target's hidden states.

TLT's drafter ("Taming the Long Tail: Efficient Reasoning RL Training with
Adaptive Drafter", https://arxiv.org/abs/2511.16665) has the form of EAGLE
("EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
https://arxiv.org/abs/2401.15077): for the token t_i at position i

  x_i = fc([norm(embed(t_i)); norm(h_{i-1})])
  h'_i = norm(layer(x_1, ..., x_i))

estimates the target's hidden state h_i; the target's head makes logits of it.
The embedding and the head are the target's own and are not trained here.
h_{i-1} is the target's hidden state where that is known, else the drafter's
estimate. Both inputs are brought to one scale, as in EAGLE-3
(https://arxiv.org/abs/2503.01840): an embedding can be far smaller than a
hidden state.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax.numpy as jnp

from rlax_llm.config import LoRAConfig
from rlax_llm.config import ModelConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.models import kv_cache
from rlax_llm.models import precision as precisions
from rlax_llm.models.kv_cache import KVCache
from rlax_llm.models.kv_cache import KVNodes
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.models.transformer import anywhere
from rlax_llm.models.transformer import Constrain
from rlax_llm.models.transformer import Layer
from rlax_llm.models.transformer import logical_axes
from rlax_llm.models.transformer import packed_mask
from rlax_llm.models.transformer import position_table
from rlax_llm.models.transformer import RMSNorm
from rlax_llm.models.transformer import round_params
from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import Params


class DraftModel(NamedTuple):
  """A drafter's network as data: functions of explicit parameters.

  `features[.., i]` is the target's hidden state at the position before that of
  `tokens[.., i]`, or an estimate of it; zeros before the first token.

  Attributes:
    init: (key) -> the drafter's own params.
    init_cache: (rows, capacity) -> empty KVCache.
    init_features: (rows) -> [rows, D], zeros.
    hidden: (DraftParams, tokens int32[R, L], features [R, L, D], positions
      int32[R, L], segments int32[R, L]) -> [R, L, D]: estimates of the
      target's hidden states; no cache, packed rows.
    extend: (DraftParams, tokens int32[N, W], features [N, W, D], positions
      int32[N, W], node_mask, cache, earlier) -> (estimates [N, W, D],
      KVNodes); as `LanguageModel.extend`.
    axes: as `LanguageModel.axes`, of the drafter's own params.
    rounded: as `LanguageModel.rounded`, of the drafter's own params.
  """

  init: Callable
  init_cache: Callable
  init_features: Callable
  hidden: Callable
  extend: Callable
  axes: Callable
  rounded: Callable


class Draft(nn.Module):
  """`fc`, one decoder layer and the norms around them."""

  config: ModelConfig
  precision: PrecisionConfig
  constrain: Constrain

  def setup(self) -> None:
    c = self.config
    dtype = jnp.dtype(self.precision.compute)
    param_dtype = jnp.dtype(self.precision.parameters)
    norm = functools.partial(RMSNorm, c.norm_epsilon, dtype, param_dtype)
    self.token_norm, self.feature_norm, self.final_norm = norm(), norm(), norm()
    self.join = nn.Dense(
      c.width,
      use_bias=False,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precisions.of_products(dtype),
      kernel_init=nn.initializers.variance_scaling(1.0, 'fan_in', 'normal'),
    )
    self.layer = Layer(c, self.precision, self.constrain)

  def read(self, embedded: Array, features: Array) -> Array:
    parts = (self.token_norm(embedded), self.feature_norm(features))
    return self.join(jnp.concatenate(parts, axis=-1))

  def hidden(
    self, embedded: Array, features: Array, positions: Array, segments: Array
  ) -> Array:
    x = self.layer.packed(
      self.read(embedded, features),
      position_table(self.config, positions),
      packed_mask(segments),
    )
    return self.final_norm(x)

  def extend(
    self,
    embedded: Array,
    features: Array,
    positions: Array,
    node_mask: Array,
    cache: KVCache,
    earlier: KVNodes | None,
  ) -> tuple[Array, KVNodes]:
    x, keys, values = self.layer.cached(
      self.read(embedded, features),
      position_table(self.config, positions),
      node_mask,
      cache,
      0,
      earlier,
    )
    return self.final_norm(x), KVNodes((keys,), (values,))


def make_draft_model(
  config: ModelConfig,
  precision: PrecisionConfig,
  *,
  model: LanguageModel,
  constrain: Constrain = anywhere,
) -> DraftModel:
  """Returns the drafter's network for a target.

  Args:
    config: the target's; frozen, `vocabulary` is set.
    precision: the target's; frozen.
    model: the target.
    constrain: as for `make_transformer`.
  """
  # One layer of the target's shape; adapters are the policy's own business.
  config = dataclasses.replace(config, layers=1, lora=LoRAConfig())
  module = Draft(config, precision, constrain)
  dtype = jnp.dtype(precision.compute)

  def init(key: Array) -> Params:
    embedded = jnp.zeros((1, 1, config.width), dtype)
    dummy = jnp.zeros((1, 1), jnp.int32)
    return module.init(
      key, embedded, embedded, dummy, dummy + 1, method='hidden'
    )['params']

  def init_cache(rows: int, capacity: int) -> KVCache:
    return kv_cache.empty(
      rows,
      capacity,
      layers=1,
      kv_heads=config.kv_heads,
      head_dim=config.head_dim or config.width // config.heads,
      dtype=dtype,
    )

  def hidden(
    params: DraftParams,
    tokens: Array,
    features: Array,
    positions: Array,
    segments: Array,
  ) -> Any:
    return module.apply(
      {'params': params.own},
      model.embed(params.policy, tokens),
      features,
      positions,
      segments,
      method='hidden',
    )

  def extend(
    params: DraftParams,
    tokens: Array,
    features: Array,
    positions: Array,
    node_mask: Array,
    cache: KVCache,
    earlier: KVNodes | None,
  ) -> Any:
    return module.apply(
      {'params': params.own},
      model.embed(params.policy, tokens),
      features,
      positions,
      node_mask,
      cache,
      earlier,
      method='extend',
    )

  return DraftModel(
    init=init,
    init_cache=init_cache,
    init_features=lambda rows: jnp.zeros((rows, config.width), dtype),
    hidden=hidden,
    extend=extend,
    axes=logical_axes,
    rounded=functools.partial(round_params, config=config, precision=precision),
  )
