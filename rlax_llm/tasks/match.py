"""Whether two answers are the same number, text or mathematical object."""

import fractions
import re

from rlax_llm.tasks import equivalence

MATCHES = ('numeric', 'exact', 'math')

_MAX_CHARACTERS = 256
_NUMBER = r'[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?'
_QUOTIENT = re.compile(f'({_NUMBER})(?:/({_NUMBER}))?')
_THOUSANDS = re.compile(r'(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])')


def parse_number(text: str) -> fractions.Fraction | None:
  """Returns the exact value of a number or a quotient, or None.

  Commas between thousands, '$', '%', whitespace and a trailing point are
  dropped: '$1,250.00' is 1250 and '5%' is 5. Exponents have three digits at
  most, since 1e999999999 would fill the memory.
  """
  if len(text) > _MAX_CHARACTERS:
    return None
  plain = _THOUSANDS.sub(lambda m: m.group().replace(',', ''), text)
  plain = re.sub(r'[\s$%]', '', plain).rstrip('.')
  match = _QUOTIENT.fullmatch(plain)
  if match is None:
    return None
  numerator, denominator = match.groups()
  try:
    return fractions.Fraction(numerator) / fractions.Fraction(denominator or 1)
  except ZeroDivisionError:
    return None


def is_equal(answer: str, truth: str, match: str) -> bool:
  """Returns whether an answer is right.

  Args:
    answer: what the model gave.
    truth: the right answer.
    match: numeric (equal as exact numbers), exact (equal as text, runs of
      whitespace counted as one space), or math (either of these, or the same
      mathematical object: see `equivalence.is_equivalent`).
  """
  if match != 'numeric' and answer.split() == truth.split():
    return True
  if match == 'exact':
    return False
  value = parse_number(answer)
  if value is not None and value == parse_number(truth):
    return True
  return match == 'math' and equivalence.is_equivalent(answer, truth)
