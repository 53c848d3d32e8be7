"""Problems from a dataset of tensorflow-datasets, read without TensorFlow."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from absl import logging
import numpy as np

from rlax_llm import config as config_lib
from rlax_llm.tasks import question_answer
from rlax_llm.tasks.question_answer import Row

_OPTIONS: Mapping[str, str] = {
  **question_answer.OPTIONS,
  'dataset': '',
  'train_split': 'train',
  'held_out_split': 'test',
  'data_dir': '',
}
# Short names, with the options that fit them.
DATASETS: Mapping[str, Mapping[str, str]] = {
  # Grade-school word problems (arXiv 2110.14168): worked solutions that end
  # in '#### ' and a number.
  'gsm8k': {'dataset': 'gsm8k', 'gold_format': 'hashes'}
}


def _prepare_command(options: Mapping[str, str]) -> str:
  """Returns the command that downloads and prepares the dataset.

  tfds knows its builders by the modules imported so far; those of questions
  with answers are in `text`. No TensorFlow is needed, unlike for `tfds build`.
  """
  place = f', data_dir={options["data_dir"]!r}' if options['data_dir'] else ''
  return (
    'python -c "import tensorflow_datasets as tfds, '
    'tensorflow_datasets.text; '
    f'tfds.builder({options["dataset"]!r}{place}, '
    "file_format='array_record').download_and_prepare()\""
  )


def _unreadable(
  options: Mapping[str, str], place: str, error: Exception
) -> config_lib.ConfigError:
  """Returns the refusal of prepared files: missing, damaged or cut short.

  Args:
    options: of the task.
    place: the folder of the files.
    error: what tfds, protobuf or array_record raised.
  """
  reason = ' '.join(str(error).split())[:200]
  return config_lib.ConfigError(
    f'the prepared files of the dataset {options["dataset"]!r} in {place} '
    f'cannot be read ({type(error).__name__}: {reason}); remove them and run '
    f'{_prepare_command(options)}'
  )


def _open(options: Mapping[str, str]) -> Any:
  """Returns the builder of a prepared dataset; downloads nothing.

  `tfds.data_source` would make the builder from its code, where that is
  imported, which asks Google's storage for metadata; the files say all that
  reading needs.
  """
  name, data_dir = options['dataset'], options['data_dir']
  try:
    # pylint: disable-next=g-import-not-at-top
    # pylint: disable-next=g-import-not-at-top
    # pylint: disable-next=g-import-not-at-top
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core import registered
  except ImportError as error:
    raise config_lib.ConfigError(
      f'the dataset {name!r} is read by tensorflow-datasets ({error}); '
      'pip install tensorflow-datasets array_record'
    ) from error
  where = data_dir or 'TFDS_DATA_DIR or ~/tensorflow_datasets'
  absent = config_lib.ConfigError(
    f'the dataset {name!r} is not prepared in {where}; run '
    f'{_prepare_command(options)} (first remove what there is of it), or set '
    "task.options['data_dir']"
  )
  try:
    naming.parse_builder_name_kwargs(name)
  except ValueError as error:  # no name of a dataset
    raise absent from error
  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
  except registered.DatasetNotFoundError as error:
    raise absent from error
  except Exception as error:  # JSON's errors, protobuf's, tfds' own, the disk's
    raise _unreadable(options, where, error) from error


def _source(
  builder: Any, split: str, option: str, options: Mapping[str, str]
) -> Any:
  """Returns the random-access source of a split."""
  name = options['dataset']
  if split.partition('[')[0] not in builder.info.splits:
    raise config_lib.ConfigError(
      f'task.options[{option!r}]={split!r} is no split of {name!r}'
      f'{config_lib.nearest(split, builder.info.splits)}; it has '
      f'{", ".join(sorted(builder.info.splits))}'
    )
  try:
    return builder.as_data_source(split=split)
  except NotImplementedError as error:
    raise config_lib.ConfigError(
      f'the dataset {name!r} is prepared as {builder.info.file_format.value}'
      ', which TensorFlow alone can read; remove '
      f'{builder.data_dir} and run {_prepare_command(options)}'
    ) from error
  except ValueError as error:  # a slice that tfds cannot read
    raise config_lib.ConfigError(
      f'task.options[{option!r}]={split!r} cannot be read ('
      f'{" ".join(str(error).split())}); give a split, or a slice of one '
      "such as 'train[:90%]'"
    ) from error
  except ImportError as error:
    raise config_lib.ConfigError(
      f'the dataset {name!r} is read by array_record ({error}); '
      'pip install array_record'
    ) from error
  except Exception as error:  # array_record raises RuntimeError
    raise _unreadable(options, str(builder.data_dir), error) from error


def _plain(value: Any) -> Any:
  """Returns a feature as a JSON type: text for bytes, numbers for scalars."""
  if isinstance(value, bytes):
    try:
      return value.decode('utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(
        f'holds no UTF-8 (byte {error.start} of {value[:60]!r})'
      ) from error
  if isinstance(value, np.floating) and np.isfinite(value):
    # A float32 of 0.1 is written 0.1, and is another number as a float64.
    return question_answer.Numeral(str(value))
  return value.item() if hasattr(value, 'item') else value


def _read(
  source: Any,
  split: str,
  options: Mapping[str, str],
  config: config_lib.TaskConfig,
  place: str,
) -> dict[str, Row]:
  """Returns question -> problem; of a repeated question the first counts."""
  rows: dict[str, Row] = {}
  conflicts = 0
  used = {options['question_field'], options['answer_field']}
  for index in range(len(source)):
    try:
      record = source[index]
    except Exception as error:  # array_record's, or of an example's bytes
      raise _unreadable(options, place, error) from error
    try:
      fields = {
        name: _plain(value) if name in used else value
        for name, value in record.items()
      }
      row = question_answer.make_row(fields, options, config)
    except ValueError as error:
      raise ValueError(
        f'{options["dataset"]}, split {split}, example {index}: {error}'
      ) from error
    conflicts += rows.setdefault(row.question, row).answer != row.answer
  if conflicts:
    logging.warning(
      '%s, split %s: %d questions repeat another with another '
      'answer; the first counts',
      options['dataset'],
      split,
      conflicts,
    )
  return rows


class TfdsTask(question_answer.QuestionAnswerTask):
  """Problems of a prepared dataset with a question and an answer feature.

  Training problems whose question is held out too are left out.
  """

  def __init__(self, config: config_lib.TaskConfig, seed: int) -> None:
    """Reads the dataset; never downloads it.

    Args:
      config: `name` ('tfds' or a name of `DATASETS`), `options`, `match`,
        `answer_format` and `instruction` are read. The options are dataset
        (tfds' name: dataset/config:version), train_split, held_out_split ('':
        a quarter of train_split, by a hash of the question), data_dir ('':
        tfds' own), and question_field, answer_field (features) and
        gold_format as for `JsonlTask`.
      seed: shuffles the training problems.

    Raises:
      ValueError: a bad option, a dataset that is not prepared, or one whose
        examples are no problems.
    """
    super().__init__(config)
    defaults = {**_OPTIONS, **DATASETS.get(config.name, {})}
    options = question_answer.read_options(config, defaults)
    if not options['dataset']:
      raise ValueError(
        "task.name is 'tfds' but task.options['dataset'] is "
        "empty; set it, for instance to 'gsm8k'"
      )
    builder = _open(options)
    train, held_out = options['train_split'], options['held_out_split']
    # Both are opened before either is read: mistakes show at once.
    sources = [_source(builder, train, 'train_split', options)]
    if held_out:
      sources.append(_source(builder, held_out, 'held_out_split', options))
    place = str(builder.data_dir)
    problems = _read(sources[0], train, options, config, place)
    rows: Sequence[Row] | None = None
    if held_out:
      others = _read(sources[1], held_out, options, config, place)
      shared = problems.keys() & others.keys()
      if shared:
        logging.warning(
          '%d questions of split %s are in %s too; they are not trained on',
          len(shared),
          train,
          held_out,
        )
      problems = {q: row for q, row in problems.items() if q not in shared}
      rows = list(others.values())
    self._set_problems(
      problems.values(),
      rows,
      seed=seed,
      way_out="choose task.options['train_split'] and "
      "task.options['held_out_split'] anew",
    )
