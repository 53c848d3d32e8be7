"""Eight simulated CPU devices, rank promotion as an error, fast compilation.

Most of the time of small models is compilation. So programs compiled by one
test are read from disk by the next, in this run of pytest and in later ones
(`pytest --cache-clear` forgets them), and they are compiled in less than half
of the time without LLVM's optimizations and by XLA's older emitters. Flags of
the environment win: `XLA_FLAGS='--xla_backend_optimization_level=3
--xla_cpu_use_fusion_emitters=true' pytest` tests what users run.
"""

import collections
import gc
from importlib import metadata
import os
import pathlib
import time

_FLAGS = [
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
]
if metadata.version('jaxlib').startswith('0.10.'):  # later ones know no older
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*_FLAGS, os.environ.get('XLA_FLAGS', '')])
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# In the environment, so that the processes which tests start read it too.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).parents[1] / '.pytest_cache/d/xla'),
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import jax  # noqa: E402  pylint: disable=wrong-import-position
import pytest  # noqa: E402  pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_addoption(parser):
  parser.addoption(
    '--full',
    action='store_true',
    help='the long forms of the crash, soak and replica tests',
  )


# `.ci/run` sets it, in seconds since the epoch: a machine that is slower than
# expected leaves out the rest of the slow tests instead of being killed.
_DEADLINE = 'SLOW_TESTS_UNTIL'
_TOO_LATE = f'not started: {_DEADLINE} has passed'


def pytest_runtest_setup(item):
  """Skips a slow test after the deadline, before its fixtures are made."""
  deadline = os.environ.get(_DEADLINE)
  if deadline and item.get_closest_marker('slow'):
    if time.time() > float(deadline):
      pytest.skip(_TOO_LATE)


def _reports(terminalreporter):
  for reports in terminalreporter.stats.values():
    for report in reports:
      if isinstance(report, pytest.TestReport):
        yield report


def _was_too_late(report):
  # A skip's longrepr is (file, line, reason), also when a worker sends it.
  return (
    report.skipped
    and isinstance(report.longrepr, tuple)
    and _TOO_LATE in report.longrepr[2]
  )


def pytest_terminal_summary(terminalreporter):
  """Lists the tests that the deadline left out, and seconds by file.

  Seconds are setup, call and teardown of all tests of a file; workers add up,
  so that the total may exceed the wall time. They are shown if TEST_SECONDS is
  1.
  """
  left_out = [r.nodeid for r in _reports(terminalreporter) if _was_too_late(r)]
  if left_out:
    terminalreporter.section(f'{len(left_out)} slow tests not run')
    terminalreporter.write_line(f'{_DEADLINE} passed before their start:')
    for name in sorted(left_out):
      terminalreporter.write_line(f'  {name}')
  if os.environ.get('TEST_SECONDS') != '1':
    return
  seconds, tests = collections.Counter(), collections.Counter()
  for report in _reports(terminalreporter):
    file = report.nodeid.split('::')[0]
    seconds[file] += report.duration
    tests[file] += report.when == 'setup'
  terminalreporter.section('seconds by file')
  for file, total in seconds.most_common():
    terminalreporter.write_line(f'{total:9.1f} s {tests[file]:5} tests  {file}')
  terminalreporter.write_line(
    f'{seconds.total():9.1f} s {tests.total():5} tests  in all'
  )


# Every executable takes some maps of the process, of which Linux allows 65,530;
# beyond them loading or keeping the next one aborts.
_MOST_MAPS = 25_000


def _drop(module):
  """Unloads what a module compiled."""
  for value in vars(module).values():
    getattr(value, 'cache_clear', lambda: None)()
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True, scope='module')
def _drop_executables(request):
  yield
  _drop(request.module)


@pytest.fixture(autouse=True)
def _stay_below_the_limit(request):
  """For modules that compile more than a process can hold."""
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > _MOST_MAPS:
    _drop(request.module)
