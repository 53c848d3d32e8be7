"""Eight simulated CPU devices, rank promotion as an error, one compile cache.

Programs compiled by one test are read from disk by the next, in this run of
pytest and in later ones (`pytest --cache-clear` forgets them): most of the
time of small models is compilation.
"""

import gc
import os
import pathlib

os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') +
                           ' --xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# In the environment, so that the processes which tests start read it too.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR',
    str(pathlib.Path(__file__).parents[1] / '.pytest_cache/d/xla'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import jax  # noqa: E402  pylint: disable=wrong-import-position
import pytest  # noqa: E402  pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_addoption(parser):
  parser.addoption('--full',
                   action='store_true',
                   help='the long forms of the crash and soak tests')


@pytest.fixture(autouse=True, scope='module')
def _drop_executables(request):
  """Unloads what a module compiled.

  Every executable takes some maps of the process, of which Linux allows
  65,530; beyond them loading the next one is a segmentation fault.
  """
  yield
  for value in vars(request.module).values():
    getattr(value, 'cache_clear', lambda: None)()
  jax.clear_caches()
  gc.collect()
