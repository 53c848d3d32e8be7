"""Several processes as one run: their indices and what the hosts exchange.

Every process drives its own devices and runs the same host program, so that
all of them compile and call the same programs in the same order. Devices talk
to each other inside those programs. Hosts exchange what only one of them knows
(clocks, rewards, past rollouts) through the service that `jax.distributed`
starts in process 0: that needs no device, and has a timeout and a message.
Every process makes the same exchanges in the same order. With one process
every function here is the identity.
"""

import base64
from collections.abc import Callable
from collections.abc import Sequence
import itertools
import json
from typing import Any
from typing import TypeVar

import jax
from jax._src import distributed  # The service has no public interface.
from jax.experimental import multihost_utils
from jax.sharding import Sharding
import numpy as np

from rlax_llm.config import ConfigError

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')

# Other processes may be compiling or scoring hard samples. A dead process is
# noticed sooner, by its missing heartbeat.
_SECONDS = 1800
_NAME = 'rlax_llm/exchange'
_numbers = itertools.count()
_written: list[str] = []  # keys of this process that may still be unread


def count() -> int:
  """Returns the number of processes of the run."""
  return distributed.global_state.num_processes


def index() -> int:
  """Returns the number of this process, from 0."""
  return distributed.global_state.process_id


def is_writer() -> bool:
  """Returns whether this process writes files and talks to the user."""
  return index() == 0


def check_devices() -> None:
  """Refuses devices of processes that this one has not joined.

  Raises:
    ConfigError: the machine, a TPU pod, has them.
  """
  if jax.process_count() != count():
    raise ConfigError(
      f'there are devices of {jax.process_count()} processes and this run '
      f'has {count()}; start it on every host with --distributed'
    )


def barrier() -> None:
  """Returns once every process has come here."""
  if count() > 1:
    _wait(f'{_NAME}/{next(_numbers)}')


def broadcast(value: Any) -> Any:
  """Returns process 0's value: JSON types and numpy arrays."""
  if count() == 1:
    return value
  name = f'{_NAME}/{next(_numbers)}'
  if not is_writer():
    return _decode(_read(name))
  _write(name, value)
  return _decode(_encode(value))


def gather(value: Any, *, to_writer: bool = False) -> list[Any]:
  """Returns the values of all processes, in their order.

  Args:
    value: JSON types and numpy arrays.
    to_writer: only the writer gets them, the others nothing.
  """
  if count() == 1:
    return [value]
  name = f'{_NAME}/{next(_numbers)}'
  _write(f'{name}/{index():09}', value)
  _wait(name, keep=1)
  if to_writer:
    wanted = range(count() if is_writer() else 0)
    return [_decode(_read(f'{name}/{i:09}')) for i in wanted]
  found = _client().key_value_dir_get_bytes(f'{name}/')
  return [_decode(text) for _, text in sorted(found)]


def merge(values: list[Any]) -> list[Any]:
  """Returns the values that each process holds some of, process by process."""
  return [value for part in gather(values) for value in part]


def share(
  work: Callable[[Sequence[_Item]], list[_Result]], items: Sequence[_Item]
) -> list[_Result]:
  """Applies `work` to items, each process to its part of them.

  Args:
    work: returns one result for each item, of JSON types and numpy arrays.
    items: the same in every process.

  Returns:
    The results of all items, in order.

  Raises:
    ConfigError: in every process, where `work` raised it in one.
  """
  if count() == 1:
    return work(items)
  results, refusal = [], ''
  try:
    results = work(items[index() :: count()])
  except ConfigError as error:
    refusal = str(error)
  parts = gather([results, refusal])
  for _, refusal in parts:
    if refusal:
      raise ConfigError(refusal)
  turns = [iter(part) for part, _ in parts]
  return [next(turns[i % count()]) for i in range(len(items))]


def whole(array: Any) -> np.ndarray:
  """Returns all of an array on the host, wherever its parts lie."""
  if count() > 1 and isinstance(array, jax.Array):
    if not (array.is_fully_addressable or array.is_fully_replicated):
      with jax.transfer_guard_device_to_host('allow'):
        return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def put(array: Any, where: Sharding) -> jax.Array:
  """Puts an array of the host, the same in every process, onto devices."""
  if count() == 1:
    return jax.device_put(array, where)
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, where, lambda i: array[i])


def in_turn(program: Callable) -> Callable:
  """Returns the compiled program, which may have to end before the next one.

  For CPU, programs in flight together take turns in another order in every
  process, and their collectives wait for each other for ever.
  """
  if count() == 1 or jax.default_backend() != 'cpu':
    return program
  return lambda *args: jax.block_until_ready(program(*args))


def _client() -> Any:
  return distributed.global_state.client


def _write(name: str, value: Any) -> None:
  _client().key_value_set_bytes(name, _encode(value))
  _written.append(name)


def _read(name: str) -> bytes:
  try:
    return _client().blocking_key_value_get_bytes(name, _SECONDS * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise _late(error) from error


def _wait(name: str, keep: int = 0) -> None:
  """Waits for all processes, then deletes the values they have read.

  Args:
    name: of the occasion.
    keep: how many of the last written values are yet to be read.
  """
  try:
    _client().wait_at_barrier(name, _SECONDS * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise _late(error) from error
  while len(_written) > keep:
    _client().key_value_delete(_written.pop(0))


def _late(error: Exception) -> RuntimeError:
  reason = ' '.join(str(error).split())[:300]
  return RuntimeError(
    f'process {index()} of {count()} timed out after {_SECONDS} s waiting for '
    f'another process: {reason}'
  )


def _encode(value: Any) -> bytes:

  def encode(item: Any) -> Any:
    if isinstance(item, np.ndarray):
      text = base64.b64encode(item.tobytes()).decode()
      return {'array': text, 'dtype': item.dtype.str, 'shape': item.shape}
    if isinstance(item, np.generic):
      return item.item()
    raise TypeError(f'{type(item).__name__} cannot be sent to other processes')

  return json.dumps(value, default=encode).encode()


def _decode(text: bytes) -> Any:

  def decode(item: dict) -> Any:
    if item.keys() != {'array', 'dtype', 'shape'}:
      return item
    raw = np.frombuffer(base64.b64decode(item['array']), item['dtype'])
    return raw.reshape(item['shape']).copy()

  return json.loads(text, object_hook=decode)
