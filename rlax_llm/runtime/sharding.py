"""Meshes and shardings, decided in one place.

A mesh has the axes `data`, `fsdp` and `tensor`. Rows (slots, rows of a packed
batch) are divided over `data` and `fsdp` together. A parameter's axes have
logical names, given by the model; one table says which mesh axis each name is
divided over: `fsdp` divides what a model holds (parameters and optimizer
state), `tensor` what it computes (heads, MLP, vocabulary). A row for `expert`
or `context` is a mesh axis more and an entry of the table.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from rlax_llm.config import ConfigError
from rlax_llm.config import MeshConfig
from rlax_llm.config import ModelConfig
from rlax_llm.runtime import processes
from rlax_llm.types import Array

MESH_AXES = ('data', 'fsdp', 'tensor')
_ROWS = ('data', 'fsdp')

# Logical axis -> mesh axes. None: every device holds the whole axis.
Table = Mapping[str | None, Any]
TABLE: Table = {
  None: None,
  'rows': _ROWS,
  'embed': 'fsdp',
  'vocabulary': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
}
# Rollouts read every parameter once per forward: gathered over fsdp ahead of
# the loop instead of in each of its steps.
ROLLOUT_TABLE: Table = {**TABLE, 'embed': None}

# What may be held whole by every device if it does not divide: fewer KV heads
# than tensor ways are shared by the query heads that read them, and the few
# rows of a block of prompts are computed by all.
_MAY_REPLICATE = ('kv_heads', 'rows')


def make_mesh(config: MeshConfig) -> Mesh:
  """Returns the mesh of a run over the first devices.

  Args:
    config: ways by axis; `data` of 0 takes the devices that are left.

  Raises:
    ConfigError: if the ways do not multiply to a number of devices that
      there are; with several processes, to all of them.
  """
  devices = jax.devices()
  processes.check_devices()
  model_ways = config.fsdp * config.tensor
  data = config.data or len(devices) // model_ways
  count = data * model_ways
  shape = f'mesh.data={config.data} x fsdp={config.fsdp} x tensor=' + str(
    config.tensor
  )
  if count > len(devices) or not data:
    raise ConfigError(
      f'{shape} needs {max(count, model_ways)} devices and there are '
      f'{len(devices)} devices; set mesh.data=0 and lower fsdp or tensor'
    )
  if not config.data and count != len(devices):
    raise ConfigError(
      f'{len(devices)} devices are not divisible by fsdp x tensor = '
      f'{model_ways}; set mesh.data to the ways wanted, or others'
    )
  if processes.count() > 1 and count != len(devices):
    raise ConfigError(
      f'{shape} leaves {len(devices) - count} of {len(devices)} devices idle;'
      f' a run of {processes.count()} processes uses them all: set '
      'mesh.data=0, or start fewer processes'
    )
  # Explicit axes, the default of jax.make_mesh, would make gathers such as
  # embedding[tokens] an error.
  return Mesh(
    np.asarray(devices[:count]).reshape(data, config.fsdp, config.tensor),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def check_model(config: ModelConfig, mesh: Mesh) -> None:
  """Refuses a model whose axes do not divide over the mesh.

  Args:
    config: `vocabulary` is set.
    mesh: from `make_mesh`.

  Raises:
    ConfigError: naming the field, its value and the ways.
  """
  for field, axis in (
    ('width', 'fsdp'),
    ('heads', 'tensor'),
    ('mlp_width', 'tensor'),
    ('vocabulary', 'tensor'),
  ):
    value, parts = getattr(config, field), mesh.shape[axis]
    if value % parts:
      change = f'make it a multiple (the next is {-(-value // parts) * parts})'
      # The folder of a published model decides its fields.
      remedy = '' if config.pretrained else f'{change} or '
      raise ConfigError(
        f'model.{field}={value} is not divisible by '
        f'mesh.{axis}={parts}; {remedy}lower mesh.{axis}'
      )


def spec(
  axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, table: Table
) -> PartitionSpec:
  """Returns where an array with these logical axes lies.

  Args:
    axes: a name, or None, for each axis; the rest are None.
    shape: of the array.
    mesh: from `make_mesh`.
    table: of the module.

  Raises:
    ValueError: an axis does not divide that has to.
  """
  parts: list[Any] = []
  for name, size in zip(axes, shape):
    target = table[name]
    names = (target,) if isinstance(target, str) else target or ()
    count = math.prod(mesh.shape[n] for n in names)
    if size % count:
      if name not in _MAY_REPLICATE:
        raise ValueError(
          f'axis {name!r} of size {size} is not divisible by {count} ways'
        )
      target = None
    parts.append(target)
  return PartitionSpec(*parts)


def place_tree(
  abstract: Any, axes: Any, mesh: Mesh, table: Table = TABLE
) -> Any:
  """Returns a NamedSharding for every leaf of a tree.

  Args:
    abstract: arrays or their shapes.
    axes: the same tree, a tuple of logical axes for each leaf.
    mesh: from `make_mesh`.
    table: of the module.
  """
  return jax.tree.map(
    lambda x, names: NamedSharding(mesh, spec(names, x.shape, mesh, table)),
    abstract,
    axes,
  )


def constrain(x: Array, axes: tuple[str | None, ...], *, mesh: Mesh) -> Array:
  """Says where an intermediate value lies; for tracing under `jax.jit`."""
  if mesh.size == 1:
    return x
  place = NamedSharding(mesh, spec(axes, x.shape, mesh, TABLE))
  return jax.lax.with_sharding_constraint(x, place)


def rows(mesh: Mesh) -> NamedSharding:
  """Leading axis over the rows' ways: slots."""
  return NamedSharding(mesh, PartitionSpec(_ROWS))


def heads(mesh: Mesh, kv_heads: int) -> NamedSharding:
  """Rows, and KV heads where they divide: the KV cache."""
  parts = 'tensor' if kv_heads % mesh.shape['tensor'] == 0 else None
  return NamedSharding(mesh, PartitionSpec(_ROWS, parts))


def microbatches(mesh: Mesh) -> NamedSharding:
  """Second axis over the rows' ways: the rows of every microbatch."""
  return NamedSharding(mesh, PartitionSpec(None, _ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  """One copy on every device: scalars and what the host writes."""
  return NamedSharding(mesh, PartitionSpec())


def ways(mesh: Mesh) -> int:
  """Returns the number of parts that rows are divided into."""
  return math.prod(mesh.shape[name] for name in _ROWS)


def split(mesh: Mesh, parts: int) -> list[Mesh]:
  """Returns meshes that divide the data ways of one.

  Args:
    mesh: from `make_mesh`.
    parts: how many.

  Raises:
    ConfigError: the data ways do not divide.
  """
  if parts == 1:
    return [mesh]
  if mesh.shape['data'] % parts:
    raise ConfigError(
      f'mesh.replicas={parts} does not divide the '
      f'{mesh.shape["data"]} ways of mesh.data; make it a '
      'divisor'
    )
  return [
    Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    for devices in np.split(mesh.devices, parts)
  ]


def on_part(tree: Any, part: Mesh) -> Any:
  """Returns what one of the meshes of `split` holds of arrays; no copies.

  Args:
    tree: arrays, or their shapes, that are not divided over the data ways.
    part: a part of the mesh that they lie on.
  """
  devices = set(part.devices.flat)

  def take(x: Any) -> Any:
    if not isinstance(x.sharding, NamedSharding) or x.sharding.mesh == part:
      return x
    place = NamedSharding(part, x.sharding.spec)
    if not isinstance(x, jax.Array):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    shards = [s.data for s in x.addressable_shards if s.device in devices]
    return jax.make_array_from_single_device_arrays(x.shape, place, shards)

  return jax.tree.map(take, tree)


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts a Batch on the mesh, its rows divided."""
  place = lambda x: processes.put(
    x, microbatches(mesh) if np.ndim(x) else replicated(mesh)
  )
  return jax.tree.map(place, batch)
