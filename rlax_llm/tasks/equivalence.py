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

_MARGIN = 256  # characters beyond twice the right answer's
_MAX_DEPTH = 16  # nested braces
# What would have more digits than a sample's time can compute: factorials of
# four digits or of an expression, powers of numbers in an exponent, exponents
# and binomials of five digits. The worker's limits end what is left.
_EXPLOSIVE = re.compile(
    r'[0-9]{4,}\s*!|[)}!]\s*!|'
    r'(?:\^|\*\*)\s*[{(]*\s*-?\s*[0-9]{5,}|'
    r'(?:\^|\*\*)\s*(?:\{[^{}A-Za-z]*|[0-9]\s*)(?:\^|\*\*|!)|'
    r'binom[{\s]*[0-9]{5,}')
_DELIMITERS = (('$$', '$$'), ('$', '$'), ('\\(', '\\)'), ('\\[', '\\]'))


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
        'numeric or exact') from error
  # It warns that its own time limits are off, and of every text it cannot
  # read.
  for name in ('math_verify', 'latex2sympy2_extended'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # What the first use builds and imports: its grammar, sympy's units.
  is_equivalent('(x+1)^2', 'x^2+2x+1')


def _bare(text: str) -> str:
  """Returns the text without the marks of a formula around it."""
  text = text.strip()
  for begin, end in _DELIMITERS:
    inner = text[len(begin):-len(end)]
    if (len(text) > len(begin) + len(end) and text.startswith(begin) and
        text.endswith(end) and begin not in inner):
      return inner.strip()
  return text


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
      parsing_timeout=None)


# The samples of one problem come one after the other.
_parse_truth = functools.lru_cache(maxsize=64)(_parse)


def is_equivalent(answer: str, truth: str) -> bool:
  r"""Returns whether an answer equals the right one, as math-verify has it.

  1/2, \frac12, 0.5 and 50\% are equal; so are (x+1)^2 and x^2+2x+1; numbers
  are compared to six decimal places; an equation x=5 stands for its right
  side. Answers much longer than the right one, with braces that do not
  balance, or with powers, factorials and binomials too large to compute are
  wrong.

  Args:
    answer: what the model gave, LaTeX or plain, with or without $...$.
    truth: the right answer.
  """
  import math_verify  # pylint: disable=g-import-not-at-top
  answer, truth = _bare(answer), _bare(truth)
  if not _admit(answer, truth):
    return False
  return bool(
      math_verify.verify(_parse_truth(truth),
                         _parse(answer),
                         timeout_seconds=None))
