"""Eight simulated CPU devices, rank promotion as an error, fast compilation.

Most of the time of small models is compilation. So programs compiled by one
test are read from disk by the next, in this run of pytest and in later ones
(`pytest --cache-clear` forgets them), and they are compiled in less than half
of the time without LLVM's optimizations and by XLA's older emitters. Flags of
the environment win: `XLA_FLAGS='--xla_backend_optimization_level=3
--xla_cpu_use_fusion_emitters=true' pytest` tests what users run.
"""

import gc
from importlib import metadata
import os
import pathlib

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
