"""Laws of published models' tokenizers and their chat templates."""

import dataclasses
import datetime
import gc
import hashlib
import json
import time

import numpy as np
import pytest
import tokenizer_helpers as helpers

from rlax_llm import sample
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.tokenizers import chat_template
from rlax_llm.tokenizers import files
from rlax_llm.tokenizers import pretrained
from rlax_llm.tokenizers import tokenizer as tokenizer_lib

load = pretrained.load_tokenizer

TEXTS = ('', 'How many legs have 3 cats?', ' a  b\n\n', 'naïve → ✅ 🙂', '\x00')
BOS = {'qwen': None, 'llama': '<|begin_of_text|>', 'mistral': '<s>'}


def _tokens(backend, ids):
  return [backend.id_to_token(i) for i in ids]


# Renderings ------------------------------------------------------------------

RENDERINGS = [
  (
    'qwen',
    '',
    '<|im_start|>system\nYou help.<|im_end|>\n'
    '<|im_start|>user\nWhy?\n<|im_end|>\n<|im_start|>assistant\n',
  ),
  (
    'qwen',
    'Be brief.',
    '<|im_start|>system\nBe brief.<|im_end|>\n'
    '<|im_start|>user\nWhy?\n<|im_end|>\n<|im_start|>assistant\n',
  ),
  (
    'llama',
    '',
    '<|begin_of_text|>'
    '<|start_header_id|>system<|end_header_id|>\n\n'
    'Today Date: 26 Jul 2024\n\n<|eot_id|>'
    '<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n',
  ),
  (
    'llama',
    ' Be brief. ',
    '<|begin_of_text|>'
    '<|start_header_id|>system<|end_header_id|>\n\n'
    'Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>'
    '<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n',
  ),
  # The line break behind the variable stays, those behind blocks go.
  ('mistral', '', '<s>\n[INST] Why?\n [/INST]'),
]


@pytest.mark.parametrize('layout, system, expected', RENDERINGS)
def test_renderings_written_by_hand(tmp_path, layout, system, expected):
  """Law: a prompt is the template's text, its special tokens one id each.

  Mutants: no trim_blocks; no lstrip_blocks; add_generation_prompt=False; the
  user's turn before the system's.
  """
  folder, backend = helpers.write(tmp_path, layout)
  tokenizer = load(folder, chat=True, system=system)
  ids = tokenizer.encode_prompt('Why?\n')
  assert ids == backend.encode(expected, add_special_tokens=False).ids
  messages = [{'role': 'user', 'content': 'Why?\n'}]
  if system:
    messages.insert(0, {'role': 'system', 'content': system})
  assert tokenizer.render_chat(messages) == expected


def test_further_turns_and_no_generation_prompt(tmp_path):
  """Law: other conversations render too; the blank lines are by hand.

  Mutant: add_generation_prompt not handed on.
  """
  messages = [
    {'role': role, 'content': content}
    for role, content in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))
  ]
  folder, _ = helpers.write(tmp_path, 'mistral')
  assert (
    load(folder).render_chat(messages, add_generation_prompt=False)
    == '<s>\n[INST] a [/INST] b</s>[INST] c [/INST]'
  )
  folder, _ = helpers.write(tmp_path, 'qwen')
  assert load(folder).render_chat(
    messages[:2], add_generation_prompt=False
  ) == (
    '<|im_start|>system\nYou help.<|im_end|>'
    '\n<|im_start|>user\na<|im_end|>\n'
    '<|im_start|>assistant\nb<|im_end|>\n'
  )


LANGUAGE = [
  (
    "{{ {'b': '<é>', 'a': [1, none]} | tojson }}",
    '{"b": "<é>", "a": [1, null]}',
  ),
  ('{{ [1] | tojson(indent=2) }}', '[\n  1\n]'),
  ("{{ strftime_now('%Y-%m-%d') }}", '2024-07-26'),
  (
    '{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}'
    '{% endfor %}',
    '01',
  ),
  ('a{% generation %}b{% endgeneration %}c', 'abc'),
  (
    '{{ tools is none }} {{ missing is defined }} {{ missing }}|',
    'True False |',
  ),
  ('{{ bos_token }}{{ eos_token }}', '<|begin_of_text|><|eot_id|>'),
  ("{% set n = namespace(x='a') %}{% set n.x = n.x + 'b' %}{{ n.x }}", 'ab'),
]


@pytest.mark.parametrize('source, expected', LANGUAGE)
def test_the_language_of_published_templates(tmp_path, source, expected):
  """Law: what templates use beyond jinja2's core works, by hand.

  Mutants: jinja2's own tojson; no loop controls; no generation tag; the clock's
  date; special tokens not among the variables.
  """
  folder, _ = helpers.write(tmp_path, 'llama', chat_template=source)
  assert load(folder).render_chat([]) == expected


def test_date_and_variables(tmp_path):
  """Law: a prompt depends on no clock; the date and variables are arguments.

  Mutant: variables not handed on.
  """
  folder, _ = helpers.write(tmp_path, 'llama')
  text = load(folder, date=datetime.date(2031, 1, 2)).render_chat(
    [{'role': 'user', 'content': 'x'}]
  )
  assert 'Today Date: 02 Jan 2031\n' in text
  folder, backend = helpers.write(tmp_path, 'qwen')
  frozen = freeze({'enable_thinking': False})
  ids = load(folder, chat=True, variables=frozen).encode_prompt('x')
  assert backend.decode(ids).endswith('<think>\n\n</think>\n\n')
  plain = load(folder, chat=True).encode_prompt('x')
  assert ids[: len(plain)] == plain and len(ids) > len(plain)


def test_where_the_template_comes_from(tmp_path):
  """Law: chat_template.jinja goes before tokenizer_config.json's text or list,
  of which 'default' is taken.

  Mutants: the file ignored; the first of the list taken.
  """
  named = [
    {'name': 'tool_use', 'template': 'tools'},
    {'name': 'default', 'template': 'one of a list'},
  ]
  folder, _ = helpers.write(tmp_path / 'a', 'qwen', chat_template='text')
  assert load(folder).render_chat([]) == 'text'
  folder, _ = helpers.write(tmp_path / 'b', 'qwen', chat_template=named)
  assert load(folder).render_chat([]) == 'one of a list'
  folder, _ = helpers.write(
    tmp_path / 'c',
    'qwen',
    chat_template=named,
    files={'chat_template.jinja': 'a file\n'},
  )
  assert load(folder).render_chat([]) == 'a file'


@pytest.mark.parametrize('layout', helpers.LAYOUTS)
def test_equals_the_transformers_library(tmp_path, layout):
  """Law: texts and ids are those of AutoTokenizer, where it is installed.

  Mutants: no trim_blocks; no BOS in plain prompts.
  """
  transformers = pytest.importorskip('transformers')
  folder, _ = helpers.write(tmp_path, layout)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  today = datetime.date.today()
  systems = ('',) if layout == 'mistral' else ('', 'Be brief. ')
  for system in systems:
    ours = load(folder, chat=True, system=system, date=today)
    for text in TEXTS[1:4]:
      messages = [{'role': 'user', 'content': text}]
      if system:
        messages.insert(0, {'role': 'system', 'content': system})
      for prompted in (True, False):
        assert ours.render_chat(
          messages, add_generation_prompt=prompted
        ) == theirs.apply_chat_template(
          messages, tokenize=False, add_generation_prompt=prompted
        )
      assert ours.encode_prompt(text) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
      )
  plain = load(folder)
  for text in TEXTS:
    ids = theirs(text)['input_ids']
    assert plain.encode_prompt(text) == ids
    assert plain.decode(ids) == theirs.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


# Special tokens --------------------------------------------------------------


@pytest.mark.parametrize('chat', [False, True])
@pytest.mark.parametrize('layout', helpers.LAYOUTS)
def test_bos_exactly_once(tmp_path, layout, chat):
  """Law: one BOS, first, whoever writes it; none where the model has none.

  Mutants: the post-processor runs behind the template; it runs never.
  """
  folder, backend = helpers.write(tmp_path, layout)
  tokenizer = load(folder, chat=chat)
  for text in (*TEXTS, (BOS[layout] or '') + 'x'):
    tokens = _tokens(backend, tokenizer.encode_prompt(text))
    if BOS[layout] is None:
      assert tokenizer.bos_id is None
      assert '<|endoftext|>' not in tokens
    elif chat and BOS[layout] in text:
      # The user's own stays where it stands.
      assert tokens[0] == BOS[layout] and tokens.count(BOS[layout]) == 2
    else:
      assert tokens[0] == BOS[layout] and tokens.count(BOS[layout]) == 1


def test_bos_by_setting_and_without_the_template(tmp_path):
  """Law: add_bos_token is enough, and a template that writes no BOS does not
  take it away; a closing EOS of the post-processor is dropped.

  Mutants: add_bos_token not read; the whole post-processor applied.
  """

  def closes(backend):
    eos = backend.token_to_id('<|im_end|>')
    backend.post_processor = helpers.processors.TemplateProcessing(
      single='$A <|im_end|>', special_tokens=[('<|im_end|>', eos)]
    )

  folder, backend = helpers.write(
    tmp_path,
    'qwen',
    backend=closes,
    add_bos_token=True,
    bos_token='<|endoftext|>',
  )
  tokens = _tokens(backend, load(folder).encode_prompt('1'))
  assert tokens == ['<|endoftext|>', '1']
  tokens = _tokens(backend, load(folder, chat=True).encode_prompt('1'))
  assert tokens[:2] == ['<|endoftext|>', '<|im_start|>']
  assert tokens.count('<|endoftext|>') == 1 and tokens.count('<|im_end|>') == 2


def test_bos_that_recurs_in_the_template(tmp_path):
  """Law: a template's first token may be the BOS and recur in every turn.

  Mutant: all but the first BOS removed.
  """
  folder, backend = helpers.write(
    tmp_path, 'qwen', add_bos_token=True, bos_token='<|im_start|>'
  )
  tokens = _tokens(backend, load(folder, chat=True).encode_prompt('1'))
  assert tokens.count('<|im_start|>') == 3 and tokens[1] != '<|im_start|>'


EOS = [
  ({}, ['<|eot_id|>']),
  (
    {
      'generation_config.json': {'eos_token_id': [301, 304, 305]},
      'config.json': {'eos_token_id': 300},
    },
    ['<|eot_id|>', '<|end_of_text|>', '<|eom_id|>', '<|begin_of_text|>'],
  ),
  (
    {
      'generation_config.json': {'eos_token_id': None},
      'config.json': {'eos_token_id': [301]},
    },
    ['<|eot_id|>', '<|end_of_text|>'],
  ),
]


@pytest.mark.parametrize('files, expected', EOS)
def test_eos_is_the_union_in_order(tmp_path, files, expected):
  """Law: the tokenizer's EOS, then the generation's, then the model's.

  Mutants: only the first file that names one; the generation's first.
  """
  folder, backend = helpers.write(tmp_path, 'llama', files=files)
  assert _tokens(backend, load(folder).eos_ids) == expected


def test_when_special_tokens_map_is_read(tmp_path):
  """Law: special_tokens_map.json goes before tokenizer_config.json, and is not
  read where that file has added_tokens_decoder: as in transformers 5.

  Mutants: the map fills gaps only; the map is read always.
  """
  roles = {
    'eos_token': {'content': '<|im_end|>', 'lstrip': False},
    'bos_token': '<|im_start|>',
  }
  for modern in (False, True):
    decoder = {'added_tokens_decoder': {}} if modern else {}
    folder, backend = helpers.write(
      tmp_path / str(modern),
      'qwen',
      files={'special_tokens_map.json': roles},
      eos_token='<|endoftext|>',
      **decoder,
    )
    tokenizer = load(folder)
    want = '<|endoftext|>' if modern else '<|im_end|>'
    assert _tokens(backend, tokenizer.eos_ids) == [want]
    assert tokenizer.bos_id == (
      None if modern else backend.token_to_id(roles['bos_token'])
    )


# Tokens that other files declare ---------------------------------------------

# Ids of the layout 'qwen': 64 a, 65 b, 291 How, 300 to 302 specials, 303 and
# 304 <think> and </think>.
MIXED = 'a <|extra|>  b<think> c<|two|>How </think><|im_end|> d [PAD]x'


def _declare(i, content, **flags):
  return {str(i): {'content': content, **flags}}


DECLARED = {
  'none': ({}, {}),
  'decoder': (
    {'added_tokens_decoder': _declare(305, '<|extra|>', special=True)},
    {},
  ),
  'decoder, out of order': (
    {
      'added_tokens_decoder': _declare(306, '<|two|>')
      | _declare(305, '<|extra|>', special=True)
    },
    {},
  ),
  'decoder, strips': (
    {
      'added_tokens_decoder': _declare(
        305, '<|extra|>', lstrip=True, rstrip=True
      )
    },
    {},
  ),
  'decoder, single word': (
    {
      'added_tokens_decoder': _declare(305, '[PAD]', single_word=True)
      | _declare(306, '<|two|>')
    },
    {},
  ),
  'decoder, other flags than tokenizer.json': (
    {
      'added_tokens_decoder': _declare(303, '<think>', special=True)
      | _declare(302, '<|im_end|>', special=True, lstrip=True)
    },
    {},
  ),
  'decoder, of the base vocabulary': (
    {'added_tokens_decoder': _declare(291, 'How', special=True)},
    {},
  ),
  'decoder, names a role': (
    {
      'added_tokens_decoder': _declare(305, '<|extra|>', lstrip=True),
      'eos_token': '<|extra|>',
    },
    {},
  ),
  'decoder goes before added_tokens.json': (
    {'added_tokens_decoder': {}},
    {'added_tokens.json': {'<|extra|>': 305}},
  ),
  'added_tokens.json': (
    {},
    {'added_tokens.json': {'<|two|>': 306, '<|extra|>': 305}},
  ),
  'added_tokens.json, names a role': (
    {'eos_token': '<|extra|>'},
    {'added_tokens.json': {'<|extra|>': 305}},
  ),
  'added_tokens.json, special by the map': (
    {},
    {
      'added_tokens.json': {'<|extra|>': 305},
      'special_tokens_map.json': {'extra_special_tokens': ['<|extra|>']},
    },
  ),
  'map': (
    {},
    {
      'special_tokens_map.json': {
        'pad_token': {
          'content': '[PAD]',
          'lstrip': True,
          'rstrip': False,
          'normalized': False,
          'single_word': False,
        }
      }
    },
  ),
  'both lists': (
    {'extra_special_tokens': ['<|two|>']},
    {
      'special_tokens_map.json': {
        'extra_special_tokens': ['<|extra|>', '<|two|>']
      }
    },
  ),
  'extra_special_tokens, roles': (
    {'extra_special_tokens': {'image_token': '<|extra|>'}},
    {},
  ),
  'additional_special_tokens': (
    {'additional_special_tokens': ['<|extra|>', '<think>']},
    {},
  ),
  'another role': ({'image_token': '<|extra|>'}, {}),
  'all at once': (
    {
      'added_tokens_decoder': _declare(305, '<|two|>'),
      'extra_special_tokens': ['<|extra|>'],
      'pad_token': {
        '__type': 'AddedToken',
        'content': '[PAD]',
        'lstrip': True,
        'normalized': True,
        'rstrip': False,
        'single_word': False,
        'special': False,
      },
    },
    {},
  ),
  'a role makes a token special': ({'pad_token': '<think>'}, {}),
  'a role of the base vocabulary': ({'pad_token': 'How'}, {}),
  'split_special_tokens': ({'split_special_tokens': True}, {}),
}


@pytest.mark.parametrize('name', DECLARED)
def test_declared_tokens_are_those_of_transformers(tmp_path, name):
  """Law: ids, text, vocabulary and the flags of every added token equal those
  that transformers makes of the same folder.

  Mutants: added_tokens_decoder not read; added_tokens.json not read; the list
  not read; flags of tokenizer.json win; a role makes nothing special; tokens
  added in the order of the file.
  """
  transformers = pytest.importorskip(
    'transformers', reason='needs the extra [parity]'
  )
  changes, files = DECLARED[name]
  folder, _ = helpers.write(tmp_path, 'qwen', files=files, **changes)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  ours = load(folder)
  ids = theirs.encode(MIXED, add_special_tokens=False)
  assert ours.encode_prompt(MIXED) == ids
  every = [*ids, *range(len(theirs))]
  assert ours.decode(every) == theirs.decode(
    every, skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  assert ours.vocab_size == len(theirs)
  backend = ours._backend  # pylint: disable=protected-access
  flags = lambda tokens: {i: t.__getstate__() for i, t in tokens.items()}
  assert flags(backend.get_added_tokens_decoder()) == flags(
    theirs.added_tokens_decoder
  )
  assert ours.eos_ids[0] == theirs.eos_token_id


def test_declared_tokens_by_hand(tmp_path):
  """Law: a token that only another file declares is one id, a special one is
  skipped, and neither becomes U+FFFD.

  Mutant: as before, tokenizer.json alone.
  """
  for special in (False, True):
    folder, _ = helpers.write(
      tmp_path / str(special),
      'qwen',
      added_tokens_decoder=_declare(305, '<|extra|>', special=special),
    )
    tokenizer = load(folder)
    assert tokenizer.encode_prompt('<|extra|>') == [305]
    assert tokenizer.decode([64, 305]) == ('a' if special else 'a<|extra|>')
    assert tokenizer.vocab_size == 306
    # Names of special tokens are text to `encode`, those of others are not.
    assert (tokenizer.encode('<|extra|>') == [305]) != special


def test_the_digest_covers_declared_tokens(tmp_path):
  """Law: other declared tokens are another tokenizer; what repeats
  tokenizer.json changes nothing.

  Mutants: only tokenizer.json is hashed; added_tokens_decoder is always hashed.
  """

  def digest(name, **changes):
    folder, _ = helpers.write(tmp_path / name, 'qwen', **changes)
    load(folder)
    return files.digest(folder)

  plain = digest('plain')
  content = (tmp_path / 'plain' / 'tokenizer.json').read_bytes()
  assert plain == hashlib.sha256(content).hexdigest()
  same = _declare(302, '<|im_end|>', special=True, normalized=False)
  assert digest('same', added_tokens_decoder=same) == plain
  others = [
    digest('a', added_tokens_decoder=_declare(305, '<|extra|>')),
    digest('b', added_tokens_decoder=_declare(305, '<|two|>')),
    digest('c', added_tokens_decoder=_declare(305, '<|two|>', lstrip=True)),
    digest('d', pad_token='[PAD]'),
  ]
  assert len({plain, *others}) == 5


# Text and ids ----------------------------------------------------------------


@pytest.mark.parametrize('layout', helpers.LAYOUTS)
def test_round_trip(tmp_path, layout):
  """Law: decode(encode(text)) == text, names of special tokens included;
  encode gives no special token.

  Mutants: special tokens parsed in `encode`; `encode` with the post-processor.
  """
  folder, _ = helpers.write(tmp_path, layout)
  tokenizer = load(folder)
  special = {*tokenizer.eos_ids, tokenizer.bos_id}
  for text in (*TEXTS, 'a<|im_end|>b<|eot_id|></s><|begin_of_text|> c'):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not special & set(ids)
  assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a?b'
  assert tokenizer.decode(tokenizer.encode_prompt('a\ud800b')) == 'a?b'


@pytest.mark.parametrize('layout', helpers.LAYOUTS)
def test_any_sampled_id_decodes(tmp_path, layout):
  """Law: specials are skipped, an EOS that is an ordinary token too; an id
  without a token is U+FFFD; nothing raises.

  Mutants: special tokens kept; only the library's specials skipped; ids
  without a token dropped.
  """
  folder, backend = helpers.write(
    tmp_path, layout, files={'generation_config.json': {'eos_token_id': 280}}
  )
  tokenizer = load(folder)
  skipped = [*tokenizer.eos_ids, tokenizer.bos_id or tokenizer.eos_ids[0]]
  ids = tokenizer.encode('How 1+1=')
  assert 280 not in ids and 280 in skipped
  noisy = np.array([*skipped, *ids, *skipped], np.int32)
  assert tokenizer.decode(noisy) == 'How 1+1='
  size = tokenizer.vocab_size
  assert size == 1 + max(backend.get_vocab().values())
  assert tokenizer.decode([*ids, size, 10**12, -1]) == 'How 1+1=' + '\ufffd' * 3
  assert tokenizer.decode([size, *skipped]) == '\ufffd'
  rng = np.random.default_rng(0)
  for _ in range(50):
    tokenizer.decode(rng.integers(0, 2 * size, 40))
  # One byte of a character of two.
  assert tokenizer.decode(tokenizer.encode('é')[-1:]) == '\ufffd'


def test_the_two_ways_to_decode_agree(tmp_path):
  """Law: an unknown id changes nothing of the text around it.

  Mutant: tokens joined in place of the decoder.
  """
  for layout in helpers.LAYOUTS:
    folder, _ = helpers.write(tmp_path / layout, layout)
    tokenizer = load(folder)
    rng = np.random.default_rng(1)
    for _ in range(50):
      ids = [int(i) for i in rng.integers(0, tokenizer.vocab_size, 30)]
      assert tokenizer.decode([*ids, 10**6]) == tokenizer.decode(ids) + '\ufffd'


def test_training_settings_do_not_cut_or_pad(tmp_path):
  """Law: truncation and padding in tokenizer.json have no effect.

  Mutant: no_truncation and no_padding left out.
  """

  def limited(backend):
    backend.enable_truncation(4)
    backend.enable_padding(length=600)

  long = 'How many legs? ' * 30
  for layout in helpers.LAYOUTS:
    folder, _ = helpers.write(tmp_path / layout, layout, backend=limited)
    tokenizer = load(folder)
    ids = tokenizer.encode_prompt(long)
    assert tokenizer.decode(ids) == long and len(ids) < 600
    assert tokenizer.decode(tokenizer.encode(long)) == long


# What a run does with it -----------------------------------------------------


def test_a_run_does_not_care(tmp_path):
  """Law: a run encodes problems and demonstrations with either tokenizer, and
  a published one keeps its text through the cuts of `sample`.

  Mutant: a demonstration closed by the last EOS.
  """
  folder, backend = helpers.write(
    tmp_path,
    'llama',
    files={'generation_config.json': {'eos_token_id': [301, 305]}},
  )
  config = testing.tiny_config()
  config.rollout.prompt_length = 200
  config.model.max_positions = 512
  run = dataclasses.replace(make_run(config), tokenizer=load(folder, chat=True))
  shown = next(run.demonstrations())
  assert _tokens(backend, shown.completion)[-1] == '<|eot_id|>'
  assert run.tokenizer.decode(shown.completion) == 'aaa'
  (request,) = run.requests(
    [run.task.problem('train', 1)], samples=1, domain=0, step=0
  )
  assert request.prompt.tolist() == run.tokenizer.encode_prompt('b')
  tokens = run.tokenizer.encode('naïve → ✅ 1+1=')
  pieces = sample.split_pieces(
    run.tokenizer, tokens, [i % 3 == 0 for i in range(len(tokens))]
  )
  assert ''.join(text for text, _ in pieces) == 'naïve → ✅ 1+1='


def test_vocabulary_of_the_model(tmp_path):
  """Law: a model may have more ids than the tokenizer, never fewer.

  Mutants: the number of tokens in place of the largest id; `<=`.
  """
  folder, _ = helpers.write(tmp_path, 'qwen')
  path = tmp_path / 'tokenizer.json'
  state = json.loads(path.read_text())
  state['model']['vocab']['late'] = 400
  path.write_text(json.dumps(state))
  tokenizer = load(folder)
  assert tokenizer.vocab_size == 401
  tokenizer_lib.check_vocabulary(tokenizer, 401)
  tokenizer_lib.check_vocabulary(tokenizer, 512)
  with pytest.raises(ConfigError, match='400 .* 401 ids') as error:
    tokenizer_lib.check_vocabulary(tokenizer, 400)
  assert '\n' not in str(error.value)


# What is refused -------------------------------------------------------------

BAD_TEMPLATES = [
  ("{{ raise_exception('no\nsystem role') }}", ['no system role']),
  ('a\n{% for %}', ['TemplateSyntaxError in line 2']),
  ('{{ messages[0].nothing.more }}', ['UndefinedError', 'nothing']),
  ('{{ messages.__class__.__mro__ }}', ['SecurityError']),
  ("{{ messages.append('x') }}", ['SecurityError']),
  ('{{ 1 / 0 }}', ['ZeroDivisionError']),
  ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', ['RecursionError']),
  ('{' + '{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', ['rendered']),
  # Time, memory and size.
  (
    '{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}'
    '{% endfor %}',
    ['exceeds 2 s'],
  ),
  ("{{ 'a' * 10 ** 10 }}", ['MemoryError']),
  (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    '{% set n.x = n.x ~ n.x %}{% endfor %}',
    ['MemoryError'],
  ),
  ('{{ 7 ** (10 ** 8) }}', ['exceeds 2 s']),
  (
    "{% for i in range(90000) %}{{ 'a' * 99 }}{% endfor %}",
    ['more than 1048576 characters'],
  ),
  ("{{ '%999999999d' % 1 }}{{ '%999999999d' % 1 }}", ['MemoryError']),
]


@pytest.mark.parametrize('source, words', BAD_TEMPLATES, ids=lambda x: x[:30])
def test_bad_templates(tmp_path, source, words):
  """Law: a template that fails, loops or explodes is one line, soon, before
  any problem is put to the model.

  Mutants: no timer; no limit of memory; no limit of characters; jinja2's
  Environment in place of the sandbox; nothing rendered at construction.
  """
  folder, _ = helpers.write(tmp_path, 'qwen', chat_template=source)
  start = time.monotonic()
  with pytest.raises(ConfigError) as error:
    load(folder, chat=True)
  assert time.monotonic() - start < 60
  message = str(error.value)
  assert '\n' not in message and len(message) < 700
  for word in (*words, 'tokenizer_config.json', 'task.chat_template=False'):
    assert word in message, message
  # It is nobody's business where no chat is wanted.
  assert load(folder).encode_prompt('1') == load(folder).encode('1')


def test_the_process_comes_back_and_ends():
  """Law: after a rendering that was cut off the next one works; no process
  outlives its template.

  Mutants: the dead process kept; no finalizer.
  """

  def render(template, n):
    return template.render([], add_generation_prompt=False, variables={'n': n})

  template = chat_template.ChatTemplate(
    '{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}.',
    origin='here',
  )
  assert render(template, 1) == '.'
  with pytest.raises(ConfigError, match='exceeds 2 s'):
    render(template, 90000)
  assert render(template, 2) == '.'
  process = template._process  # pylint: disable=protected-access
  assert process.poll() is None
  del template
  gc.collect()
  assert process.poll() is not None


@pytest.mark.parametrize(
  'source, system, words',
  [
    ('{{ bos_token }}constant', '', ['drops the problem']),
    ("{{ messages[-1]['content'] }}", 'Be brief.', ['task.system_prompt']),
    (None, '', ['no chat template']),
    ([{'name': 'rag', 'template': 'x'}], '', ["['rag']", "'default'"]),
    (7, '', ['is a int']),
  ],
)
def test_templates_that_do_not_serve(tmp_path, source, system, words):
  """Law: a template that is absent, unnamed or drops what it is given is
  refused at construction.

  Mutants: no check of the problem; no check of the system text.
  """
  folder, _ = helpers.write(tmp_path, 'llama', chat_template=source)
  with pytest.raises(ConfigError) as error:
    load(folder, chat=True, system=system)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


HEADLESS = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
IGNORING = {
  'no header': (HEADLESS, True),
  'plain roles': (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    True,
  ),
  'no marks': ("{% for m in messages %}{{ m['content'] }}{% endfor %}", True),
  'refuses replies': (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ raise_exception('no') }}{% endif %}{{ m['content'] }}|{% endfor %}",
    True,
  ),
  'drops the reply': ("{{ messages[0]['content'] }}|", True),
  'header': (
    HEADLESS + '{% if add_generation_prompt %}<|im_start|>assistant'
    '\n{% endif %}',
    False,
  ),
  'needs the flag': (
    HEADLESS + '{% if not add_generation_prompt %}'
    "{{ raise_exception('no') }}{% endif %}<|im_start|>assistant\n",
    False,
  ),
  # The end of the user's turn is all that a reply follows.
  'Llama 2': (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>"
    '{% endif %}{% endfor %}',
    False,
  ),
}


@pytest.mark.parametrize('name', IGNORING)
def test_a_template_without_the_header_of_a_reply_warns(tmp_path, name):
  """Law: one line where the model cannot tell that its turn begins.

  Mutants: no comparison of the two renderings; templates whose replies have
  no header warn too.
  """
  source, warns = IGNORING[name]
  folder, _ = helpers.write(tmp_path, 'qwen', chat_template=source)
  warnings = load(folder, chat=True).warnings
  assert len(warnings) == warns
  for line in warnings:
    assert '\n' not in line
    for word in ('add_generation_prompt', folder, 'task.chat_template=False'):
      assert word in line
  assert load(folder).warnings == ()


@pytest.mark.parametrize('layout', helpers.LAYOUTS)
def test_published_layouts_do_not_warn(tmp_path, layout):
  """Law: templates that are right say nothing.

  Mutant: every template whose two renderings are equal warns.
  """
  folder, _ = helpers.write(tmp_path, layout)
  assert load(folder, chat=True).warnings == ()


def test_mistral_takes_no_system_text(tmp_path):
  """Law: the template's own refusal reaches the user.

  Mutant: the system text dropped.
  """
  folder, _ = helpers.write(tmp_path, 'mistral')
  with pytest.raises(ConfigError, match='Roles must alternate'):
    load(folder, chat=True, system='Be brief.')
  with pytest.raises(ConfigError, match='read by the chat template only'):
    load(folder, system='Be brief.')


_DEEP = '[' * 100000
HOSTILE = [
  ('tokenizer.json', None, ['holds no tokenizer.json']),
  ('tokenizer.json', b'\xff\xfe', ['no UTF-8 at byte 0']),
  ('tokenizer.json', _DEEP, ['is no tokenizer']),
  ('tokenizer.json', 'null', ['is no tokenizer']),
  ('tokenizer.json', '', ['is no tokenizer']),
  ('tokenizer_config.json', None, ['holds no tokenizer_config.json']),
  ('tokenizer_config.json', b'{"a": "\xc3"}', ['no UTF-8 at byte 7']),
  ('tokenizer_config.json', _DEEP, ['nested too deeply']),
  ('tokenizer_config.json', ' ' * 2**24, ['longer than 8388608 bytes']),
  ('tokenizer_config.json', '[]', ['holds a list']),
  ('tokenizer_config.json', '{"a": }', ['is no JSON']),
  ('tokenizer_config.json', '{"a": ' + '9' * 9999 + '}', ['is no JSON']),
  ('tokenizer_config.json', '{}', ['names no EOS token']),
  (
    'tokenizer_config.json',
    {'eos_token': '<eos>'},
    ["'<eos>'", 'not in tokenizer.json'],
  ),
  (
    'tokenizer_config.json',
    {'eos_token': '<|im_end|>', 'add_bos_token': True},
    ['add_bos_token but no bos_token'],
  ),
  (
    'generation_config.json',
    {'eos_token_id': [10**30]},
    ['generation_config.json', 'no id of the tokenizer'],
  ),
  ('generation_config.json', {'eos_token_id': True}, ['eos_token_id True']),
  ('config.json', {'eos_token_id': -1}, ['eos_token_id -1', 'config.json']),
  ('chat_template.jinja', b'\x80', ['no UTF-8']),
  ('special_tokens_map.json', _DEEP, ['nested too deeply']),
  ('added_tokens.json', _DEEP, ['nested too deeply']),
  ('added_tokens.json', '[]', ['holds a list']),
  # transformers gives an added token the next id whatever a file says.
  (
    'added_tokens.json',
    {'<|extra|>': 306},
    ["'<|extra|>'", '306', '305', 'added_tokens.json'],
  ),
  ('added_tokens.json', {'<|im_end|>': 305}, ["'<|im_end|>'", '305', '302']),
  ('added_tokens.json', {'<|extra|>': 305, '<|two|>': 305}, ['id 305 twice']),
  ('added_tokens.json', {'<|extra|>': True}, ['<|extra|>', 'no id']),
  ('added_tokens.json', {'<|extra|>': 2**40}, ['<|extra|>', 'no id']),
  (
    'tokenizer_config.json',
    {
      'eos_token': '<|im_end|>',
      'added_tokens_decoder': _declare(310, '<|extra|>'),
    },
    ["'<|extra|>'", '310', '305', 'without a gap'],
  ),
  (
    'tokenizer_config.json',
    {
      'eos_token': '<|im_end|>',
      'added_tokens_decoder': _declare(64, '<|extra|>'),
    },
    ["'<|extra|>'", '64', '305'],
  ),
  (
    'tokenizer_config.json',
    {
      'eos_token': '<|im_end|>',
      'added_tokens_decoder': _declare(305, '<|x|>') | _declare(306, '<|x|>'),
    },
    ["token '<|x|>' twice"],
  ),
  (
    'tokenizer_config.json',
    {'eos_token': '<|im_end|>', 'added_tokens_decoder': None},
    ['added_tokens_decoder', 'NoneType'],
  ),
  (
    'tokenizer_config.json',
    {
      'eos_token': '<|im_end|>',
      'added_tokens_decoder': {'x': {'content': '<|x|>'}},
    },
    ["added_tokens_decoder['x']", 'no id'],
  ),
  (
    'tokenizer_config.json',
    {'eos_token': '<|im_end|>', 'added_tokens_decoder': {'305': '<|x|>'}},
    ["added_tokens_decoder['305']", 'no token'],
  ),
  (
    'tokenizer_config.json',
    {
      'eos_token': '<|im_end|>',
      'added_tokens_decoder': _declare(305, '<|x|>', lstrip='yes'),
    },
    ["added_tokens_decoder['305']", 'no token'],
  ),
  (
    'tokenizer_config.json',
    {
      'eos_token': '<|im_end|>',
      'added_tokens_decoder': _declare(305, '<|x|>', strip=True),
    },
    ["added_tokens_decoder['305']", 'no token'],
  ),
  (
    'tokenizer_config.json',
    {'eos_token': '<|im_end|>', 'extra_special_tokens': '<|x|>'},
    ['extra_special_tokens', 'is a str'],
  ),
  (
    'tokenizer_config.json',
    {'eos_token': '<|im_end|>', 'extra_special_tokens': [7]},
    ['extra_special_tokens', 'no token'],
  ),
  ('tokenizer_config.json', {'eos_token': 7}, ['eos_token', 'no token']),
  (
    'tokenizer_config.json',
    {'eos_token': '<|im_end|>', 'pad_token': '\ud800'},
    ['pad_token', 'no token'],
  ),
]


@pytest.mark.parametrize(
  'name, content, words', HOSTILE, ids=lambda x: str(x)[:24]
)
def test_hostile_files(tmp_path, name, content, words):
  """Law: each is one short line that names the file.

  Mutants: no limit of size; RecursionError not caught; EOS ids not checked;
  declared ids not compared with those that the tokens get.
  """
  folder, _ = helpers.write(tmp_path, 'qwen')
  if content is None:
    (tmp_path / name).unlink()
  else:
    if isinstance(content, dict):
      content = json.dumps(content)
    (tmp_path / name).write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
  with pytest.raises(ConfigError) as error:
    load(folder)
  message = str(error.value)
  assert '\n' not in message and len(message) < 700
  for word in (*words, str(tmp_path)):
    assert word in message, message


def test_files_that_are_none(tmp_path):
  """Law: a folder in place of a file, a file in place of the folder, a
  post-processor that names a missing token: one error each.

  Mutant: panics of the library not caught.
  """
  folder, _ = helpers.write(tmp_path, 'llama')
  with pytest.raises(ConfigError, match='is no folder'):
    load(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'chat_template.jinja').mkdir()
  with pytest.raises(ConfigError, match='is no file'):
    load(folder)
  (tmp_path / 'chat_template.jinja').rmdir()
  path = tmp_path / 'tokenizer.json'
  state = json.loads(path.read_text())
  state['post_processor']['processors'][1]['special_tokens'] = {}
  path.write_text(json.dumps(state))
  with pytest.raises(ConfigError, match='is no tokenizer'):
    load(folder)
  state['post_processor'] = None
  state['model']['vocab']['late'] = 2**31
  path.write_text(json.dumps(state))
  with pytest.raises(ConfigError, match='2147483648'):
    load(folder)
