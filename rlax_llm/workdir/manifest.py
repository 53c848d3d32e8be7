# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""manifest.json: which config, code, versions and devices a workdir's run has.

A run is a value: the same config on the same kind of machine gives the same
bits. `check_workdir` refuses to continue a run under another config;
`write_manifest` records the machine and warns where it changed.
"""

from collections.abc import Collection
from collections.abc import Mapping
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import field_classes
from rlax_llm.config import Section
from rlax_llm.config import to_dict
from rlax_llm.models.pretrained import loading
from rlax_llm.runtime import processes
from rlax_llm.runtime.files import write_atomic
from rlax_llm.runtime.files import WriteError
from rlax_llm.workdir.metrics import jsonable

MANIFEST_FILE = 'manifest.json'

# What training values depend on; the last three verify answers.
_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'reasoning-gym',
  'sympy',
  'math-verify',
)
# The folder of the weights: what it holds counts, not where it lies.
_BASE = 'model.pretrained'
_NAMED = 3  # differing fields named in one message


def read_manifest(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the manifest of a workdir.

  Args:
    workdir: the run's folder.

  Returns:
    manifest.json as a dict; None where there is none.

  Raises:
    ConfigError: it is not valid JSON.
  """
  path = pathlib.Path(workdir) / MANIFEST_FILE
  if not path.exists():
    return None
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
    runs = manifest['runs']
    if not isinstance(manifest['config'], dict) or not manifest['config']:
      raise ValueError('it holds no config')
    if not runs or not all(isinstance(run, dict) for run in list(runs)):
      raise ValueError('it lists no run')
    return manifest
  except (ValueError, KeyError, TypeError, RecursionError, OSError) as e:
    raise ConfigError(
      f'{path} is not a manifest ({type(e).__name__}: {e}); '
      'give another --workdir'
    ) from e


def check_workdir(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  allow: Collection[str] = field_classes.MAY_DIFFER,
) -> list[str]:
  """Refuses a workdir that holds the run of another config.

  Args:
    workdir: the run's folder; it may be missing or empty.
    config: `to_dict(config)` of the run about to start.
    allow: classes of `field_classes` whose fields may differ.

  Returns:
    Warnings, one line each: differences that are allowed and still matter.

  Raises:
    ConfigError: it does; names the first few fields and both values.
  """
  manifest = read_manifest(workdir)
  if manifest is None:
    return []
  # A field that one side does not know has, for it, the default.
  old = field_classes.comparable(_with_defaults(manifest['config']))
  new = field_classes.comparable(_with_defaults(jsonable(config)))
  differing = [
    name
    for name in sorted(old.keys() | new.keys())
    if old.get(name, '(absent)') != new.get(name, '(absent)')
  ]
  if _BASE in differing and _same_weights(manifest, new.get(_BASE)):
    differing.remove(_BASE)
  refused = [
    name for name in differing if field_classes.class_of(name) not in allow
  ]
  if refused:
    label = lambda name: (
      'control.logical_slots, by default rollout.slots'
      if name == 'control.logical_slots'
      else name
    )
    shown = ', '.join(
      f'{label(name)} ({old.get(name, "absent")!r} there, '
      f'{new.get(name, "absent")!r} now)'
      for name in refused[:_NAMED]
    )
    more = len(refused) - _NAMED
    raise ConfigError(
      f'workdir {os.fspath(workdir)!r} holds a run of another config: {shown}'
      f'{f" and {more} more" if more > 0 else ""}; give another --workdir, '
      'or the config of that run to continue it'
    )
  warnings = []
  layout = [
    name
    for name in differing
    if field_classes.class_of(name) == field_classes.LAYOUT
  ]
  if layout:
    warnings.append(
      f'{", ".join(layout)} changed: sums are taken in another '
      'order, so the curve may part from that of the old layout'
    )
  schedule = new.get('learning.schedule')
  if 'num_steps' in differing and schedule != 'constant':
    warnings += [
      f'num_steps was {old["num_steps"]} and is {new["num_steps"]}: the '
      f'{schedule} schedule of the learning rate changes with it, so this '
      'run differs from one of that length from the start'
    ]
  staleness = new['control.staleness']
  if staleness and new['num_steps'] > old['num_steps']:
    warnings.append(
      f'num_steps was {old["num_steps"]} and is {new["num_steps"]}: with '
      f'control.staleness={staleness} a run that had reached its end learns '
      f'in its next {staleness} steps from newer policies than a run of that '
      'length from the start'
    )
  return warnings


def _same_weights(manifest: Mapping[str, Any], folder: Any) -> bool:
  """Whether a folder holds the weights that a run began with: they moved."""
  began = manifest['runs'][0].get('pretrained')
  if not began or not folder:
    return False
  if not (pathlib.Path(folder) / loading.CONFIG_FILE).is_file():
    return False
  found = loading.fingerprint(folder)
  return all(
    found[name] == began.get(name) for name in found if name != 'folder'
  )


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns dotted path -> leaf; fields that are not given have defaults.

  A dict of the user's (`task.rewards`) is one field: its default has no part
  in one that is given.
  """

  def fill(section: Any, given: Any) -> Any:
    if not isinstance(section, Section) or not isinstance(given, Mapping):
      return given
    known = {
      name: fill(value, given[name]) if name in given else to_dict(value)
      for name, value in vars(section).items()
    }
    return {**given, **known}

  return _flatten(fill(Config(), config))


def environment() -> dict[str, Any]:
  """Returns what bit-equality depends on besides the config.

  Returns:
    commit (None outside a git checkout), versions, platform, devices,
    xla_flags, cpu_count. Initialises the jax backend.
  """
  versions = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = 'unknown'
  return {
    'commit': _commit(),
    'versions': versions,
    'platform': f'{platform.system()} {platform.machine()}',
    'backend': jax.default_backend(),
    'devices': [device.device_kind for device in jax.devices()],
    'processes': processes.count(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'cpu_count': os.cpu_count(),
  }


def write_manifest(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  run_id: str,
  resume_step: int | None = None,
  extra: Mapping[str, Any] | None = None,
) -> list[str]:
  """Writes manifest.json; a continued run is added to the runs it lists.

  Args:
    workdir: the run's folder; made if missing.
    config: `to_dict(config)`.
    run_id: as given to `MetricsWriter`.
    resume_step: the restored step, or None.
    extra: further facts of this run (the reference's path and digest).

  Returns:
    Warnings, one line each: what differs from the machine and the code of the
    run before, so that bits may differ.
  """
  root = pathlib.Path(workdir)
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(
      f'--workdir={os.fspath(workdir)!r} cannot be written '
      f'({error.strerror}); give a folder that can'
    ) from error
  manifest = read_manifest(root) if resume_step is not None else None
  now = datetime.datetime.now(datetime.UTC)
  run = {
    'run': run_id,
    'started': now.isoformat(timespec='seconds'),
    'command': shlex.join([sys.executable, *sys.argv]),
    'resumed_step': resume_step,
    **environment(),
    **jsonable(extra or {}),
  }
  earlier = manifest['runs'] if manifest else []
  warnings = _changes(earlier[-1], run) if earlier else []
  text = json.dumps(
    {'config': jsonable(config), 'runs': [*earlier, run]}, indent=2
  )
  try:
    write_atomic(root / MANIFEST_FILE, text + '\n')
  except WriteError as error:
    # Before any work: another folder may do.
    raise ConfigError(f'--workdir={os.fspath(workdir)!r}: {error}') from error
  return warnings


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  names = (
    'commit',
    'versions',
    'platform',
    'backend',
    'devices',
    'processes',
    'xla_flags',
    'cpu_count',
  )
  flat_old = _flatten({name: old.get(name) for name in names})
  flat_new = _flatten({name: new.get(name) for name in names})
  return [
    f'{name} was {flat_old.get(name)!r} in the run continued here and is '
    f'{flat_new[name]!r} now: the continuation may differ in bits'
    for name in sorted(flat_new)
    if name in flat_old and flat_old[name] != flat_new[name]
  ]


def _flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Returns dotted path -> leaf; an empty dict leaves no entry."""
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  flat = {}
  for name, value in tree.items():
    flat.update(_flatten(value, f'{prefix}.{name}' if prefix else str(name)))
  return flat


def _commit() -> str | None:
  """Returns the package's commit, with -dirty if the checkout was changed."""
  here = pathlib.Path(__file__).resolve()

  def git(*arguments: str) -> str:
    return subprocess.run(
      # Only reads: a full disk must leave no lock in the checkout.
      ['git', '--no-optional-locks', '-C', str(here.parent), *arguments],
      check=True,
      capture_output=True,
      text=True,
      timeout=10,
    ).stdout.strip()

  try:
    # An installed package may lie inside somebody else's checkout.
    git('ls-files', '--error-unmatch', here.name)
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('-dirty' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None
