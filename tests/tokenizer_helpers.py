"""Small tokenizers in the layouts of published models."""

import json
import os

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

_TEXTS = [
  'How many legs have three cats? The answer is 12.',
  'naïve → ✅ 1+1=',
] * 4

QWEN_SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
LLAMA_SPECIALS = (
  '<|begin_of_text|>',
  '<|end_of_text|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eom_id|>',
  '<|eot_id|>',
)

QWEN_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {{- message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Blocks without '-': trim_blocks and lstrip_blocks decide their whitespace.
MISTRAL_TEMPLATE = """\
{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' -}}
    {% else %}
{{ ' ' + message['content'] + eos_token -}}
    {% endif %}
{% endfor %}
"""


def _byte_level(specials, plain=()):
  """A byte-level BPE: ids of the merges, then the specials, then the plain."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(
    _TEXTS,
    trainers.BpeTrainer(
      vocab_size=300,
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  backend.add_special_tokens(list(specials))
  backend.add_tokens(list(plain))
  return backend


def _begin_with(token, backend):
  return processors.TemplateProcessing(
    single=f'{token} $A',
    pair=f'{token} $A $B',
    special_tokens=[(token, backend.token_to_id(token))],
  )


def qwen():
  """Returns (tokenizer, tokenizer_config): no BOS, NFC."""
  backend = _byte_level(QWEN_SPECIALS, ('<think>', '</think>'))
  backend.normalizer = normalizers.NFC()
  backend.post_processor = processors.ByteLevel(trim_offsets=False)
  return backend, {
    'add_bos_token': False,
    'bos_token': None,
    'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>',
    'chat_template': QWEN_TEMPLATE,
  }


def llama():
  """Returns (tokenizer, tokenizer_config): the post-processor adds BOS."""
  backend = _byte_level(LLAMA_SPECIALS)
  backend.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=False),
      _begin_with('<|begin_of_text|>', backend),
    ]
  )
  return backend, {
    'bos_token': '<|begin_of_text|>',
    'eos_token': '<|eot_id|>',
    'clean_up_tokenization_spaces': True,
    'chat_template': LLAMA_TEMPLATE,
  }


def mistral():
  """Returns (tokenizer, tokenizer_config): words with '▁', byte fallback."""
  backend = tokenizers.Tokenizer(
    models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(content=' ', left=1),
    ]
  )
  letters = sorted(set(''.join(_TEXTS)) | {'▁', '[', ']', '/', 'I', 'S', 'T'})
  backend.train_from_iterator(
    _TEXTS,
    trainers.BpeTrainer(
      vocab_size=400,
      show_progress=False,
      initial_alphabet=letters,
      special_tokens=['<unk>', '<s>', '</s>']
      + [f'<0x{i:02X}>' for i in range(256)],
    ),
  )
  # The trainer made the bytes special; in published models they are not.
  state = json.loads(backend.to_str())
  state['added_tokens'] = state['added_tokens'][:3]
  backend = tokenizers.Tokenizer.from_str(json.dumps(state))
  backend.post_processor = _begin_with('<s>', backend)
  return backend, {
    'add_bos_token': True,
    'bos_token': {'__type': 'AddedToken', 'content': '<s>'},
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'chat_template': MISTRAL_TEMPLATE,
  }


LAYOUTS = {'qwen': qwen, 'llama': llama, 'mistral': mistral}


def write(folder, layout, *, backend=None, files=None, **changes):
  """Writes a model's tokenizer; returns (folder, the library's tokenizer).

  Args:
    folder: made if missing.
    layout: a name of LAYOUTS.
    backend: changes the library's tokenizer before it is saved.
    files: further files: name -> text, bytes, or what becomes JSON.
    **changes: of tokenizer_config.json.
  """
  os.makedirs(folder, exist_ok=True)
  made, config = LAYOUTS[layout]()
  if backend is not None:
    backend(made)
  made.save(os.path.join(folder, 'tokenizer.json'))
  given = {'tokenizer_config.json': {**config, **changes}, **(files or {})}
  for name, value in given.items():
    if not isinstance(value, (str, bytes)):
      value = json.dumps(value)
    if isinstance(value, str):
      value = value.encode()
    with open(os.path.join(folder, name), 'wb') as file:
      file.write(value)
  return str(folder), made
