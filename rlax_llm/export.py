"""A trained policy as a folder that other libraries load.

  python -m rlax_llm.export --workdir=DIR --out=FOLDER [--step=100] [--adapter]
                            [--drafter]

Writes config.json, safetensors of the published layout and, for a run that
began from a published model, its tokenizer. Adapters are merged into their
matrices, or with --adapter written alone, as PEFT reads them. With --drafter
the learned drafter is written instead, without the embedding and the head,
which are the policy's. The folder appears as a whole or not at all.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from absl import flags as absl_flags
import jax
import numpy as np

from rlax_llm import sample
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.config import ModelConfig
from rlax_llm.models import lora
from rlax_llm.models.pretrained import config_json
from rlax_llm.models.pretrained import loading
from rlax_llm.models.pretrained import safetensors_files
from rlax_llm.models.pretrained import weight_layout
from rlax_llm.runtime import flags
from rlax_llm.types import Params

SHARD_BYTES = 5 * 10**9  # weights above it are split
# What belongs to the tokenizer of a published model, where it is there.
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
)
_TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def check_target(out: str) -> None:
  """Refuses a target that exists and holds something.

  Raises:
    ConfigError: it does.
  """
  path = pathlib.Path(out)
  if path.is_dir() and not any(path.iterdir()):
    return
  if path.exists():
    raise ConfigError(
      f'--out={out!r} exists and is not an empty folder; give '
      'another one, or remove it'
    )


def tokenizer_facts(run: Run) -> tuple[dict[str, Any], list[pathlib.Path]]:
  """Returns (token ids for config.json, files to copy) of a run's tokenizer."""
  folder = run.config.model.pretrained
  if run.config.model.tokenizer != loading.TOKENIZER:
    ids: dict[str, Any] = {'eos_token_id': list(run.tokenizer.eos_ids)}
    if run.tokenizer.bos_id is not None:
      ids['bos_token_id'] = run.tokenizer.bos_id
    return ids, []
  items = loading.read_config(folder)
  files = [pathlib.Path(folder) / name for name in TOKENIZER_FILES]
  return (
    {name: items[name] for name in _TOKEN_IDS if name in items},
    [path for path in files if path.is_file()],
  )


def export_folder(
  out: str,
  model: ModelConfig,
  params: Params,
  *,
  token_ids: Mapping[str, Any],
  files: list[pathlib.Path],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a model as published models are written; adapters are merged.

  One parameter at a time is fetched from the devices. Everything is written
  beside the target, synced, and then renamed.

  Args:
    out: the folder to make; missing or empty.
    model: the architecture, with its vocabulary.
    params: of that architecture, of one dtype.
    token_ids: more entries of config.json.
    files: copied into the folder.
    shard_bytes: the largest size of one weights file, unless a single tensor
      is larger.

  Raises:
    ConfigError: the target holds something, or no published architecture has
      these settings.
  """
  flat = _flatten(lora.merge(params, model.lora))
  dtype = np.dtype(flat['embedding'].dtype)
  config = config_json.to_config_json(model, dtype.name) | dict(token_ids)
  with _whole_folder(out) as folder:
    _write_weights(
      folder,
      weight_layout.leaves(model),
      flat,
      dtype,
      shard_bytes=shard_bytes,
      name=loading.WEIGHTS_FILE,
    )
    _write_json(folder / loading.CONFIG_FILE, config)
    for file in files:
      shutil.copyfile(file, folder / file.name)
      _sync(folder / file.name)


def export_adapter(out: str, model: ModelConfig, params: Params) -> None:
  """Writes the adapters alone, in PEFT's format.

  Args:
    out: the folder to make; missing or empty.
    model: the architecture, with its adapters and the folder of its base.
    params: of that architecture.

  Raises:
    ConfigError: the target holds something, or there are no adapters.
  """
  _check_adapters(model)
  config = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': model.pretrained or None,
    'r': model.lora.rank,
    'lora_alpha': model.lora.alpha,
    'lora_dropout': 0.0,
    'target_modules': list(model.lora.targets),
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }
  with _whole_folder(out) as folder:
    _write_weights(
      folder,
      weight_layout.adapter_leaves(model),
      _flatten(params),
      np.dtype(np.float32),
      shard_bytes=SHARD_BYTES,
      name='adapter_model.safetensors',
    )
    _write_json(folder / 'adapter_config.json', config)


def export_drafter(out: str, model: ModelConfig, params: Params) -> None:
  """Writes a drafter: one layer and what joins its inputs.

  Args:
    out: the folder to make; missing or empty.
    model: the policy's architecture, with its vocabulary.
    params: the drafter's.

  Raises:
    ConfigError: the target holds something.
  """
  flat = _flatten(params)
  dtype = np.dtype(flat['join/kernel'].dtype)
  layer = dataclasses.replace(model, layers=1)
  config = config_json.to_config_json(layer, dtype.name) | {
    'architectures': ['RlaxDrafter'],
    'model_type': 'rlax_drafter',
  }
  with _whole_folder(out) as folder:
    _write_weights(
      folder,
      weight_layout.drafter_leaves(model),
      flat,
      dtype,
      shard_bytes=SHARD_BYTES,
      name=loading.WEIGHTS_FILE,
    )
    _write_json(folder / loading.CONFIG_FILE, config)


def _check_adapters(model: ModelConfig) -> None:
  """Refuses a model without adapters."""
  if not model.lora.rank:
    raise ConfigError(
      '--adapter writes adapters and this run has none '
      '(model.lora.rank=0); leave it out'
    )


def _flatten(params: Params) -> dict[str, jax.Array]:
  """Returns the parameters by path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }


@contextlib.contextmanager
def _whole_folder(out: str) -> Iterator[pathlib.Path]:
  """Yields a folder that becomes `out` if nothing fails, else nothing."""
  check_target(out)
  target = pathlib.Path(out).absolute()
  temporary = target.with_name(f'.{target.name}.partial')
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
  except OSError as error:
    raise ConfigError(
      f'--out={out!r} cannot be written ({error.strerror}); '
      'give a folder that can'
    ) from error
  try:
    yield temporary
    _sync(temporary)
    temporary.rename(target)
    _sync(target.parent)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(
  folder: pathlib.Path,
  leaves: Mapping[str, weight_layout.Leaf],
  params: Mapping[str, jax.Array],
  dtype: np.dtype,
  *,
  shard_bytes: int,
  name: str,
) -> None:
  """Writes tensors, and their index if they take several files.

  Args:
    folder: where.
    leaves: what is written, by path.
    params: the parameters, by path.
    dtype: theirs.
    shard_bytes: see `export_folder`.
    name: of the file, if one holds all.
  """
  pieces = {
    piece.name: (path, piece)
    for path, leaf in leaves.items()
    for piece in leaf.pieces
  }
  sizes = {
    name: int(np.prod(piece.shape)) * dtype.itemsize
    for name, (_, piece) in pieces.items()
  }
  shards: list[list[str]] = [[]]
  used = 0
  for tensor, size in sizes.items():
    if shards[-1] and used + size > shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(tensor)
    used += size
  fetched: dict[str, np.ndarray] = {}

  def fetch(name: str) -> np.ndarray:
    path, piece = pieces[name]
    if path not in fetched:
      fetched.clear()  # one parameter at a time
      fetched[path] = safetensors_files.bits(fetch_leaf(params[path]))
    return weight_layout.extract(piece, fetched[path]).view(dtype)

  if len(shards) == 1:
    names = [name]
  else:
    names = [
      f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
      for i in range(len(shards))
    ]
  for file, shard in zip(names, shards):
    shapes = {name: pieces[name][1].shape for name in shard}
    safetensors_files.write_file(folder / file, shapes, dtype, fetch)
  if len(shards) > 1:
    _write_json(
      folder / loading.INDEX_FILE,
      {
        'metadata': {'total_size': sum(sizes.values())},
        'weight_map': {
          name: file for file, shard in zip(names, shards) for name in shard
        },
      },
    )


def fetch_leaf(leaf: jax.Array) -> np.ndarray:
  """Returns the whole of an array on the host.

  Arrays keep what was fetched of them as long as they live; the parts that are
  made here do not live longer than the result.
  """
  if leaf.is_fully_replicated:
    return np.asarray(leaf.addressable_data(0))
  out = np.empty(leaf.shape, leaf.dtype)
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      out[shard.index] = np.asarray(shard.data)
  return out


def _write_json(path: pathlib.Path, items: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(items, indent=2) + '\n', encoding='utf-8')
  _sync(path)


def _sync(path: pathlib.Path) -> None:
  """Returns once a file, or the names in a folder, have reached the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def export(
  workdir: str,
  out: str,
  *,
  base: str | None = None,
  step: int | None = None,
  adapter: bool = False,
  drafter: bool = False,
) -> int:
  """Exports a checkpoint of a run; returns its step.

  Args:
    workdir: the run's folder.
    out: the folder to make; missing or empty.
    base: see `sample.load_config`.
    step: which checkpoint; None: the newest.
    adapter: write the adapters alone.
    drafter: write the drafter.

  Raises:
    ConfigError: whatever the user got wrong.
  """
  check_target(out)
  run = make_run(sample.load_config(workdir, base))
  model = run.states.model_config
  if adapter and drafter:
    raise ConfigError('--adapter and --drafter are two exports; give one')
  if adapter:
    _check_adapters(model)
  if drafter and run.states.draft_model is None:
    raise ConfigError(
      f'--drafter writes the learned drafter and this run has none '
      f'(rollout.drafter={run.config.rollout.drafter!r}); leave it out'
    )
  # Before the checkpoint is read: no architecture may have these settings.
  config_json.to_config_json(model, '')
  if drafter:
    step, _, drafts = run.states.restore_params(
      workdir, step=step, drafter=True
    )
    export_drafter(out, model, drafts)
    return step
  token_ids, files = tokenizer_facts(run)
  step, params, _ = run.states.restore_params(workdir, step=step)
  if adapter:
    export_adapter(out, model, params)
  else:
    export_folder(out, model, params, token_ids=token_ids, files=files)
  return step


def main(argv: list[str]) -> None:
  """Exports as the command line says."""
  del argv
  if not _OUT.value:
    raise ConfigError('--out is missing: the folder to write')
  step = export(
    _WORKDIR.value,
    _OUT.value,
    base=_BASE.value,
    step=_STEP.value,
    adapter=_ADAPTER.value,
    drafter=_DRAFTER.value,
  )
  what = 'drafter' if _DRAFTER.value else 'policy'
  print(f'wrote the {what} of step {step} to {_OUT.value}')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_workdir()
  _BASE = flags.DEFINE_base()
  _OUT = absl_flags.DEFINE_string('out', None, 'the folder to write')
  _STEP = absl_flags.DEFINE_integer(
    'step', None, 'which checkpoint; the newest when absent'
  )
  _ADAPTER = absl_flags.DEFINE_boolean(
    'adapter', False, 'write the adapters alone, for PEFT'
  )
  _DRAFTER = absl_flags.DEFINE_boolean(
    'drafter', False, 'write the learned drafter'
  )
  flags.run(main)
