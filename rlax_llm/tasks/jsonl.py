"""Problems from a JSON-lines file: {"question": ..., "answer": ...}."""

from collections.abc import Mapping
import errno
import json
import os
import stat
from typing import Any

from rlax_llm import config as config_lib
from rlax_llm.tasks import question_answer
from rlax_llm.tasks.question_answer import Row

_MAX_LINE = 2**20  # bytes


def _reject_constant(name: str) -> float:
  raise ValueError(f'{name} is no JSON number')


def _parse_line(line: bytes) -> dict[str, Any]:
  """Returns the line's object; raises ValueError saying what is wrong."""
  if len(line) > _MAX_LINE:
    raise ValueError(f'longer than {_MAX_LINE} bytes; shorten the line')
  try:
    row = json.loads(
      line.decode('utf-8'),
      parse_float=question_answer.Numeral,
      parse_int=question_answer.Numeral,
      parse_constant=_reject_constant,
    )
  except UnicodeDecodeError as error:
    raise ValueError(f'no UTF-8 at byte {error.start}; save it as UTF-8') from (
      error
    )
  except RecursionError as error:
    raise ValueError('nested too deeply; question and answer are flat') from (
      error
    )
  except ValueError as error:
    raise ValueError(f'no JSON ({error}); write one object to a line') from (
      error
    )
  if not isinstance(row, dict):
    kind = type(row).__name__.replace('Numeral', 'number')
    raise ValueError(f'holds a {kind}; write a JSON object')
  return row


def read_problems(
  path: str, options: Mapping[str, str], config: config_lib.TaskConfig
) -> dict[str, tuple[Row, int]]:
  """Returns question -> (problem, line number) in the order of the file.

  Args:
    path: the file; blank lines and repeated lines are skipped.
    options: names of the fields, and the format of the answer's.
    config: `match` and `answer_format` are read.

  Raises:
    ValueError: '<file>, line <number>: <what is wrong>; <the way out>'.
  """
  problems: dict[str, tuple[Row, int]] = {}
  number = 0
  try:
    # Worker processes read the file again: a pipe would be empty, or block.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise OSError(errno.EINVAL, 'not a regular file')
    with open(path, 'rb') as file:
      # A bounded readline: a file without line breaks would fill the memory.
      while line := file.readline(_MAX_LINE + 2):
        number += 1
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
        if not line.strip():
          continue
        row = question_answer.make_row(_parse_line(line), options, config)
        earlier = problems.setdefault(row.question, (row, number))
        if earlier[0].answer != row.answer:
          raise ValueError(
            f'repeats the question of line {earlier[1]} with '
            'another answer; remove one'
          )
  except OSError as error:
    raise ValueError(
      f'task data {path!r} cannot be read ({error.strerror}); set task.path'
    ) from error
  except ValueError as error:
    raise ValueError(f'{path}, line {number}: {error}') from error
  if not problems:
    raise ValueError(
      f'{path} holds no problems; write one JSON object with '
      'question and answer to a line'
    )
  return problems


class JsonlTask(question_answer.QuestionAnswerTask):
  """Problems of a file, split by a hash of the question or by file.

  MATH-500, for instance, has its questions in `problem` and its answers in
  `answer`, or in the last box of `solution`:
  options={'question_field': 'problem', 'answer_field': 'solution',
  'gold_format': 'boxed'}.
  """

  def __init__(self, config: config_lib.TaskConfig, seed: int) -> None:
    """Reads the files.

    Args:
      config: `path`, `held_out_path`, `options`, `match`, `answer_format` and
        `instruction` are read. The options are question_field and
        answer_field, names of fields, and gold_format, where the answer stands
        in its field: all, boxed (the last box), or hashes (after the
        last ####).
      seed: shuffles the training problems.

    Raises:
      ValueError: a missing path, a bad line, or files that share questions.
    """
    if not config.path:
      raise ValueError("task.name is 'jsonl' but task.path is empty; set it")
    super().__init__(config)
    options = question_answer.read_options(config, question_answer.OPTIONS)
    problems = read_problems(config.path, options, config)
    rows = None
    if config.held_out_path:
      held_out = read_problems(config.held_out_path, options, config)
      shared = [q for q in held_out if q in problems]
      if shared:
        raise ValueError(
          f'{len(shared)} questions of {config.held_out_path} are in '
          f'{config.path} too, the first at line {held_out[shared[0]][1]}; '
          'remove them from one file'
        )
      rows = [row for row, _ in held_out.values()]
    self._set_problems(
      (row for row, _ in problems.values()),
      rows,
      seed=seed,
      way_out=f'add problems to {config.path}, or set task.held_out_path',
    )
