"""Questions and their right answers: what tasks made of data sets share."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import math
from typing import Any

from rlax_llm import config as config_lib
from rlax_llm.tasks import answer_text
from rlax_llm.tasks import equivalence
from rlax_llm.tasks import extract
from rlax_llm.tasks import match as match_lib
from rlax_llm.tasks import task as task_lib

# Where the right answer stands in the data's own answer field.
GOLD_FORMATS = ('all', 'boxed', 'hashes')
# Options of every such task, with their defaults.
OPTIONS: Mapping[str, str] = {
  'question_field': 'question',
  'answer_field': 'answer',
  'gold_format': 'all',
}


@dataclasses.dataclass(frozen=True)
class Numeral:
  """A number as its file writes it; a float would round it."""

  text: str


@dataclasses.dataclass(frozen=True)
class Row:
  """One problem of a data set."""

  question: str
  answer: str
  trace: str | None  # the data's own solution, where it fits the answer format


def read_options(
  config: config_lib.TaskConfig, defaults: Mapping[str, str]
) -> dict[str, str]:
  """Returns `config.options` with the defaults of what it leaves out.

  Raises:
    ValueError: an unknown option, a value that is no string, or an unknown
      gold_format.
  """
  for name, value in config.options.items():
    if name not in defaults:
      raise ValueError(
        f'task.options[{name!r}] is no option of {config.name!r}'
        f'{config_lib.nearest(name, defaults)}; its options are '
        f'{", ".join(sorted(defaults))}'
      )
    if not isinstance(value, str):
      raise ValueError(
        f'task.options[{name!r}]={value!r} is of type '
        f'{type(value).__name__}; give it as str'
      )
  options = {**defaults, **config.options}
  if options['gold_format'] not in GOLD_FORMATS:
    raise ValueError(
      f"task.options['gold_format']={options['gold_format']!r} is unknown"
      f'; use one of {", ".join(GOLD_FORMATS)}'
    )
  return options


def make_row(
  fields: Mapping[str, Any],
  options: Mapping[str, str],
  config: config_lib.TaskConfig,
) -> Row:
  """Returns the problem that a data set's record holds.

  Args:
    fields: the record, of JSON types; its numbers may be `Numeral`s.
    options: from `read_options`.
    config: `match` and `answer_format` are read.

  Raises:
    ValueError: what is wrong with the record, and the way out.
  """
  names = options['question_field'], options['answer_field']
  for name in names:
    if name not in fields:
      raise ValueError(
        f'lacks the field {name!r}{config_lib.nearest(name, fields)}; give '
        f'{names[0]} and {names[1]}, or name the fields in task.options'
      )
  question, gold = (fields[name] for name in names)
  if not isinstance(question, str) or not question.strip():
    raise ValueError(f'field {names[0]!r} must be a string that is not blank')
  field = f'field {names[1]!r}'
  if isinstance(gold, float) and not math.isfinite(gold):
    raise ValueError(f'{field} is {gold}, no finite number; write a string')
  if isinstance(gold, Numeral):
    gold = gold.text
  if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
    raise ValueError(
      f'{field} is a {type(gold).__name__}; it must be a string or a number'
    )
  gold = str(gold).strip()
  if not gold:
    raise ValueError(f'{field} is blank; remove the problem or fill it in')
  answer = extract.extract_answer(gold, options['gold_format'])
  if answer is None:
    raise ValueError(
      f'{field} ends in {gold[-60:]!r}, without an answer in the format '
      f'{options["gold_format"]!r}; correct it, or set '
      "task.options['gold_format']"
    )
  if config.match == 'numeric' and answer_text.parse_number(answer) is None:
    raise ValueError(
      f'{field} has the answer {answer[:60]!r}, no number; set '
      "task.match='exact' or 'math', or write one number, of at most "
      f'{answer_text.MAX_CHARACTERS} characters and with an exponent of at '
      'most three digits'
    )
  fits = options['gold_format'] == config.answer_format != 'all'
  return Row(question, answer, gold if fits else None)


class QuestionAnswerTask:
  """Problems of a data set; the base of the tasks that read one."""

  def __init__(self, config: config_lib.TaskConfig) -> None:
    """Checks what such tasks read of the config; problems come later.

    Args:
      config: `match`, `answer_format`, `prompt_format` and `instruction`.

    Raises:
      ValueError: an unknown or unfit value, or math-verify is missing.
    """
    if config.match not in match_lib.MATCHES:
      raise ValueError(
        f'task.match {config.match!r} is unknown; use one of '
        f'{", ".join(match_lib.MATCHES)}'
      )
    if config.prompt_format != 'question':
      raise ValueError(
        f'task.prompt_format={config.prompt_format!r} does not '
        f"fit {config.name!r}; use 'question'"
      )
    extract.extract_answer('', config.answer_format)
    if config.match == 'math':
      equivalence.require()
    self._config = config
    self._problems: dict[str, Sequence[Row]] = {}
    self._way_out = ''

  def _set_problems(
    self,
    train: Iterable[Row],
    held_out: Sequence[Row] | None,
    *,
    seed: int,
    way_out: str,
  ) -> None:
    """Orders the training problems by the seed.

    Args:
      train: different questions.
      held_out: others; None: taken from `train`, by a hash of the question.
      seed: the run's.
      way_out: what to do about an empty split.
    """
    self._way_out = way_out
    if held_out is None:
      rows = list(train)
      held_out = [r for r in rows if task_lib.split_of(r.question) != 'train']
      train = [r for r in rows if task_lib.split_of(r.question) == 'train']

    def order(row: Row) -> bytes:
      text = f'{seed}\n{row.question}'.encode('utf-8', 'replace')
      return hashlib.sha256(text).digest()

    self._problems = {
      'train': sorted(train, key=order),
      # In the data's order: every seed is evaluated on the same ones.
      'held_out': held_out,
    }

  def problem(self, split: task_lib.Split, index: int) -> task_lib.Problem:
    """See `Task.problem`; indices wrap around.

    Raises:
      ValueError: the split is empty.
    """
    rows = self._problems[split]
    if not rows:
      raise ValueError(
        f'{self._config.name!r} has no {split} problem; {self._way_out}'
      )
    row = rows[index % len(rows)]
    return task_lib.make_problem(
      self._config.name,
      task_lib.with_instruction(row.question, self._config),
      row.answer,
      row.trace,
      {'answer': row.answer},
    )

  def score(self, entry: Mapping[str, Any], completion: str) -> float:
    """Returns 1.0 for the right answer, else 0.0."""
    answer = extract.extract_answer(completion, self._config.answer_format)
    if answer is None:
      return 0.0
    return float(
      match_lib.is_equal(answer, entry['answer'], self._config.match)
    )

  def num_problems(self, split: task_lib.Split) -> int | None:
    """Returns how many problems the split has."""
    return len(self._problems[split])
