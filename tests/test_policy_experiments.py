"""The experiments on boundary policies run, on a model that knows nothing."""

import csv
import subprocess
import sys

import pytest

_TINY = ('--size=smoke', '--seeds=1', '--problems=4')
COMMANDS = {
    'april': (
        ('--trained', '--steps=2', '--ratios=1,1.5', *_TINY), 'trained.csv', 2),
    'arrol': (('--steps=2', '--samples=4', '--arms=whole groups,head weighted',
               *_TINY), 'arms.csv', 2),
    'dynamic_sampling': (
        ('--steps=2', '--arms=what comes,both', *_TINY), 'arms.csv', 2),
    'early_stop': (('--settings=1x4', '--tasks=tally', *_TINY), 'stops.csv', 2),
    'length_order': (('--trained', '--epochs=2', '--prompts=4', '--seeds=1',
                      '--size=smoke'), 'trained.csv', 6),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', COMMANDS)
def test_the_command_writes_its_table(name, tmp_path):
  """Law: the command ends well and writes a row for each arm.

  Mutant: a metric's name misspelled.
  """
  flags, file, rows = COMMANDS[name]
  done = subprocess.run([
      sys.executable, '-m', f'experiments.{name}.run', f'--out={tmp_path}',
      *flags
  ],
                        check=False,
                        capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  with open(tmp_path / file, encoding='utf-8') as table:
    assert len(list(csv.DictReader(table))) == rows
