"""Plain arithmetic on text: exact, bounded, and without an interpreter."""

from collections.abc import Callable
from collections.abc import Iterator
import fractions
import re

# An operand, or one of + - * / ( ) and `_NEGATE`.
Token = fractions.Fraction | str
Division = Callable[
  [fractions.Fraction, fractions.Fraction], fractions.Fraction
]

_NEGATE = '~'  # a minus sign before a parenthesis
_LEXEME = re.compile(r'[ \t\n]*([0-9]+|[-+*/()])')
_MAX_CHARACTERS = 1024


def tokenize(expression: str) -> list[Token]:
  """Returns the tokens of an expression over integers and + - * / ( ).

  A sign before a number is part of it; a plus sign before an operand is
  dropped.

  Raises:
    ValueError: another character, or more than 1024 characters.
  """
  text = expression.strip()
  if len(text) > _MAX_CHARACTERS:
    raise ValueError(
      f'expression of {len(text)} characters; the limit is {_MAX_CHARACTERS}'
    )
  tokens: list[Token] = []
  at = 0
  while at < len(text):
    lexeme = _LEXEME.match(text, at)
    if lexeme is None:
      raise ValueError(f'character {text[at]!r} in an arithmetic expression')
    at = lexeme.end()
    token = lexeme.group(1)
    is_prefix = not tokens or (
      isinstance(tokens[-1], str) and tokens[-1] != ')'
    )
    if token.isdigit():
      tokens.append(fractions.Fraction(int(token)))
    elif token == '-' and is_prefix:
      tokens.append(_NEGATE)
    elif token != '+' or not is_prefix:
      tokens.append(token)
  return _simplify(tokens)


def render(tokens: list[Token]) -> str:
  """Returns the expression without spaces."""
  return ''.join('-' if t == _NEGATE else str(t) for t in tokens)


def _simplify(tokens: list[Token]) -> list[Token]:
  """Applies minus signs and drops parentheses around single numbers."""
  stack: list[Token] = []
  for token in tokens:
    stack.append(token)
    while True:
      if (
        len(stack) > 2
        and stack[-1] == ')'
        and stack[-3] == '('
        and not isinstance(stack[-2], str)
      ):
        stack[-3:] = [stack[-2]]
      elif (
        len(stack) > 1
        and stack[-2] == _NEGATE
        and isinstance(number := stack[-1], fractions.Fraction)
      ):
        stack[-2:] = [-number]
      else:
        break
  return stack


def _operate(tokens: list[Token], divide: Division) -> list[Token]:
  """Returns the tokens after their first operation, by precedence."""
  closed = ')' in tokens
  end = tokens.index(')') if closed else len(tokens)
  begin = end
  while begin > 0 and tokens[begin - 1] != '(':
    begin -= 1
  numbers = tokens[begin:end:2]
  operators = tokens[begin + 1 : end : 2]
  if (
    not operators
    or len(numbers) != len(operators) + 1
    or closed != (begin > 0)
    or not set(operators) <= set('+-*/')
    or any(isinstance(n, str) for n in numbers)
  ):
    raise ValueError(f'{render(tokens)!r} is no arithmetic expression')
  first = next((i for i, o in enumerate(operators) if o in ('*', '/')), 0)
  left, right = numbers[first : first + 2]
  assert not isinstance(left, str) and not isinstance(right, str)
  if operators[first] == '+':
    result = left + right
  elif operators[first] == '-':
    result = left - right
  elif operators[first] == '*':
    result = left * right
  else:
    result = divide(left, right)
  at = begin + 2 * first
  return _simplify([*tokens[:at], result, *tokens[at + 3 :]])


def _exact(
  left: fractions.Fraction, right: fractions.Fraction
) -> fractions.Fraction:
  return left / right


def floor_divide(
  left: fractions.Fraction, right: fractions.Fraction
) -> fractions.Fraction:
  """Returns the floor of left / right."""
  return fractions.Fraction(left // right)


def steps(expression: str, divide: Division = _exact) -> Iterator[list[Token]]:
  """Yields the expression, then what is left after each operation.

  Operations go innermost parenthesis first, then * and / before + and -,
  then left to right. The last item is one number.

  Args:
    expression: as for `tokenize`.
    divide: what '/' means.

  Raises:
    ValueError: not an expression.
    ZeroDivisionError: a division by zero.
  """
  tokens = tokenize(expression)
  yield tokens
  while len(tokens) > 1 or not tokens or isinstance(tokens[0], str):
    tokens = _operate(tokens, divide)
    yield tokens


def value(expression: str) -> fractions.Fraction:
  """Returns the exact value of an expression; raises as `steps` does."""
  result = list(steps(expression))[-1][0]
  assert isinstance(result, fractions.Fraction)
  return result
