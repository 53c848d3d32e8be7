"""Stand-ins for what published configs name: folders and data, no weights."""

import json
import pathlib

import tokenizer_helpers

from rlax_llm.config import Config

_QWEN2 = dict(
  model_type='qwen2',
  architectures=['Qwen2ForCausalLM'],
  hidden_act='silu',
  rms_norm_eps=1e-6,
  rope_theta=1000000.0,
  max_position_embeddings=32768,
  use_sliding_window=False,
  tie_word_embeddings=True,
  vocab_size=151936,
)
# The config.json of the published models.
CONFIG_JSON = {
  'Qwen2.5-0.5B-Instruct': _QWEN2
  | dict(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
  ),
  'Qwen3-1.7B': _QWEN2
  | dict(
    model_type='qwen3',
    architectures=['Qwen3ForCausalLM'],
    attention_bias=False,
    head_dim=128,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=40960,
  ),
}

# The keys of published config.json files beside those above, with values that
# stand in files of that family.
_COMMON = dict(
  attention_dropout=0.0,
  bos_token_id=1,
  eos_token_id=2,
  initializer_range=0.02,
  torch_dtype='bfloat16',
  transformers_version='4.40.1',
  use_cache=True,
)
_LLAMA = _COMMON | dict(
  architectures=['LlamaForCausalLM'],
  model_type='llama',
  attention_bias=False,
  hidden_act='silu',
  hidden_size=64,
  intermediate_size=128,
  max_position_embeddings=4096,
  num_attention_heads=4,
  num_hidden_layers=2,
  num_key_value_heads=4,
  pretraining_tp=1,
  rms_norm_eps=1e-5,
  rope_scaling=None,
  tie_word_embeddings=False,
  vocab_size=32000,
)
_LLAMA3 = dict(
  factor=32.0,
  high_freq_factor=4.0,
  low_freq_factor=1.0,
  original_max_position_embeddings=8192,
  rope_type='llama3',
)
_WINDOW = dict(max_window_layers=21, sliding_window=131072)
KEYS = {
  'Qwen2': CONFIG_JSON['Qwen2.5-0.5B-Instruct'] | _COMMON | _WINDOW,
  'Qwen2.5': CONFIG_JSON['Qwen2.5-0.5B-Instruct']
  | _COMMON
  | _WINDOW
  | dict(use_mrope=False),
  'Qwen3': CONFIG_JSON['Qwen3-1.7B']
  | _COMMON
  | dict(max_window_layers=28, rope_scaling=None, sliding_window=None),
  'Llama 1': _LLAMA | dict(max_sequence_length=2048, pad_token_id=-1),
  'Llama 2': _LLAMA
  | dict(
    _name_or_path='meta-llama/Llama-2-7b-hf',
    max_length=4096,
    pad_token_id=0,
    torch_dtype='float16',
  ),
  'Llama 3.2': _LLAMA
  | dict(
    eos_token_id=[128001, 128008, 128009],
    head_dim=16,
    max_position_embeddings=131072,
    mlp_bias=False,
    rope_scaling=_LLAMA3,
    rope_theta=500000.0,
    tie_word_embeddings=True,
  ),
  'SmolLM2': _LLAMA
  | {
    'is_llama_config': True,
    'pad_token_id': 2,
    'rope_interleaved': False,
    'rope_theta': 100000,
    'tie_word_embeddings': True,
    'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}},
  },
  'unsloth': _LLAMA | dict(unsloth_fixed=True, unsloth_version='2025.1.1'),
}


def stand_in(config: Config, folder: pathlib.Path) -> Config:
  """Returns the config with a folder and data that are there; changes it.

  The folder has the published config.json, a small tokenizer of the same
  layout, and no weights.
  """
  if config.model.pretrained:
    name = pathlib.Path(config.model.pretrained).name
    files = {'config.json': CONFIG_JSON[name]}
    config.model.pretrained, _ = tokenizer_helpers.write(
      folder / name, 'qwen', files=files
    )
  if config.task.name in ('gsm8k', 'jsonl'):
    fields = dict(
      question_field='question', answer_field='answer', gold_format='all'
    ) | dict(config.task.options)
    if config.task.name == 'gsm8k':
      config.task.name = 'jsonl'
      fields['gold_format'] = 'hashes'
    lines = [
      {
        fields['question_field']: f'What is {i} + {i}?',
        fields['answer_field']: f'{i} + {i} = {2 * i}\n#### {2 * i}'
        if fields['gold_format'] == 'hashes'
        else str(2 * i),
      }
      for i in range(2000)
    ]
    path = folder / 'data.jsonl'
    path.write_text('\n'.join(json.dumps(line) for line in lines))
    config.task.options = fields
    config.task.path = str(path)
  return config
