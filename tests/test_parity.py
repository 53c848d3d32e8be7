"""The same function as transformers: logits, completions, log-probabilities.

Needs the extra `[parity]`; skipped without it.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm import export
from rlax_llm.config import ControlConfig
from rlax_llm.config import freeze
from rlax_llm.config import MeshConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.models.pretrained import config_json
from rlax_llm.models.pretrained import loading
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import sharding
from rlax_llm.types import Request
from rlax_llm.types import TRAIN
from rlax_llm.workdir.checkpoint import digest_arrays

torch = pytest.importorskip('torch', reason='needs the extra [parity]')
transformers = pytest.importorskip(
  'transformers', reason='needs the extra [parity]'
)
import safetensors.torch  # noqa: E402  pylint: disable=wrong-import-position

VOCABULARY, POSITIONS = 61, 512
NEW = 24  # tokens of a completion
# Long enough for all three branches of llama3 scaling to matter.
LENGTH = 200
LLAMA3 = dict(
  rope_type='llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
CASES = {
  'qwen2, 4 / 2': ('Qwen2', dict(rope_theta=1e6)),
  'qwen2, tied, 6 / 1': (
    'Qwen2',
    dict(
      num_attention_heads=6,
      num_key_value_heads=1,
      hidden_size=48,
      tie_word_embeddings=True,
    ),
  ),
  'qwen3, heads wider than the model': (
    'Qwen3',
    dict(head_dim=24, rope_theta=1e6),
  ),
  'qwen3, tied, narrow heads': (
    'Qwen3',
    dict(head_dim=6, tie_word_embeddings=True),
  ),
  'llama, 4 / 4': ('Llama', dict(num_key_value_heads=4)),
  'llama, llama3 scaling': ('Llama', dict(rope_theta=5e2, rope_scaling=LLAMA3)),
  'llama, tied, linear scaling, head_dim': (
    'Llama',
    dict(
      rope_scaling=dict(rope_type='linear', factor=4.0),
      head_dim=10,
      tie_word_embeddings=True,
    ),
  ),
}


def _make(folder, name):
  """Writes a random model with transformers and returns it."""
  family, changes = CASES[name]
  fields = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
    rms_norm_eps=1e-5,
    # Large enough for laws that are far from flat.
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=0,
    pad_token_id=0,
  )
  config = getattr(transformers, f'{family}Config')(**(fields | changes))
  torch.manual_seed(0)
  model = getattr(transformers, f'{family}ForCausalLM')(config).float().eval()
  with torch.no_grad():  # biases and norms begin as 0 and 1: nothing to see
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  model.save_pretrained(folder, max_shard_size='20KB')
  return model


def _load(folder):
  """Returns (section, our model, its parameters)."""
  section = config_json.from_config_json(
    loading.read_config(str(folder)), 'config.json'
  )
  model = make_transformer(freeze(section), freeze(PrecisionConfig()))
  place = sharding.replicated(sharding.make_mesh(MeshConfig(data=1)))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  return section, model, loading.load_params(str(folder), section, abstract)


@pytest.fixture(name='pair', scope='module', params=CASES)
def _pair(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('parity')
  theirs = _make(folder, request.param)
  return (folder, theirs, *_load(folder))


# pylint: disable=protected-access
KNOWN = config_json._READ | config_json._HARMLESS | config_json._NEUTRAL.keys()


@pytest.mark.parametrize('family', ['Qwen2', 'Qwen3', 'Llama'])
def test_every_key_of_the_config_classes_is_known(tmp_path, family):
  """Law: no key of transformers is unknown: none of the family's class, of its
  base class, of the settings of `generate` that it moves away, or of the file
  that it writes.

  Mutants: initializer_range or sliding_window taken from the tables.
  """
  config = getattr(transformers, f'{family}Config')()
  names = {field.name for field in dataclasses.fields(config)}
  names |= config.to_dict().keys() | {'torch_dtype', 'rope_scaling'}
  names |= transformers.GenerationConfig._get_default_generation_params().keys()
  config.save_pretrained(tmp_path)
  names |= json.loads((tmp_path / 'config.json').read_text()).keys()
  # Attributes of the class alone, which no file sets.
  assert {
    name for name in names - KNOWN if not name.startswith(('base_model_',))
  } == set()


# Values that these keys may have, and that some model would react to.
STRIKING = dict(
  initializer_range=0.7,
  transformers_version='5.0',
  dtype='bfloat16',
  torch_dtype='bfloat16',
  attention_dropout=0.9,
  attn_implementation='eager',
  _attn_implementation='eager',
  tokenizer_class='X',
  problem_type='regression',
  id2label={'0': 'a'},
  label2id={'a': 0},
)


@pytest.mark.parametrize('family', ['Qwen2', 'Qwen3', 'Llama'])
def test_harmless_keys_do_not_change_the_function(family):
  """Law: with every key that is called harmless set to a striking value at
  once, transformers computes the same logits, up to the order of its sums; with
  is_causal=False it does not.

  Mutant: is_causal among the harmless keys.
  """
  fields = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=0,
  )
  tokens = _tokens(1, 12)
  torch.manual_seed(0)

  def configure(**changes):
    return getattr(transformers, f'{family}Config')(**(fields | changes))

  def make(**changes):
    model = getattr(transformers, f'{family}ForCausalLM')(configure(**changes))
    return model.float().eval()

  plain = make(initializer_range=0.3)
  want = _their_logits(plain, tokens)

  def differs(**changes):
    model = make(**changes)
    model.load_state_dict(plain.state_dict())
    model.config.return_dict = True  # else the logits come in a tuple
    return not np.allclose(_their_logits(model, tokens), want, atol=1e-5)

  def strike(name, flag):
    for value in (STRIKING.get(name, flag), 3):
      try:
        transformers.GenerationConfig.from_model_config(
          configure(**{name: value})
        )  # as the model's constructor does
        return value
      except Exception:  # pylint: disable=broad-except
        continue  # a bool is no value of this key; 3 is one
    raise AssertionError(f'{name} has no value that transformers takes')

  for flag in (True, False):
    assert not differs(
      **{name: strike(name, flag) for name in config_json._HARMLESS}
    )
  assert differs(is_causal=False)


def test_float16_and_stored_frequencies_as_llama_2_is_published(tmp_path):
  """Law: a folder of float16 weights with inv_freq in every layer has the
  logits of transformers, which reads the same folder.

  Mutants: F16 read as BF16; the buffers refused.
  """
  theirs = _make(tmp_path / 'made', 'llama, 4 / 4')
  tensors = {
    name: value.half().contiguous()
    for name, value in theirs.state_dict().items()
  }
  frequencies = theirs.model.rotary_emb.inv_freq.half()
  tensors |= {
    f'model.layers.{i}.self_attn.rotary_emb.inv_freq': frequencies.clone()
    for i in range(2)
  }
  safetensors.torch.save_file(
    tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'}
  )
  shutil.copy(tmp_path / 'made/config.json', tmp_path / 'config.json')
  again = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
  _, model, params = _load(tmp_path)
  np.testing.assert_allclose(
    _our_logits(model, params, _tokens()),
    _their_logits(again, _tokens()),
    atol=2e-4,
  )


def _their_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def _our_logits(model, params, tokens):
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = jax.jit(model.hidden)(
    params,
    jnp.asarray(tokens, jnp.int32),
    order,
    jnp.ones(tokens.shape, jnp.int32),
  )
  return np.asarray(jax.jit(model.logits)(params, hidden))


def _tokens(rows=2, length=LENGTH):
  return np.random.default_rng(3).integers(0, VOCABULARY, (rows, length))


def test_logits_are_equal(pair):
  """Law: float32 logits within 2e-4, and they are far from flat.

  Mutants: up and gate swapped; KV heads in another order; q's bias left out;
  rope scaling left out.
  """
  _, theirs, _, model, params = pair
  want = _their_logits(theirs, _tokens())
  assert want.std() > 0.5
  np.testing.assert_allclose(
    _our_logits(model, params, _tokens()), want, atol=2e-4
  )


def _engine(model, width, sampling):
  """An engine with one capacity and one number of rows: little to compile."""
  return RolloutEngine(
    model,
    rollout=freeze(
      RolloutConfig(
        slots=4,
        width=width,
        prompt_length=16,
        max_new_tokens=NEW,
        min_capacity=48,
        segment_forwards=NEW,
        samples_per_prompt=1,
      )
    ),
    control=freeze(ControlConfig(compact=False)),
    sampling=sampling,
    eos_ids=(0,),
    seed=5,
    mesh=sharding.make_mesh(MeshConfig(data=1)),
    clock=lambda: 0.0,
  )


def _generate(engine, params, store=None):
  """Completions of three prompts."""
  requests = [
    Request(
      prompt=_tokens(3, 16)[i, :length].astype(np.int32),
      samples=1,
      domain=TRAIN,
      step=0,
      request=i,
    )
    for i, length in enumerate((16, 9, 3))
  ]
  rollouts, _ = engine.generate(params, requests, RolloutState(store=store))
  return sorted(rollouts, key=lambda r: r.request.request)


def _complete(model, prompt):
  """The greedy completion of transformers."""
  prompt = torch.tensor(np.asarray(prompt, np.int64))[None]
  with torch.no_grad():
    whole = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=NEW,
    )
  return whole[0, prompt.shape[1] :].tolist()


@pytest.mark.slow
def test_completions_are_equal(pair):
  """Law: greedy completions for W = 1 and W = 4 are those of transformers;
  sampled ones have its log-probabilities within 1e-4.

  The second epoch of W = 4 drafts from the first. Mutants: positions one off
  in `extend`; log-probabilities of another temperature.
  """
  _, theirs, _, model, params = pair
  greedy = Sampling(temperature=0.0)
  store = RolloutStore(history=2, megabytes=1, tokenizer='')
  wide = _engine(model, 4, greedy)
  first = _generate(wide, params, store)
  want = [_complete(theirs, rollout.request.prompt) for rollout in first]
  for rollouts in (
    first,
    _generate(wide, params, store),
    _generate(_engine(model, 1, greedy), params),
  ):
    assert [rollout.tokens.tolist() for rollout in rollouts] == want
  assert wide.stats.metrics()['rollout/accept_length'] > 1.5
  for rollout in _generate(
    _engine(model, 4, Sampling(temperature=0.8)), params
  ):
    text = np.r_[rollout.request.prompt, rollout.tokens]
    logits = torch.tensor(_their_logits(theirs, text[None])[0] / 0.8)
    law = torch.log_softmax(logits, -1).numpy()
    start = len(rollout.request.prompt)
    logprobs = law[np.arange(start - 1, len(text) - 1), text[start:]]
    np.testing.assert_allclose(rollout.behaviour_logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize('shard_bytes', [export.SHARD_BYTES, 30_000])
def test_what_we_export_is_what_transformers_loads(pair, tmp_path, shard_bytes):
  """Law: exported, loaded by transformers: the parameters and logits bit for
  bit, none missing or left over; saved by it and imported: our bits again.

  Mutants: no rope_scaling in config.json; an index that names a wrong file.
  """
  _, theirs, section, model, params = pair
  out = tmp_path / 'out'
  export.export_folder(
    str(out),
    section,
    params,
    token_ids={'eos_token_id': 0},
    files=[],
    shard_bytes=shard_bytes,
  )
  assert (out / 'model.safetensors.index.json').exists() == (
    shard_bytes == 30_000
  )
  kind = type(theirs)
  again, report = kind.from_pretrained(out, output_loading_info=True)
  for name in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    assert not report[name], report
  assert again.dtype == torch.float32
  for (name, want), (other, got) in zip(
    theirs.state_dict().items(), again.state_dict().items()
  ):
    assert name == other and torch.equal(want, got), name
  np.testing.assert_array_equal(
    _their_logits(again.eval(), _tokens()), _their_logits(theirs, _tokens())
  )
  again.save_pretrained(tmp_path / 'back')
  section_back, _, params_back = _load(tmp_path / 'back')
  assert section_back == section
  assert digest_arrays(params_back) == digest_arrays(params)
  # AutoModel finds the class by config.json alone.
  items = json.loads((out / 'config.json').read_text())
  assert type(transformers.AutoModelForCausalLM.from_pretrained(out)) is kind
  assert items['architectures'] == [kind.__name__]
