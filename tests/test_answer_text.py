"""Numbers and boxes in answers, and the form that votes are counted in."""

import fractions
import random
import time

import pytest

from rlax_llm.experience import labels as labels_lib
from rlax_llm.tasks import answer_text

NUMBERS = [
  # Mixed numbers, plain and in LaTeX.
  ('2 1/2', '5/2'),
  ('-2 1/2', '-5/2'),
  ('\u22122 1/2', '-5/2'),
  ('1,000 1/2', '2001/2'),
  (r'2\frac{1}{2}', '5/2'),
  (r'2 \frac12', '5/2'),
  (r'-2\dfrac{1}{2}', '-5/2'),
  ('0 1/2', '1/2'),
  ('2 100/200', '5/2'),
  # Quotients.
  ('21/2', '21/2'),
  ('1 / 2', '1/2'),
  ('1.5/-2', '-3/4'),
  ('1,000/2,000', '1/2'),
  (r'\frac{-1}{2}', '-1/2'),
  (r'-\tfrac 1 2', '-1/2'),
  (r'\frac{1,000}{2}', '500'),
  # Decimals, exponents, thousands.
  ('.5', '1/2'),
  ('3.', '3'),
  ('- 3', '-3'),
  ('+4', '4'),
  ('025', '25'),
  ('1e-3', '1/1000'),
  ('1,250.00', '1250'),
  ('1{,}250', '1250'),
  (r'10,\!080', '10080'),
  (r'1\,250\,000', '1250000'),
  ('1 250', '1250'),
  ('1\u202f250', '1250'),
  # Markup.
  ('$42$', '42'),
  (r'\(42\)', '42'),
  ('**$42$.**', '42'),
  (r'\textbf{42}', '42'),
  (r'\boxed{42}', '42'),
  (r'\fbox{\boxed{42}}', '42'),
  (r'$\boxed 42$', '42'),
  ('#### 42', '42'),
  ('42 ####', '42'),
  ('42,', '42'),
  ('42:', '42'),
  # Other scripts.
  ('３', '3'),
  ('－１，２５０．５', '-2501/2'),
  ('٢', '2'),
  ('½', '1/2'),
  ('2½', '5/2'),
  ('-2 ¾', '-11/4'),
  ('２ １／２', '5/2'),
]
UNITS = [
  ('5%', '5', '%'),
  (r'5\%.', '5', '%'),
  ('5 percent', '5', '%'),
  (r'5\text{ percent}', '5', '%'),
  (r'\$10,\!080', '10080', '$'),
  ('-$5', '-5', '$'),
  ('$-5', '-5', '$'),
  ('5 dollars', '5', '$'),
  ('5€', '5', '€'),
  (r'90^\circ', '90', '°'),
  (r'90^{\circ}', '90', '°'),
  ('12 inches', '12', 'inch'),
  (r'12\text{ cm}^2', '12', 'cm^2'),
  (r'12 \mbox{ cm}^{2}', '12', 'cm^2'),
  ('12 square cm', '12', 'cm^2'),
  ('2 1/2 hours', '5/2', 'h'),
  (r'2\frac{1}{2}\text{ hours}', '5/2', 'h'),
  (r'42\text{ apples}', '42', 'apple'),
]
NO_NUMBERS = [
  # Two numbers.
  '10 20',
  '1 2',
  '1  250',
  '1\n250',
  '1 250,000',
  '1 0000',
  '2.5 1/2',
  '1 250/3',
  '3 5/2',
  '2 -1/2',
  '2-1/2',
  '1/2/3',
  '2 1/2 3',
  r'\frac{1}{2}3',
  r'\frac{2 1}{2}',
  '3 or 4',
  '5 cm 6',
  '5 feet 6 inches',
  # Marks in the middle.
  '1,00',
  '1,0000',
  '0,123',
  '1.000,5',
  '1. 5',
  '1 .5',
  '1e 3',
  '1$2',
  '1%2',
  '12**3',
  '5! ',
  '1_000',
  # Words that change the number, and variables.
  '5 million',
  r'5\text{ million}',
  r'3\text{ halves}',
  '5 pi',
  '5x',
  '5 m',
  '42 apples',
  'x=5',
  '$5%',
  # No numbers, or too large.
  '',
  '.',
  '-',
  '$',
  '--3',
  '1/0',
  r'\frac{1}{0}',
  '1e9999',
  '9' * 257,
  'nan',
  '1½3',
  '½½',
  '2½/3',
  '①',
  '2⁵',
]


@pytest.mark.parametrize('text, value', NUMBERS)
def test_a_number_is_read_exactly(text, value):
  """Mutants: a mixed number without the sign on its fraction; its fraction
  multiplied; marks dropped from the middle.
  """
  assert answer_text.parse_number(text) == (fractions.Fraction(value), '')


@pytest.mark.parametrize('text, value, unit', UNITS)
def test_a_number_has_its_unit(text, value, unit):
  """Mutant: units dropped."""
  assert answer_text.parse_number(text) == (fractions.Fraction(value), unit)


@pytest.mark.parametrize('text', NO_NUMBERS)
def test_what_is_no_number(text):
  """Mutants: whitespace dropped; fractions of mixed numbers above 1; the rest
  of the text ignored; any word is a unit.
  """
  assert answer_text.parse_number(text) is None


def test_tokens_are_never_joined():
  """Law: text that white space separates into numbers is none of the numbers
  that its tokens spell together, but for thousands in groups.

  Mutant: `re.sub(r'[\\s$%]', '', text)`.
  """
  rng = random.Random(0)
  tokens = ['1', '25', '3.5', '1/2', '-4', '12/7', '1e2', '7%', '$8', '9,000']
  for _ in range(2000):
    chosen = [rng.choice(tokens) for _ in range(rng.randint(2, 4))]
    text = ' '.join(chosen)
    glued = answer_text.parse_number(''.join(chosen))
    number = answer_text.parse_number(text)
    if number is not None:
      # The only ones: an integer and a fraction below 1.
      whole, fraction = chosen
      assert whole.lstrip('$-').replace(',', '').isdigit()
      part = fractions.Fraction(fraction)
      assert 0 < part < 1
      sign = -1 if whole.startswith('-') else 1
      assert number.value == answer_text.parse_number(whole).value + sign * part
      assert glued is None or glued.value != number.value


def test_notations_of_one_number_agree():
  """Law: every notation of a mixed number is the same exact value.

  Mutant: floats: 1/3 and its notations differ by rounding.
  """
  rng = random.Random(1)
  for _ in range(200):
    whole, lower = rng.randint(1, 10**6), rng.randint(2, 10**9)
    upper = rng.randint(1, lower - 1)
    sign = rng.choice(['', '-'])
    value = fractions.Fraction(f'{sign}{whole * lower + upper}/{lower}')
    for text in (
      f'{sign}{whole} {upper}/{lower}',
      f'{sign}{whole}\\frac{{{upper}}}{{{lower}}}',
      f'{sign}{whole:,} {upper:,}/{lower:,}',
      f'{sign}\\dfrac{{{whole * lower + upper}}}{{{lower}}}',
      f'{value}',
      f'${value}$',
    ):
      assert answer_text.parse_number(text) == (value, ''), text


@pytest.mark.parametrize(
  'text, content',
  [
    (r'\boxed{42}', '42'),
    (r' $\boxed{ 42 }$ ', '42'),
    ('\\boxed\n{42}', '42'),
    (r'\fbox{x + 1}', 'x + 1'),
    (r'\boxed{\boxed{8}}', '8'),
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{\boxed{a}+\frac{1}{2}}', r'\boxed{a}+\frac{1}{2}'),
    (r'\boxed 5', '5'),
    (r'$\boxed 5$', '5'),
    (r'\boxed{5} cm', r'\boxed{5} cm'),
    (r'\boxed{5}, \boxed{6}', r'\boxed{5}, \boxed{6}'),
    (r'it is \boxed{5}', r'it is \boxed{5}'),
    (r'\boxed{5', r'\boxed{5'),
    ('$5$', '$5$'),
    ('5', '5'),
  ],
)
def test_only_a_box_around_everything_is_taken_off(text, content):
  """Mutant: the last box of the text."""
  assert answer_text.unbox(text) == content


@pytest.mark.parametrize(
  'text',
  [
    '\\boxed{' * 100_000 + '}' * 100_000,
    '\\boxed{' * 100_000,
    '}' * 100_000,
    '\\boxed{}' * 100_000,
    '\\boxed 5' * 100_000,
    ' ' * 200_000 + '5',
    '\\boxed' + ' ' * 200_000,
    '1 ' * 100_000,
  ],
)
def test_any_text_takes_linear_time(text):
  """Mutant: one search for the closing brace by box."""
  start = time.perf_counter()
  answer_text.unbox(text)
  answer_text.last_box(text)
  answer_text.canonical(text)
  answer_text.parse_number(text)
  assert time.perf_counter() - start < 2


VOTES = [
  ['1,000', '1000.0', ' 1000', '1 000', r'\boxed{1000}', '**1000**', '1e3'],
  ['2 1/2', '5/2', '2.5', r'2\frac12', r'$\frac{5}{2}$'],
  ['21/2', '10.5', '10 1/2'],
  ['12'],
  ['1 2', '1  2', '1\n2'],
  ['1.5'],
  ['1 .5'],
  ['5%', r'5\%', '5 percent'],
  ['5 cm', r'5\text{ cm}'],
  ['(1, 2)', '(1,2)', '( 1 ,2 )'],
  ['x + 1', 'X+1', r'\boxed{x+1}'],
  ['new york', 'New  York'],
  ['newyork'],
  [None, '', ' '],
]


def test_a_number_without_a_unit_votes_for_its_only_equal():
  """Law: votes agree with `is_same_number`, where that is transitive.

  Mutants: units never merged; a number merged with the first of several units.
  """
  votes = lambda *answers: answer_text.with_units(
    [labels_lib.canonical(answer) for answer in answers]
  )
  assert len(set(votes('$5', '5', '5.0', r'\$5'))) == 1
  assert len(set(votes('5', '5%', '$5'))) == 3
  assert votes('7', '5%', None) == ['7', '5%', None]
  assert votes('x5', '5%') == ['x5', '5%']


def test_equal_answers_are_one_vote():
  """Law: the canonical form is one within a group, and another in any other.

  Mutant: `re.sub(r'\\s+', '', answer)`.
  """
  forms = [
    {labels_lib.canonical(answer) for answer in group} for group in VOTES
  ]
  assert all(len(form) == 1 for form in forms), forms
  assert len(set.union(*forms)) == len(VOTES)
