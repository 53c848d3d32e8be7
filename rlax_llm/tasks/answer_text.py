r"""Answers as text: the box around an answer, and the number it stands for.

Both follow what math-verify (github.com/huggingface/Math-Verify) and the
graders of MATH (arXiv 2103.03874) and GSM8K (arXiv 2110.14168) read; the
docstrings say where they differ from one another.
"""

from collections.abc import Sequence
import fractions
import re
from typing import NamedTuple
import unicodedata

# ---- Boxes -------------------------------------------------------------------

# A box with its brace; a box without one, before a number or a command; an
# escaped character; a brace; the end of a formula or of a line. A doubled
# backslash is a line break, except that models escape a box with it.
_BOX = r'\\(?:boxed|fbox)'
_UNBRACED = r'\s*(?=[+\-\u2212]?(?:\.?[0-9]|\\[A-Za-z{$]))'
_MARK = re.compile(
  rf'(?P<box>{_BOX}(?:\s*(?P<brace>\{{)|{_UNBRACED}))|'
  r'\\[{}$)\]]|\\\\(?!boxed|fbox)|[{}$\n]'
)
_ENDS_UNBRACED = frozenset(('}', '$', '\n', '\\)', '\\]'))


def last_box(text: str) -> str:
  r"""Returns the content of the last \boxed{...} whose braces balance, or ''.

  \fbox is a box too, and whitespace, line breaks included, may stand before
  the brace, as in math-verify. Without a brace, \boxed 5 holds the rest of its
  formula or line, as in MATH's grader; such a box must begin with a number or
  a command, so that a sentence about \boxed is none. Of nested boxes the
  innermost counts. A box inside <think> counts even where the thought does not
  end, as in math-verify; probes and forced answers read their answers there.

  The search is one pass: a completion of nothing but boxes takes linear time.
  """
  # Where the content of each open box begins, and whether it has a brace; for
  # a group that is no box, None.
  stack: list[tuple[int, bool] | None] = []
  begin = end = 0

  def close(at: int) -> None:
    nonlocal begin, end
    group = stack.pop()
    if group is not None and group[0] > begin:
      begin, end = group[0], at

  def close_unbraced(at: int) -> None:
    while stack and (group := stack[-1]) is not None and not group[1]:
      close(at)

  for found in _MARK.finditer(text):
    mark = found.group()
    if found['box']:
      stack.append((found.end(), found['brace'] is not None))
      continue
    if mark in _ENDS_UNBRACED:
      close_unbraced(found.start())
    if mark == '{':
      stack.append(None)
    elif mark == '}' and stack:
      close(found.start())
  close_unbraced(len(text))
  return text[begin:end]


_DELIMITERS = (('$$', '$$'), ('$', '$'), ('\\(', '\\)'), ('\\[', '\\]'))
_BRACE = re.compile(r'\\.|[{}]', re.DOTALL)
_BOXED = re.compile(rf'\\?{_BOX}\s*(?P<brace>\{{)')
_BOXED_BARE = re.compile(rf'\\?{_BOX}{_UNBRACED}')
# Commands that set their argument in another font.
_FONT = re.compile(
  r'\\(?:text|textbf|textit|textrm|textnormal|mbox|mathbf|'
  r'mathrm|mathit)\s*(?P<brace>\{)'
)


def strip_formula(text: str) -> str:
  r"""Returns the text without the $...$, \(...\) or \[...\] around it."""
  text = text.strip()
  for begin, end in _DELIMITERS:
    inner = text[len(begin) : -len(end)]
    if (
      len(text) > len(begin) + len(end)
      and text.startswith(begin)
      and text.endswith(end)
      and begin not in inner
    ):
      return inner.strip()
  return text


def _closing(text: str) -> dict[int, int]:
  """Returns the position of the closing brace of every opening one."""
  opened: list[int] = []
  closing = {}
  for found in _BRACE.finditer(text):
    if found.group() == '{':
      opened.append(found.start())
    elif found.group() == '}' and opened:
      closing[opened.pop()] = found.start()
  return closing


def _argument(text: str, command: re.Pattern[str]) -> str | None:
  """Returns the argument of nested commands that the whole text consists of.

  Args:
    text: without whitespace at its ends.
    command: begins with the command, ends with the group `brace`.

  Returns:
    The innermost argument; None where the text is no such command.
  """
  if not command.match(text):
    return None
  closing = _closing(text)
  begin, end = 0, len(text)
  while found := command.match(text, begin, end):
    if closing.get(found.start('brace')) != end - 1:
      break
    begin, end = found.end(), end - 1
    while begin < end and text[begin].isspace():
      begin += 1
    while begin < end and text[end - 1].isspace():
      end -= 1
  return text[begin:end] if begin else None


def unbox(text: str) -> str:
  r"""Returns the content of a box that is the whole text; else the text.

  <answer>\boxed{42}</answer> gives the answer 42: like the tags, the box says
  where the answer stands and is no part of it. The same goes for $\boxed{42}$.
  A box with text beside it stays as it is.

  Args:
    text: an extracted answer, or a right answer of a data set.
  """
  inner = strip_formula(text)
  content = _argument(inner, _BOXED)
  if content is None and (bare := _BOXED_BARE.match(inner)):
    content = last_box(inner) if '\n' not in inner[bare.end() :] else None
  return text if content is None else content


# ---- Numbers -----------------------------------------------------------------

MAX_CHARACTERS = 256  # of a number


class Number(NamedTuple):
  """A number as an answer gives it."""

  value: fractions.Fraction  # in its unit: 5 for 5%
  unit: str  # '%', '$', 'cm', 'cm^2', ...; '': none is given


# Spaces of text and of TeX.
_SPACE = r'(?:\s|\\[ ,;:!]|~)'
_COMMA = r'(?:,|\{,\}|,\\!)'
# ISO 80000-1 puts a thin space between thousands; texts have any one space.
_THIN = r'(?:\\[ ,;:!]|~|[ \u00a0\u2009\u202f])'
_SIGN = r'[+-]'
_CURRENCIES = '$€£¥₹'


def _decimal(name: str, separator: str) -> str:
  """Returns the pattern of an unsigned decimal number.

  Args:
    name: of a group, unlike all others.
    separator: pattern between thousands. One number has one separator.
  """
  groups = (
    rf'[1-9][0-9]{{0,2}}(?P<{name}>{separator})[0-9]{{3}}'
    rf'(?:(?P={name})[0-9]{{3}})*(?![0-9])'
  )
  # Exponents have three digits at most: 1e999999999 would fill the memory.
  return (
    rf'(?:(?:{groups}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)'
    r'(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?'
  )


def _integer(name: str) -> str:
  groups = (
    rf'[1-9][0-9]{{0,2}}(?P<{name}>{_COMMA})[0-9]{{3}}'
    rf'(?:(?P={name})[0-9]{{3}})*(?![0-9])'
  )
  return rf'(?:{groups}|[0-9]+)'


def _tex_fraction(upper: str, lower: str) -> str:
  """Returns the pattern of \\frac; its arguments are groups of these names."""

  def argument(name: str) -> str:
    inner = rf'{_SIGN}?{_decimal(name + "_thousands", _COMMA)}'
    # Without braces an argument is one character.
    return (
      rf'{_SPACE}*(?:\{{{_SPACE}*(?P<{name}>{inner}){_SPACE}*\}}|'
      rf'(?P<{name}_digit>[0-9]))'
    )

  return rf'\\[dtc]?frac{argument(upper)}{argument(lower)}'


_NUMBER = re.compile(
  rf'(?P<sign>{_SIGN}{_SPACE}*)?'
  rf'(?:\\?(?P<before>[%{_CURRENCIES}]){_SPACE}*)?'
  rf'(?P<inner_sign>{_SIGN}{_SPACE}*)?(?:'
  # A whole number and a fraction. First: the whole number of 2 100/200 is
  # no group of thousands.
  rf'(?P<whole>{_integer("c")})(?:{_SPACE}+(?P<up>{_integer("d")})'
  rf'{_SPACE}*/{_SPACE}*(?P<low>{_integer("e")})|'
  rf'{_SPACE}*{_tex_fraction("mixed_up", "mixed_low")})|'
  rf'{_tex_fraction("tex_up", "tex_low")}|'
  rf'(?P<numerator>{_decimal("f", _COMMA)}){_SPACE}*/{_SPACE}*'
  rf'(?P<denominator>{_SIGN}?{_decimal("g", _COMMA)})|'
  rf'(?P<number>{_decimal("h", f"(?:{_COMMA}|{_THIN})")}))'
)

# Unit -> its other spellings.
_SPELLINGS = {
  '%': 'percent percentage pct',
  '$': 'dollar dollars usd',
  '€': 'euro euros eur',
  '£': 'gbp',
  '°': 'degree degrees deg',
  'cent': 'cents',
  'mm': 'millimeter millimeters millimetre millimetres',
  'cm': 'centimeter centimeters centimetre centimetres',
  'm': 'meter meters metre metres',
  'km': 'kilometer kilometers kilometre kilometres kms',
  'inch': 'inches',
  'foot': 'feet ft',
  'yard': 'yards yd',
  'mile': 'miles',
  'mg': 'milligram milligrams',
  'g': 'gram grams gm',
  'kg': 'kilogram kilograms kgs',
  'ounce': 'ounces oz',
  'pound': 'pounds lb lbs',
  'ml': 'milliliter milliliters millilitre millilitres',
  'l': 'liter liters litre litres',
  'gallon': 'gallons gal',
  's': 'second seconds sec',
  'minute': 'minutes min mins',
  'h': 'hour hours hr hrs',
  'day': 'days',
  'week': 'weeks',
  'month': 'months',
  'year': 'years yr yrs',
  'mph': '',
  'km/h': 'kmh kph',
  'm/s': '',
  'unit': 'units',
}
_UNITS = {
  spelling: unit
  for unit, others in _SPELLINGS.items()
  for spelling in (unit, *others.split())
}
# One letter is as likely a variable; in \text{} it is a unit.
_BARE = {word: unit for word, unit in _UNITS.items() if len(word) > 1}
_POWERS = {'square': '2', 'sq': '2', 'cubic': '3', 'cu': '3'}
# Words that change the number, or say that there are several.
_NO_UNIT = frozenset(
  'hundred thousand million billion trillion dozen half halves third thirds '
  'quarter quarters fourth fourths fifth fifths sixth sixths seventh eighth '
  'eighths ninth tenth tenths hundredth hundredths thousandth thousandths '
  'hundreds thousands millions billions trillions dozens pi i and or to plus '
  'minus times over more less about mod base'.split()
)
_SYMBOL = re.compile(rf'\\?([%{_CURRENCIES}])')
_DEGREE = re.compile(r'(?:\{\})?\^\s*\{?\s*\\?circ\s*\}?|\\degree|°')
_MARKED = re.compile(
  r'\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm)'
  r'\s*\{([^{}\\]*)\}'
)
_WORDS = re.compile(r'([a-z]+(?:[ /-][a-z]+)*)(?:\^([23]))?')
_ENDS = re.compile(rf'^{_SPACE}+|{_SPACE}+$')


def _unit(text: str) -> str | None:
  """Returns the unit that follows a number; None: the text is no unit."""
  text = _ENDS.sub('', text)
  if _DEGREE.fullmatch(text):
    return '°'
  text = text.translate({0xB2: '^2', 0xB3: '^3'})
  text, marked = _MARKED.subn(r'\1', re.sub(r'\^\{([23])\}', r'^\1', text))
  text = ' '.join(text.casefold().replace('.', ' ').split())
  if not text:
    return ''
  if symbol := _SYMBOL.fullmatch(text):
    return symbol[1]
  found = _WORDS.fullmatch(text)
  if found is None:
    return None
  words, power = found[1], found[2]
  first, _, rest = words.partition(' ')
  if rest and not power and first in _POWERS:
    words, power = rest, _POWERS[first]
  unit = (_UNITS if marked else _BARE).get(words)
  if unit is None:
    # Things that are counted have any name; only TeX marks it as a text.
    if not marked or _NO_UNIT & set(re.split('[ /-]', words)):
      return None
    unit = words.removesuffix('s')
  return f'{unit}^{power}' if power else unit


def _strip_markup(text: str) -> str:
  """Returns the text without what sets it off: fonts, boxes, punctuation."""
  while True:
    inner = strip_formula(text)
    content = _argument(inner, _FONT)
    inner = unbox(inner) if content is None else content
    if inner.startswith('**') and inner.endswith('**') and len(inner) > 4:
      inner = inner[2:-2]
    inner = re.sub(r'^####\s*|\s*####$|[.,:;\s]+$', '', inner)
    if inner == text:
      return text
    text = inner


def _to_ascii(text: str) -> str:
  """Returns the text with digits, signs and fractions of any script in ASCII.

  A fraction of one character stays apart from what stands beside it: 2½ is
  2 1/2.
  """
  if text.isascii():
    return text
  characters = []
  for character in text:
    digit = unicodedata.decimal(character, None)
    kind = unicodedata.decomposition(character).partition(' ')[0]
    if digit is not None:
      character = str(digit)
    elif kind == '<fraction>':
      plain = unicodedata.normalize('NFKC', character).replace('\u2044', '/')
      character = f' {plain} '
    elif kind == '<wide>':
      character = unicodedata.normalize('NFKC', character)
    characters.append(character)
  return ''.join(characters).replace('\u2212', '-')


def parse_number(text: str) -> Number | None:
  r"""Returns the number that an answer is, exactly, or None.

  The whole text must be one number: two that stand apart are none, and none of
  its marks is dropped from the middle. It is

    - an integer or a decimal, 1250, 1,250.00, .5, 3., 1e3, with exponents of at
      most three digits. Thousands are well formed: one to three digits, then
      groups of three, with one separator throughout: a comma, 1{,}250,
      1,\!250, or one space, as math-verify reads 1 250;
    - a quotient of these, 1/2, \frac{1}{2}, \dfrac12; or
    - a mixed number, 2 1/2, 2½ or 2\frac{1}{2}: an integer and a fraction
      below 1,

  with digits of any script, a sign (+, - or U+2212) and a unit: a currency or a
  percent sign before or after it, degrees, a common unit (cm, hours, km/h,
  cm^2), or what \text{...} holds. 5% is 5, in the unit %: data sets of numbers
  write what they ask for, and the way to compare 50% and 1/2 is `match='math'`.
  Words that change the number ('5 million', '3 and a half') are no units.

  Markup around the number is dropped: $...$, \(...\), boxes, \textbf{...},
  **bold**, the #### of GSM8K, and the punctuation of a sentence at the end.

  Args:
    text: an answer, of at most 256 characters.
  """
  if len(text) > MAX_CHARACTERS:
    return None
  plain = _strip_markup(_to_ascii(text))
  found = _NUMBER.match(plain)
  if found is None or (found['sign'] and found['inner_sign']):
    return None
  before, behind = found['before'] or '', _unit(plain[found.end() :])
  if behind is None or (before and behind and before != behind):
    return None

  def value(*names: str) -> fractions.Fraction:
    digits = next((found[name] for name in names if found[name]), '0')
    # Of thousands: what separates them.
    return fractions.Fraction(re.sub('[^0-9.eE+-]', '', digits))

  result = value('number', 'whole')
  upper = value(
    'numerator', 'up', 'tex_up', 'tex_up_digit', 'mixed_up', 'mixed_up_digit'
  )
  lower = value(
    'denominator',
    'low',
    'tex_low',
    'tex_low_digit',
    'mixed_low',
    'mixed_low_digit',
  )
  if found['number'] is None:
    if not lower or (found['whole'] and not 0 <= upper / lower < 1):
      return None
    result += upper / lower
  if '-' in (found['sign'] or found['inner_sign'] or ''):
    result = -result
  return Number(result, before or behind)


def is_same_number(one: str, other: str) -> bool:
  """Returns whether two texts are one number, in one unit where both have one.

  Args:
    one: an answer, as for `parse_number`.
    other: another.
  """
  a, b = parse_number(one), parse_number(other)
  if a is None or b is None or a.value != b.value:
    return False
  return not a.unit or not b.unit or a.unit == b.unit


# ---- Votes -------------------------------------------------------------------


def with_units(forms: Sequence[str | None]) -> list[str | None]:
  """Returns votes in which a number without a unit has that of its equals.

  As in `is_same_number`, 5 equals both 5% and $5. Where its equals have several
  units, it stays apart from them.

  Args:
    forms: canonical forms; None: no answer.
  """
  units: dict[str, set[str]] = {}
  for form in forms:
    if form is not None and (found := _CANONICAL.fullmatch(form)) and found[2]:
      units.setdefault(found[1], set()).add(form)
  only = {
    value: next(iter(all_)) for value, all_ in units.items() if len(all_) == 1
  }
  return [None if form is None else only.get(form, form) for form in forms]


# A number in lowest terms, and its unit.
_CANONICAL = re.compile(r'(-?[0-9]+(?:/[0-9]+)?)(.*)', re.DOTALL)
# Whitespace that separates two words or numbers.
_GAP = re.compile(r'(?<=[\w.])\s+(?=[\w.])')


def canonical(answer: str) -> str:
  r"""Returns the form that equal answers share; '' for a blank one.

  A number in its lowest terms, with its unit; other text without a box around
  it, without capitals, and without whitespace but for one space between words:
  (1, 2) is (1,2), while 2 1/2 is 5/2 and 1 2 is not 12.

  Args:
    answer: any text.
  """
  number = parse_number(answer)
  if number is not None:
    return f'{number.value}{number.unit}'
  gap = '\n'
  words = _GAP.sub(gap, unbox(answer).strip()).split(gap)
  return ' '.join(''.join(word.split()) for word in words).casefold()
