"""config.json of published models, and back: Qwen2, Qwen3 and Llama.

Both layouts of rotary positions are read: `rope_theta` with `rope_scaling`, and
the later `rope_parameters`. Whatever would change the model's function and is
not implemented is refused; a key that is not looked at changes nothing.
"""

import dataclasses
from typing import Any, Mapping, NamedTuple

from rlax_llm.config import ARCHITECTURE_FIELDS
from rlax_llm.config import ConfigError
from rlax_llm.config import ModelConfig
from rlax_llm.config import nearest


class Family(NamedTuple):
  """What an architecture's name says beyond its config.json."""
  model_type: str
  qkv_bias: bool
  qk_norm: bool
  head_dim: int  # where config.json gives none; 0: width / heads


FAMILIES = {
    'LlamaForCausalLM': Family('llama', False, False, 0),
    'Qwen2ForCausalLM': Family('qwen2', True, False, 0),
    'Qwen3ForCausalLM': Family('qwen3', False, True, 128),
}
_SILU = ('silu', 'swish')  # two names of one function
# Key -> (values under which it has no effect, what it would ask for).
_UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    'mlp_bias': ((None, False), 'biases in the MLP'),
    'use_sliding_window': ((None, False), 'attention within a sliding window'),
    'quantization_config': ((None,), 'quantized weights'),
    'partial_rotary_factor': ((None, 1.0), 'rotation of a part of each head'),
}
_REQUIRED: Any = object()


class _Reader:
  """Typed access to the keys of a config.json."""

  def __init__(self, items: Mapping[str, Any], where: str) -> None:
    self._items = items
    self.where = where

  def __call__(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Returns a value; an absent one and null are the default."""
    value: Any = self._items.get(name)
    if value is None:
      if default is _REQUIRED:
        self.refuse(f'has no {name!r}, which this architecture needs')
      return default
    kinds: Any = (int, float) if kind is float else (kind,)
    if (not isinstance(value, kinds) or
        (kind is not bool and isinstance(value, bool)) or
        (kind in (int, float) and not 0 < value < float('inf'))):
      what = {int: 'a whole number above 0', float: 'a number above 0'}
      self.refuse(f'has {name}={value!r}; it must be '
                  f'{what.get(kind, f"of type {kind.__name__}")}')
    return value

  def refuse(self, why: str) -> None:
    raise ConfigError(f'{self.where} {why}')


def from_config_json(items: Any, where: str) -> ModelConfig:
  """Returns the architecture that a config.json describes.

  Args:
    items: its parsed content.
    where: names the file in messages.

  Returns:
    A ModelConfig; fields outside of ARCHITECTURE_FIELDS have their defaults.

  Raises:
    ConfigError: it is of another architecture, lacks a value, or asks for
      something that is not implemented.
  """
  if not isinstance(items, Mapping):
    raise ConfigError(f'{where} holds no JSON object; it is not the config of '
                      'a model')
  read = _Reader(items, where)
  family = _family(items, read)
  for name, (allowed, what) in _UNUSED.items():
    if items.get(name) not in allowed:
      read.refuse(f'has {name}={items[name]!r}: {what} is not implemented; use '
                  'another model')
  # Of Qwen2 the key says nothing: its biases are fixed.
  if family.model_type != 'qwen2' and read('attention_bias', bool, False):
    read.refuse('has attention_bias=True, which puts a bias on the output of '
                'attention: that is not implemented; use another model')
  kinds = set(items.get('layer_types') or ()) - {'full_attention'}
  if kinds:
    read.refuse(f'has layer_types with {sorted(map(str, kinds))[0]!r}: only '
                'full_attention is implemented; use another model')
  activation = read('hidden_act', str, 'silu')
  if activation not in _SILU:
    read.refuse(f'has hidden_act={activation!r}; only silu is implemented')
  heads = read('num_attention_heads', int)
  model = ModelConfig(vocabulary=read('vocab_size', int),
                      layers=read('num_hidden_layers', int),
                      width=read('hidden_size', int),
                      heads=heads,
                      kv_heads=read('num_key_value_heads', int, heads),
                      mlp_width=read('intermediate_size', int),
                      max_positions=read('max_position_embeddings', int),
                      norm_epsilon=float(read('rms_norm_eps', float, 1e-6)),
                      qkv_bias=family.qkv_bias,
                      qk_norm=family.qk_norm,
                      tied_head=read('tie_word_embeddings', bool, False))
  head_dim = read('head_dim', int, family.head_dim)
  if not head_dim and model.width % heads:
    read.refuse(f'has hidden_size={model.width}, which is not divisible by '
                f'num_attention_heads={heads}, and no head_dim')
  model.head_dim = head_dim or model.width // heads
  if heads % model.kv_heads:
    read.refuse(f'has num_attention_heads={heads}, which is not divisible by '
                f'num_key_value_heads={model.kv_heads}')
  if model.head_dim % 2:
    read.refuse(f'has head_dim={model.head_dim}; rotary positions need an even '
                'one')
  return dataclasses.replace(model, **_rope(items, read))


def _family(items: Mapping[str, Any], read: _Reader) -> Family:
  names = items.get('architectures')
  if names is None:
    by_type = {f.model_type: name for name, f in FAMILIES.items()}
    kind = read('model_type', str)
    names = [by_type.get(kind, kind)]
  if not isinstance(names, list) or len(names) != 1:
    read.refuse(f'has architectures={names!r}; give a list of one name')
  name = names[0]
  if name not in FAMILIES:
    read.refuse(f'is of architecture {name!r}{nearest(str(name), FAMILIES)}; '
                f'implemented are {", ".join(FAMILIES)}')
  family = FAMILIES[name]
  if read('model_type', str, family.model_type) != family.model_type:
    read.refuse(f'has model_type={items["model_type"]!r}, but its architecture '
                f'{name} is of type {family.model_type!r}')
  return family


def _rope(items: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
  """Returns the fields rope_* from the old and the new layout."""
  parts = []
  for name in ('rope_scaling', 'rope_parameters'):
    part = read(name, dict, None)
    if part:
      parts.append(_rope_part(part, _Reader(part, f'{name} of {read.where}')))
  # Either layout may give the base apart.
  bases = {float(read('rope_theta', float, 1e4))
          } if items.get('rope_theta') is not None else set()
  bases |= {part.pop('rope_theta') for part in parts if 'rope_theta' in part}
  if len(bases) > 1:
    read.refuse(
        f'gives rope_theta as {" and as ".join(map(str, sorted(bases)))}'
        '; keep one')
  if parts and parts[0] != parts[-1]:
    read.refuse('has rope_scaling and rope_parameters that differ; keep one')
  base = bases.pop() if bases else 1e4
  return (parts[0] if parts else {}) | {'rope_theta': base}


def _rope_part(part: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
  """Returns the fields rope_* that one object gives."""
  if any(isinstance(value, Mapping) for value in part.values()):
    read.refuse('differs from layer to layer, which is not implemented; use '
                'another model')
  if part.get('partial_rotary_factor') not in (None, 1.0):
    read.refuse(f'has partial_rotary_factor={part["partial_rotary_factor"]!r}:'
                ' rotation of a part of each head is not implemented; use '
                'another model')
  kind = read('rope_type', str, read('type', str, 'default'))
  fields: dict[str, Any] = {}
  theta = read('rope_theta', float, None)
  if theta is not None:
    fields['rope_theta'] = float(theta)
  if kind == 'default':
    return fields
  if kind not in ('linear', 'llama3'):
    read.refuse(f'has rope_type={kind!r}; implemented are default, linear and '
                'llama3')
  fields |= dict(rope_scaling=kind, rope_factor=float(read('factor', float)))
  if kind == 'llama3':
    fields |= dict(rope_low=float(read('low_freq_factor', float)),
                   rope_high=float(read('high_freq_factor', float)),
                   rope_original=read('original_max_position_embeddings', int))
    if fields['rope_low'] >= fields['rope_high']:
      read.refuse(f'has low_freq_factor={fields["rope_low"]}, which must be '
                  f'below high_freq_factor={fields["rope_high"]}')
  return fields


def merge(user: ModelConfig, published: ModelConfig,
          where: str) -> dict[str, Any]:
  """Returns the architecture fields of a published model.

  A field that the user left at its default cannot be told from one that was
  not set, so it says nothing.

  Args:
    user: the config's section.
    published: from `from_config_json`.
    where: names the file in messages.

  Raises:
    ConfigError: a field that the user set disagrees.
  """
  default = ModelConfig()
  fields = {}
  for name in ARCHITECTURE_FIELDS:
    mine, theirs = getattr(user, name), getattr(published, name)
    if mine not in (getattr(default, name), theirs):
      raise ConfigError(f'model.{name}={mine!r}, but {where} says {theirs!r}; '
                        'leave it out: model.pretrained decides it')
    fields[name] = theirs
  return fields


def to_config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
  """Returns the config.json of a model, in the layout that all versions read.

  Args:
    model: with its vocabulary.
    dtype: of the stored weights, by its name in NumPy.

  Raises:
    ConfigError: no published architecture has these settings.
  """
  names = [
      name for name, family in FAMILIES.items()
      if (family.qkv_bias, family.qk_norm) == (model.qkv_bias, model.qk_norm)
  ]
  if not names:
    raise ConfigError(
        f'model.qkv_bias={model.qkv_bias} with model.qk_norm={model.qk_norm} '
        'is of no published architecture; such a model cannot be exported')
  scaling: dict[str, Any] | None = None
  if model.rope_scaling != 'none':
    scaling = dict(rope_type=model.rope_scaling, factor=model.rope_factor)
  if model.rope_scaling == 'llama3':
    scaling |= dict(  # type: ignore[operator]
        low_freq_factor=model.rope_low,
        high_freq_factor=model.rope_high,
        original_max_position_embeddings=model.rope_original)
  return dict(architectures=names,
              model_type=FAMILIES[names[0]].model_type,
              vocab_size=model.vocabulary,
              num_hidden_layers=model.layers,
              hidden_size=model.width,
              num_attention_heads=model.heads,
              num_key_value_heads=model.kv_heads,
              head_dim=model.head_dim or model.width // model.heads,
              intermediate_size=model.mlp_width,
              max_position_embeddings=model.max_positions,
              rope_theta=model.rope_theta,
              rope_scaling=scaling,
              rms_norm_eps=model.norm_epsilon,
              hidden_act='silu',
              tie_word_embeddings=model.tied_head,
              use_sliding_window=False,
              attention_bias=False,
              mlp_bias=False,
              torch_dtype=dtype)
