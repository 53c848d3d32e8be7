"""Which answers may reach a reasoning-gym scorer.

Some scorers hand the model's text to Python's `eval` or to sympy's parser,
which calls it: they would run code, or compute 9**9**9**9. Others accept
wrong answers. Text is admitted by what it consists of; what is refused is a
wrong answer.
"""

from collections.abc import Callable
from collections.abc import Mapping
import fractions
import re
from typing import Any

from rlax_llm.tasks import answer_text
from rlax_llm.tasks.reasoning_gym import arithmetic

_MAX_DEPTH = 64  # nested brackets
_MARGIN = 4096  # characters beyond four times the oracle's length
_PLAIN = frozenset(map(chr, range(32, 127))) | {'\n', '\t'}


def _depth(text: str) -> int:
  """Returns how deep brackets nest, whatever closes them."""
  depth = deepest = 0
  for character in text:
    if character in '([{':
      depth += 1
      deepest = max(deepest, depth)
    elif character in ')]}':
      depth -= 1
  return deepest


def _admit_text(answer: str, item: Mapping[str, Any]) -> bool:
  """Printable ASCII, and whatever else the problem itself is written in."""
  own = f'{item["question"]}{item["answer"] or ""}'
  if len(answer) > _MARGIN + 4 * len(own):
    return False
  return (set(answer) <= _PLAIN | set(own)) and _depth(answer) <= _MAX_DEPTH


def _numbers(answer: str) -> list[int]:
  return sorted(int(n) for n in re.findall('[0-9]+', answer))


def _admit_target(answer: str, item: Mapping[str, Any]) -> bool:
  """An expression that uses the numbers and has the target as exact value.

  The scorers round, and puzzle24's does not compare the numbers.
  """
  metadata = item['metadata']
  target = metadata.get('target', 24)
  try:
    # '2--3' and the like are no answers to these puzzles but do no harm.
    return _numbers(answer) == sorted(metadata['numbers']) and arithmetic.value(
      answer
    ) == fractions.Fraction(target)
  except (ValueError, ZeroDivisionError):
    return False


_FUNCTIONS = frozenset(
  'sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh '
  'exp log sqrt'.split()
)
_SYMBOLIC = re.compile(r'[0-9A-Za-z+\-*/(). ]+')
# A point that is not a decimal point; a letter beside a digit (2x, 1e9); a
# word that is called although it is a variable is looked for below.
_MALFORMED = re.compile(
  r'(?<![0-9])\.|\.(?![0-9])|[0-9.][A-Za-z]|[A-Za-z][0-9]|'
  r'[A-Za-z] +[A-Za-z(]|\( *\)|[0-9)] *\(|\) *[0-9A-Za-z.]|'
  r'/ */|\* *\* *\*|\* +\*'
)
_POWER = re.compile(
  r'(?<=[A-Za-z)]) *\*\* *'
  r'(?:[0-9]{1,3}|\(-?[0-9]{1,2}(?:/[0-9]{1,2})?\))'
  r'(?! *\*\*|[0-9.])'
)
_POWERED = re.compile(r' *\*\*')


def _nested_powers(text: str) -> bool:
  """Whether a parenthesis under a power holds another: ((x)**99)**99."""
  holds = [False]
  for at, character in enumerate(text):
    if character == '(':
      holds.append(False)
    elif character == ')':
      if len(holds) == 1:
        return True  # unbalanced
      inner = holds.pop()
      powered = _POWERED.match(text, at + 1) is not None
      if powered and inner:
        return True
      holds[-1] = holds[-1] or inner or powered
  return False


def _symbolic(
  functions: frozenset[str], constants: frozenset[str]
) -> Callable[[str, Mapping[str, Any]], bool]:
  """Returns a rule for closed forms in the problem's variables."""

  def admit(answer: str, item: Mapping[str, Any]) -> bool:
    metadata = item['metadata']
    variables = set(metadata.get('variables', ())) or {metadata.get('variable')}
    if len(answer) > 128 + 4 * len(item['answer']):
      return False
    if not _SYMBOLIC.fullmatch(answer) or _MALFORMED.search(answer):
      return False
    for word in re.finditer(r'([A-Za-z]+)(\()?', answer):
      called = word.group(2) is not None
      if word.group(1) not in (functions if called else constants | variables):
        return False
    if len(_POWER.findall(answer)) != answer.count('**'):
      return False
    # The depth limit keeps sympy's simplification short.
    return _depth(answer) <= 8 and not _nested_powers(answer)

  return admit


def _characters(allowed: str) -> Callable[[str, Mapping[str, Any]], bool]:
  pattern = re.compile(f'[{allowed}]*')

  def admit(answer: str, item: Mapping[str, Any]) -> bool:
    own = len(str(item['answer'] or ''))
    return (
      len(answer) <= _MARGIN + 4 * own and pattern.fullmatch(answer) is not None
    )

  return admit


def _shape(pattern: str) -> Callable[[str, Mapping[str, Any]], bool]:
  compiled = re.compile(pattern)
  return lambda answer, item: (
    _admit_text(answer, item) and compiled.fullmatch(answer) is not None
  )


def _admit_as_many_words(answer: str, item: Mapping[str, Any]) -> bool:
  """No more words than the oracle has, in the problem's characters."""
  return set(answer) <= set(item['question'] + item['answer']) and len(
    answer.split()
  ) <= len(item['answer'].split())


def _admit_oracle(answer: str, item: Mapping[str, Any]) -> bool:
  return answer.lower() == item['answer'].strip().lower()


def _admit_number(answer: str, item: Mapping[str, Any]) -> bool:
  return (
    _admit_text(answer, item) and answer_text.parse_number(answer) is not None
  )


_RULES: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
  # sympy's parser.
  'countdown': _admit_target,
  'puzzle24': _admit_target,
  'polynomial_multiplication': _symbolic(frozenset(), frozenset()),
  'simple_integration': _symbolic(frozenset(), frozenset('C')),
  'intermediate_integration': _symbolic(_FUNCTIONS, frozenset('C')),
  # `eval`: of these four only the exact text is worth 1.0, so that nothing it
  # could turn into a value is needed.
  'string_insertion': _characters('A-E'),
  'spiral_matrix': _characters('0-9 '),
  'binary_matrix': _characters(r'0-9 \n'),
  'n_queens': _characters(r'Q_ \n'),
  # These scorers give full marks to more than the right answer: they read
  # past other text, take NaN for a small distance, or (the last) take any
  # text for True.
  'complex_arithmetic': _characters(r'0-9.+\-*ij() '),
  'fraction_simplification': _shape(
    r'\$? *(?:-?[0-9]+ */ *-?[0-9]+|'
    r'\\d?frac *\{ *[0-9]+ *\} *\{ *[0-9]+ *\}) *\$?'
  ),
  'gsm_symbolic': _characters(r'0-9.,$%+\-'),
  'kakurasu': _characters(r'01 \n'),
  'knights_knaves': _admit_as_many_words,
  'letter_jumble': _admit_as_many_words,
  'quantum_lock': _characters('A-Ca-c→>, -'),
  'sokoban': _characters('UDLR'),
  'survo': _characters(r'0-9 \n-'),
  'game_of_life_halting': _admit_oracle,
  # These raise, or compute 10**999999999, where the answer is malformed.
  'boxnet': _shape(r'(?s:\[.*\])'),
  'coin_flip': _admit_number,
  'prime_factorization': _shape('[0-9]+(?: *× *[0-9]+)*'),
}


def admit(name: str, answer: str, item: Mapping[str, Any]) -> bool:
  """Returns whether the scorer of a task may see an answer.

  Args:
    name: the reasoning-gym task.
    answer: the extracted answer.
    item: the problem, with question, answer and metadata.
  """
  return _RULES.get(name, _admit_text)(answer, item)
