"""Problems from a JSON-lines file: {"question": ..., "answer": ...}."""

import hashlib
import json
import math
from typing import Any, Mapping

from rlax_llm import config as config_lib
from rlax_llm.tasks import extract
from rlax_llm.tasks import match as match_lib
from rlax_llm.tasks import task as task_lib

_MAX_LINE = 2**20  # bytes


def _reject_constant(name: str) -> float:
  raise ValueError(f'{name} is no JSON number')


def _parse_line(line: bytes, match: str) -> tuple[str, str]:
  """Returns (question, answer); raises ValueError saying what is wrong."""
  if len(line) > _MAX_LINE:
    raise ValueError(f'longer than {_MAX_LINE} bytes; shorten the line')
  try:
    row = json.loads(line.decode('utf-8'), parse_constant=_reject_constant)
  except UnicodeDecodeError as error:
    raise ValueError(f'no UTF-8 at byte {error.start}; save it as UTF-8') from (
        error)
  except RecursionError as error:
    raise ValueError('nested too deeply; question and answer are flat') from (
        error)
  except ValueError as error:
    raise ValueError(f'no JSON ({error}); write one object to a line') from (
        error)
  if not isinstance(row, dict):
    raise ValueError(f'holds a {type(row).__name__}; write a JSON object')
  for field in ('question', 'answer'):
    if field not in row:
      raise ValueError(
          f'lacks the field {field!r}{config_lib.nearest(field, row)}'
          '; give question and answer')
  question, answer = row['question'], row['answer']
  if not isinstance(question, str) or not question.strip():
    raise ValueError("field 'question' must be a string that is not blank")
  if isinstance(answer, float) and not math.isfinite(answer):
    raise ValueError("field 'answer' is too large a number; write a string")
  if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
    raise ValueError(f"field 'answer' is a {type(answer).__name__}; it must be "
                     'a string or a number')
  answer = str(answer).strip()
  if not answer:
    raise ValueError("field 'answer' is blank; remove the line or fill it in")
  if match == 'numeric' and match_lib.parse_number(answer) is None:
    raise ValueError(f"field 'answer' is {answer[:60]!r}, no number; set "
                     "task.match='exact'")
  return question, answer


def read_problems(path: str, match: str) -> dict[str, tuple[str, int]]:
  """Returns question -> (answer, line number) in the order of the file.

  Args:
    path: the file; blank lines and repeated lines are skipped.
    match: numeric or exact; numeric answers must be numbers.

  Raises:
    ValueError: '<file>, line <number>: <what is wrong>; <the way out>'.
  """
  problems: dict[str, tuple[str, int]] = {}
  number = 0
  try:
    with open(path, 'rb') as file:
      # A bounded readline: a file without line breaks would fill the memory.
      while line := file.readline(_MAX_LINE + 2):
        number += 1
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
        if not line.strip():
          continue
        question, answer = _parse_line(line, match)
        earlier = problems.setdefault(question, (answer, number))
        if earlier[0] != answer:
          raise ValueError(f'repeats the question of line {earlier[1]} with '
                           'another answer; remove one')
  except OSError as error:
    raise ValueError(f'task data {path!r} cannot be read ({error.strerror}); '
                     'set task.path') from error
  except ValueError as error:
    raise ValueError(f'{path}, line {number}: {error}') from error
  if not problems:
    raise ValueError(f'{path} holds no problems; write one JSON object with '
                     'question and answer to a line')
  return problems


class JsonlTask:
  """Problems of a file, split by a hash of the question or by file."""

  def __init__(self, config: config_lib.TaskConfig, seed: int) -> None:
    """Reads the files.

    Args:
      config: `path`, `held_out_path`, `match`, `answer_format` and
        `instruction` are read.
      seed: shuffles the training problems.

    Raises:
      ValueError: a missing path, a bad line, or files that share questions.
    """
    if not config.path:
      raise ValueError("task.name is 'jsonl' but task.path is empty; set it")
    if config.match not in ('numeric', 'exact'):
      raise ValueError(f'task.match {config.match!r} is unknown; use numeric '
                       'or exact')
    if config.prompt_format != 'question':
      raise ValueError(f'task.prompt_format={config.prompt_format!r} does not '
                       "fit 'jsonl'; use 'question'")
    extract.extract_answer('', config.answer_format)
    self._config = config
    problems = read_problems(config.path, config.match)
    if config.held_out_path:
      held_out = read_problems(config.held_out_path, config.match)
      shared = [q for q in held_out if q in problems]
      if shared:
        raise ValueError(
            f'{len(shared)} questions of {config.held_out_path} are in '
            f'{config.path} too, the first at line {held_out[shared[0]][1]}; '
            'remove them from one file')
    else:
      held_out = {
          q: a for q, a in problems.items() if task_lib.split_of(q) != 'train'
      }
      problems = {q: a for q, a in problems.items() if q not in held_out}

    def order(question: str) -> bytes:
      text = f'{seed}\n{question}'.encode('utf-8', 'replace')
      return hashlib.sha256(text).digest()

    self._problems: dict[str, list[tuple[str, str]]] = {
        'train': [(q, problems[q][0]) for q in sorted(problems, key=order)],
        # In the file's order: every seed is evaluated on the same ones.
        'held_out': [(q, a) for q, (a, _) in held_out.items()],
    }

  def problem(self, split: task_lib.Split, index: int) -> task_lib.Problem:
    """See `Task.problem`; indices wrap around.

    Raises:
      ValueError: the split is empty.
    """
    problems = self._problems[split]
    if not problems:
      raise ValueError(f'{self._config.path} has no {split} problem; add '
                       'problems, or set task.held_out_path')
    question, answer = problems[index % len(problems)]
    return task_lib.make_problem(
        'jsonl', task_lib.with_instruction(question, self._config), answer,
        None, {'answer': answer})

  def score(self, entry: Mapping[str, Any], completion: str) -> float:
    """Returns 1.0 for the right answer, else 0.0."""
    answer = extract.extract_answer(completion, self._config.answer_format)
    if answer is None:
      return 0.0
    return float(match_lib.is_equal(answer, entry['answer'],
                                    self._config.match))

  def num_problems(self, split: task_lib.Split) -> int | None:
    """Returns how many problems the split has."""
    return len(self._problems[split])
