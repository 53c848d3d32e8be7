"""Imports go one way, and optional packages are imported where used."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'rlax_llm'

# Package -> the packages of rlax_llm that it may import, besides itself.
_PURE = {'types', 'config', 'ops', 'models', 'drafting'}
_BESIDE = {'types', 'config', 'runtime', 'models', 'ops', 'workdir'}
ALLOWED = {
  'types': set(),
  'config': {'types'},
  'ops': {'types', 'config'},
  'runtime': {'types', 'config'},
  'tokenizers': {'types', 'config', 'runtime'},
  'models': {'types', 'config', 'ops'},
  'drafting': {'types', 'config', 'ops', 'models'},
  'workdir': {'types', 'config', 'ops', 'runtime', 'models'},
  'tasks': _BESIDE,
  'rollout': {*_PURE, 'runtime'},
  'learning': {*_PURE, 'runtime', 'workdir'},
}
# Between and above rollout and learning; each may import those before it.
TOP = (
  'components',
  'experience',
  'warm_start',
  'preflight',
  'evaluate',
  'sample',
  'report',
  'export',
  'train',
  'testing',
)
NO_JIT = ('ops', 'models', 'drafting', 'rollout/segment.py')
# Of learning, the class that jits, and the teacher, which is found in a folder.
DRIVERS = ('learner', 'teacher')
OPTIONAL = (
  'grain',
  'tensorflow_datasets',
  'array_record',
  'reasoning_gym',
  'math_verify',
  'tensorflow',
)


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
  never imports rollout: they meet in experience.

  Mutant: `from rlax_llm.rollout.engine import RolloutEngine` in
  learning/batch.py.
  """
  wrong = []
  for path in _modules():
    unit = _unit(path)
    if unit == '__init__':
      continue
    assert unit in ALLOWED or unit in TOP, f'{path}: give {unit!r} a place'
    for name in _imports(path):
      parts = name.split('.')
      if parts[0] != 'rlax_llm' or parts[1] == unit:
        continue
      if unit in TOP:
        right = parts[1] in ALLOWED or parts[1] in TOP[: TOP.index(unit)]
      else:
        right = parts[1] in ALLOWED[unit]
      if not right:
        wrong.append(f'{path.relative_to(ROOT)} imports {name}')
  assert not wrong, wrong


def test_the_package_imports_nothing_beside_it():
  """Law: nothing in rlax_llm imports configs, experiments, tests or colab;
  configs import only rlax_llm.config.

  Mutant: `from configs import quickstart` in rlax_llm/testing.py.
  """
  for path in _modules():
    for name in _imports(path):
      assert name.split('.')[0] not in (
        'configs',
        'experiments',
        'tests',
        'colab',
      ), f'{path} imports {name}'
  for path in (ROOT / 'configs').glob('*.py'):
    for name in _imports(path):
      assert name.split('.')[0] in (
        'configs',
        *sys.stdlib_module_names,
      ) or name.startswith('rlax_llm.config'), f'{path} imports {name}'


def test_pure_packages_have_no_jit_and_ops_no_modules():
  """Law: the engine and the entrypoints jit; ops, models, drafting, learning
  and the segment do not, read no file and no clock. ops has no flax.

  Mutant: `@jax.jit` on `update`.
  """
  pure = [
    file
    for file in (PACKAGE / 'learning').glob('*.py')
    if file.stem not in DRIVERS
  ]
  for entry in (*NO_JIT, *pure):
    path = PACKAGE / entry
    for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      if 'pretrained' in file.parts:
        continue  # files are its business
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
    [sys.executable, '-c', _WITHOUT_OPTIONAL.format(optional=OPTIONAL)],
    cwd=ROOT,
    env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
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


# Ops without a caller yet: multi-turn samples, replay, losses of Tinker.
WAITING = {
  'agent_advantages',
  'improvement_reward',
  'parallel_reward',
  'quadratic_regularised',
  'replay_probabilities',
  'token_bleu',
  'turn_advantages',
  'turn_multiplier',
}


def _named(nodes):
  """The names that statements read or import."""
  for node in (inner for outer in nodes for inner in ast.walk(outer)):
    if isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.alias):
      yield node.name


def test_every_op_has_a_caller():
  """Law: rlax_llm calls each public function of ops, except those that wait.

  Mutant: a public function `unused` in ops/losses.py.
  """
  bodies = {path: ast.parse(path.read_text()).body for path in _modules()}
  names = {path: set(_named(body)) for path, body in bodies.items()}
  uncalled = set()
  for path in sorted((PACKAGE / 'ops').glob('*.py')):
    elsewhere = set()
    for other, body in bodies.items():
      if other != path and path.stem in _modules_named(body):
        elsewhere |= names[other]
    for node in bodies[path]:
      if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
        beside = _named([other for other in bodies[path] if other is not node])
        if node.name not in elsewhere | set(beside):
          uncalled.add(node.name)
  assert uncalled == WAITING


def _modules_named(body):
  """The last parts of the modules that a file imports, or imports from."""
  found = set()
  for node in (inner for outer in body for inner in ast.walk(outer)):
    if isinstance(node, ast.Import):
      found |= {alias.name.split('.')[-1] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found.add((node.module or '').split('.')[-1])
      found |= {alias.name for alias in node.names}
  return found
