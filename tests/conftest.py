"""Eight simulated CPU devices, and rank promotion as an error."""

import os

os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') +
                           ' --xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402  pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', 'raise')
