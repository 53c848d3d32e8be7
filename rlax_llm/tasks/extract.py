"""Where the answer stands in a completion."""

from rlax_llm.tasks import answer_text

FORMATS = (
  'tag',
  'scratchpad',
  'last_line',
  'after_equals',
  'boxed',
  'hashes',
  'all',
)
# Formats whose mark a completion either has or lacks.
MARKED = ('tag', 'boxed', 'hashes')

_OPEN = '<answer>'
_CLOSE = '</answer>'
_HASHES = '####'
_OPENINGS = {
  'tag': _OPEN,
  'scratchpad': ')',
  'last_line': '\n',
  'after_equals': '=',
  'boxed': '\\boxed{',
  'hashes': f'\n{_HASHES} ',
}


def extract_answer(completion: str, answer_format: str) -> str | None:
  """Returns the answer in a completion, stripped of whitespace, or None.

  Args:
    completion: the text the model wrote, without the prompt.
    answer_format: tag (the last <answer>...</answer>), scratchpad (what
      follows the last ')'; all of it where there is none), last_line (the last
      line that is not blank), after_equals (after the last '='; all of it
      where there is none, since the prompt's own '=' stands before it), boxed
      (the last \\boxed{...} or \\fbox{...}, see `answer_text.last_box`), hashes
      (the line after the last ####), all.

  Returns:
    The answer, or None where it is missing or blank.

  Raises:
    ValueError: an unknown format.
  """
  if answer_format == 'tag':
    end = completion.rfind(_CLOSE)
    begin = completion.rfind(_OPEN, 0, end) if end >= 0 else -1
    answer = completion[begin + len(_OPEN) : end] if begin >= 0 else ''
  elif answer_format == 'scratchpad':
    answer = completion.rpartition(')')[2]
  elif answer_format == 'last_line':
    answer = completion.rstrip().rpartition('\n')[2]
  elif answer_format == 'after_equals':
    answer = completion.rpartition('=')[2]
  elif answer_format == 'boxed':
    answer = answer_text.last_box(completion)
  elif answer_format == 'hashes':
    _, mark, behind = completion.rpartition(_HASHES)
    answer = behind.strip().partition('\n')[0] if mark else ''
  elif answer_format == 'all':
    answer = completion
  else:
    raise ValueError(
      f'task.answer_format {answer_format!r} is unknown; '
      f'use one of {", ".join(FORMATS)}'
    )
  return answer.strip() or None


def opening(answer_format: str) -> str:
  """Returns the text that precedes an answer; '': none does.

  Args:
    answer_format: as for `extract_answer`.
  """
  return _OPENINGS.get(answer_format, '')


def wrap_answer(steps: str, answer: str, answer_format: str) -> str:
  """Returns a completion whose extracted answer is `answer`.

  Args:
    steps: worked steps that end in '=' and the answer, or in the answer; ''
      for the answer alone.
    answer: the final answer.
    answer_format: as for `extract_answer`.
  """
  if answer_format == 'tag':
    return f'{steps}{_OPEN}{answer}{_CLOSE}'
  if answer_format == 'boxed':
    return f'{steps}\\boxed{{{answer}}}'
  if answer_format == 'hashes':
    return f'{steps}\n{_HASHES} {answer}'.lstrip()
  if answer_format == 'scratchpad' and steps:
    return f'({steps}){answer}'
  if answer_format == 'last_line' and steps:
    return f'{steps}\n{answer}'
  return steps if answer_format == 'after_equals' and steps else answer
