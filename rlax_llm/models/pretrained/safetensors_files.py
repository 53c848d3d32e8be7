"""Files of the safetensors format, read and written by parts.

A file is 8 bytes with the length of a JSON header, the header, and the tensors'
bytes, little-endian and row by row. The header maps a name to dtype, shape and
the place of its bytes. (https://github.com/huggingface/safetensors)

Tensors are read into arrays with plain reads: pages of a memory map would count
as the process's memory until the whole file is closed.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import os
import pathlib
import struct
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
  'F32': np.dtype(np.float32),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class Tensor(NamedTuple):
  """Where a tensor lies."""

  path: pathlib.Path
  dtype: str  # the format's name
  shape: tuple[int, ...]
  start: int  # bytes from the beginning of the file


def bits(array: np.ndarray) -> np.ndarray:
  """Returns a view that NumPy can copy fast: bfloat16 as integers."""
  return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a file by name; no tensor is read.

  Args:
    path: the file.

  Raises:
    ValueError: the file is damaged; says how, without its name.
    OSError: it cannot be read.
  """
  size = path.stat().st_size
  with open(path, 'rb') as file:
    head = file.read(8)
    length = struct.unpack('<Q', head)[0] if len(head) == 8 else None
    if length is None or length > min(size - 8, _LONGEST_HEADER):
      raise ValueError(
        'is truncated or no safetensors file: its header is incomplete'
      )
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=_without_duplicates)
    header.pop('__metadata__', None)
    found = {name: _entry(path, 8 + length, e) for name, e in header.items()}
  except _Duplicate as error:
    raise ValueError(f'names {error.args[0]} twice') from None
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise ValueError(
      f'has a header that is no safetensors header ({type(error).__name__})'
    ) from None
  end = max((stop for _, stop in found.values()), default=8 + length)
  if end != size:
    raise ValueError(
      f'is {"truncated" if end > size else "too long"}: its '
      f'header describes {end} bytes and it has {size}'
    )
  return {name: tensor for name, (tensor, _) in found.items()}


class _Duplicate(Exception):
  """A name occurs twice in one JSON object."""


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  items = dict(pairs)
  if len(items) < len(pairs):
    names = [name for name, _ in pairs]
    raise _Duplicate(next(n for n in names if names.count(n) > 1))
  return items


def _entry(
  path: pathlib.Path, base: int, entry: Mapping[str, Any]
) -> tuple[Tensor, int]:
  """Returns a tensor and where it ends."""
  start, stop = entry['data_offsets']
  shape = tuple(int(n) for n in entry['shape'])
  dtype = str(entry['dtype'])
  if (
    dtype in DTYPES
    and stop - start != math.prod(shape) * DTYPES[dtype].itemsize
  ):
    raise ValueError('sizes disagree')
  if not 0 <= start <= stop or min(shape, default=0) < 0:
    raise ValueError('negative size')
  return Tensor(path, dtype, shape, base + start), base + stop


def read_rows(
  tensor: Tensor, rows: slice, out: np.ndarray | None = None
) -> np.ndarray:
  """Returns rows of a tensor: the part [start, stop) of its first axis.

  Args:
    tensor: of a dtype in DTYPES.
    rows: start and stop are set.
    out: where to; contiguous, of the right shape and dtype. None: a new array.

  Raises:
    OSError: the file has become shorter.
  """
  dtype = DTYPES[tensor.dtype]
  if out is None:
    out = np.empty((rows.stop - rows.start, *tensor.shape[1:]), dtype)
  stride = math.prod(tensor.shape[1:]) * dtype.itemsize
  view = out.reshape(-1).view(np.uint8).data
  with open(tensor.path, 'rb', buffering=0) as file:
    file.seek(tensor.start + rows.start * stride)
    while view:
      count = file.readinto(view)
      if not count:
        raise OSError(f'{tensor.path} ended before its tensors did')
      view = view[count:]
  return out


def write_file(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: np.dtype,
  fetch: Callable[[str], np.ndarray],
) -> None:
  """Writes a file, one tensor in memory at a time, and syncs it to the disk.

  Args:
    path: the file; made or replaced.
    shapes: by name, in the order of the file.
    dtype: of all tensors; one of DTYPES.
    fetch: returns a tensor by its name; called once for each, in order.
  """
  # What loads into torch looks for this mark.
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  place = 0
  for name, shape in shapes.items():
    end = place + math.prod(shape) * dtype.itemsize
    header[name] = {
      'dtype': _NAMES[dtype],
      'shape': list(shape),
      'data_offsets': [place, end],
    }
    place = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, shape in shapes.items():
      tensor = fetch(name)
      if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
          f'{name} is {tensor.dtype}{list(tensor.shape)}, not '
          f'{dtype}{list(shape)}'
        )
      file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
