"""Problems, splits, epochs, traces, extraction, matching and bad input."""

import collections
import fractions
import json
import os
import random
import re
import time

import pytest
from reasoning_gym import factory

from rlax_llm import config as config_lib
from rlax_llm.tasks import extract
from rlax_llm.tasks import match
from rlax_llm.tasks import registry
from rlax_llm.tasks import task as task_lib
from rlax_llm.tasks.reasoning_gym import arithmetic
from rlax_llm.tasks.reasoning_gym import guard
from rlax_llm.tasks.reasoning_gym import traces
from rlax_llm.tasks.verifier import codec

QUICK = (
  'chain_sum',
  'gcd',
  'spell_backward',
  'acre',
  'list_functions',
  'gsm_symbolic',
  'survo',
  'pool_matrix',
  'countdown',
)


def make(name='chain_sum', seed=0, **changes):
  return registry.make_task(config_lib.TaskConfig(name=name, **changes), seed)


def prompts_of(task, split, count):
  return [task.problem(split, i).prompt for i in range(count)]


def one_line(error):
  text = str(error.value)
  assert '\n' not in text and len(text) < 1500
  return text


# ---- Splits, seeds, steps ------------------------------------------------


@pytest.mark.parametrize('name', QUICK)
def test_problems_are_a_function_of_seed_split_and_index(name):
  """Mutants: state carried from item to item; a split without its hash."""
  count = 6
  forward, backward = make(name), make(name)
  first = {
    (s, i): forward.problem(s, i) for s in task_lib.SPLITS for i in range(count)
  }
  for key in reversed(first):
    assert backward.problem(*key) == first[key]
  other = make(name, seed=1)
  assert prompts_of(other, 'train', count) != prompts_of(
    forward, 'train', count
  )


@pytest.mark.parametrize('name', ['chain_sum', 'basic_arithmetic', 'gcd'])
@pytest.mark.parametrize('prompt_format', ['question', 'short'])
def test_splits_never_overlap(name, prompt_format):
  """Across run seeds and on a small task, where draws collide.

  Mutant: a split by index or by seed.
  """
  options = {
    'chain_sum': {'min_terms': 2, 'max_terms': 2, 'max_digits': 1},
    'basic_arithmetic': {
      'max_terms': 2,
      'max_digits': 1,
      'whitespace': 'random',
      'format_style': 'natural',
    },
    'gcd': {'max_value': 12},
  }[name]
  prompts = collections.defaultdict(set)
  for seed in (0, 1):
    task = make(name, seed, options=options, prompt_format=prompt_format)
    for split in task_lib.SPLITS:
      prompts[split] |= {
        ''.join(
          task.problem(split, i)
          .entry['metadata']
          .get('expression', task.problem(split, i).prompt)
          .split()
        )
        for i in range(150)
      }
  assert prompts['train'] and prompts['held_out']
  assert not prompts['train'] & prompts['held_out']
  share = len(prompts['held_out']) / sum(map(len, prompts.values()))
  assert 0.1 < share < 0.5


def test_neighbouring_seeds_share_no_stream():
  """Mutant: seed + index, as in reasoning-gym itself."""
  options = {'min_digits': 6, 'max_digits': 6}
  prompts = [
    set(prompts_of(make(seed=s, options=options), 'train', 100))
    for s in range(3)
  ]
  assert all(len(p) == 100 for p in prompts)
  assert not prompts[0] & prompts[1] and not prompts[1] & prompts[2]


def step_ids(config, seed, step, task=None):
  task = task or registry.make_task(config, seed)
  return [
    p.prompt_id for p in task_lib.problems_for_step(task, config, seed, step)
  ]


def test_epochs_recur_and_are_reshuffled():
  """Mutants: one permutation for all epochs; a cursor kept in the task."""
  config = config_lib.TaskConfig(prompts_per_step=4, epoch_prompts=12)
  steps = [step_ids(config, 0, s) for s in range(9)]
  epochs = [sum(steps[e : e + 3], []) for e in (0, 3, 6)]
  assert len(set(epochs[0])) == 12
  assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2]
  task = registry.make_task(config, 0)
  for step in (7, 0, 8, 3):
    assert step_ids(config, 0, step, task) == steps[step]
  assert step_ids(config, 1, 0) != steps[0]


@pytest.mark.parametrize('size, available', [(4, 10), (4, 5), (7, 7), (5, 2)])
def test_no_prompt_twice_in_a_step_if_avoidable(size, available):
  """Mutant: steps that run across the end of an epoch."""
  config = config_lib.TaskConfig(prompts_per_step=size, epoch_prompts=available)
  task = registry.make_task(config, 3)
  seen = collections.Counter()
  for step in range(60):
    counts = collections.Counter(step_ids(config, 3, step, task))
    assert sum(counts.values()) == size
    assert max(counts.values()) <= -(-size // available)
    seen += counts
  assert len(seen) == available
  assert max(seen.values()) < 2 * min(seen.values())


def test_fresh_problems_differ_between_and_within_steps():
  config = config_lib.TaskConfig(
    prompts_per_step=30,
    options={'min_terms': 2, 'max_terms': 2, 'max_digits': 1},
  )
  task = registry.make_task(config, 0)
  steps = [step_ids(config, 0, s, task) for s in range(8)]
  # 200 sums, 150 of them in the split: collisions are drawn again.
  assert all(len(set(step)) >= 29 for step in steps)
  assert len({tuple(step) for step in steps}) == 8
  assert step_ids(config, 0, 5) == steps[5]


def test_too_few_problems_name_the_task_and_the_way_out():
  small = {'min_terms': 2, 'max_terms': 2, 'max_digits': 1}
  task = make(options=small, epoch_prompts=1000)
  with pytest.raises(ValueError, match='task.epoch_prompts') as error:
    task.problem('train', 0)
  assert 'chain_sum' in one_line(error)
  held_out = task_lib.distinct_problems(make(options=small), 'held_out', 20)
  assert len({p.prompt_id for p in held_out}) == 20
  only = {'min_terms': 1, 'max_terms': 1, 'max_digits': 1}
  with pytest.raises(ValueError, match='widen task.options'):
    task_lib.distinct_problems(make(options=only), 'held_out', 11)


def test_generation_is_cheap():
  task = make()
  task.problem('train', 0)
  start = time.perf_counter()
  for i in range(200):
    task.problem('train', i)
  assert (time.perf_counter() - start) / 200 < 5e-3


def test_instruction_stands_on_its_own_line():
  plain, told = (
    make().problem('train', 0),
    make(instruction='Think.').problem('train', 0),
  )
  assert told.prompt == plain.prompt + '\nThink.'
  assert told.prompt_id != plain.prompt_id


# ---- Mixtures ------------------------------------------------------------


def test_mixture_holds_its_proportions_without_gaps(tmp_path):
  """Mutant: the mixture's index passed on to its tasks."""
  path = tmp_path / 'data.jsonl'
  path.write_text(
    ''.join(
      json.dumps({'question': f'q{i}', 'answer': i}) + '\n' for i in range(60)
    )
  )
  config = config_lib.TaskConfig(
    name='mixture',
    mixture={'chain_sum': 3, 'jsonl': 1, 'gcd': 0.5},
    options={'gcd': {'max_value': 50}},
    path=str(path),
  )
  task = registry.make_task(config, 0)
  problems = [task.problem('train', i) for i in range(900)]
  counts = collections.Counter(p.source for p in problems)
  assert abs(counts['chain_sum'] / 900 - 3 / 4.5) < 0.05
  assert abs(counts['gcd'] / 900 - 0.5 / 4.5) < 0.03
  recurrences = collections.Counter(
    p.prompt for p in problems if p.source == 'jsonl'
  )
  assert max(recurrences.values()) - min(recurrences.values()) <= 1
  chain = make()
  own = [p.prompt for p in problems if p.source == 'chain_sum']
  assert own == [chain.problem('train', i).prompt for i in range(len(own))]
  for problem in problems[:50]:
    answer = f'<answer>{problem.answer}</answer>'
    assert task.score(problem.entry, answer) == 1.0
    assert task.score(problem.entry, '<answer>-12345678</answer>') == 0.0


# ---- Traces --------------------------------------------------------------


@pytest.mark.parametrize(
  'name, options',
  [
    ('chain_sum', {'allow_negation': True}),
    ('chain_sum', {'min_terms': 1, 'max_terms': 2}),
    ('basic_arithmetic', {'max_digits': 2}),
    ('basic_arithmetic', {'allow_parentheses': False}),
    ('basic_arithmetic', {'whitespace': 'no_space', 'max_terms': 6}),
    ('products', {'max_terms': 4, 'allow_negation': True}),
    ('gcd', {'max_numbers': 4}),
    ('lcm', {'max_numbers': 4}),
  ],
)
@pytest.mark.parametrize('answer_format', extract.FORMATS)
def test_traces_verify(name, options, answer_format):
  """Mutants: operations without precedence; a sign lost on the way."""
  for prompt_format in ('question', 'short'):
    task = make(
      name,
      options=options,
      answer_format=answer_format,
      prompt_format=prompt_format,
    )
    for i in range(25):
      problem = task.problem('train', i)
      assert task.score(problem.entry, problem.trace) == 1.0, problem


def test_each_step_of_a_trace_equals_the_next():
  """Mutant: a step that restates the rest and drops its last term."""
  task = make(
    'products',
    prompt_format='short',
    answer_format='after_equals',
    options={'max_terms': 5, 'allow_negation': True},
  )
  for i in range(50):
    problem = task.problem('train', i)
    lines = (problem.prompt + problem.trace).split('=')
    assert len({arithmetic.value(line) for line in lines}) == 1
    operators = [len(arithmetic.tokenize(line)) // 2 for line in lines]
    assert operators == list(range(len(lines) - 1, -1, -1)) or (
      operators == [0, 0]
    )


def test_a_tally_adds_every_term_in_turn():
  """Mutant: the sign of a negated operand is lost."""
  task = make(
    'chain_sum',
    prompt_format='short',
    answer_format='after_equals',
    options={'max_terms': 6, 'allow_negation': True},
  )
  leading = lambda line: re.match(r'-?[0-9]+', line).group()
  for i in range(50):
    problem = task.problem('train', i)
    first = leading(problem.prompt)
    lines = problem.trace.split('=')
    lines[0] = first + lines[0]
    for line, following in zip(lines, lines[1:]):
      assert arithmetic.value(line) == int(leading(following))
    terms = [line.removeprefix(leading(line)) for line in lines]
    assert first + ''.join(terms) + '=' == problem.prompt


@pytest.mark.parametrize(
  'expression, answer, trace',
  [
    ('4 + 3 - 2 + 6', '11', '+3=7-2=5+6=11'),
    ('2 - 5 + 4', '1', '-5=-3+4=1'),
    ('3 - -5', '8', '--5=8'),
    ('-7', '-7', '-7'),
  ],
)
def test_chain_sum_traces_by_hand(expression, answer, trace):
  item = {'metadata': {'expression': expression}, 'answer': answer}
  assert traces.trace('chain_sum', item, 'after_equals') == trace
  assert (
    traces.trace('chain_sum', item, 'tag')
    == f'{trace}<answer>{answer}</answer>'
  )
  assert traces.trace('chain_sum', item, 'scratchpad') == f'({trace}){answer}'


def test_basic_arithmetic_trace_by_hand():
  item = {'metadata': {'expression': '-( 2 + 3 * 4 ) / 7 - -5'}, 'answer': '3'}
  assert (
    traces.trace('basic_arithmetic', item, 'after_equals')
    == '-(2+12)/7--5=-14/7--5=-2--5=3'
  )
  assert (
    traces.trace('basic_arithmetic', {**item, 'answer': '4'}, 'tag') is None
  )


def test_short_prompts():
  problem = make(prompt_format='short').problem('train', 0)
  assert set(problem.prompt) <= set('0123456789+-=')
  assert problem.prompt.endswith('=')
  assert make('spell_backward').problem('train', 0).trace is None


def test_arithmetic_agrees_with_python():
  """Mutants: * and + of one precedence; right-to-left subtraction."""
  rng = random.Random(0)

  def expression(depth):
    if depth == 0 or rng.random() < 0.3:
      return str(rng.randint(-20, 20))
    inner = (
      expression(depth - 1)
      + rng.choice(' +-*/'.strip())
      + expression(depth - 1)
    )
    return f'{rng.choice(["", "-"])}({inner})' if rng.random() < 0.5 else inner

  checked = 0
  for _ in range(400):
    text = expression(4)
    try:
      value = arithmetic.value(text)
    except ZeroDivisionError:
      continue
    assert value == _reference(text), text
    checked += 1
  assert checked > 200


def _reference(text):
  """Evaluates through Python's own parser, with exact numbers."""
  import ast  # pylint: disable=g-import-not-at-top

  def walk(node):
    if isinstance(node, ast.Constant):
      return fractions.Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
      return -walk(node.operand)
    left, right = walk(node.left), walk(node.right)
    return {
      ast.Add: lambda: left + right,
      ast.Sub: lambda: left - right,
      ast.Mult: lambda: left * right,
      ast.Div: lambda: left / right,
    }[type(node.op)]()

  return walk(ast.parse(text, mode='eval').body)


@pytest.mark.parametrize(
  'text',
  [
    '',
    '1 2',
    '(1',
    '1)',
    '()',
    '1+',
    '+*1',
    '2**3',
    '7//2',
    'x',
    '1.5',
    '１',
    '(1)(2)',
    '1+)(2',
    '9' * 2000,
    '(' * 600 + '1' + ')' * 599,
    '-',
    '--',
  ],
)
def test_no_arithmetic(text):
  with pytest.raises(ValueError):
    arithmetic.value(text)


# ---- Extraction, codec, guard, match -------------------------------------


@pytest.mark.parametrize(
  'text, answer_format, answer',
  [
    ('<answer>1</answer> no <answer> 2 \n</answer>!', 'tag', '2'),
    ('<answer>1</answer> <answer>2', 'tag', '1'),
    ('1</answer>', 'tag', None),
    ('<answer> </answer>', 'tag', None),
    ('<answer>a<answer>b</answer>', 'tag', 'b'),
    ('1\n 2 \n\n', 'last_line', '2'),
    ('', 'last_line', None),
    ('7-2=5 = 6 ', 'after_equals', '6'),
    ('11', 'after_equals', '11'),
    ('5=', 'after_equals', None),
    (' x y ', 'all', 'x y'),
  ],
)
def test_extract(text, answer_format, answer):
  assert extract.extract_answer(text, answer_format) == answer


def test_extract_is_linear():
  start = time.perf_counter()
  extract.extract_answer('<answer>' * 300_000, 'tag')
  extract.extract_answer('</answer>' * 300_000, 'tag')
  assert time.perf_counter() - start < 1


def test_codec_round_trip():
  value = {
    'a': (1, [2.5, (None, True)]),
    3: {'__type__': 'x'},
    (0, 1): {frozenset({'p', 'q'}) and 'k': {1, 2}},
  }
  assert codec.decode(json.loads(json.dumps(codec.encode(value)))) == value


def test_symbolic_guard():
  item = {'answer': '3*x**2/2 + C', 'metadata': {'variable': 'x'}}
  good = [
    '3*x**2/2 + C',
    'x*asin(2*x) - sqrt(1 - 4*x**2)/2',
    '-2*(8 - 4*x)**(3/2) + C',
    'sin(x)**2*exp(-x)',
    '0.5*x',
    'x**(-1)',
  ]
  bad = [
    '9**9',
    'x**9**9',
    '(x**9)**9**9',
    '((x)**99)**99',
    'x**(9**9)',
    'Integral(x,x)',
    'x.y',
    'x._',
    'x(1)',
    '2x',
    'x2',
    '1e9',
    'C(1)',
    'sin',
    'lambda',
    'x if x',
    '9 **9',
    'x* *9',
    '(9)**9**9',
    'x**9999',
    '()' * 40,
    ')x(',
    'x**(9)**9',
    '(1)**(1)**9',
    'x//2',
    'E**9',
  ]
  for answer in good:
    assert guard.admit('intermediate_integration', answer, item), answer
  for answer in bad:
    assert not guard.admit('intermediate_integration', answer, item), answer


@pytest.mark.parametrize(
  'answer, truth, equal',
  [
    ('1/2', '0.5', True),
    ('$1,250.00', '1250', True),
    ('5%', '5', True),
    ('3.', '3', True),
    (' - 3', '-3', True),
    ('1e3', '1000', True),
    ('+4', '4', True),
    ('.5', '0.50', True),
    ('2,1', '21', False),
    ('1e999999999', '1', False),
    ('1e999', '1', False),
    ('1/0', '1', False),
    ('nan', 'nan', False),
    ('３', '3', True),
    ('3 or 4', '3', False),
    ('0.1', '1/10', True),
    ('1' * 300, '1', False),
    ('--3', '3', False),
    ('1,00', '100', False),
    ('1/2/3', '1', False),
    # Numbers that stand apart, and mixed numbers.
    ('2 1/2', '2.5', True),
    ('5/2', '2 1/2', True),
    ('21/2', '2 1/2', False),
    ('10 20', '1020', False),
    ('1 250', '1250', True),
    ('5 %', '5', True),
    # Units: none is any, two must agree.
    ('5 cm', '5', True),
    ('5 cm', '5 centimeters', True),
    ('5 cm', '5 m', False),
    ('$5', '5%', False),
    # Markup.
    ('\u22121250', '-1250', True),
    ('**42**', '42', True),
    ('42,', '42', True),
    ('42 ####', '42', True),
    (r'\boxed{42}', '42', True),
    ('42', r'$\boxed{42}$', True),
    ('2,5', '25', False),
  ],
)
def test_numeric_match(answer, truth, equal):
  """Mutants: floats in place of fractions; every comma dropped; whitespace
  dropped; units not compared.
  """
  assert match.is_equal(answer, truth, 'numeric') is equal


def test_exact_match():
  assert match.is_equal(' a\n b', 'a b', 'exact')
  assert not match.is_equal('ab', 'a b', 'exact')
  # A box says where the answer stands. Mutant: `unbox` of the answer alone.
  assert match.is_equal(r'\boxed{42}', '42', 'exact')
  assert match.is_equal('a b', r'$\boxed{a\nb}$'.replace(r'\n', '\n'), 'exact')
  assert not match.is_equal(r'\boxed{a} b', 'a b', 'exact')
  assert not match.is_equal('$42$', '42', 'exact')


# ---- JSONL ---------------------------------------------------------------


def write_lines(path, lines):
  path.write_bytes(
    b''.join(
      (line if isinstance(line, bytes) else line.encode()) + b'\n'
      for line in lines
    )
  )
  return str(path)


GOOD = [json.dumps({'question': f'q{i}', 'answer': i}) for i in range(40)]


def test_jsonl_splits_by_question_and_scores(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', ['', *GOOD, GOOD[3], '  '])
  task = make('jsonl', path=path, answer_format='last_line')
  counts = {s: task.num_problems(s) for s in task_lib.SPLITS}
  assert sum(counts.values()) == 40 and min(counts.values()) > 0
  prompts = {
    s: {task.problem(s, i).prompt for i in range(2 * counts[s])}
    for s in task_lib.SPLITS
  }
  assert not prompts['train'] & prompts['held_out']
  assert len(prompts['train']) == counts['train']
  problem = task.problem('train', 0)
  assert task.score(problem.entry, f'so\n{problem.answer}.0') == 1.0
  assert task.score(problem.entry, 'so\n41') == 0.0
  other = make('jsonl', path=path, seed=1)
  assert prompts_of(other, 'train', 9) != prompts_of(task, 'train', 9)
  config = config_lib.TaskConfig(name='jsonl', path=path, prompts_per_step=8)
  assert len(set(step_ids(config, 0, 5))) == 8


def test_jsonl_held_out_file(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', GOOD[:30])
  other = write_lines(tmp_path / 'b.jsonl', GOOD[30:])
  task = make('jsonl', path=path, held_out_path=other)
  assert task.num_problems('train') == 30
  expected = [f'q{i}' for i in range(30, 40)]
  assert prompts_of(task, 'held_out', 10) == expected
  write_lines(tmp_path / 'b.jsonl', GOOD[30:] + GOOD[4:6])
  with pytest.raises(ValueError, match='2 questions .* first at line 11'):
    make('jsonl', path=path, held_out_path=other)


@pytest.mark.parametrize(
  'line, words',
  [
    (b'{"question": "q"}', "'answer'"),
    (b'{"Question": "q", "answer": 1}', "did you mean 'Question'"),
    (b'{"question": "q", "answer": 1', 'no JSON'),
    (b'[1]', 'holds a list'),
    (b'{"question": 3, "answer": 1}', "'question' must be a string"),
    (b'{"question": "q", "answer": null}', 'NoneType'),
    (b'{"question": "q", "answer": true}', 'bool'),
    (b'{"question": "q", "answer": [1]}', 'list'),
    (b'{"question": "q", "answer": NaN}', 'NaN'),
    (b'{"question": "q", "answer": -Infinity}', 'Infinity'),
    (b'{"question": "q", "answer": 1e9999}', 'at most three digits'),
    (b'{"question": "q", "answer": ' + b'9' * 5000 + b'}', 'at most 256'),
    (b'{"question": "q", "answer": "2 3"}', 'no number'),
    (b'7', 'holds a number'),
    (b'{"question": "q", "answer": " "}', 'blank'),
    (b'{"question": "q", "answer": "ten"}', "task.match='exact'"),
    (b'{"question": "q1", "answer": 7}', 'line 2'),
    (b'\xff{"question": "q", "answer": 1}', 'UTF-8'),
    (b'{"question": "q", "answer": ' + b'[' * 100_000 + b'}', 'deep'),
    (b'{"question": "' + b'x' * 2**20 + b'", "answer": 1}', 'longer than'),
    (b'\x00', 'no JSON'),
  ],
)
def test_bad_lines(tmp_path, line, words):
  path = write_lines(tmp_path / 'bad.jsonl', [*GOOD[:2], line])
  with pytest.raises(ValueError, match=words) as error:
    make('jsonl', path=path)
  assert f'{path}, line 3: ' in one_line(error)


NUMERALS = [
  '0.12345678901234567891',
  '123456789012345678901234567890',
  '1e999',
  '-1.50',
  '1E-7',
  '0.1',
  '10000000000000001.0',
  '1e-400',
]


@pytest.mark.parametrize('kind', ['numeric', 'exact'])
@pytest.mark.parametrize('numeral', NUMERALS)
def test_a_json_number_is_its_text(tmp_path, numeral, kind):
  """Law: a right answer that is a JSON number equals its own text, and no
  other number.

  Mutant: json's floats, which round.
  """
  lines = [f'{{"question": "q{i}", "answer": {numeral}}}' for i in range(8)]
  path = write_lines(tmp_path / 'a.jsonl', lines)
  task = make('jsonl', path=path, answer_format='all', match=kind)
  problem = task.problem('train', 0)
  assert problem.answer == numeral
  entry = json.loads(task_lib.problem_json(problem))['entry']
  assert task.score(entry, numeral) == 1.0
  digits, mark, exponent = numeral.partition('e')
  assert task.score(entry, f'{digits}1{mark}{exponent}') == 0.0


@pytest.mark.parametrize('name', ['folder', 'pipe', '/dev/null', 'absent'])
def test_data_that_are_no_file(tmp_path, name):
  """Law: one line. Mutant: a pipe is opened, which waits for a writer."""
  (tmp_path / 'folder').mkdir()
  os.mkfifo(tmp_path / 'pipe')
  path = str(tmp_path / name)
  with pytest.raises(
    ValueError, match='cannot be read.*set task.path'
  ) as error:
    make('jsonl', path=path)
  assert path in one_line(error)


@pytest.mark.parametrize('at', range(0, 60, 7))
def test_a_jsonl_file_cut_short(tmp_path, at):
  """Law: half a line is refused, wherever it ends; a whole one is read.

  Mutant: a last line without a line break is skipped.
  """
  whole = json.dumps({'question': 'q' * 20, 'answer': 1234}).encode()
  path = write_lines(tmp_path / 'a.jsonl', GOOD)
  with open(path, 'ab') as file:
    file.write(whole[: at + 1])
  if at + 1 >= len(whole):
    make('jsonl', path=path)
    return
  with pytest.raises(ValueError, match='line 41: no JSON') as error:
    make('jsonl', path=path)
  one_line(error)


def test_empty_file_and_oversized_epoch(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', ['', ' '])
  with pytest.raises(ValueError, match='holds no problems'):
    make('jsonl', path=path)
  path = write_lines(tmp_path / 'a.jsonl', GOOD[:5])
  with pytest.raises(ValueError, match='task.epoch_prompts=50'):
    make('jsonl', path=path, epoch_prompts=50)


def test_options_of_a_validated_config_are_accepted():
  """Frozen configs hold tuples and FrozenDicts."""
  options = config_lib.FrozenDict({'operators': ['+', '-'], 'max_terms': 3})
  task = make('basic_arithmetic', options=options)
  assert '*' not in task.problem('train', 0).answer


def test_importing_tasks_is_light():
  """No jax, numpy apart, and no reasoning-gym before a task needs it."""
  import subprocess  # pylint: disable=g-import-not-at-top
  import sys  # pylint: disable=g-import-not-at-top

  code = (
    'import sys; from rlax_llm.tasks.verifier import verifier; '
    'from rlax_llm.tokenizers import tokenizer; '
    'print([m for m in ("jax", "grain", "reasoning_gym", "sympy") '
    'if m in sys.modules])'
  )
  output = subprocess.run(
    [sys.executable, '-c', code], check=True, capture_output=True, text=True
  )
  assert output.stdout.strip() == '[]'


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(factory.DATASETS) - {'composite'}))
def test_every_task_is_deterministic_and_varied(name):
  count = 2 if name == 'knight_swap' else 5
  first, second = make(name), make(name)
  problems = [first.problem('train', i) for i in range(count)]
  again = {i: second.problem('train', i) for i in reversed(range(count))}
  # codeio runs sample programs that draw random numbers.
  assert name == 'codeio' or [again[i] for i in range(count)] == problems
  assert len({p.prompt for p in problems}) > 1
  for problem in problems:
    assert json.loads(json.dumps(problem.entry)) == problem.entry
    if problem.answer is not None:
      answer = f'<answer>{problem.answer}</answer>'
      assert second.score(problem.entry, answer) == 1.0


def test_a_trace_that_leaves_off_answers_with_what_it_reached():
  """Mutant: the last value is that of all terms."""
  item = {'metadata': {'expression': '4 + 3 - 2 + 6'}, 'answer': '11'}
  trace = lambda n: traces.trace('chain_sum', item, 'scratchpad', terms_done=n)
  assert [trace(n) for n in (2, 3, 4)] == [
    '(+3=7)7',
    '(+3=7-2=5)5',
    '(+3=7-2=5+6=11)11',
  ]


def test_unfinished_traces_are_the_configured_share():
  """Mutant: every problem shares one random number."""
  task = make(
    'chain_sum',
    prompt_format='short',
    answer_format='scratchpad',
    options={'min_terms': 4, 'max_terms': 6},
    trace_unfinished=0.3,
  )
  problems = [task.problem('train', i) for i in range(400)]
  finished = [p.trace.endswith(f'={p.answer}){p.answer}') for p in problems]
  assert 0.62 < sum(finished) / len(finished) < 0.78


def test_only_sums_can_be_left_off():
  with pytest.raises(ValueError, match='trace_unfinished=0.5.*set it to 0'):
    make('gcd', trace_unfinished=0.5)
