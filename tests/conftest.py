"""Eight simulated CPU devices, and rank promotion as an error."""

import gc
import os

os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') +
                           ' --xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

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
