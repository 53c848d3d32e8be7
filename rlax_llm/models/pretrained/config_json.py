"""config.json of published models, and back: Qwen2, Qwen3 and Llama.

Both layouts of rotary positions are read: `rope_theta` with `rope_scaling`, and
the later `rope_parameters`. Every key is one of four kinds: it is read; it is
known to leave the model's function unchanged; it is accepted only with the
value that has no effect; or it is unknown, and refused. Unknown keys are
refused because any later key may change the function, as `is_causal` does. The
tables below were checked key by key against transformers 5.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any
from typing import NamedTuple

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
  kv_heads: int  # where config.json lacks the key; 0: as many as heads


FAMILIES = {
  'LlamaForCausalLM': Family('llama', False, False, 0, 0),
  'Qwen2ForCausalLM': Family('qwen2', True, False, 0, 32),
  'Qwen3ForCausalLM': Family('qwen3', False, True, 128, 32),
}
_SILU = ('silu', 'swish')  # two names of one function
# Keys by which the cache of transformers drops positions.
_WINDOWS = ('sliding_window', 'attention_chunk_size')
_FULL = ('full_attention', 'attention')  # likewise
_READ = frozenset(
  (
    'architectures',
    'model_type',
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'head_dim',
    'max_position_embeddings',
    'original_max_position_embeddings',
    'sliding_window',
    'attention_chunk_size',
    'rms_norm_eps',
    'hidden_act',
    'tie_word_embeddings',
    'layer_types',
    'rope_theta',
    'rope_scaling',
    'rope_parameters',
  )
)


class _Neutral(NamedTuple):
  """A key that is accepted with some values only."""

  values: tuple[Any, ...]  # those without effect
  asks_for: str  # what any other value asks for
  families: tuple[str, ...] = ('llama', 'qwen2', 'qwen3')  # others ignore it


_OFF, _NONE = (None, False), (None,)
_NEUTRAL = {
  # Null is not neutral: transformers tests `not config.is_causal`.
  'is_causal': _Neutral((True,), 'attention to later tokens'),
  'attention_bias':  # Of Qwen2 the key says nothing: its biases are fixed.
  _Neutral(_OFF, 'a bias on the output of attention', ('llama', 'qwen3')),
  'mlp_bias': _Neutral(_OFF, 'a bias in the MLP'),
  'use_sliding_window': _Neutral(_OFF, 'attention within a sliding window'),
  'kv_sharing_modes': _Neutral(
    _NONE, 'sharing of keys and values between layers'
  ),
  'partial_rotary_factor': _Neutral(
    (None, 1.0), 'rotation of a part of each head'
  ),
  'rope_interleaved': _Neutral(_OFF, 'rotation of neighbouring dimensions'),
  'use_mrope': _Neutral(_OFF, 'multimodal rotary positions'),
  'per_layer_config': _Neutral(
    (None, {}), 'a config that differs from layer to layer'
  ),
  'pruned_heads': _Neutral((None, {}), 'removal of heads'),
  'is_encoder_decoder': _Neutral(_OFF, 'an encoder'),
  'add_cross_attention': _Neutral(_OFF, 'cross-attention'),
  'cross_attention_hidden_size': _Neutral(_NONE, 'cross-attention'),
  'quantization_config': _Neutral(_NONE, 'reading quantized weights'),
  'quantization': _Neutral(_NONE, 'reading quantized weights'),
  'fusion_config': _Neutral((None, {}), 'replacement of modules'),
  'transformers_weights': _Neutral(
    _NONE, 'reading weights from a file of another name'
  ),
  'auto_map': _Neutral((None, {}), "running the model's own code"),
}
# Keys that leave the function of these architectures unchanged.
_HARMLESS = frozenset(
  (
    # Where the file came from, and what wrote it.
    '_name_or_path',
    'name_or_path',
    '_commit_hash',
    'transformers_version',
    'is_llama_config',
    'unsloth_fixed',
    'unsloth_version',
    'transformers.js_config',
    # How weights are stored, initialised and trained.
    'dtype',
    'torch_dtype',
    '_pre_quantization_dtype',
    'use_bfloat16',
    'initializer_range',
    'attention_dropout',  # only training in transformers drops anything
    'gradient_checkpointing',
    # Read together with use_sliding_window only.
    'max_window_layers',
    # How the function is computed, and what is returned beside the logits.
    'use_cache',
    'pretraining_tp',
    'attn_implementation',
    '_attn_implementation',
    '_attn_implementation_autoset',
    '_flash_attn_2_enabled',
    'chunk_size_feed_forward',
    'torchscript',
    'return_dict',
    'output_hidden_states',
    'output_attentions',
    'tie_last_hidden_states',
    'max_sequence_length',  # of LLaMA 1; max_position_embeddings repeats it
    # Other heads than that of a language model, other kinds of models.
    'id2label',
    'label2id',
    'num_labels',
    'problem_type',
    'finetuning_task',
    'task_specific_params',
    'is_decoder',
    'tie_encoder_decoder',
    'tf_legacy_loss',
    # Special tokens: the tokenizer and the export read them.
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
    'sep_token_id',
    'decoder_start_token_id',
    'tokenizer_class',
    'prefix',
    # Settings of `generate` in transformers; a run has a sampling law of its
    # own.
    'max_length',
    'min_length',
    'do_sample',
    'early_stopping',
    'num_beams',
    'num_beam_groups',
    'diversity_penalty',
    'temperature',
    'top_k',
    'top_p',
    'typical_p',
    'epsilon_cutoff',
    'eta_cutoff',
    'repetition_penalty',
    'encoder_repetition_penalty',
    'length_penalty',
    'no_repeat_ngram_size',
    'encoder_no_repeat_ngram_size',
    'bad_words_ids',
    'num_return_sequences',
    'output_scores',
    'return_dict_in_generate',
    'forced_bos_token_id',
    'forced_eos_token_id',
    'remove_invalid_values',
    'exponential_decay_length_penalty',
    'suppress_tokens',
    'begin_suppress_tokens',
    'max_new_tokens',
    'min_new_tokens',
    'min_p',
    'num_assistant_tokens',
    'num_assistant_tokens_schedule',
    'assistant_confidence_threshold',
    'assistant_lookbehind',
    'target_lookbehind',
  )
)
_NAMED = 8  # unknown keys named in one message
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
    if (
      not isinstance(value, kinds)
      or (kind is not bool and isinstance(value, bool))
      or (kind in (int, float) and not 0 < value < float('inf'))
    ):
      what = {int: 'a whole number above 0', float: 'a number above 0'}
      self.refuse(
        f'has {name}={value!r}; it must be '
        f'{what.get(kind, f"of type {kind.__name__}")}'
      )
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
    raise ConfigError(
      f'{where} holds no JSON object; it is not the config of a model'
    )
  read = _Reader(items, where)
  family = _family(items, read)
  _check_keys(items, family, read)
  activation = read('hidden_act', str, 'silu')
  if activation not in _SILU:
    read.refuse(f'has hidden_act={activation!r}; only silu is implemented')
  heads = read('num_attention_heads', int)
  kv_heads = heads
  if 'num_key_value_heads' not in items:
    kv_heads = family.kv_heads or heads
  layers = read('num_hidden_layers', int)
  _check_layer_types(layers, read)
  model = ModelConfig(
    vocabulary=read('vocab_size', int),
    layers=layers,
    width=read('hidden_size', int),
    heads=heads,
    kv_heads=read('num_key_value_heads', int, kv_heads),
    mlp_width=read('intermediate_size', int),
    max_positions=read('max_position_embeddings', int),
    norm_epsilon=float(read('rms_norm_eps', float, 1e-6)),
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    tied_head=read('tie_word_embeddings', bool, False),
  )
  # Qwen reads windows with use_sliding_window only, which is refused.
  for name in _WINDOWS if family.model_type == 'llama' else ():
    if read(name, int, model.max_positions) < model.max_positions:
      read.refuse(
        f'has {name}={items[name]}, fewer positions than '
        f'max_position_embeddings={model.max_positions}: attention '
        'within a window is not implemented; use another model'
      )
  head_dim = read('head_dim', int, family.head_dim)
  if not head_dim and model.width % heads:
    read.refuse(
      f'has hidden_size={model.width}, which is not divisible by '
      f'num_attention_heads={heads}, and no head_dim'
    )
  model.head_dim = head_dim or model.width // heads
  if heads % model.kv_heads:
    read.refuse(
      f'has num_attention_heads={heads}, which is not divisible by '
      f'num_key_value_heads={model.kv_heads}'
    )
  if model.head_dim % 2:
    read.refuse(
      f'has head_dim={model.head_dim}; rotary positions need an even one'
    )
  return dataclasses.replace(model, **_rope(items, read))


def _check_keys(
  items: Mapping[str, Any], family: Family, read: _Reader
) -> None:
  """Refuses keys that ask for what is not implemented, and unknown keys."""
  for name, key in _NEUTRAL.items():
    if (
      name in items
      and family.model_type in key.families
      and items[name] not in key.values
    ):
      read.refuse(
        f'has {name}={items[name]!r}: {key.asks_for} is not '
        'implemented; use another model'
      )
  known = _READ | _HARMLESS | _NEUTRAL.keys()
  unknown = sorted(items.keys() - known)
  if unknown:
    names = ', '.join(map(repr, unknown[:_NAMED]))
    more = len(unknown) - _NAMED
    read.refuse(
      f'has keys that are not known: {names}'
      f'{f" and {more} more" if more > 0 else ""}'
      '. A key may change what the model computes; delete keys that '
      f'do not, or use another model{nearest(unknown[0], known)}'
    )


def _check_layer_types(layers: int, read: _Reader) -> None:
  """Refuses layers of other kinds, and a list of another length."""
  kinds = read('layer_types', list, None)
  if kinds is None:
    return
  for kind in kinds:
    if kind not in _FULL:
      read.refuse(
        f'has layer_types with {kind!r}: only full_attention is '
        'implemented; use another model'
      )
  if len(kinds) != layers:
    read.refuse(
      f'has {len(kinds)} layer_types, but num_hidden_layers={layers}'
      '; correct one of them'
    )


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
    read.refuse(
      f'is of architecture {name!r}{nearest(str(name), FAMILIES)}; '
      f'implemented are {", ".join(FAMILIES)}'
    )
  family = FAMILIES[name]
  if read('model_type', str, family.model_type) != family.model_type:
    read.refuse(
      f'has model_type={items["model_type"]!r}, but its architecture '
      f'{name} is of type {family.model_type!r}'
    )
  return family


def _rope(items: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
  """Returns the fields rope_* from the old and the new layout."""
  parts = []
  for name in ('rope_scaling', 'rope_parameters'):
    part = read(name, dict, None)
    if part:
      parts.append(
        _rope_part(
          part,
          read('original_max_position_embeddings', int, None),
          _Reader(part, f'{name} of {read.where}'),
        )
      )
  # Either layout may give the base apart.
  bases = (
    {float(read('rope_theta', float, 1e4))}
    if items.get('rope_theta') is not None
    else set()
  )
  bases |= {part.pop('rope_theta') for part in parts if 'rope_theta' in part}
  if len(bases) > 1:
    read.refuse(
      f'gives rope_theta as {" and as ".join(map(str, sorted(bases)))}'
      '; keep one'
    )
  if parts and parts[0] != parts[-1]:
    read.refuse('has rope_scaling and rope_parameters that differ; keep one')
  base = bases.pop() if bases else 1e4
  return (parts[0] if parts else {}) | {'rope_theta': base}


# Kind of scaling -> the keys that it reads besides those of all kinds.
_ROPE_KEYS = {
  'default': (),
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
}
_ROPE_COMMON = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor')


def _rope_part(
  part: Mapping[str, Any], original: int | None, read: _Reader
) -> dict[str, Any]:
  """Returns the fields rope_* that one object gives.

  Args:
    part: the object.
    original: original_max_position_embeddings beside the object, if any.
    read: of the object.
  """
  if any(isinstance(value, Mapping) for value in part.values()):
    read.refuse(
      'differs from layer to layer, which is not implemented; use another model'
    )
  if part.get('partial_rotary_factor') not in (None, 1.0):
    read.refuse(
      f'has partial_rotary_factor={part["partial_rotary_factor"]!r}:'
      ' rotation of a part of each head is not implemented; use '
      'another model'
    )
  kind = read('rope_type', str, read('type', str, 'default'))
  if read('type', str, kind) != kind:
    read.refuse(f'has rope_type={kind!r} and type={part["type"]!r}; keep one')
  fields: dict[str, Any] = {}
  theta = read('rope_theta', float, None)
  if theta is not None:
    fields['rope_theta'] = float(theta)
  if kind not in _ROPE_KEYS:
    read.refuse(
      f'has rope_type={kind!r}; implemented are default, linear and llama3'
    )
  known = (*_ROPE_COMMON, *_ROPE_KEYS[kind])
  for name, value in part.items():
    if name not in known and value is not None:
      read.refuse(
        f'has {name!r}: {str(value)[:40]!r}, which rope_type={kind!r} does '
        'not read; delete it, or correct rope_type'
      )
  if kind == 'default':
    return fields
  fields |= dict(rope_scaling=kind, rope_factor=float(read('factor', float)))
  if kind == 'llama3':
    within = read('original_max_position_embeddings', int, original)
    if within != (original or within):
      read.refuse(
        f'has original_max_position_embeddings={within}, but beside '
        f'it the file has {original}; keep one'
      )
    fields |= dict(
      rope_low=float(read('low_freq_factor', float)),
      rope_high=float(read('high_freq_factor', float)),
      rope_original=within or read('original_max_position_embeddings', int),
    )
    if fields['rope_low'] >= fields['rope_high']:
      read.refuse(
        f'has low_freq_factor={fields["rope_low"]}, which must be '
        f'below high_freq_factor={fields["rope_high"]}'
      )
  return fields


def merge(
  user: ModelConfig, published: ModelConfig, where: str
) -> dict[str, Any]:
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
      raise ConfigError(
        f'model.{name}={mine!r}, but {where} says {theirs!r}; '
        'leave it out: model.pretrained decides it'
      )
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
    name
    for name, family in FAMILIES.items()
    if (family.qkv_bias, family.qk_norm) == (model.qkv_bias, model.qk_norm)
  ]
  if not names:
    raise ConfigError(
      f'model.qkv_bias={model.qkv_bias} with model.qk_norm={model.qk_norm} '
      'is of no published architecture; such a model cannot be exported'
    )
  scaling: dict[str, Any] | None = None
  if model.rope_scaling != 'none':
    scaling = dict(rope_type=model.rope_scaling, factor=model.rope_factor)
  if model.rope_scaling == 'llama3':
    scaling |= dict(  # type: ignore[operator]
      low_freq_factor=model.rope_low,
      high_freq_factor=model.rope_high,
      original_max_position_embeddings=model.rope_original,
    )
  return dict(
    architectures=names,
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
    torch_dtype=dtype,
  )
