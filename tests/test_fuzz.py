"""Hostile files and texts: an answer or one line, never a crash or a hang."""

import json
import os
import pathlib
import pickle
import time

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import pytest
import tokenizer_helpers

from rlax_llm import config as config_lib
from rlax_llm import testing
from rlax_llm.config import ConfigError
from rlax_llm.config.validation import validate
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.models.pretrained import loading
from rlax_llm.models.pretrained import safetensors_files
from rlax_llm.runtime import flags
from rlax_llm.tasks import answer_text
from rlax_llm.tasks import extract
from rlax_llm.tasks import jsonl
from rlax_llm.tasks import match
from rlax_llm.tasks import question_answer
from rlax_llm.tasks.reasoning_gym import guard
from rlax_llm.tokenizers import chat_template
from rlax_llm.tokenizers import files
from rlax_llm.tokenizers.pretrained import load_tokenizer
from rlax_llm.workdir.checkpoint import Checkpoints

_SETTINGS = dict(
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
fuzz = hypothesis.settings(max_examples=120, **_SETTINGS)
# Where an example starts a process or reads many files.
fuzz_slowly = hypothesis.settings(max_examples=40, **_SETTINGS)

# Python's own texts: lone surrogates and control characters among them.
TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
PIECES = st.sampled_from(
  [
    '9' * 4000,
    '10**10**9',
    '9**9**9**9',
    '1e999999999',
    '-' * 2000,
    '(' * 2000,
    '\\boxed{' * 500,
    '}' * 500,
    '\\frac{',
    '<answer>' * 300,
    '</answer>',
    '####',
    '=',
    '\n' * 500,
    'a' * 5000 + '!',
    '1,' * 2000,
    '\ud800',
    '\0',
    'NaN',
    'Infinity',
    '\\sqrt[' * 99,
    '٣',
    '²',
    ' ' * 5000,
    '^{' * 50,
    '!' * 99,
  ]
)
ANSWERS = st.lists(PIECES | TEXT, max_size=5).map(''.join)
SCALARS = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | TEXT
  | st.sampled_from([10**400, 1e308, 5e-324])
)
JSON = st.recursive(
  SCALARS,
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
  ),
  max_leaves=8,
)
BYTES = st.binary(max_size=60) | st.sampled_from(
  [
    b'[' * 20000,
    b'{"a":' * 4000,
    b'\xff\xfe',
    b'\xef\xbb\xbf',
    b'\0' * 99,
    b'"' + b'x' * 10**4,
    b'9' * 10**4,
    b'NaN',
    b'1e400',
    b'"\\ud800"',
  ]
)


def _dumps(value):
  return json.dumps(value).encode()


def _one_line(error):
  message = str(error)
  assert '\n' not in message and len(message) < 1500, message[:300]


# ---- Texts -------------------------------------------------------------------


@fuzz
@hypothesis.given(ANSWERS, st.sampled_from(extract.FORMATS))
def test_any_completion_has_an_answer_or_none(text, answer_format):
  """Law: an extracted answer is stripped, not blank, and a part of the text;
  no text takes long.

  Mutant: a regular expression that backtracks over unbalanced braces.
  """
  begin = time.process_time()
  answer = extract.extract_answer(text, answer_format)
  assert time.process_time() - begin < 1
  if answer is not None:
    assert answer and answer == answer.strip() and answer in text


@fuzz
@hypothesis.given(ANSWERS, ANSWERS, st.sampled_from(['numeric', 'exact']))
def test_any_answers_are_compared(answer, truth, kind):
  """Law: a comparison ends soon and is True or False; what is equal as text
  is right; a number is equal to itself.

  Mutant: exponents of any length; it hangs.
  """
  begin = time.process_time()
  equal = match.is_equal(answer, truth, kind)
  assert time.process_time() - begin < 1
  assert equal in (True, False)
  if kind == 'exact':
    assert equal == (
      answer_text.unbox(answer).split() == answer_text.unbox(truth).split()
    )
    assert match.is_equal(answer, answer, kind)
  elif answer_text.parse_number(answer) is not None:
    assert match.is_equal(answer, answer, kind)


ITEM = {
  'question': 'What is 3 + 4?',
  'answer': '7',
  'metadata': {'numbers': [3, 4], 'target': 7, 'variable': 'x'},
}


@fuzz
@hypothesis.given(ANSWERS, st.sampled_from(sorted(guard._RULES) + ['gcd']))
def test_the_guard_judges_any_answer(answer, name):
  """Law: whether a scorer may see an answer is known soon, and what it sees
  calls nothing.

  Mutant: a power of a power admitted to `countdown`.
  """
  begin = time.process_time()
  admitted = guard.admit(name, answer, ITEM)
  assert time.process_time() - begin < 1
  if admitted and name in ('countdown', 'puzzle24'):
    assert '**' not in answer and '_' not in answer


# ---- Files -------------------------------------------------------------------


@fuzz
@hypothesis.given(
  st.lists(
    BYTES
    | JSON.map(_dumps)
    | st.fixed_dictionaries({'question': JSON, 'answer': JSON}).map(_dumps),
    min_size=1,
    max_size=4,
  ),
  st.sampled_from(['numeric', 'exact']),
  st.sampled_from(question_answer.GOLD_FORMATS),
)
def test_any_jsonl_file_is_read_or_refused(tmp_path, lines, kind, gold_format):
  """Law: what is read is questions with answers that match themselves; else
  one line names the file and the line.

  Mutant: RecursionError passed on.
  """
  path = tmp_path / 'data.jsonl'
  path.write_bytes(b'\n'.join(lines))
  config = config_lib.TaskConfig(name='jsonl', path=str(path), match=kind)
  options = {**question_answer.OPTIONS, 'gold_format': gold_format}
  try:
    found = jsonl.read_problems(str(path), options, config)
  except ValueError as error:
    _one_line(error)
    assert str(path) in str(error)
    return
  for question, (row, number) in found.items():
    assert (
      question.strip() and 1 <= number <= path.read_bytes().count(b'\n') + 1
    )
    assert match.is_equal(row.answer, row.answer, kind)


NAMES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'generation_config.json',
  'config.json',
  'chat_template.jinja',
)


@pytest.fixture(name='model', scope='module')
def _model(tmp_path_factory):
  return tokenizer_helpers.write(tmp_path_factory.mktemp('model'), 'llama')[0]


@fuzz_slowly
@hypothesis.given(
  st.sampled_from(NAMES),
  BYTES
  | JSON.map(_dumps)
  | st.dictionaries(
    st.sampled_from(
      [
        'eos_token',
        'bos_token',
        'add_bos_token',
        'eos_token_id',
        'model',
        'added_tokens',
        'chat_template',
        'vocab',
        'post_processor',
        'pad_token',
        'added_tokens_decoder',
        'extra_special_tokens',
      ]
    ),
    JSON,
  ).map(_dumps),
)
def test_any_tokenizer_files_are_read_or_refused(
  model, tmp_path, name, content
):
  """Law: a folder with one hostile file gives a tokenizer that reads and
  writes text, or one line.

  Mutant: the library's panics passed on; a template of any type.
  """
  folder = tmp_path / 'copy'
  folder.mkdir(exist_ok=True)
  for other in NAMES:
    (folder / other).unlink(missing_ok=True)
  for entry in pathlib.Path(model).iterdir():
    (folder / entry.name).write_bytes(entry.read_bytes())
  (folder / name).write_bytes(content)
  try:
    made = load_tokenizer(str(folder))
  except ConfigError as error:
    _one_line(error)
    return
  text = 'How many legs have three cats?'
  # A file may name a letter as a special token; then it is skipped.
  named = files.read_declared(str(folder)).names.values()
  if not any(name and name in text for name in named):
    assert 'legs' in made.decode(made.encode_prompt(text))


_PROGRAM = st.lists(
  st.sampled_from(
    [
      '{{ messages }}',
      '{{',
      '}}',
      '{%',
      '%}',
      '{% for m in messages %}',
      '{% endfor %}',
      '{{ m.content }}',
      '{% set x = x ~ x %}',
      "{{ 'a' * 9999 }}",
      '{% raw %}',
      '{#',
      '\ud800',
      '{{ ().__class__ }}',
      '{{ x.y.z }}',
      '{% macro f() %}',
      '{% endmacro %}',
      '{{ f() }}',
      '{{ 1/0 }}',
      '{{ messages|tojson }}',
      '{% include "x" %}',
      '{{ 10**400 }}',
      '(' * 500,
      '{{ ' + '[' * 300,
      '{% if a %}' * 200,
    ]
  ),
  max_size=6,
).map(''.join)


@pytest.mark.slow
@fuzz_slowly
@hypothesis.given(_PROGRAM | TEXT)
def test_any_template_is_rendered_or_refused(source):
  """Law: a hostile template is a text or one line, and the next one works.

  Mutant: UnicodeEncodeError or RecursionError of the renderer ends a run.
  """
  template = chat_template.ChatTemplate(source, origin='here')
  for ask in (
    lambda: template.render(
      [{'role': 'user', 'content': 'x'}],
      add_generation_prompt=True,
      variables={},
    ),
    template.names,
  ):
    try:
      assert isinstance(ask(), (str, frozenset))
    except ConfigError as error:
      _one_line(error)
  template.close()


@fuzz
@hypothesis.given(BYTES | JSON.map(_dumps), st.integers(0, 2**64 - 1))
def test_any_weights_file_is_refused(tmp_path, content, length):
  """Law: neither a hostile header nor its length is believed.

  Mutants: RecursionError passed on; the length not bounded by the file.
  """
  path = tmp_path / 'model.safetensors'
  for data in (
    content,
    length.to_bytes(8, 'little') + content,
    len(content).to_bytes(8, 'little') + content,
  ):
    path.write_bytes(data)
    try:
      found = safetensors_files.read_header(path)
    except ValueError as error:
      _one_line(error)
      continue
    assert not found


@fuzz
@hypothesis.given(BYTES | JSON.map(_dumps))
def test_any_config_json_is_refused(tmp_path, content):
  """Law: one line. Mutant: RecursionError passed on."""
  (tmp_path / 'config.json').write_bytes(content)
  config = testing.tiny_config()
  config.model.pretrained = str(tmp_path)
  with pytest.raises(ConfigError) as error:
    validate(loading.resolve(config))
  _one_line(error.value)


PATHS = [
  path
  for path, value in flags.field_paths(config_lib.Config()).items()
  if not isinstance(value, config_lib.Section)
]


@fuzz
@hypothesis.given(st.dictionaries(st.sampled_from(PATHS), JSON, max_size=4))
def test_any_config_is_valid_or_refused(changes):
  """Law: a config of JSON's types is one that is hashable and comes back from
  JSON, or one line.

  Mutant: numbers that are not finite let through.
  """
  config = testing.tiny_config()
  for path, value in changes.items():
    *sections, name = path.split('.')
    section = config
    for part in sections:
      section = getattr(section, part)
    setattr(section, name, value)
  try:
    frozen = validate(loading.resolve(config))
  except ConfigError as error:
    _one_line(error)
    return
  hash(frozen)
  text = json.dumps(config_lib.to_dict(frozen), allow_nan=False)
  assert validate(config_lib.from_dict(json.loads(text))) == frozen


@fuzz
@hypothesis.given(JSON)
def test_any_recorded_config_is_read_or_refused(items):
  """Law: as above, for what a manifest holds. Mutant: `hasattr` for fields."""
  try:
    validate(config_lib.from_dict(items))
  except ConfigError as error:
    _one_line(error)


@fuzz
@hypothesis.given(TEXT | JSON.map(json.dumps))
def test_any_record_of_rollouts_is_read_or_refused(text):
  """Law: ValueError is all that a damaged store raises: a run goes on without
  it. Mutant: KeyError passed on.
  """
  store = RolloutStore(history=2, megabytes=1, tokenizer='bytes')
  try:
    store.restore(text)
  except ValueError:
    pass


# ---- Nothing is unpickled ----------------------------------------------------


class _Bomb:
  def __reduce__(self):
    return (os.mkdir, (self.path,))

  def __init__(self, path):
    self.path = path


def test_a_checkpoint_is_never_unpickled(tmp_path, monkeypatch):
  """Law: whichever file of a checkpoint is a pickle, or is called one, none of
  its code runs, and no pickle is read on the way.

  Mutant: the host state read by `pickle.loads` where it begins like one.
  """
  states = {'policy': {'w': jnp.arange(6.0)}}
  bomb = pickle.dumps(_Bomb(str(tmp_path / 'exploded')))
  folder = tmp_path / 'run'
  with Checkpoints(folder) as saved:
    saved.save(1, states, {'cursor': 1})
  paths = [p for p in (folder / 'checkpoints' / '1').rglob('*') if p.is_file()]
  assert len(paths) > 5

  read = []
  for name in ('load', 'loads'):
    true = getattr(pickle, name)
    monkeypatch.setattr(
      pickle,
      name,
      lambda *args, true=true, **kwargs: (
        read.append(args) or true(*args, **kwargs)
      ),
    )
  with Checkpoints(folder) as saved:
    assert saved.restore(states)[0] == 1
  for path in paths:
    good = path.read_bytes()
    path.write_bytes(bomb)
    path.with_suffix('.pkl').write_bytes(bomb)
    try:
      with Checkpoints(folder) as saved:
        saved.restore(states)
    except ConfigError as error:
      _one_line(error)
    path.write_bytes(good)
    assert not (tmp_path / 'exploded').exists(), path
  assert not read
