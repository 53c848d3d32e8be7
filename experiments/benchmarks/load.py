"""Loads a published checkpoint of the 0.5B shape: seconds and host memory.

  python -m experiments.benchmarks.load --dtype=bfloat16

Writes random weights in three shards to a temporary folder (or --folder, which
is kept), then loads them, each in a process of its own: a process inherits the
peak memory of the one that starts it.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax
import numpy as np

from experiments.benchmarks import common
from experiments.common import use_device
from rlax_llm.config import freeze
from rlax_llm.config import MeshConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.models.pretrained import config_json
from rlax_llm.models.pretrained import loading
from rlax_llm.models.pretrained import safetensors_files
from rlax_llm.models.pretrained import weight_layout
from rlax_llm.models.transformer import make_transformer
from rlax_llm.runtime import sharding

_FOLDER = flags.DEFINE_string('folder', '', 'Where to write the checkpoint.')
_SHARDS = flags.DEFINE_integer('shards', 3, 'Weights files.')
_PART = flags.DEFINE_enum(
  'part', '', ['', 'write', 'read'], 'Do only this, with --folder.'
)
_TO = flags.DEFINE_enum(
  'to',
  '',
  ['', 'float32', 'bfloat16'],
  'Dtype of the parameters; empty: as stored.',
)


def peak_bytes() -> int:
  """Returns the most memory that this process has held."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(folder: pathlib.Path) -> None:
  """Writes a checkpoint of random weights."""
  model = common.model_config()
  dtype = np.dtype(jax.numpy.dtype(common.DTYPE.value))
  shapes = {
    piece.name: piece.shape
    for leaf in weight_layout.leaves(model).values()
    for piece in leaf.pieces
  }
  rng = np.random.default_rng(common.SEED.value)
  fetch = lambda name: rng.standard_normal(shapes[name], np.float32).astype(
    dtype
  )
  names = list(shapes)
  where: dict[str, str] = {}
  for i in range(_SHARDS.value):
    file = f'model-{i + 1:05d}-of-{_SHARDS.value:05d}.safetensors'
    part = names[
      i * len(names) // _SHARDS.value : (i + 1) * len(names) // _SHARDS.value
    ]
    safetensors_files.write_file(
      folder / file, {n: shapes[n] for n in part}, dtype, fetch
    )
    where |= dict.fromkeys(part, file)
  (folder / loading.INDEX_FILE).write_text(json.dumps({'weight_map': where}))
  (folder / loading.CONFIG_FILE).write_text(
    json.dumps(config_json.to_config_json(model, dtype.name))
  )


def read(folder: str) -> None:
  """Loads a folder and prints what it took."""
  model = config_json.from_config_json(loading.read_config(folder), folder)
  precision = PrecisionConfig(parameters=_TO.value or common.DTYPE.value)
  init = make_transformer(freeze(model), freeze(precision)).init
  place = sharding.replicated(sharding.make_mesh(MeshConfig(data=1)))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(init, jax.random.key(0)),
  )
  stored = loading.fingerprint(folder)['weights_bytes']
  before = peak_bytes()
  start = time.perf_counter()
  params = jax.block_until_ready(loading.load_params(folder, model, abstract))
  seconds = time.perf_counter() - start
  common.emit(
    seconds=round(seconds, 2),
    gigabytes=round(stored / 1e9, 3),
    parameters=precision.parameters,
    before_over_size=round(before / stored, 2),
    peak_over_size=round(peak_bytes() / stored, 2),
    leaves=len(jax.tree.leaves(params)),
  )


def main(argv: list[str]) -> None:
  """Writes, then loads, in new processes."""
  del argv
  use_device()
  if _PART.value == 'write':
    write(pathlib.Path(_FOLDER.value))
  elif _PART.value == 'read':
    read(_FOLDER.value)
  else:
    with tempfile.TemporaryDirectory() as temporary:
      folder = _FOLDER.value or temporary
      os.makedirs(folder, exist_ok=True)
      for part in ('write', *['read'] * common.REPEATS.value):
        subprocess.run(
          [
            sys.executable,
            '-m',
            'experiments.benchmarks.load',
            *sys.argv[1:],
            f'--folder={folder}',
            f'--part={part}',
          ],
          check=True,
        )


if __name__ == '__main__':
  flags.FLAGS.set_default('model', '0.5b')
  app.run(main)
