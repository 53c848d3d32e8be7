"""Meshes and shardings, decided in one place."""

from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from rlax_llm.config import ConfigError
from rlax_llm.config import MeshConfig


def make_mesh(config: MeshConfig) -> Mesh:
  """Returns the mesh of a run: one axis, `data`, over the devices.

  Args:
    config: `data` ways; 0 takes every device.

  Raises:
    ConfigError: if there are fewer devices than ways.
  """
  devices = jax.devices()
  count = config.data or len(devices)
  if count > len(devices):
    raise ConfigError(
        f'mesh.data={count} but there are {len(devices)} devices; set '
        'mesh.data=0 to use all of them')
  # Explicit axes, the default of jax.make_mesh, would make gathers such as
  # embedding[tokens] an error.
  return Mesh(np.asarray(devices[:count]), ('data',),
              axis_types=(AxisType.Auto,))


def rows(mesh: Mesh) -> NamedSharding:
  """Leading axis over `data`: slots."""
  return NamedSharding(mesh, PartitionSpec('data'))


def microbatches(mesh: Mesh) -> NamedSharding:
  """Second axis over `data`: the rows of every microbatch."""
  return NamedSharding(mesh, PartitionSpec(None, 'data'))


def replicated(mesh: Mesh) -> NamedSharding:
  """One copy on every device: parameters and scalars."""
  return NamedSharding(mesh, PartitionSpec())


def ways(mesh: Mesh) -> int:
  """Returns the number of parts that rows are divided into."""
  return mesh.shape['data']


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts a Batch on the mesh, its rows divided."""
  place = lambda x: jax.device_put(
      x,
      microbatches(mesh) if np.ndim(x) else replicated(mesh))
  return jax.tree.map(place, batch)
