"""Published weights: config.json, safetensors, folders that do not fit."""

import io
import json
import pathlib
import re
import shutil
import types

from config_helpers import train_quietly
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import published
import pytest
import safetensors.numpy
import tokenizer_helpers

from rlax_llm import export
from rlax_llm import sample
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import MeshConfig
from rlax_llm.config import ModelConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.models.pretrained import config_json
from rlax_llm.models.pretrained import loading
from rlax_llm.models.pretrained import safetensors_files
from rlax_llm.models.transformer import make_transformer
from rlax_llm.runtime import sharding
from rlax_llm.workdir import manifest
from rlax_llm.workdir import progress
from rlax_llm.workdir.checkpoint import digest_arrays

BFLOAT16 = ml_dtypes.bfloat16

# Qwen2 in the old layout: 2 layers, width 12, 4 heads of 6, 2 KV heads.
QWEN2 = dict(
  architectures=['Qwen2ForCausalLM'],
  model_type='qwen2',
  vocab_size=11,
  hidden_size=12,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  intermediate_size=10,
  max_position_embeddings=256,
  rope_theta=1e6,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
  use_sliding_window=False,
  sliding_window=4096,
  hidden_act='silu',
  torch_dtype='float32',
)
LLAMA3 = dict(
  rope_type='llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)

LLAMA = dict(architectures=['LlamaForCausalLM'], model_type='llama')


def _config(changes):
  """config.json of the test's model; a change to None removes the key."""
  items = QWEN2 | changes
  return {name: value for name, value in items.items() if value is not None}


def _read(changes):
  return config_json.from_config_json(_config(changes), 'config.json')


def _tensors(model, seed=0, dtype=np.float32):
  """Random tensors, shapes written out by hand from the published layout."""
  rng = np.random.default_rng(seed)
  d, f, hd = model.width, model.mlp_width, model.head_dim
  shapes = {'model.embed_tokens.weight': (model.vocabulary, d)}
  for i in range(model.layers):
    prefix = f'model.layers.{i}'
    shapes |= {
      f'{prefix}.self_attn.q_proj.weight': (model.heads * hd, d),
      f'{prefix}.self_attn.k_proj.weight': (model.kv_heads * hd, d),
      f'{prefix}.self_attn.v_proj.weight': (model.kv_heads * hd, d),
      f'{prefix}.self_attn.o_proj.weight': (d, model.heads * hd),
      f'{prefix}.mlp.gate_proj.weight': (f, d),
      f'{prefix}.mlp.up_proj.weight': (f, d),
      f'{prefix}.mlp.down_proj.weight': (d, f),
      f'{prefix}.input_layernorm.weight': (d,),
      f'{prefix}.post_attention_layernorm.weight': (d,),
    }
    if model.qkv_bias:
      shapes |= {
        f'{prefix}.self_attn.{n}_proj.bias': (heads * hd,)
        for n, heads in (
          ('q', model.heads),
          ('k', model.kv_heads),
          ('v', model.kv_heads),
        )
      }
    if model.qk_norm:
      shapes |= {
        f'{prefix}.self_attn.{n}_norm.weight': (hd,) for n in ('q', 'k')
      }
  shapes['model.norm.weight'] = (d,)
  if not model.tied_head:
    shapes['lm_head.weight'] = (model.vocabulary, d)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()
  }


def _save(folder, items, tensors, shards=3):
  """Writes a folder with the safetensors library; returns tensor -> file."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(items))
  names = list(tensors)
  where = {}
  for i in range(shards):
    file = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
    part = {name: tensors[name] for name in names[i::shards]}
    safetensors.numpy.save_file(part, folder / file)
    where |= dict.fromkeys(part, file)
  index = {'metadata': {}, 'weight_map': where}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return where


def _abstract(model, dtype='float32', place=None):
  """The parameters' shapes, on one device unless placed."""
  place = place or (
    lambda x: sharding.replicated(sharding.make_mesh(MeshConfig(data=1)))
  )
  init = make_transformer(
    freeze(model), freeze(PrecisionConfig(parameters=dtype))
  ).init
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)),
    jax.eval_shape(init, jax.random.key(0)),
  )


def _load(folder, model, dtype='float32', place=None):
  return loading.load_params(str(folder), model, _abstract(model, dtype, place))


@pytest.fixture(name='folder')
def _folder(tmp_path):
  """A good folder in three shards; tests damage it."""
  _save(tmp_path / 'model', _config({}), _tensors(_read({})))
  return tmp_path / 'model'


def _changed_index(folder, change):
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  change(index['weight_map'])
  path.write_text(json.dumps(index))


def _shard(folder, number):
  return folder / f'model-{number:05d}-of-00003.safetensors'


# ---- config.json -------------------------------------------------------------


def test_architectures_are_read():
  """Law: every field of config.json ends in its own of ModelConfig.

  Mutants: as many KV heads as heads; Qwen3 without its norm; head_dim from
  width / heads where it is given.
  """
  model = _read({})
  assert (
    model.vocabulary,
    model.layers,
    model.width,
    model.heads,
    model.kv_heads,
    model.head_dim,
    model.mlp_width,
    model.max_positions,
  ) == (11, 2, 12, 4, 2, 6, 10, 256)
  assert (model.rope_theta, model.norm_epsilon) == (1e6, 1e-5)
  assert (model.qkv_bias, model.qk_norm, model.tied_head) == (
    True,
    False,
    False,
  )
  llama = _read(
    {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'num_key_value_heads': None,
      'tie_word_embeddings': True,
    }
  )
  assert (llama.kv_heads, llama.qkv_bias, llama.qk_norm, llama.tied_head) == (
    4,
    False,
    False,
    True,
  )
  qwen3 = _read(
    {'architectures': None, 'model_type': 'qwen3', 'head_dim': None}
  )
  assert (qwen3.head_dim, qwen3.qkv_bias, qwen3.qk_norm) == (128, False, True)
  assert _read({'hidden_size': 16, 'head_dim': None}).head_dim == 4


@pytest.mark.parametrize(
  'changes',
  [
    {'rope_theta': 5e5, 'rope_scaling': LLAMA3},
    {'rope_theta': None, 'rope_parameters': LLAMA3 | {'rope_theta': 5e5}},
    {
      'rope_theta': 5e5,
      'rope_scaling': LLAMA3,
      'rope_parameters': LLAMA3 | {'rope_theta': 5e5},
    },
  ],
  ids=['old', 'new', 'both'],
)
def test_both_layouts_of_rope_are_read(changes):
  """Law: the old and the new layout say the same.

  Mutants: the base of rope_parameters dropped; low and high swapped.
  """
  model = _read(changes)
  assert (
    model.rope_theta,
    model.rope_scaling,
    model.rope_factor,
    model.rope_low,
    model.rope_high,
    model.rope_original,
  ) == (5e5, 'llama3', 8.0, 1.0, 4.0, 64)
  linear = _read({'rope_scaling': {'type': 'linear', 'factor': 2}})
  assert (linear.rope_theta, linear.rope_scaling, linear.rope_factor) == (
    1e6,
    'linear',
    2.0,
  )
  plain = _read({'rope_parameters': {'rope_type': 'default'}})
  assert (plain.rope_theta, plain.rope_scaling) == (1e6, 'none')


BAD_CONFIGS = [
  (
    {'architectures': ['Qwen2MoeForCausalLM']},
    ["'Qwen2MoeForCausalLM'", "did you mean 'Qwen2ForCausalLM'"],
  ),
  (
    {'architectures': ['LlamaForCausalLM', 'Qwen2ForCausalLM']},
    ['a list of one'],
  ),
  ({'model_type': 'llama'}, ["'llama'", 'Qwen2ForCausalLM', "'qwen2'"]),
  ({'architectures': None, 'model_type': None}, ["'model_type'"]),
  ({'hidden_size': None}, ["'hidden_size'"]),
  ({'hidden_size': '12'}, ["hidden_size='12'", 'whole number']),
  ({'num_hidden_layers': 0}, ['num_hidden_layers=0', 'above 0']),
  ({'tie_word_embeddings': 1}, ['tie_word_embeddings=1', 'bool']),
  ({'use_sliding_window': True}, ['use_sliding_window=True', 'sliding window']),
  (
    {'layer_types': ['full_attention', 'sliding_attention']},
    ["'sliding_attention'"],
  ),
  (
    {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'attention_bias': True,
    },
    ['attention_bias=True', 'output'],
  ),
  (
    {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'mlp_bias': True,
    },
    ['mlp_bias=True'],
  ),
  ({'hidden_act': 'gelu'}, ["hidden_act='gelu'", 'silu']),
  ({'quantization_config': {'bits': 4}}, ['quantization_config', 'quantized']),
  (
    {'num_key_value_heads': 3},
    ['num_attention_heads=4', 'num_key_value_heads=3'],
  ),
  ({'head_dim': 5}, ['head_dim=5', 'even']),
  ({'hidden_size': 13, 'head_dim': None}, ['hidden_size=13', 'no head_dim']),
  (
    {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}},
    ["rope_type='yarn'", 'linear and llama3'],
  ),
  ({'rope_scaling': {'type': 'linear'}}, ['rope_scaling', "'factor'"]),
  (
    {
      'rope_scaling': {
        k: v for k, v in LLAMA3.items() if k != 'low_freq_factor'
      }
    },
    ["'low_freq_factor'"],
  ),
  (
    {'rope_scaling': LLAMA3 | {'low_freq_factor': 4.0}},
    ['low_freq_factor=4.0', 'below'],
  ),
  (
    {'rope_parameters': {'rope_theta': 1e4}},
    ['rope_theta', '10000.0', '1000000.0'],
  ),
  (
    {'rope_scaling': LLAMA3, 'rope_parameters': LLAMA3 | {'factor': 4.0}},
    ['differ', 'keep one'],
  ),
  (
    {'rope_parameters': {'full_attention': {'rope_type': 'default'}}},
    ['layer to layer'],
  ),
  (
    {'rope_parameters': {'partial_rotary_factor': 0.5}},
    ['partial_rotary_factor=0.5'],
  ),
  ({'partial_rotary_factor': 0.5}, ['partial_rotary_factor=0.5']),
  ({'is_causal': False}, ['is_causal=False', 'later tokens']),
  (
    {'rms_norm_epsilon': 1e-3},
    ["'rms_norm_epsilon'", "'rms_norm_eps'", 'delete'],
  ),
  (
    {'logit_scale': 2.0, 'attn_logit_softcapping': 30.0},
    ["'attn_logit_softcapping', 'logit_scale'"],
  ),
  (
    LLAMA | {'sliding_window': 255},
    ['sliding_window=255', 'max_position_embeddings=256'],
  ),
  (
    LLAMA | {'attention_chunk_size': 128},
    ['attention_chunk_size=128', 'within a window'],
  ),
  (
    {'layer_types': ['full_attention'] * 3},
    ['3 layer_types', 'num_hidden_layers=2'],
  ),
  ({'layer_types': 'full_attention'}, ["layer_types='full_attention'", 'list']),
  (
    {'per_layer_config': {'0': {'rms_norm_eps': 1.0}}},
    ['per_layer_config', 'layer to layer'],
  ),
  (
    {'transformers_weights': 'other.safetensors'},
    ["transformers_weights='other.safetensors'"],
  ),
  (
    {'auto_map': {'AutoModelForCausalLM': 'own.Model'}},
    ['auto_map', 'own code'],
  ),
  ({'quantization': {'bits': 4}}, ['quantization=', 'quantized']),
  (
    {
      'rope_scaling': {
        'rope_type': 'linear',
        'factor': 2.0,
        'attention_factor': 0.5,
      }
    },
    ["'attention_factor'", "'linear'", 'delete'],
  ),
  (
    {'rope_scaling': {'rope_type': 'default', 'factor': 2.0}},
    ["'factor'", "'default'"],
  ),
  (
    {'rope_scaling': {'rope_type': 'default', 'type': 'linear'}},
    ["rope_type='default'", "type='linear'"],
  ),
  (
    {'rope_scaling': LLAMA3, 'original_max_position_embeddings': 128},
    ['original_max_position_embeddings=64', '128', 'keep one'],
  ),
  # transformers takes 32 where the key of a Qwen model is absent.
  (
    {'num_key_value_heads': None},
    ['num_attention_heads=4', 'num_key_value_heads=32'],
  ),
]


@pytest.mark.parametrize(
  'changes, words', BAD_CONFIGS, ids=lambda x: str(x)[:40]
)
def test_bad_configs_are_refused(changes, words):
  """Law: one line that names the file, the key and the value.

  Mutants: mlp_bias not looked at; layer_types not looked at; rope_parameters
  that differ from rope_scaling accepted; whole numbers may be 0; unknown keys
  accepted; is_causal known as harmless.
  """
  with pytest.raises(ConfigError) as caught:
    _read(changes)
  for word in ['config.json', *words]:
    assert word in str(caught.value), caught.value
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', published.KEYS)
def test_keys_of_published_models_are_known(name):
  """Law: a config.json with every key that its family is published with is
  read.

  Mutants: use_mrope unknown; rope_interleaved=False refused.
  """
  model = config_json.from_config_json(published.KEYS[name], 'config.json')
  assert model.layers == published.KEYS[name]['num_hidden_layers']


def test_harmless_keys_and_neutral_values_change_nothing():
  """Law: with a harmless key, whatever its value, or a neutral value, the
  model is the one without; is_causal has one neutral value, and null is none.

  Mutants: is_causal=None neutral; a harmless key refused.
  """
  plain = _read({})
  items = _config({})
  read = lambda name, value: config_json.from_config_json(
    items | {name: value}, 'config.json'
  )
  # pylint: disable=protected-access
  for name in config_json._HARMLESS:
    for value in (None, 7, 'x', {'a': []}):
      assert read(name, value) == plain
  for name, key in config_json._NEUTRAL.items():
    for value in key.values:
      assert read(name, value) == plain
    if 'qwen2' in key.families:
      with pytest.raises(ConfigError, match=f'{name}=7'):
        read(name, 7)
  with pytest.raises(ConfigError, match='is_causal=None'):
    read('is_causal', None)
  assert _read(LLAMA | {'sliding_window': 256}) == _read(LLAMA)
  assert _read({'layer_types': ['attention', 'full_attention']}) == plain
  scaled = {'rope_scaling': LLAMA3}
  assert _read(scaled | {'original_max_position_embeddings': 64}) == _read(
    scaled
  )


def test_config_json_comes_back():
  """Law: to_config_json, then from_config_json, is the identity on models.

  Mutants: rope_original dropped; tied_head negated.
  """
  for changes in (
    {},
    {'rope_scaling': LLAMA3},
    {
      'rope_scaling': {'type': 'linear', 'factor': 3.0},
      'tie_word_embeddings': True,
    },
    {'architectures': None, 'model_type': 'qwen3'},
    {'architectures': None, 'model_type': 'llama'},
  ):
    model = _read(changes)
    written = config_json.to_config_json(model, 'float32')
    assert (
      config_json.from_config_json(json.loads(json.dumps(written)), 'x')
      == model
    )
  with pytest.raises(ConfigError, match='no published architecture'):
    config_json.to_config_json(ModelConfig(qkv_bias=True, qk_norm=True), '')


# ---- Files -------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [np.float32, BFLOAT16, np.float16])
def test_files_are_those_of_the_library(tmp_path, dtype):
  """Law: what we write, the safetensors library reads, and the reverse.

  Mutants: offsets that do not begin at 0; a header length that is too large.
  """
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(size=shape).astype(dtype)
    for name, shape in (('a', (3, 5)), ('b.weight', (7,)), ('c', (2, 1, 4)))
  }
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  safetensors_files.write_file(
    tmp_path / 'ours', shapes, np.dtype(dtype), tensors.__getitem__
  )
  theirs = safetensors.numpy.load_file(tmp_path / 'ours')
  safetensors.numpy.save_file(tensors, tmp_path / 'theirs')
  for path in (tmp_path / 'ours', tmp_path / 'theirs'):
    header = safetensors_files.read_header(path)
    assert header.keys() == tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
      got = safetensors_files.read_rows(header[name], slice(0, tensor.shape[0]))
      np.testing.assert_array_equal(got, tensor)
      np.testing.assert_array_equal(theirs[name], tensor)
      part = safetensors_files.read_rows(header[name], slice(1, 2))
      np.testing.assert_array_equal(part, tensor[1:2])


# ---- Import ------------------------------------------------------------------


@pytest.mark.parametrize('family', ['qwen2', 'qwen3', 'llama'])
@pytest.mark.parametrize('tied', [False, True])
def test_tensors_lie_where_the_model_reads_them(tmp_path, family, tied):
  """Law: every parameter equals its published tensors, written out by hand.

  The projections of x by head equal x @ W.T by head. Mutants: k and v
  swapped; gate and up swapped.
  """
  changes = dict(architectures=None, model_type=family)
  model = _read(changes | {'tie_word_embeddings': tied})
  tensors = _tensors(model)
  _save(tmp_path, _config(changes), tensors)
  params = jax.device_get(_load(tmp_path, model))
  np.testing.assert_array_equal(
    params['embedding'], tensors['model.embed_tokens.weight']
  )
  if not tied:
    np.testing.assert_array_equal(params['head'], tensors['lm_head.weight'].T)
  rng = np.random.default_rng(1)
  for i in range(2):
    layer, prefix = params[f'layer_{i}'], f'model.layers.{i}'
    weight = lambda name: tensors[f'{prefix}.{name}.weight']
    for ours, theirs in (
      ('attention_norm', 'input_layernorm'),
      ('mlp_norm', 'post_attention_layernorm'),
    ):
      np.testing.assert_array_equal(layer[ours]['scale'], weight(theirs))
    if family == 'qwen3':
      for ours, theirs in (('query_norm', 'q_norm'), ('key_norm', 'k_norm')):
        np.testing.assert_array_equal(
          layer[ours]['scale'], weight(f'self_attn.{theirs}')
        )
    for ours, theirs in (
      ('output', 'self_attn.o_proj'),
      ('down', 'mlp.down_proj'),
    ):
      np.testing.assert_array_equal(layer[ours]['kernel'], weight(theirs).T)
    x = rng.normal(size=12)
    joint = np.einsum('d,dkgh->kgh', x, layer['query_key_value']['kernel'])
    if family == 'qwen2':
      joint += layer['query_key_value']['bias']
    for name, got in (
      ('q', joint[:, :2].reshape(-1)),
      ('k', joint[:, 2].reshape(-1)),
      ('v', joint[:, 3].reshape(-1)),
    ):
      want = weight(f'self_attn.{name}_proj') @ x
      if family == 'qwen2':
        want += tensors[f'{prefix}.self_attn.{name}_proj.bias']
      np.testing.assert_allclose(got, want, atol=1e-5)
    for j, name in enumerate(('gate', 'up')):
      np.testing.assert_array_equal(
        layer['gate_up']['kernel'][:, j], weight(f'mlp.{name}_proj').T
      )


@pytest.mark.parametrize('stored', [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize('wanted', ['float32', 'bfloat16'])
def test_weights_are_cast_to_the_configured_dtype(tmp_path, stored, wanted):
  """Law: what is loaded is NumPy's cast of what is stored, bit for bit.

  Mutants: bits reinterpreted instead of cast; F16 unknown.
  """
  model = _read({})
  tensors = _tensors(model, dtype=stored)
  _save(tmp_path, _config({}), tensors)
  exact = {name: t.astype(np.float32) for name, t in tensors.items()}
  _save(tmp_path / 'exact', _config({}), exact)
  want = jax.tree.map(
    lambda x: np.asarray(x).astype(wanted), _load(tmp_path / 'exact', model)
  )
  got = _load(tmp_path, model, wanted)
  assert digest_arrays(got) == digest_arrays(want)


def test_every_sharding_loads_the_same_bits(folder):
  """Law: whatever axis is divided over devices, the parameters are the same,
  and a device reads no more rows than its part needs.

  Mutants: a shard reads from row 0; the second of the split axes ignored.
  """
  model = _read({})
  want = digest_arrays(_load(folder, model))
  mesh = sharding.make_mesh(MeshConfig(data=2))
  for axis in range(4):

    def place(x, axis=axis):
      spec = [None] * x.ndim
      if axis < x.ndim and x.shape[axis] % 2 == 0:
        spec[axis] = 'data'
      return NamedSharding(mesh, PartitionSpec(*spec))

    params = _load(folder, model, place=place)
    assert digest_arrays(params) == want
    if axis == 0:
      kernel = params['layer_0']['query_key_value']['kernel']
      assert kernel.addressable_shards[0].data.shape == (6, 2, 4, 6)


def test_a_stored_copy_of_a_tied_head_must_be_equal(tmp_path):
  """Law: an equal copy is accepted, another is refused.

  Mutant: the comparison left out.
  """
  changes = {'tie_word_embeddings': True}
  model = _read(changes)
  tensors = _tensors(model)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  _save(tmp_path, _config(changes), tensors)
  _load(tmp_path, model)
  tensors['lm_head.weight'][-1, -1] += 1
  _save(tmp_path, _config(changes), tensors)
  with pytest.raises(ConfigError, match='tie_word_embeddings=true'):
    _load(tmp_path, model)


def _frequencies(theta=1e6, divided=1.0):
  """Those of a head of 6, as Llama's first code wrote them."""
  return (1 / theta ** (np.arange(0, 6, 2) / 6) / divided).astype(np.float32)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize('scaled', [False, True])
def test_stored_rotary_frequencies_are_skipped(tmp_path, dtype, scaled):
  """Law: Llama 2 is published with them; they change no bit of the
  parameters. Scaled models may store either kind.

  Mutants: they belong to no parameter; scaled ones are refused; compared
  exactly.
  """
  changes = LLAMA | (
    {'rope_scaling': {'type': 'linear', 'factor': 4.0}} if scaled else {}
  )
  model = _read(changes)
  tensors = _tensors(model, dtype=dtype)
  _save(tmp_path / 'plain', _config(changes), tensors)
  want = digest_arrays(_load(tmp_path / 'plain', model))
  for divided in (1.0, 4.0)[: 1 + scaled]:
    stored = _frequencies(divided=divided).astype(dtype)
    names = [f'model.layers.{i}.self_attn' for i in range(2)] + ['model']
    _save(
      tmp_path,
      _config(changes),
      tensors | {f'{name}.rotary_emb.inv_freq': stored for name in names},
    )
    assert digest_arrays(_load(tmp_path, model)) == want


INV_FREQ = 'model.layers.1.self_attn.rotary_emb.inv_freq'


@pytest.mark.parametrize(
  'name, stored, words',
  [
    (INV_FREQ, _frequencies(theta=1e4), ['rope_theta=1e+06', 'correct rope']),
    (INV_FREQ, np.full(3, np.nan, np.float32), ['other rotary frequencies']),
    (INV_FREQ, _frequencies()[:2], ['has shape [2], not [3]']),
    (INV_FREQ, np.zeros(3, np.int32), ['dtype I32']),
    (INV_FREQ.replace('1', '2'), _frequencies(), ['belongs to no parameter']),
    ('rotary_emb.inv_freq', _frequencies(), ['belongs to no parameter']),
  ],
)
def test_other_buffers_are_refused(tmp_path, name, stored, words):
  """Law: what is no rotary frequency of this model is no stray to skip.

  Mutants: any name that ends in inv_freq is skipped; the values are not
  compared.
  """
  model = _read(LLAMA)
  _save(tmp_path, _config(LLAMA), _tensors(model) | {name: stored})
  with pytest.raises(ConfigError) as caught:
    loading.find_tensors(str(tmp_path), model)
  for word in [name, *words]:
    assert word in str(caught.value), caught.value


# ---- Folders that do not fit -------------------------------------------------


def _rewrite(path, change):
  tensors = dict(safetensors.numpy.load_file(path))
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def _truncate(folder):
  path = _shard(folder, 2)
  path.write_bytes(path.read_bytes()[:-4])


def _lengthen(folder):
  path = _shard(folder, 2)
  path.write_bytes(path.read_bytes() + b'1234')


def _double_in_header(folder):
  path = _shard(folder, 1)
  header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2
  header = header[:-1].replace(b',{', b',') + b'}'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))


def _rename(folder):
  _rewrite(_shard(folder, 1), lambda t: t.update(odd=t.pop(sorted(t)[0])))


NORM = 'model.norm.weight'
BAD_FOLDERS = [
  (lambda f: _shard(f, 2).unlink(), ['model-00002-of-00003', 'missing']),
  (_truncate, ['model-00002-of-00003', 'truncated', 'bytes']),
  (_lengthen, ['model-00002-of-00003', 'too long']),
  (lambda f: _shard(f, 2).write_bytes(b'abc'), ['00002', 'incomplete']),
  (
    lambda f: _shard(f, 2).write_bytes(b'\2' + bytes(7) + b'[]'),
    ['00002', 'no safetensors header'],
  ),
  (_double_in_header, ['00001', 'names a twice']),
  (_rename, ['odd', 'belongs to no parameter', 'is not in model-00001']),
  (
    lambda f: _rewrite(
      _shard(f, 1), lambda t: t.update({NORM: np.zeros(12, np.float32)})
    ),
    [NORM, 'is in model-00001', 'and in model-000', 'says model-000'],
  ),
  (
    lambda f: _changed_index(f, lambda m: m.pop(NORM)),
    [NORM, 'says nothing of it'],
  ),
  (
    lambda f: _changed_index(f, lambda m: m.update(ghost=_shard(f, 1).name)),
    ['ghost is not in model-00001'],
  ),
  (
    lambda f: _changed_index(f, lambda m: m.update(ghost='../x')),
    ['is no index', 'elsewhere'],
  ),
  (
    lambda f: (f / 'model.safetensors.index.json').write_text('[]'),
    ['is no index'],
  ),
  (
    lambda f: (f / 'model.safetensors.index.json').unlink(),
    ['neither', 'model-00001-of-00003'],
  ),
  (
    lambda f: shutil.copy(_shard(f, 1), f / 'stray.safetensors'),
    ['stray.safetensors is not listed'],
  ),
]


@pytest.mark.parametrize('damage, words', BAD_FOLDERS)
def test_damaged_folders_are_refused(folder, damage, words):
  """Law: one line that names the file or the tensor; no tensor is read.

  Mutants: sizes not compared; duplicates across shards accepted; files that
  the index does not list accepted.
  """
  model = _read({})
  loading.find_tensors(str(folder), model)
  damage(folder)
  with pytest.raises(ConfigError) as caught:
    loading.find_tensors(str(folder), model)
  message = str(caught.value)
  assert '\n' not in message and repr(str(folder)) in message
  for word in words:
    assert word in message, message


def test_all_problems_are_in_one_message(tmp_path):
  """Law: missing, extra, misshapen and mistyped tensors are named together.

  Mutant: the first problem raises.
  """
  model = _read({})
  tensors = _tensors(model)
  del tensors['model.layers.1.mlp.up_proj.weight']
  tensors['model.layers.2.mlp.up_proj.weight'] = np.zeros(3, np.float32)
  tensors['model.norm.weight'] = np.zeros((12, 1), np.float32)
  tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(np.float64)
  _save(tmp_path, _config({}), tensors)
  with pytest.raises(ConfigError) as caught:
    loading.find_tensors(str(tmp_path), model)
  for word in (
    'model.layers.1.mlp.up_proj.weight is missing',
    'model.layers.2.mlp.up_proj.weight in model-0',
    'model.norm.weight has shape [12, 1], not [12]',
    'lm_head.weight is of dtype F64',
    'convert the weights to F32',
  ):
    assert word in str(caught.value), caught.value
  assert 'more' not in str(caught.value)
  _save(tmp_path, _config({}), {'odd': np.zeros(1, np.float32)}, shards=1)
  with pytest.raises(ConfigError, match=r'and \d+ more'):
    loading.find_tensors(str(tmp_path), model)


def _unlist(folder):
  (folder / 'model.safetensors.index.json').unlink()


def _empty(folder):
  for path in folder.glob('*safetensors*'):
    path.unlink()


REMEDIES = [
  (lambda f: _shard(f, 2).unlink(), 'fetch the missing files'),
  (_truncate, 'fetch the damaged files again'),
  (
    lambda f: (f / 'model.safetensors.index.json').write_text('[]'),
    'fetch the damaged files again',
  ),
  (lambda f: _shard(f, 2).write_bytes(b'abc'), 'fetch the damaged files again'),
  (
    lambda f: shutil.copy(_shard(f, 1), f / 'stray.safetensors'),
    'move the files that model.safetensors.index.json does not list out',
  ),
  (_unlist, 'fetch model.safetensors.index.json, or leave'),
  (_empty, 'give a folder with safetensors files'),
  (
    lambda f: _changed_index(f, lambda m: m.pop(NORM)),
    'fetch model.safetensors.index.json and the files that it lists',
  ),
  (
    lambda f: _rewrite(
      _shard(f, 1), lambda t: t.update({sorted(t)[0]: np.zeros(1, np.float32)})
    ),
    'give the config.json of',
  ),
]


@pytest.mark.parametrize('damage, remedy', REMEDIES)
def test_the_remedy_fits_the_cause(folder, damage, remedy):
  """Law: the message ends in what mends this damage, and nothing else.

  Mutant: one remedy for all.
  """
  damage(folder)
  with pytest.raises(ConfigError) as caught:
    loading.find_tensors(str(folder), _read({}))
  _, found = str(caught.value).split('. To mend it: ')
  assert found.startswith(remedy) and ';' not in found, found


def test_the_remedy_of_a_tensor_that_is_left_over(tmp_path):
  """Law: nothing is to be fetched where a tensor has no parameter, or a file
  no place.

  Mutants: as of missing tensors; read_config asks for the whole folder.
  """
  model = _read({})
  _save(
    tmp_path, _config({}), _tensors(model) | {'odd': np.zeros(1, np.float32)}
  )
  with pytest.raises(ConfigError, match='delete the tensors') as caught:
    loading.find_tensors(str(tmp_path), model)
  assert 'fetch' not in str(caught.value)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ConfigError, match='is no JSON.*fetch this file again'):
    loading.read_config(str(tmp_path))


# ---- Export ------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shards', [1, 4])
def test_export_then_import_is_bit_equal(tmp_path, folder, dtype, shards):
  """Law: import, export, import: the same bits, and the tensors are those
  that were first read; every file is below the limit.

  Mutants: axes not turned back; the index says the first file of all.
  """
  model = _read({})
  params = _load(folder, model, dtype)
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  out = tmp_path / 'deep' / 'out'
  limit = total if shards == 1 else total // 3
  export.export_folder(
    str(out),
    model,
    params,
    token_ids={'eos_token_id': [7]},
    files=[folder / 'config.json'][:0],
    shard_bytes=limit,
  )
  files = sorted(out.glob('*.safetensors'))
  assert (len(files) == 1) == (shards == 1)
  assert all(path.stat().st_size < limit + 2**13 for path in files)
  items = loading.read_config(str(out))
  assert items['eos_token_id'] == [7] and items['torch_dtype'] == dtype
  assert config_json.from_config_json(items, 'x') == model
  again = _load(out, model, dtype)
  assert digest_arrays(again) == digest_arrays(params)
  read = {}
  for path in files:
    read |= safetensors.numpy.load_file(path)
  for name, tensor in _tensors(model).items():
    np.testing.assert_array_equal(read[name], tensor.astype(dtype))
  assert [p.name for p in out.parent.iterdir()] == ['out']


def test_export_gathers_divided_parameters(tmp_path, folder):
  """Law: parameters divided over devices are exported whole.

  Mutant: only the first shard fetched.
  """
  model = _read({})
  mesh = sharding.make_mesh(MeshConfig(data=2))
  spec = lambda x: (
    PartitionSpec('data') if x.shape[0] % 2 == 0 else (PartitionSpec())
  )
  params = _load(folder, model, place=lambda x: NamedSharding(mesh, spec(x)))
  out = tmp_path / 'out'
  export.export_folder(str(out), model, params, token_ids={}, files=[])
  assert digest_arrays(_load(out, model)) == digest_arrays(_load(folder, model))


def test_export_appears_whole_or_not_at_all(tmp_path, folder, monkeypatch):
  """Law: a failure leaves nothing behind; a target with content is refused
  and stays as it was.

  Mutants: written in place; the check of the target left out.
  """
  model = _read({})
  params = _load(folder, model)
  out = tmp_path / 'out'
  write = lambda: export.export_folder(
    str(out), model, params, token_ids={}, files=[]
  )
  with monkeypatch.context() as patch:
    patch.setattr(export, '_write_json', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      write()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['model']
  out.mkdir()
  write()
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  with pytest.raises(ConfigError, match='not an empty folder'):
    write()
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before


# ---- Runs --------------------------------------------------------------------


def _tiny(folder, **model):
  config = testing.tiny_config()
  config.mesh.data = 1
  config.num_steps = 2
  config.checkpoint.every = 1
  config.rollout.drafter, config.rollout.width = 'none', 1
  fields = dict(pretrained=str(folder), tokenizer=testing.ALPHABET) | model
  config.model = ModelConfig(**fields)
  return config


def test_a_field_that_disagrees_is_refused(folder):
  """Law: a field set to what the folder says, or left alone, is accepted;
  another value is refused. The folder decides the rest.

  Mutants: the user's value wins; the folder's wins without a word.
  """
  run = make_run(_tiny(folder, layers=2, rope_theta=1e6))
  assert run.config.model.heads == 4 and run.model.vocabulary == 11
  with pytest.raises(ConfigError) as caught:
    make_run(_tiny(folder, layers=3))
  for word in ('model.layers=3', 'config.json', 'says 2', 'leave it out'):
    assert word in str(caught.value)
  # What was resolved resolves to itself.
  assert make_run(run.config).config == run.config


def test_the_default_tokenizer_depends_on_the_folder(folder):
  """Law: '' is bytes without a folder and the folder's with one; 'bytes' stays
  bytes with a folder.

  Mutant: '' is always bytes.
  """
  config = testing.tiny_config()
  config.model.tokenizer = ''
  assert loading.resolve(config).model.tokenizer == 'bytes'
  config = _tiny(folder, tokenizer='')
  assert loading.resolve(config).model.tokenizer == 'pretrained'
  with pytest.raises(ConfigError, match='258 ids.*pretrained model.s own'):
    make_run(_tiny(folder, tokenizer='bytes'))


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_continues_without(tmp_path, folder):
  """Law: step 0 has the folder's parameters; the manifest records what they
  were; a continued run needs no weights; the export of step 0 is the folder.

  Mutants: fresh parameters; weights checked in a continued run; export of the
  newest step whatever --step says.
  """
  workdir = str(tmp_path / 'run')
  config = _tiny(folder)
  config.checkpoint.keep = 9
  train_quietly(config, workdir)
  facts = manifest.read_manifest(workdir)['runs'][0]['pretrained']
  assert facts == loading.fingerprint(str(folder))
  run = make_run(config)
  model = _read({})
  want = _load(folder, model)
  _, params, _ = run.states.restore_params(workdir, step=0)
  assert digest_arrays(params) == digest_arrays(want)
  out = tmp_path / 'out'
  assert export.export(workdir, str(out), step=0) == 0
  assert digest_arrays(_load(out, model)) == digest_arrays(want)
  assert loading.read_config(str(out))['eos_token_id'] == [0]
  assert export.export(workdir, str(tmp_path / 'last')) == 2
  assert digest_arrays(_load(tmp_path / 'last', model)) != digest_arrays(want)
  with pytest.raises(ConfigError, match='no checkpoint of step 7; it has 0, 1'):
    export.export(workdir, str(tmp_path / 'none'), step=7)

  for path in folder.glob('*.safetensors*'):
    path.unlink()
  config.num_steps = 3
  summary = train_quietly(config, workdir)
  assert summary['steps'] == 3
  assert sample.load_config(workdir).model.pretrained == str(folder)
  with pytest.raises(ConfigError, match='no safetensors file'):
    train_quietly(config, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


@pytest.mark.slow
def test_weights_may_move(tmp_path, folder):
  """Law: a run goes on with its weights in another place, and is exported with
  them there; other weights are refused.

  Mutants: the folder's name counts; any folder will do.
  """
  workdir, moved = str(tmp_path / 'run'), tmp_path / 'moved'
  config = _tiny(folder)
  config.num_steps = 1
  train_quietly(config, workdir)
  folder.rename(moved)
  with pytest.raises(ConfigError, match='say with --base where'):
    export.export(workdir, str(tmp_path / 'out'))
  assert export.export(workdir, str(tmp_path / 'out'), base=str(moved)) == 1
  config.model.pretrained = str(moved)
  config.num_steps = 2
  assert train_quietly(config, workdir)['steps'] == 2
  tensors = _tensors(_read({}))
  _save(
    tmp_path / 'another', _config({}), {k: v + 1 for k, v in tensors.items()}
  )
  config.model.pretrained = str(tmp_path / 'another')
  with pytest.raises(ConfigError, match='model.pretrained .*another'):
    train_quietly(config, workdir)
  for base in (config.model.pretrained, str(tmp_path)):  # no config.json here
    with pytest.raises(ConfigError, match=f'model.pretrained .*{base}'):
      sample.load_config(workdir, base)


def test_a_published_tokenizer_is_exported_too(tmp_path, folder):
  """Law: with the folder's tokenizer its files and token ids go along, byte for
  byte, and nothing else of the folder; with another tokenizer none do.

  Mutants: the index of the folder's weights copied too; ids that are 0.
  """
  (folder / 'tokenizer.json').write_text('{"a": 1}')
  (folder / 'chat_template.jinja').write_text('x')
  (folder / 'config.json').write_text(json.dumps(QWEN2 | {'eos_token_id': 9}))
  run = make_run(_tiny(folder))
  assert export.tokenizer_facts(run) == (
    {'eos_token_id': [0], 'bos_token_id': 1},
    [],
  )
  own = loading.resolve(_tiny(folder, tokenizer=''))
  ids, files = export.tokenizer_facts(types.SimpleNamespace(config=own))
  assert ids == {'eos_token_id': 9}
  out, model = tmp_path / 'out', _read({})
  export.export_folder(
    str(out), model, _load(folder, model), token_ids=ids, files=files
  )
  assert sorted(p.name for p in out.iterdir()) == [
    'chat_template.jinja',
    'config.json',
    'model.safetensors',
    'tokenizer.json',
  ]
  assert (out / 'tokenizer.json').read_text() == '{"a": 1}'
  assert loading.read_config(str(out))['eos_token_id'] == 9


def test_a_run_prints_the_warnings_of_its_tokenizer(tmp_path):
  """Law: a template without the header of a reply is one `warning:` line.

  Mutant: train.py drops the tokenizer's warnings.
  """
  folder = tmp_path / 'model'
  changes = {'vocab_size': 320, 'num_hidden_layers': 1}
  _save(folder, _config(changes), _tensors(_read(changes)))
  tokenizer_helpers.write(
    folder,
    'qwen',
    chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    '\n{% endfor %}',
  )
  config = _tiny(folder, tokenizer='')
  config.num_steps = config.evaluate.every = 0
  config.evaluate.problems = 1
  config.rollout.prompt_length = 64
  config.task.chat_template = True
  shown = io.StringIO()
  train_quietly(config, tmp_path / 'run', display=progress.Progress(shown))
  lines = [line for line in shown.getvalue().split('\n') if 'warning:' in line]
  assert len(lines) == 1 and 'add_generation_prompt' in lines[0], lines


def test_the_fingerprint_sees_changes(folder):
  """Law: another byte in a tensor, another file name or another config.json
  is another fingerprint; the same content is the same.

  Mutant: only names and sizes are hashed.
  """
  first = loading.fingerprint(str(folder))
  assert first == loading.fingerprint(str(folder))
  path = _shard(folder, 2)
  text = bytearray(path.read_bytes())
  text[-1] ^= 1
  path.write_bytes(bytes(text))
  second = loading.fingerprint(str(folder))
  assert second['weights_sha256'] != first['weights_sha256']
  assert second['config_sha256'] == first['config_sha256']


def test_the_export_command(tmp_path, folder, monkeypatch, capsys):
  """Law: the command writes the folder and says where; it needs --out.

  Mutant: --out not checked.
  """
  workdir = str(tmp_path / 'run')
  config = _tiny(folder)
  config.num_steps = 0
  train_quietly(config, workdir)
  values = dict(
    workdir=workdir,
    out=None,
    base=None,
    step=None,
    adapter=False,
    drafter=False,
  )
  for name, value in values.items():
    monkeypatch.setattr(
      export,
      f'_{name.upper()}',
      types.SimpleNamespace(value=value),
      raising=False,
    )
  with pytest.raises(ConfigError, match='--out is missing'):
    export.main([])
  out = tmp_path / 'out'
  monkeypatch.setattr(export, '_OUT', types.SimpleNamespace(value=str(out)))
  export.main([])
  assert re.search(r'step 0 to .*out', capsys.readouterr().out)
  assert (pathlib.Path(out) / 'model.safetensors').is_file()
