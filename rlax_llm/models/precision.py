"""How matrix products are taken."""

import jax
import jax.numpy as jnp


def of_products(dtype: jnp.dtype) -> jax.lax.Precision | None:
  """Returns the precision of the products of a dtype; give it to each.

  float32 is meant in full. By default GPUs round its factors to TensorFloat-32
  (10 bits) and TPUs to bfloat16, and a value that differs by its last bit,
  because executables of two shapes sum in another order, then differs by 1e-3:
  tokens would depend on shapes. To be faster, compute in bfloat16.

  Args:
    dtype: of the factors.
  """
  full = jnp.dtype(dtype) == jnp.float32
  return jax.lax.Precision.HIGHEST if full else None
