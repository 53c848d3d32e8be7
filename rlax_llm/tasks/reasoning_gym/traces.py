"""Short prompts and written-step completions of the arithmetic tasks."""

from collections.abc import Mapping
import math
import re
from typing import Any

from rlax_llm.tasks import extract
from rlax_llm.tasks.reasoning_gym import arithmetic

_EXPRESSIONS = ('chain_sum', 'basic_arithmetic', 'products')
# Tasks whose question is one expression.
ARITHMETIC = (*_EXPRESSIONS, 'gcd', 'lcm')


def expression(name: str, item: Mapping[str, Any]) -> str | None:
  """Returns the question as an expression without spaces, or None.

  Args:
    name: the reasoning-gym task.
    item: its item, with question, answer and metadata.
  """
  metadata = item['metadata']
  if name in _EXPRESSIONS:
    return ''.join(metadata['expression'].split())
  if name in ('gcd', 'lcm'):
    return f'{name}({",".join(map(str, metadata["numbers"]))})'
  return None


def _gcd_steps(numbers: list[int]) -> list[str]:
  """Returns Euclid's steps, the numbers themselves excluded."""
  lines = []
  while len(numbers) > 1:
    a, b, *rest = numbers
    numbers = [b, a % b, *rest] if b else [a, *rest]
    lines.append(
      f'gcd({",".join(map(str, numbers))})'
      if len(numbers) > 1
      else str(numbers[0])
    )
  return lines


def _lcm_steps(numbers: list[int]) -> list[str]:
  """Returns a*b/gcd(a,b), Euclid, and the quotient, for each further b."""
  lines = []
  while len(numbers) > 1:
    a, b, *rest = numbers
    pair = [f'{a}*{b}/gcd({a},{b})']
    pair += [f'{a}*{b}/{step}' for step in _gcd_steps([a, b])]
    pair += [f'{a * b}/{math.gcd(a, b)}', str(math.lcm(a, b))]
    tail = ''.join(f',{n}' for n in rest)
    lines += [f'lcm({step}{tail})' if rest else step for step in pair]
    numbers = [math.lcm(a, b), *rest]
  return lines


def _expression_steps(text: str) -> list[str]:
  # The task's own division is Python's //.
  lines = [
    arithmetic.render(tokens)
    for tokens in arithmetic.steps(text, arithmetic.floor_divide)
  ]
  return lines[1:] or lines


def _tally(text: str, terms_done: int | None = None) -> list[str]:
  """Returns the running value after each term: +3, 7-2, 5 for 4+3-2.

  `terms_done` leaves off early: after 2 terms it is +3, 7.
  """
  first, *terms = re.findall(r'([+-]?)(-?[0-9]+)', text)
  value = int(''.join(first))
  lines = [''] if terms else []
  for sign, number in terms[: terms_done and terms_done - 1]:
    lines[-1] += sign + number
    value += -int(number) if sign == '-' else int(number)
    lines.append(str(value))
  return lines or [str(value)]


def trace(
  name: str,
  item: Mapping[str, Any],
  answer_format: str,
  *,
  terms_done: int | None = None,
) -> str | None:
  """Returns a completion that works the problem out step by step, or None.

  A sum keeps a tally: for 4 + 3 - 2 + 6 it is '+3=7-2=5+6=11'. Other tasks
  carry out the first operation and restate the rest: for 4 * (3 - 2) + 6 it
  is '4*1+6=4+6=10'.

  Args:
    name: the reasoning-gym task.
    item: its item, with question, answer and metadata.
    answer_format: a name of `extract.FORMATS`.
    terms_done: leave off after so many terms, at least 2, and give what was
      reached as the answer; only where `can_leave_off(name)`. None: all.

  Returns:
    The completion, final answer included; None for a task without traces.
  """
  text = expression(name, item)
  if text is None:
    return None
  try:
    if name == 'chain_sum':
      lines = _tally(text)
    elif name == 'gcd':
      lines = _gcd_steps(item['metadata']['numbers'])
    elif name == 'lcm':
      lines = _lcm_steps(item['metadata']['numbers'])
    else:
      lines = _expression_steps(text)
  except (ValueError, ZeroDivisionError):
    return None
  # The scorer's answer is the law; steps that miss it would teach an error.
  if lines[-1] != item['answer']:
    return None
  if terms_done is not None:
    lines = _tally(text, terms_done)
  return extract.wrap_answer('='.join(lines), lines[-1], answer_format)


def can_leave_off(name: str) -> bool:
  """Returns whether traces of a task can stop before the last term."""
  return name == 'chain_sum'
