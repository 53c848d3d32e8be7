"""Data sets of maths problems: reading them, and checking their answers."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from rlax_llm import config as config_lib
from rlax_llm.tasks import equivalence
from rlax_llm.tasks import extract
from rlax_llm.tasks import match
from rlax_llm.tasks import question_answer
from rlax_llm.tasks import registry
from rlax_llm.tasks import task as task_lib
from rlax_llm.tasks import tfds
from rlax_llm.tasks.verifier import verifier as verifier_lib

ROOT = pathlib.Path(__file__).parent.parent


def make(seed=0, **changes):
  return registry.make_task(config_lib.TaskConfig(**changes), seed)


def one_line(error):
  text = str(error.value)
  assert '\n' not in text and len(text) < 600
  return text


# ---- Extraction ----------------------------------------------------------


@pytest.mark.parametrize(
  'text, answer',
  [
    (r'so \boxed{5}.', '5'),
    (r'\boxed{1} and \boxed{2}', '2'),
    (r'$\boxed{\frac{1}{\sqrt{2}}}$ ends', r'\frac{1}{\sqrt{2}}'),
    (r'\boxed{\{1, \{2\}\}}', r'\{1, \{2\}\}'),
    (r'\boxed{\{ }', r'\{'),
    (r'\boxed{5} then \boxed{6', '5'),
    (r'\boxed{5} then \boxed{ {6}', '5'),
    (r'} {\boxed{7}', '7'),
    (r'\boxed{\boxed{8}}', '8'),
    (r'\boxed{a \\ b}', r'a \\ b'),
    (r'\\boxed{9}', '9'),
    (r'\boxed {10}', '10'),
    # math-verify's boxes: \fbox, any whitespace before the brace.
    (r'\fbox{42}', '42'),
    (r'\boxed{5} or \fbox{6}', '6'),
    (r'\boxed{\text{\fbox{6}}}', '6'),
    (r'\\fbox{9}', '9'),
    ('\\boxed\n{5}', '5'),
    ('\\boxed\t {5}', '5'),
    (r'\fboxsep{3}', None),
    (r'\boxedfoo{3}', None),
    # MATH's box without a brace: to the end of the formula, or of the line.
    (r'\boxed 5', '5'),
    (r'so $\boxed 52$ apples', '52'),
    (r'\(\boxed -3\) it is', '-3'),
    ('$\\boxed \\frac{1}{2}$', r'\frac{1}{2}'),
    ('\\boxed \u22123\nand 4', '\u22123'),
    (r'\boxed{\boxed 5}', '5'),
    # A sentence about boxes is none.
    (r'\boxed{5}. I put it in \boxed.', '5'),
    (r'\boxed{5}, in \boxed as asked', '5'),
    (r'put it in \boxed', None),
    # Thoughts are text like any other, finished or not, as in math-verify.
    (r'<think>Say \boxed{5}', '5'),
    (r'<think>\boxed{5}</think> \boxed{6}', '6'),
    (r'<think>\boxed{5}</think> Five.', '5'),
    (r'\boxed{ }', None),
    (r'\boxed{', None),
    ('boxed{5}', None),
    ('', None),
  ],
)
def test_boxed(text, answer):
  """Mutants: the first '}' ends a box; escaped braces count; a box without a
  brace may begin with a word.
  """
  assert extract.extract_answer(text, 'boxed') == answer


@pytest.mark.parametrize(
  'text, answer',
  [
    ('6*3=18\n#### 18', '18'),
    ('#### 17\nno:\n#### 18\n\nGood luck!', '18'),
    ('####18', '18'),
    ('####\n 18', '18'),
    ('### 18', None),
    ('18', None),
    ('#### ', None),
  ],
)
def test_hashes(text, answer):
  """Mutant: the first mark."""
  assert extract.extract_answer(text, 'hashes') == answer


@pytest.mark.parametrize(
  'text',
  [
    r'\boxed{',
    r'\boxed{}',
    '}',
    r'\boxed  ',
    '{',
    '####',
    r'\boxed 5',
    r'\fbox 5{',
    '$',
  ],
)
def test_extraction_is_linear(text):
  """Mutant: the rest of the text is searched from every box."""
  start = time.monotonic()
  extract.extract_answer(text * 200_000, 'boxed')
  extract.extract_answer(text * 200_000, 'hashes')
  assert time.monotonic() - start < 5


# ---- tensorflow-datasets -------------------------------------------------

# Before the command that prepares gsm8k: its download becomes local files of 40
# training and 7 test problems.
BUILD = textwrap.dedent("""\
    import importlib.resources, json, pathlib, sys
    # What tfds imports under another name; Python's own does for reading.
    sys.modules.setdefault('importlib_resources', importlib.resources)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import gcs_utils

    gcs_utils._is_gcs_disabled = True
    folder = pathlib.Path(sys.argv[1])
    paths = {}
    for split in ('train', 'test', 'train_socratic', 'test_socratic'):
      count = 40 if split.startswith('train') else 7
      path = paths[split] = folder / f'{split}.jsonl'
      path.write_text(''.join(
          json.dumps({'question': f'{split}: {i} times 1000?',
                      'answer': f'Say {i}.\\n#### {i},000'}) + '\\n'
          for i in range(1, count + 1)))
    tfds.download.DownloadManager.download_and_extract = lambda *_: paths
    COMMAND
    assert 'tensorflow' not in sys.modules
    """)

READ = textwrap.dedent("""\
    import sys
    from rlax_llm import config
    from rlax_llm.tasks import registry
    made = registry.make_task(
        config.TaskConfig(name='gsm8k', options={'data_dir': sys.argv[1]}), 0)
    assert made.problem('train', 0).answer
    assert 'tensorflow_datasets' in sys.modules
    print('tensorflow' in sys.modules)
    """)


def python(code, *arguments):
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, arguments)],
    check=True,
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'PYTHONPATH': os.pathsep.join(
        [str(ROOT), os.environ.get('PYTHONPATH', '')]
      ),
    },
  ).stdout


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Prepared by the command that the error message names."""
  folder = tmp_path_factory.mktemp('gsm8k')
  data_dir = str(folder / 'data')
  with pytest.raises(config_lib.ConfigError) as error:
    gsm8k(data_dir)
  command = re.search('python -c "(.*)"', str(error.value)).group(1)
  python(BUILD.replace('COMMAND', command), folder)
  return data_dir


def gsm8k(data_dir, seed=0, **changes):
  options = {'data_dir': data_dir, **changes.pop('options', {})}
  return make(seed, **{'name': 'gsm8k', 'options': options, **changes})


def test_gsm8k_is_a_function_of_seed_split_and_index(prepared):
  """Mutants: the training problems in the file's order; the splits swapped."""
  task, again, other = (gsm8k(prepared, seed) for seed in (0, 0, 1))
  assert [task.num_problems(s) for s in task_lib.SPLITS] == [40, 7]
  train = [task.problem('train', i) for i in range(40)]
  assert {p.prompt for p in train} == {
    f'train: {i} times 1000?' for i in range(1, 41)
  }
  assert [again.problem('train', i) for i in reversed(range(40))] == train[::-1]
  assert [other.problem('train', i) for i in range(40)] != train
  assert task.problem('train', 43) == train[3]
  assert {int(p.answer.replace(',', '')) for p in train} == set(
    range(1000, 41000, 1000)
  )
  held_out = [task.problem('held_out', i) for i in range(7)]
  assert {p.prompt for p in held_out} == {
    f'test: {i} times 1000?' for i in range(1, 8)
  }
  # Every seed is evaluated on the same ones, in the same order.
  assert [other.problem('held_out', i) for i in range(7)] == held_out


def test_gsm8k_epochs_are_permutations(prepared):
  """Mutant: step * B + i, the same order in every epoch."""
  config = config_lib.TaskConfig(
    name='gsm8k', options={'data_dir': prepared}, prompts_per_step=8
  )
  task = registry.make_task(config, 0)
  epochs = [
    [
      p.prompt_id
      for step in range(first, first + 5)
      for p in task_lib.problems_for_step(task, config, 0, step)
    ]
    for first in (0, 5)
  ]
  assert len(set(epochs[0])) == 40
  assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]


def test_gsm8k_scores_and_traces(prepared):
  """The data's own solution is a right completion where the format is its own.

  Mutant: the trace given for every answer format.
  """
  task = gsm8k(prepared, answer_format='hashes')
  problem = task.problem('train', 0)
  number = problem.answer.replace(',', '')
  assert problem.trace == f'Say {number[:-3]}.\n#### {problem.answer}'
  assert task.score(problem.entry, problem.trace) == 1.0
  assert task.score(problem.entry, f'#### ${number}.00') == 1.0
  assert task.score(problem.entry, f'#### {number}1') == 0.0
  assert task.score(problem.entry, number) == 0.0
  assert gsm8k(prepared).problem('train', 0).trace is None


def test_tfds_options(prepared):
  options = {
    'dataset': 'gsm8k:1.0.0',
    'question_field': 'annotation',
    'answer_field': 'short_answer',
    'train_split': 'train[:75%]',
    'held_out_split': 'train[75%:]',
    'data_dir': prepared,
  }
  task = make(name='tfds', options=options)
  assert [task.num_problems(s) for s in task_lib.SPLITS] == [30, 10]
  assert task.problem('train', 0).prompt.startswith('Say ')
  # Without a held-out split: by the question's hash.
  task = make(name='tfds', options={**options, 'held_out_split': ''})
  counts = [task.num_problems(s) for s in task_lib.SPLITS]
  assert sum(counts) == 30 and min(counts) > 0
  # A question in both splits is not trained on.
  task = make(
    name='tfds',
    options={
      **options,
      'train_split': 'train',
      'held_out_split': 'train[:25%]',
    },
  )
  prompts = [
    {task.problem(s, i).prompt for i in range(40)} for s in task_lib.SPLITS
  ]
  assert list(map(len, prompts)) == [30, 10] and not prompts[0] & prompts[1]


def test_tfds_is_read_without_tensorflow(prepared):
  """Mutant: `import tensorflow` in tfds.py, where it is installed."""
  assert python(READ, prepared).strip() == 'False'


@pytest.mark.parametrize(
  'options, words',
  [
    (
      {'train_split': 'tarin'},
      "'tarin' is no split of 'gsm8k'; did you mean 'train'",
    ),
    ({'train_split': 'train[:x]'}, "'train\\[:x\\]' cannot be read"),
    (
      {'question_field': 'questions'},
      "lacks the field 'questions'; did you mean 'question'",
    ),
    (
      {'gold_format': 'boxed'},
      "split train, example 0: .* without an answer in the format 'boxed'",
    ),
    ({'gold_format': 'all'}, "no number; set task.match='exact' or 'math'"),
    ({'gold_format': 'box'}, 'use one of all, boxed, hashes'),
    (
      {'split': 'train'},
      "'split'.* is no option of 'gsm8k'; did you mean 'train_split'",
    ),
    ({'data_dir': 3}, 'of type int; give it as str'),
    ({'dataset': ''}, "set it, for instance to 'gsm8k'"),
    ({'dataset': 'a b'}, "'a b' is not prepared"),
  ],
)
def test_bad_tfds_options(prepared, options, words):
  with pytest.raises(ValueError, match=words) as error:
    gsm8k(prepared, options=options)
  one_line(error)


def test_a_missing_dataset_names_the_command(tmp_path, monkeypatch):
  """And nothing is fetched: no address is looked up, nothing is written.

  Mutant: `tfds.data_source(name)`, which downloads: it tries for minutes.
  """
  asked = []

  def refuse(*arguments, **unused):
    asked.append(arguments)
    raise OSError('no network')

  monkeypatch.setattr('socket.socket.connect', refuse)
  monkeypatch.setattr('socket.getaddrinfo', refuse)
  with pytest.raises(config_lib.ConfigError, match='not prepared') as error:
    gsm8k(str(tmp_path))
  assert f"tfds.builder('gsm8k', data_dir='{tmp_path}', " in one_line(error)
  assert not asked and not os.listdir(tmp_path)


def test_a_dataset_in_another_file_format_is_refused(prepared, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(prepared, copy)
  path = copy / 'gsm8k/1.0.0/dataset_info.json'
  info = json.loads(path.read_text())
  path.write_text(json.dumps({**info, 'fileFormat': 'tfrecord'}))
  with pytest.raises(
    config_lib.ConfigError,
    match='prepared as tfrecord.*file_format=.array_record.',
  ):
    gsm8k(str(copy))


def _cut(share):

  def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

  return damage


def _flip(at):

  def damage(path):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)

  return damage


def _other_type(path):
  path.write_text(path.read_text().replace('text_feature.Text', 'no.Such'))


def _in_place_of_file(path):
  path.unlink()
  path.mkdir()


def _more_than_there_is(path):
  info = json.loads(path.read_text())
  for split in info['splits']:
    split['shardLengths'] = ['41']
  path.write_text(json.dumps(info))


def _unknown_place(path):
  path.write_text(path.read_text().replace('{SHARD_X_OF_Y}', '{SPLIT.x}'))


@pytest.mark.parametrize(
  'damage',
  [
    _in_place_of_file,
    _cut(0),
    _cut(0.3),
    pathlib.Path.unlink,
    lambda path: path.write_bytes(b'\xff\xfe'),
    lambda path: path.write_bytes(b'[]'),
    lambda path: path.write_bytes(b'{}'),
    lambda path: path.write_bytes(b'[' * 10**5),
  ],
)
@pytest.mark.parametrize(
  'name',
  [
    'gsm8k-train.array_record-00000-of-00001',
    'gsm8k-test.array_record-00000-of-00001',
    'dataset_info.json',
    'features.json',
  ],
)
def test_a_damaged_dataset_is_refused_in_one_line(
  prepared, tmp_path, name, damage
):
  """Law: whichever prepared file is missing, cut short or something else, one
  ConfigError names the folder and the command.

  Mutants: errors of array_record passed on; those of protobuf passed on.
  """
  _refused(prepared, tmp_path, name, damage)


@pytest.mark.parametrize(
  'name, damage',
  [
    ('gsm8k-train.array_record-00000-of-00001', _flip(300)),
    ('gsm8k-train.array_record-00000-of-00001', _cut(0.9999)),
    ('features.json', _other_type),
    ('dataset_info.json', _more_than_there_is),
    ('dataset_info.json', _unknown_place),
  ],
)
def test_a_dataset_with_one_fault_is_refused(prepared, tmp_path, name, damage):
  """Law: as above, where damage shows while examples are read.

  Mutants: errors of single records passed on; those of their places too.
  """
  _refused(prepared, tmp_path, name, damage)


def _refused(prepared, tmp_path, name, damage):
  copy = tmp_path / 'data'
  shutil.copytree(prepared, copy)
  damage(copy / 'gsm8k/1.0.0' / name)
  with pytest.raises(
    config_lib.ConfigError, match='remove .*|not prepared'
  ) as error:
    gsm8k(str(copy))
  text = str(error.value)
  assert '\n' not in text and len(text) < 1000
  assert str(copy) in text and 'download_and_prepare()' in text


@pytest.mark.parametrize(
  'kind, numeral',
  [
    ('float16', '0.1'),
    ('float32', '0.1'),
    ('float64', '0.1'),
    ('float32', '16777216.0'),
  ],
)
def test_a_number_of_a_dataset_is_its_text(kind, numeral):
  """Law: a float of any width is the shortest text that it is written as.

  Mutant: `value.item()`, which widens 0.1 to 0.10000000149011612.
  """
  record = {'question': b'q', 'answer': np.dtype(kind).type(numeral)}
  rows = _rows(record)
  assert match.is_equal(numeral, rows['q'].answer, 'numeric')


def _rows(record):
  options = {**question_answer.OPTIONS, 'dataset': 'own'}
  return tfds._read(
    [record], 'train', options, config_lib.TaskConfig(), 'folder'
  )


@pytest.mark.parametrize(
  'record, words',
  [
    ({'question': b'q', 'answer': b'1\xff'}, 'holds no UTF-8'),
    ({'question': b'\xff', 'answer': b'1'}, 'holds no UTF-8'),
    ({'question': b'q', 'answer': np.float32('nan')}, 'no finite number'),
  ],
)
def test_bad_examples_of_a_dataset(record, words):
  """Mutant: bytes decoded with replacement characters."""
  with pytest.raises(ValueError, match=f'own, split train.*{words}') as error:
    _rows(record)
  one_line(error)
  # Other features may be anything.
  assert _rows({'question': b'q', 'answer': b'1', 'image': b'\xff'})


def test_short_names_are_known():
  """Mutant: a dataset whose name `make_task` takes for reasoning-gym's."""
  assert set(tfds.DATASETS) <= set(task_lib.OTHERS)
  for name in tfds.DATASETS:
    with pytest.raises(config_lib.ConfigError, match='is not prepared'):
      make(name=name, options={'data_dir': '/nowhere'})


# ---- JSONL of the MATH and AIME kind -------------------------------------

MATH = [
  {
    'problem': 'Half of one?',
    'solution': r'We get \boxed{0} no, $\boxed{\frac{1}{2}}$.',
    'answer': r'\frac{1}{2}',
    'level': 1,
  },
  {
    'problem': 'The set?',
    'solution': r'\boxed{\{1,2\}}',
    'answer': r'\{1,2\}',
    'level': 2,
  },
]


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def jsonl(path, **changes):
  return make(name='jsonl', path=path, held_out_path='', **changes)


def answers(task):
  return {
    p.prompt: p.answer
    for s in task_lib.SPLITS
    for p in (task.problem(s, i) for i in range(task.num_problems(s)))
  }


@pytest.mark.parametrize(
  'options',
  [
    {'question_field': 'problem'},
    {
      'question_field': 'problem',
      'answer_field': 'solution',
      'gold_format': 'boxed',
    },
  ],
)
def test_fields_of_a_jsonl_file(tmp_path, options):
  """MATH's answer field and the last box of its solution say the same."""
  path = write(tmp_path / 'math.jsonl', MATH)
  task = jsonl(path, options=options, match='exact')
  assert answers(task) == {row['problem']: row['answer'] for row in MATH}


def test_bad_fields_of_a_jsonl_file(tmp_path):
  path = write(tmp_path / 'math.jsonl', MATH)
  with pytest.raises(
    ValueError,
    match="line 1: lacks the field 'question'.*"
    'give question and answer, or name',
  ):
    jsonl(path, match='exact')
  options = {'question_field': 'problem', 'gold_format': 'boxed'}
  with pytest.raises(
    ValueError, match="line 1: field 'answer' ends in .*format 'boxed'"
  ):
    jsonl(path, match='exact', options=options)
  with pytest.raises(
    ValueError, match="no option of 'jsonl'; did you mean 'question_field'"
  ):
    jsonl(path, options={'question': 'problem'})


# ---- Equal answers -------------------------------------------------------


@pytest.fixture(scope='module')
def math_verify():
  module = pytest.importorskip('math_verify')
  equivalence.require()
  return module


EQUAL = [
  (r'\frac{1}{2}', r'\frac12'),
  ('1/2', r'\frac{1}{2}'),
  ('0.5', r'\dfrac{1}{2}'),
  ('.5', r'$\frac{1}{2}$'),
  (r'50\%', r'\frac{1}{2}'),
  ('x^2+2x+1', '(x+1)^2'),
  (r'3\sqrt{3}', r'\sqrt{27}'),
  (r'\{2, 1\}', r'\{1,2\}'),
  (r'(3,\frac{\pi}{2})', r'\left( 3, \frac{\pi}{2} \right)'),
  (r'\text{east}', 'east'),
  ('90', r'90^\circ'),
  ('x = 5', '5'),
  ('1,000', '1000'),
  ('025', '25'),
  (
    r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}',
    r'\begin{pmatrix}1\\2\end{pmatrix}',
  ),
  (r'x \in [-2,7]', '[-2,7]'),
  ('5!', '120'),
  ('e^{ x^2}', 'e^{x^2}'),
  ('2 1/2', r'\frac{5}{2}'),
  (r'\frac52', '2 1/2'),
  (r'2\frac{1}{2}', '2.5'),
  ('x = 2 1/2', '5/2'),
  ('(2 1/2, 3)', r'(\frac{5}{2}, 3)'),
  ('1 250', '1250'),
  ('(1 250, 2)', '(1250, 2)'),
  (r'\frac 1 2', '0.5'),
  (r'\log_2 8', '3'),
  ('$1 2 3$', '1 2 3'),
  ('\u22121250', '-1250'),
  ('**42**', '42'),
  (r'$\boxed{42}$', '42'),
]
UNEQUAL = [
  ('2', '3'),
  ('', '3'),
  ('q-p', 'p-q'),
  ('18 or 19', '18'),
  ('18, 19', '18'),
  (r'18} \boxed{19', '18'),
  ('18}{', '18'),
  ('(1,2)', '(2,1)'),
  ('[0,1)', '(0,1)'),
  ('west', r'\text{east}'),
  (r'\frac{1}{', r'\frac{1}{2}'),
  ('4.6667', r'\frac{14}{3}'),
  ('it is 18', '18'),
  ('2 1/2', r'\frac{21}{2}'),
  ('2 1/2', r'\frac{3}{2}'),
  ('x = 2 1/2', '3/2'),
  ('10 20', '30'),
  (r'10\ 20', '30'),
  ('30', '10 20'),
  ('1020', '10 20'),
  ('1 250', '251'),
  ('(1 250, 2)', '(0, 2)'),
  (r'\frac{2 1}{2}', '3/2'),
]


@pytest.mark.parametrize('answer, truth', EQUAL)
def test_equal_mathematics(math_verify, answer, truth):
  """Mutant: exact matching."""
  del math_verify
  assert match.is_equal(answer, truth, 'math')


@pytest.mark.parametrize('answer, truth', UNEQUAL)
def test_unequal_mathematics(math_verify, answer, truth):
  """Mutants: equal where math-verify cannot read an answer; numbers that stand
  apart passed on to it, which adds them up.
  """
  del math_verify
  assert not match.is_equal(answer, truth, 'math')


EXPLOSIVE = [
  '9^{9^{9}}',
  '9**9**9',
  '99999999!',
  '((9!)!)!',
  '10^{100000000}',
  r'\binom{100000000}{50000000}',
  'x^{9^{9^9}}',
]


@pytest.mark.parametrize(
  'answer', [*EXPLOSIVE, '{' * 500 + '1' + '}' * 500, '1' * 10**6]
)
def test_what_cannot_be_computed_is_wrong_at_once(math_verify, answer):
  """Mutant: `_admit` that returns True: the first of them hangs."""
  del math_verify
  start = time.monotonic()
  assert not match.is_equal(answer, '5', 'math')
  assert time.monotonic() - start < 1


def test_no_answer_is_evaluated_as_python(math_verify, monkeypatch, tmp_path):
  """Sympy makes numbers by evaluation; nothing but numerals gets there.

  Mutant: `sympy.sympify` of the answer.
  """
  del math_verify
  from sympy.parsing import sympy_parser  # pylint: disable=g-import-not-at-top

  evaluate, codes = sympy_parser.eval_expr, []

  def record(code, *rest):
    codes.append(code)
    return evaluate(code, *rest)

  monkeypatch.setattr(sympy_parser, 'eval_expr', record)
  touched = tmp_path / 'touched'
  for text in (
    f'__import__("os").system("touch {touched}")',
    'x+17',
    '(2+3)',
    'f(open)',
    '1 if 1 else 2',
    r'\sqrt{__name__}',
    '1.5x',
    r'\text{open}(3)',
    'x_{open(5)}',
    '0x10',
    '1_000',
    '[9][0]',
  ):
    match.is_equal(text, '5', 'math')
    match.is_equal('5', text, 'math')
  assert codes and not touched.exists()
  for code in codes:
    assert re.fullmatch(r"(Integer|Float) ?\('?[0-9.]+ ?'? ?\) ?", code), code


def test_math_verify_leaves_the_alarm_alone(math_verify, monkeypatch):
  """The one alarm of the process is the worker's.

  Mutant: math-verify's default time limits, which end it.
  """
  del math_verify

  def refuse(*unused):
    raise AssertionError('the alarm was touched')

  monkeypatch.setattr('signal.alarm', refuse)
  monkeypatch.setattr('signal.signal', refuse)
  assert match.is_equal('x^2+2x+1', '(x+1)^2', 'math')


def test_the_verifier_scores_mathematics(math_verify, tmp_path):
  """In the worker: right, wrong, a hang in sympy, and right again.

  Mutant: `_admit` that returns True: the tower of powers hangs too.
  """
  del math_verify
  path = write(tmp_path / 'math.jsonl', MATH)
  config = config_lib.TaskConfig(
    name='jsonl',
    path=path,
    options={'question_field': 'problem'},
    match='math',
    answer_format='boxed',
    verifier_seconds=1.0,
  )
  task = registry.make_task(config, 0)
  (half,) = (
    p
    for s in task_lib.SPLITS
    for p in (task.problem(s, i) for i in range(task.num_problems(s)))
    if p.prompt == 'Half of one?'
  )
  # Bounded powers of one another: no rule of ours refuses these.
  hang = r'\boxed{(((9^{9999})^{9999})^{9999})}'
  texts = [
    r'\boxed{0.5}',
    r'\boxed{\frac{2}{4}}',
    r'\boxed{2}',
    hang,
    r'\boxed{5 \times 10^{-1}}',
    'no box',
    r'\boxed{9^{9^{9^9}}}',
  ]
  with verifier_lib.Verifier(config, 0) as verifier:
    scores = verifier.score([half] * len(texts), texts)
    again = verifier.score([half] * 3, texts[:3])
  assert scores.rewards.tolist() == [1, 1, 0, 0, 1, 0, 0]
  assert scores.unscorable.tolist() == [False] * 3 + [True] + [False] * 3
  assert again.rewards.tolist() == [1, 1, 0]


def test_a_missing_math_verify_is_one_config_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  path = write(tmp_path / 'math.jsonl', MATH)
  with pytest.raises(
    config_lib.ConfigError, match=r"pip install 'rlax_llm\[math\]'"
  ) as error:
    jsonl(path, match='math', options={'question_field': 'problem'})
  one_line(error)
