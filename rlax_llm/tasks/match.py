"""Whether two answers are the same number, text or mathematical object."""

from rlax_llm.tasks import answer_text
from rlax_llm.tasks import equivalence

MATCHES = ('numeric', 'exact', 'math')


def is_equal(answer: str, truth: str, match: str) -> bool:
  r"""Returns whether an answer is right.

  A box that is all of an answer, or of the right one, is taken off first.

  Args:
    answer: what the model gave.
    truth: the right answer.
    match: numeric (equal as exact numbers, in one unit where both give one: see
      `answer_text.parse_number`), exact (equal as text, runs of whitespace
      counted as one space), or math (either of these, or the same mathematical
      object: see `equivalence.is_equivalent`).
  """
  answer, truth = answer_text.unbox(answer), answer_text.unbox(truth)
  if match != 'numeric' and answer.split() == truth.split():
    return True
  if match == 'exact':
    return False
  if answer_text.is_same_number(answer, truth):
    return True
  return match == 'math' and equivalence.is_equivalent(answer, truth)
