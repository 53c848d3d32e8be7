"""A folder with a published model: its config, its tensors, its parameters.

The folder holds config.json and either model.safetensors or shards with
model.safetensors.index.json. Headers are checked before a tensor is read; then
every parameter goes to its devices before the next one is read, so that the
host holds one parameter more than the model.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import ModelConfig
from rlax_llm.models import rotary
from rlax_llm.models.pretrained import config_json
from rlax_llm.models.pretrained import safetensors_files
from rlax_llm.models.pretrained import weight_layout
from rlax_llm.models.pretrained.safetensors_files import Tensor
from rlax_llm.types import Params

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
TOKENIZER = 'pretrained'  # model.tokenizer: the folder's

_NAMED = 8  # problems named in one message


class _Problem(NamedTuple):
  """What is wrong with a folder, and what mends it."""

  text: str
  remedy: str


# A remedy for each cause. A message has those of its problems, each once.
_PERMISSIONS = 'check the permissions of the files that cannot be read'
_DAMAGED = 'fetch the damaged files again'
_MISSING = 'fetch the missing files'
_INDEX = (
  f'fetch {INDEX_FILE} and the files that it lists again, all from one '
  'publication'
)
_NO_INDEX = (
  f'fetch {INDEX_FILE}, or leave {WEIGHTS_FILE} alone in the folder '
  'if it holds all weights'
)
_FORMAT = 'give a folder with safetensors files, or convert its weights to them'
_STRAY = (
  f'move the files that {INDEX_FILE} does not list out of the folder, '
  f'or fetch the {INDEX_FILE} that lists them'
)
_UNKNOWN = (
  f'give the {CONFIG_FILE} of these weights, or delete the tensors '
  'that belong to no parameter'
)
_OTHER = f'give the {CONFIG_FILE} of these weights, or the weights of this one'
_DTYPE = (
  f'convert the weights to {", ".join(safetensors_files.DTYPES)}, or '
  'give a model that is published so'
)
_ROTARY = f'correct rope_theta in {CONFIG_FILE}, or delete these tensors'


def read_config(folder: str) -> dict[str, Any]:
  """Returns the parsed config.json of a folder.

  Raises:
    ConfigError: there is none, or it is no JSON.
  """
  path = pathlib.Path(folder) / CONFIG_FILE
  if not path.is_file():
    raise ConfigError(
      f'model.pretrained={folder!r} has no {CONFIG_FILE}; give '
      'the folder of a published model'
    )
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ConfigError(
      f'{path} cannot be read: {error.strerror}; check its permissions'
    ) from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f'{path} is no JSON: {error}; fetch this file again'
    ) from error


def resolve(config: Config) -> Config:
  """Returns the config with what `model.pretrained` and '' stand for.

  Args:
    config: not yet validated.

  Raises:
    ConfigError: the folder is of no implemented model, or a field that the
      config sets disagrees with it.
  """
  model = config.model
  if (
    not isinstance(model, ModelConfig)
    or not isinstance(model.pretrained, str)
    or not isinstance(model.tokenizer, str)
  ):
    return config  # the check of types comes later and names it
  fields: dict[str, Any] = {}
  if model.pretrained:
    where = os.path.join(model.pretrained, CONFIG_FILE)
    published = config_json.from_config_json(
      read_config(model.pretrained), where
    )
    fields = config_json.merge(model, published, where)
  elif model.tokenizer == TOKENIZER:
    raise ConfigError(
      f'model.tokenizer={TOKENIZER!r} is the one of '
      'model.pretrained, which is not set; set it, or a '
      "tokenizer: 'bytes' or an alphabet"
    )
  if model.tokenizer == '':
    fields['tokenizer'] = TOKENIZER if model.pretrained else 'bytes'
  return dataclasses.replace(config, model=dataclasses.replace(model, **fields))


def find_tensors(folder: str, model: ModelConfig) -> dict[str, Tensor]:
  """Returns every published tensor of a model by its name.

  Reads headers, and rotary frequencies where they are stored.

  Args:
    folder: of the model.
    model: the architecture that its config.json describes.

  Raises:
    ConfigError: files or tensors are missing, damaged, double, left over, or
      of another shape or dtype, or stored rotary frequencies are not those of
      config.json; one message names them together, and what mends each.
  """
  root = pathlib.Path(folder)
  problems: list[_Problem] = []
  index, names = _list_files(root, problems)
  found: dict[str, Tensor] = {}
  unread = set()
  for name in names:
    try:
      header = safetensors_files.read_header(root / name)
    except FileNotFoundError:
      problems.append(
        _Problem(f'{name} is missing, but {INDEX_FILE} lists it', _MISSING)
      )
      unread.add(name)
      continue
    except OSError as error:
      problems.append(
        _Problem(f'{name} cannot be read: {error.strerror}', _PERMISSIONS)
      )
      unread.add(name)
      continue
    except ValueError as error:
      problems.append(_Problem(f'{name} {error}', _DAMAGED))
      unread.add(name)
      continue
    for tensor in header:
      if tensor in found:
        problems.append(
          _Problem(
            f'{tensor} is in {found[tensor].path.name} and in {name}', _INDEX
          )
        )
      elif index is not None and index.get(tensor) != name:
        problems.append(
          _Problem(
            f'{tensor} is in {name}, but {INDEX_FILE} says '
            f'{index.get(tensor, "nothing of it")}',
            _INDEX,
          )
        )
    found = header | found
  # What a lost file should have held is not named again, one by one.
  accounted = (
    set() if names and not (index is None and unread) else set(_wanted(model))
  )
  for tensor, name in (index or {}).items():
    if tensor not in found:
      accounted.add(tensor)
      if name not in unread:
        problems.append(
          _Problem(
            f'{tensor} is not in {name}, where {INDEX_FILE} puts it', _INDEX
          )
        )
  _compare(found, model, accounted, problems)
  if problems:
    more = len(problems) - _NAMED
    texts = '; '.join(problem.text for problem in problems[:_NAMED])
    remedies = '; '.join(dict.fromkeys(p.remedy for p in problems))
    raise ConfigError(
      f'the weights in {folder!r} do not fit: {texts}'
      f'{f"; and {more} more" if more > 0 else ""}. To mend '
      f'it: {remedies}'
    )
  return found


def _list_files(
  root: pathlib.Path, problems: list[_Problem]
) -> tuple[dict[str, str] | None, list[str]]:
  """Returns (tensor -> file of the index or None, files to read)."""
  present = sorted(path.name for path in root.glob('*.safetensors'))
  path = root / INDEX_FILE
  if not path.is_file():
    if present != [WEIGHTS_FILE]:
      problems.append(
        _Problem(
          f'neither {INDEX_FILE} nor {WEIGHTS_FILE} alone is there'
          f' (found: {", ".join(present) or "no safetensors file"})',
          _NO_INDEX if present else _FORMAT,
        )
      )
      return None, []
    return None, present
  try:
    index = json.loads(path.read_text(encoding='utf-8'))['weight_map']
    names = sorted(set(index.values()))
    if any(os.path.basename(name) != name for name in names):
      raise ValueError('it names files elsewhere')
  except OSError as error:
    problems.append(
      _Problem(f'{INDEX_FILE} cannot be read: {error.strerror}', _PERMISSIONS)
    )
    return None, []
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    problems.append(
      _Problem(
        f'{INDEX_FILE} is no index ({type(error).__name__}: {error})', _DAMAGED
      )
    )
    return None, []
  problems += [
    _Problem(f'{name} is not listed in {INDEX_FILE}', _STRAY)
    for name in present
    if name not in names
  ]
  return index, names


def _wanted(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every published tensor by name."""
  return {
    piece.name: piece.shape
    for leaf in weight_layout.leaves(model).values()
    for piece in leaf.pieces
  }


def _compare(
  found: Mapping[str, Tensor],
  model: ModelConfig,
  accounted: set[str],
  problems: list[_Problem],
) -> None:
  """Adds what is missing, left over or of another kind."""
  wanted = _wanted(model)
  buffers = weight_layout.rotary_buffers(model)
  optional = dict(buffers)
  if model.tied_head:
    # Some writers store the tied head too; `load_params` compares it.
    optional[weight_layout.HEAD] = wanted[weight_layout.EMBEDDING]
  problems += [
    _Problem(f'{name} is missing', _OTHER)
    for name in wanted
    if name not in found and name not in accounted
  ]
  for name, tensor in found.items():
    shape = wanted.get(name) or optional.get(name)
    if shape is None:
      problems.append(
        _Problem(
          f'{name} in {tensor.path.name} belongs to no parameter', _UNKNOWN
        )
      )
      continue
    if tensor.shape != shape:
      problems.append(
        _Problem(
          f'{name} has shape {list(tensor.shape)}, not {list(shape)}', _OTHER
        )
      )
    elif tensor.dtype not in safetensors_files.DTYPES:
      problems.append(
        _Problem(
          f'{name} is of dtype {tensor.dtype}; read are '
          f'{", ".join(safetensors_files.DTYPES)}',
          _DTYPE,
        )
      )
    elif name in buffers and not _fits_rotary(tensor, model):
      problems.append(
        _Problem(
          f'{name} in {tensor.path.name} holds other rotary frequencies '
          f'than {CONFIG_FILE} implies (rope_theta={model.rope_theta:g})',
          _ROTARY,
        )
      )


# A bfloat16 keeps 8 bits; a float16 below 2^-14 is a multiple of 2^-24.
_ROTARY_RELATIVE, _ROTARY_ABSOLUTE = 2.0**-7, 2.0**-24


def _fits_rotary(tensor: Tensor, model: ModelConfig) -> bool:
  """Whether stored rotary frequencies are the model's, up to their rounding.

  Writers that scaled the positions instead stored unscaled frequencies.
  """
  stored = safetensors_files.read_rows(tensor, slice(0, tensor.shape[0]))
  head_dim = model.head_dim or model.width // model.heads
  scalings = (
    rotary.RopeScaling(),
    rotary.RopeScaling(
      model.rope_scaling,
      model.rope_factor,
      model.rope_low,
      model.rope_high,
      model.rope_original,
    ),
  )
  return any(
    np.allclose(
      stored.astype(np.float32),
      rotary.rotary_frequencies(head_dim, model.rope_theta, scaling),
      rtol=_ROTARY_RELATIVE,
      atol=_ROTARY_ABSOLUTE,
    )
    for scaling in scalings
  )


def load_params(folder: str, model: ModelConfig, abstract: Params) -> Params:
  """Reads the parameters of a published model onto their devices.

  Args:
    folder: of the model.
    model: the architecture that its config.json describes, with the vocabulary.
    abstract: the parameters as `jax.ShapeDtypeStruct` with shardings; each
      device's part is read for it, and cast to the dtype.

  Returns:
    The parameters, in the structure of `abstract`.

  Raises:
    ConfigError: as `find_tensors`; or a tied head is stored that differs.
    ValueError: `abstract` is of another architecture.
  """
  found = find_tensors(folder, model)
  if model.tied_head and weight_layout.HEAD in found:
    _check_tied(found)
  leaves = weight_layout.leaves(model)
  flat, structure = jax.tree_util.tree_flatten_with_path(abstract)
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in flat
  ]
  if {path: leaf.shape for path, (_, leaf) in zip(paths, flat)} != {
    path: leaf.shape for path, leaf in leaves.items()
  }:
    raise ValueError('the abstract parameters are not those of the model')
  arrays: list[Any] = [None] * len(flat)
  # The largest first, while little else is held.
  for i in sorted(range(len(flat)), key=lambda i: -flat[i][1].size):
    arrays[i] = _load_leaf(leaves[paths[i]], found, flat[i][1])
  return jax.tree_util.tree_unflatten(structure, arrays)


def _load_leaf(
  leaf: weight_layout.Leaf,
  found: Mapping[str, Tensor],
  abstract: jax.ShapeDtypeStruct,
) -> jax.Array:
  """Returns one parameter, on its devices."""
  made: dict[tuple, np.ndarray] = {}

  def fill(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    box = tuple(slice(*cut.indices(n)[:2]) for cut, n in zip(index, leaf.shape))
    key = tuple((cut.start, cut.stop) for cut in box)
    if key not in made:  # devices may hold copies of one part
      made[key] = _read_box(leaf, box, found, abstract.dtype)
    return made[key]

  array = jax.make_array_from_callback(leaf.shape, abstract.sharding, fill)
  return jax.block_until_ready(array)


def _read_box(
  leaf: weight_layout.Leaf,
  box: weight_layout.Box,
  found: Mapping[str, Tensor],
  dtype: np.dtype,
) -> np.ndarray:
  """Returns a box of a parameter, from what is stored of it."""
  out = np.empty([cut.stop - cut.start for cut in box], dtype)
  for part in weight_layout.parts(leaf, box):
    tensor = found[part.piece.name]
    same = safetensors_files.DTYPES[tensor.dtype] == dtype
    target = out[part.target]
    if (
      same
      and len(part.piece.shape) == out.ndim
      and part.piece.axes == tuple(range(out.ndim))
      and target.flags.c_contiguous
      and _whole(part)
    ):
      safetensors_files.read_rows(tensor, part.rows, target)
      continue
    rows = safetensors_files.read_rows(tensor, part.rows)
    if same:
      weight_layout.place(
        part, safetensors_files.bits(rows), safetensors_files.bits(out)
      )
    else:
      weight_layout.place(part, rows, out)
  return out


def _whole(part: weight_layout.Part) -> bool:
  """Whether a part takes all of every row it reads."""
  shape = (*part.piece.split[1:], *part.piece.shape[1:])
  return all(
    (cut.start, cut.stop) == (0, n) for cut, n in zip(part.inner[1:], shape)
  )


def _check_tied(found: Mapping[str, Tensor]) -> None:
  """Refuses a stored head that differs from the embedding it is tied to."""
  embedding, head = (
    found[name] for name in (weight_layout.EMBEDDING, weight_layout.HEAD)
  )
  vocabulary, width = embedding.shape
  step = max(1, 2**24 // width)
  for start in range(0, vocabulary, step):
    rows = slice(start, min(start + step, vocabulary))
    a, b = (safetensors_files.read_rows(t, rows) for t in (embedding, head))
    if not np.array_equal(a, b):
      raise ConfigError(
        f'{weight_layout.HEAD} in {head.path} differs from '
        f'{weight_layout.EMBEDDING}, but {CONFIG_FILE} has '
        'tie_word_embeddings=true; correct one of them'
      )


_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def fingerprint(folder: str) -> dict[str, Any]:
  """Returns what tells one folder of weights from another, in little time.

  Args:
    folder: of the model.

  Returns:
    folder, config_sha256, weights_bytes, and weights_sha256: over names, sizes
    and 16 evenly spaced parts of 64 KiB of every weights file, the first of
    which holds the header.
  """
  root = pathlib.Path(folder)
  digest, total = hashlib.sha256(), 0
  for path in sorted(root.glob('*.safetensors')):
    size = path.stat().st_size
    total += size
    digest.update(f'{path.name} {size}\n'.encode())
    last = max(size - _SAMPLE_BYTES, 0)
    with open(path, 'rb') as file:
      for i in range(_SAMPLES):
        file.seek(last * i // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
  config = (root / CONFIG_FILE).read_bytes()
  return {
    'folder': folder,
    'config_sha256': hashlib.sha256(config).hexdigest(),
    'weights_bytes': total,
    'weights_sha256': digest.hexdigest(),
  }
