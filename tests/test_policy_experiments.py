"""Experiments on a long-tailed task run, on a model that knows nothing."""

import csv
import subprocess
import sys

import pytest

from experiments import common

_TINY = ('--size=smoke', '--seeds=1', '--problems=4')
COMMANDS = {
  'april.run': (
    ('--trained', '--steps=2', '--ratios=1,1.5', *_TINY),
    'trained.csv',
    2,
  ),
  'arrol.run': (
    ('--steps=2', '--samples=4', '--arms=whole groups,head weighted', *_TINY),
    'arms.csv',
    2,
  ),
  'dynamic_sampling.run': (
    ('--steps=2', '--arms=what comes,both', *_TINY),
    'arms.csv',
    2,
  ),
  'early_stop.run': (
    ('--settings=1x4', '--tasks=tally', *_TINY),
    'stops.csv',
    2,
  ),
  'length_order.run': (
    ('--trained', '--epochs=2', '--prompts=4', '--seeds=1', '--size=smoke'),
    'trained.csv',
    6,
  ),
  'tlt.drift': (
    ('--steps=2', '--every=1', '--warmup=2', '--depth=2', '--size=smoke'),
    'drift.csv',
    3,
  ),
  'tlt.end_to_end': (
    (
      '--steps=2',
      '--warmup=2',
      '--width=3',
      '--branching=1',
      '--arms=none,hybrid',
      '--size=smoke',
    ),
    'end_to_end.csv',
    2,
  ),
}


def test_lower_bound_by_hand():
  """Law: of 1, 2, 3: the mean 2 less t(0.95, 2) = 2.920 times 1 / sqrt(3).

  Mutant: the two-sided quantile.
  """
  assert common.lower_bound([1.0, 2.0, 3.0]) == pytest.approx(
    (2 - 2.920 / 3**0.5, 2), abs=1e-3
  )
  assert common.lower_bound([0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
  'given, words',
  [
    ('whole groups,haed', "'haed': name some of whole groups"),
    ('random half', "['random half']: name some of whole groups"),
  ],
)
def test_a_wrong_arm_is_one_error(given, words):
  """Law: a name that is none, or the yardstick left out, ends the command in
  one line that names what there is, before anything is run.

  Mutant: what is unknown is left out.
  """
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.arrol.run', f'--arms={given}'],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert words in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', COMMANDS)
def test_the_command_writes_its_table(name, tmp_path):
  """Law: the command ends well and writes a row for each arm.

  Mutant: a metric's name misspelled.
  """
  flags, file, rows = COMMANDS[name]
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', f'--out={tmp_path}', *flags],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  with open(tmp_path / file, encoding='utf-8') as table:
    assert len(list(csv.DictReader(table))) == rows
