"""Stand-ins for what published configs name: folders and data, no weights."""

import json
import pathlib

import tokenizer_helpers

from rlax_llm.config import Config

_QWEN2 = dict(model_type='qwen2',
              architectures=['Qwen2ForCausalLM'],
              hidden_act='silu',
              rms_norm_eps=1e-6,
              rope_theta=1000000.0,
              max_position_embeddings=32768,
              use_sliding_window=False,
              tie_word_embeddings=True,
              vocab_size=151936)
# The config.json of the published models.
CONFIG_JSON = {
    'Qwen2.5-0.5B-Instruct':
        _QWEN2 | dict(hidden_size=896,
                      intermediate_size=4864,
                      num_hidden_layers=24,
                      num_attention_heads=14,
                      num_key_value_heads=2),
    'Qwen3-1.7B':
        _QWEN2 | dict(model_type='qwen3',
                      architectures=['Qwen3ForCausalLM'],
                      attention_bias=False,
                      head_dim=128,
                      hidden_size=2048,
                      intermediate_size=6144,
                      num_hidden_layers=28,
                      num_attention_heads=16,
                      num_key_value_heads=8,
                      max_position_embeddings=40960),
}


def stand_in(config: Config, folder: pathlib.Path) -> Config:
  """Returns the config with a folder and data that are there; changes it.

  The folder has the published config.json, a small tokenizer of the same
  layout, and no weights.
  """
  if config.model.pretrained:
    name = pathlib.Path(config.model.pretrained).name
    files = {'config.json': CONFIG_JSON[name]}
    config.model.pretrained, _ = tokenizer_helpers.write(folder / name,
                                                         'qwen',
                                                         files=files)
  if config.task.name in ('gsm8k', 'jsonl'):
    fields = dict(question_field='question',
                  answer_field='answer',
                  gold_format='all') | dict(config.task.options)
    if config.task.name == 'gsm8k':
      config.task.name = 'jsonl'
      fields['gold_format'] = 'hashes'
    lines = [{
        fields['question_field']:
            f'What is {i} + {i}?',
        fields['answer_field']:
            f'{i} + {i} = {2 * i}\n#### {2 * i}'
            if fields['gold_format'] == 'hashes' else str(2 * i)
    } for i in range(2000)]
    path = folder / 'data.jsonl'
    path.write_text('\n'.join(json.dumps(line) for line in lines))
    config.task.options = fields
    config.task.path = str(path)
  return config
