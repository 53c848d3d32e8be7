r"""Whether two LaTeX answers are the same mathematical object.

Answers go through math-verify (github.com/huggingface/Math-Verify), LaTeX
only: its other reader, for plain expressions, hands the model's text to
sympy's `parse_expr`, which evaluates it as Python. Of LaTeX nothing but
numerals, as the grammar reads them, gets there.
"""

import functools
import importlib
import logging
import re
from typing import Any

from rlax_llm import config as config_lib
from rlax_llm.tasks import answer_text

_MARGIN = 256  # characters beyond twice the right answer's
_MAX_DEPTH = 16  # nested braces
# What would have more digits than a sample's time can compute: factorials of
# four digits or of an expression, powers of numbers in an exponent, exponents
# and binomials of five digits. The worker's limits end what is left.
_EXPLOSIVE = re.compile(
  r'[0-9]{4,}\s*!|[)}!]\s*!|'
  r'(?:\^|\*\*)\s*[{(]*\s*-?\s*[0-9]{5,}|'
  r'(?:\^|\*\*)\s*(?:\{[^{}A-Za-z]*|[0-9]\s*)(?:\^|\*\*|!)|'
  r'binom[{\s]*[0-9]{5,}'
)
_SPACE = r'(?:\s|\\[ ,;:]|~)'
# The grammar multiplies, or adds up, what stands side by side. A mixed number
# with its fraction in \frac it reads as one; thousands it reads with a comma.
_MIXED = re.compile(
  rf'(?<![\w.,^}}])([0-9]+){_SPACE}+([0-9]+)\s*/\s*([0-9]+)'
  r'(?![\w/]|[.,][0-9])'
)
_THOUSANDS = re.compile(
  rf'(?<![\w.,^}}])([1-9][0-9]{{0,2}})((?:{_SPACE}[0-9]'
  r'{3})+)(?![\w/]|,[0-9])'
)
# Arguments without braces are no numbers that stand apart: \frac 1 2, \log_2 8.
_ARGUMENTS = re.compile(
  r'\\[dtc]?(?:frac|binom)\s*[0-9]\s*[0-9]|'
  r'\\sqrt\s*[0-9]|[_^]\s*[0-9]+'
)
_APART = re.compile(rf'[0-9.]{_SPACE}+\.?[0-9]')


def require() -> None:
  """Imports math-verify, so that no sample's time is spent on it.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    importlib.import_module('math_verify')
  except ImportError as error:
    raise config_lib.ConfigError(
      "task.match='math' needs the package math-verify "
      f"({error}); pip install 'rlax_llm[math]', or set task.match to "
      'numeric or exact'
    ) from error
  # It warns that its own time limits are off, and of every text it cannot
  # read.
  for name in ('math_verify', 'latex2sympy2_extended'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # What the first use builds and imports: its grammar, sympy's units.
  is_equivalent('(x+1)^2', 'x^2+2x+1')


def _with_one_meaning(text: str) -> str:
  r"""Returns the text with 2 1/2 as 2\frac{1}{2} and 1 250 as 1250."""

  def mix(found: re.Match[str]) -> str:
    whole, upper, lower = found.groups()
    if int(upper) >= int(lower):
      return found.group()
    return rf'{whole}\frac{{{upper}}}{{{lower}}}'

  text = _MIXED.sub(mix, text)
  return _THOUSANDS.sub(lambda m: re.sub('[^0-9]', '', m.group()), text)


def _holds_numbers_apart(text: str) -> bool:
  """Whether two numbers stand side by side, with nothing but space between."""
  return _APART.search(_ARGUMENTS.sub(' @ ', text)) is not None


def _admit(answer: str, truth: str) -> bool:
  """Whether an answer may be read: short, balanced, of bounded values."""
  if len(answer) > _MARGIN + 2 * len(truth):
    return False
  depth = 0
  for brace in re.findall(r'\\.|[{}]', answer):
    depth += {'{': 1, '}': -1}.get(brace, 0)
    if not 0 <= depth <= _MAX_DEPTH:
      return False
  return depth == 0 and (answer == truth or not _EXPLOSIVE.search(answer))


def _parse(text: str) -> list[Any]:
  import math_verify  # pylint: disable=g-import-not-at-top

  # No time limit of its own: it is the process's one alarm, which the worker
  # has set to end a hung sample.
  return math_verify.parse(
    f'\\boxed{{{text}}}',
    extraction_config=[math_verify.LatexExtractionConfig()],
    parsing_timeout=None,
  )


# The samples of one problem come one after the other.
_parse_truth = functools.lru_cache(maxsize=64)(_parse)


def is_equivalent(answer: str, truth: str) -> bool:
  r"""Returns whether an answer equals the right one, as math-verify has it.

  1/2, \frac12, 0.5 and 50\% are equal; so are (x+1)^2 and x^2+2x+1; numbers
  are compared to six decimal places; an equation x=5 stands for its right
  side. Answers much longer than the right one, with braces that do not
  balance, or with powers, factorials and binomials too large to compute are
  wrong. So are answers in which two numbers stand apart, 10 20, which
  math-verify adds up; a mixed number, 2 1/2, is one number.

  Args:
    answer: what the model gave, LaTeX or plain, with or without $...$.
    truth: the right answer.
  """
  import math_verify  # pylint: disable=g-import-not-at-top

  answer, truth = (
    _with_one_meaning(answer_text.strip_formula(text))
    for text in (answer, truth)
  )
  if answer.split() == truth.split():
    return True
  if not _admit(answer, truth) or any(
    map(_holds_numbers_apart, (answer, truth))
  ):
    return False
  return bool(
    math_verify.verify(
      _parse_truth(truth), _parse(answer), timeout_seconds=None
    )
  )
