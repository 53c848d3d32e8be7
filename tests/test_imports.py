"""Imports go one way, and optional packages are imported where used."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'rlax_llm'

# Package or module -> what of rlax_llm it may import, itself included.
_BASE = {'types', 'config', 'config_base'}
ALLOWED = {
    'types': set(),
    'config': {'config_base'},
    'config_base': set(),
    'answer_text': set(),
    'ops': {*_BASE, 'ops'},
    'models': {*_BASE, 'ops', 'models'},
    'drafting': {*_BASE, 'ops', 'models', 'drafting'},
    'rollout': {
        *_BASE, 'ops', 'models', 'drafting', 'rollout', 'sharding',
        'executables', 'processes'
    },
    'learning': {*_BASE, 'ops', 'models', 'learning', 'answer_text'},
    'tasks': {*_BASE, 'metric_names', 'tasks', 'answer_text'},
    'files': set(),
    'board': set(),
    'metric_names': set(),
    'metrics': {*_BASE, 'files', 'board', 'metric_names'},
    'progress': set(_BASE),
    'checkpoint': {*_BASE, 'files', 'processes'},
    'sharding': {*_BASE, 'processes'},
    'tokenizer': set(_BASE),
    'template_worker': set(),
    'chat_template': {*_BASE, 'template_worker'},
    'tokenizer_files': set(_BASE),
    'pretrained_tokenizer': {*_BASE, 'chat_template', 'tokenizer_files'},
    'executables': {*_BASE, 'processes'},
    'processes': set(_BASE),
    'launch': {*_BASE, 'processes'},
    'flags': {*_BASE, 'files', 'launch', 'stopping'},
    'stopping': {'processes'},
    'workdir_lock': {*_BASE, 'files'},
    'guards': {*_BASE, 'executables'},
    'field_classes': set(_BASE),
    'manifest': {
        *_BASE, 'field_classes', 'files', 'metrics', 'pretrained', 'processes'
    },
    'plots': {*_BASE, 'files', 'metrics'},
    'progression': set(_BASE),
    'field_types': set(_BASE),
    'rollout_validation': {*_BASE, 'drafting'},
    'validation': {*_BASE, 'field_types', 'rollout_validation'},
    'safetensors_files': set(_BASE),
    'pretrained': {*_BASE, 'models', 'safetensors_files'},
}
# Whatever assembles the parts; it may import all of them.
TOP = {
    'states', 'run', 'learner', 'experience', 'groups', 'pruning', 'sampler',
    'early_stop', 'credit', 'step', 'warm_start', 'drafter_training', 'train',
    'trainer', 'evaluate', 'sample', 'report', 'export', 'testing', 'teacher',
    'forced_answers', 'leaps'
}
NO_JIT = ('ops', 'models', 'drafting', 'learning', 'rollout/segment.py')
OPTIONAL = ('grain', 'tensorflow_datasets', 'array_record', 'reasoning_gym',
            'math_verify', 'tensorflow')


def _modules():
  return sorted(PACKAGE.rglob('*.py'))


def _unit(path):
  """The package or module of rlax_llm that a file belongs to."""
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


def _imports(path):
  """Yields the dotted names that a file imports, wherever it does."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} has a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_imports_go_one_way():
  """Law: types, config <- ops <- models <- drafting <- rollout; learning
  never imports rollout; helpers import types and config only.

  Mutant: `from rlax_llm.rollout.engine import RolloutEngine` in
  learning/batch.py.
  """
  wrong = []
  for path in _modules():
    unit = _unit(path)
    if unit in TOP or unit == '__init__':
      continue
    assert unit in ALLOWED, f'{path}: give {unit!r} a place in the order'
    for name in _imports(path):
      parts = name.split('.')
      if parts[0] == 'rlax_llm' and parts[1] not in ALLOWED[unit] | {unit}:
        wrong.append(f'{path.relative_to(ROOT)} imports {name}')
  assert not wrong, wrong


def test_the_package_imports_nothing_beside_it():
  """Law: nothing in rlax_llm imports configs, experiments, tests or colab;
  configs import only rlax_llm.config.

  Mutant: `from configs import quickstart` in rlax_llm/testing.py.
  """
  for path in _modules():
    for name in _imports(path):
      assert name.split('.')[0] not in ('configs', 'experiments', 'tests',
                                        'colab'), f'{path} imports {name}'
  for path in (ROOT / 'configs').glob('*.py'):
    for name in _imports(path):
      assert (name.split('.')[0] in ('configs', *sys.stdlib_module_names) or
              name.startswith('rlax_llm.config')), f'{path} imports {name}'


def test_entrypoints_are_not_imported_by_parts():
  """Law: only entrypoints, and the trainer, may stand on another entrypoint.

  Mutant: `from rlax_llm import train` in learner.py.
  """
  entrypoints = {'train', 'evaluate', 'sample', 'report', 'export'}
  for path in _modules():
    if _unit(path) in {*entrypoints, 'trainer'}:
      continue
    for name in _imports(path):
      parts = name.split('.')
      assert not (parts[0] == 'rlax_llm' and
                  parts[1] in entrypoints), f'{path} imports {name}'


def test_pure_packages_have_no_jit_and_ops_no_modules():
  """Law: the engine and the entrypoints jit; ops, models, drafting, learning
  and the segment do not, read no file and no clock. ops has no flax.

  Mutant: `@jax.jit` on `update`.
  """
  for entry in NO_JIT:
    path = PACKAGE / entry
    for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      imported = set(_imports(file))
      assert not imported & {'jax.jit', 'time', 'os', 'pathlib', 'io'}, file
      for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
          assert node.attr not in ('jit', 'pmap', 'pjit'), f'{file} jits'
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
          assert node.func.id not in ('open', 'eval', 'exec', 'print'), file
  for file in (PACKAGE / 'ops').glob('*.py'):
    assert not any(name.startswith('flax') for name in _imports(file)), file


_WITHOUT_OPTIONAL = """
import importlib, pkgutil, sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {optional!r}:
      raise ImportError(f'blocked: {{name}}')

sys.meta_path.insert(0, Blocked())
import rlax_llm
for module in pkgutil.walk_packages(rlax_llm.__path__, 'rlax_llm.'):
  importlib.import_module(module.name)
import jax._src.xla_bridge as bridge
assert not bridge._backends, 'an import touched a device'
print('imported')
"""


def test_imports_without_the_optional_packages():
  """Law: every module imports without grain, tfds and reasoning-gym, and
  imports touch no device.

  Mutants: `import grain` at the top of tasks/task.py; a module-level
  `jnp.zeros(1)`.
  """
  done = subprocess.run(
      [sys.executable, '-c',
       _WITHOUT_OPTIONAL.format(optional=OPTIONAL)],
      cwd=ROOT,
      env={
          'PYTHONPATH': str(ROOT),
          'JAX_PLATFORMS': 'cpu'
      },
      capture_output=True,
      text=True,
      timeout=120,
      check=False)
  assert done.returncode == 0 and 'imported' in done.stdout, done.stderr


@pytest.mark.parametrize('word', ['eval', 'exec', 'pickle'])
def test_nothing_evaluates_text(word):
  """Law: no eval, exec or pickle in the package.

  Mutant: `eval(completion)` in a verifier.
  """
  for path in _modules():
    assert word not in _imports(path)
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id != word, f'{path} calls {word}'
