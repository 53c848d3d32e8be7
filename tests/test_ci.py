"""The hooks of conftest.py that `.ci/run` relies on, on a tiny test file."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

_TESTS = """
import pytest

def test_fast(): pass

@pytest.mark.slow
def test_long(): pass

@pytest.mark.slow
@pytest.mark.parametrize('case', [1, 2])
def test_longer(case): assert case == 1
"""


def _run(folder, workers, **environment):
  """Returns the exit code and the output of pytest on a file of four tests."""
  conftest = pathlib.Path(__file__).with_name('conftest.py')
  shutil.copy(conftest, folder)
  (folder / 'pytest.ini').write_text('[pytest]\nmarkers =\n    slow: slow\n')
  (folder / 'test_tiny.py').write_text(_TESTS)
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-n', str(workers)],
    cwd=folder,
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
    check=False,
  )
  return done.returncode, done.stdout


@pytest.mark.parametrize('workers', [0, 2])
def test_no_slow_test_starts_after_the_deadline(tmp_path, workers):
  """Law: they are skipped and listed; the exit code is that of the others.

  Mutant: a deadline that is not read; a list that workers do not send.
  """
  code, output = _run(tmp_path, workers, SLOW_TESTS_UNTIL='1')
  assert code == 0, output
  assert '1 passed, 3 skipped' in output
  listed = output.split('3 slow tests not run')[1]
  names = re.findall(r'^  test_tiny\.py::(\S+)', listed, re.MULTILINE)
  assert names == ['test_long', 'test_longer[1]', 'test_longer[2]']


def test_slow_tests_before_the_deadline_run_and_are_timed(tmp_path):
  """Law: before the deadline nothing is skipped, and a failure is one.

  Mutant: a comparison turned around; seconds of calls only, without a file.
  """
  later = str(time.time() + 3600)
  code, output = _run(tmp_path, 0, SLOW_TESTS_UNTIL=later, TEST_SECONDS='1')
  assert code == 1, output
  assert '1 failed, 3 passed' in output
  assert 'slow tests not run' not in output
  table = output.split('seconds by file')[1]
  assert re.search(r'\d+\.\d s +4 tests  test_tiny\.py', table)
