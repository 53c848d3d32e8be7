"""Every notebook of colab/ runs on CPU, and is kept without outputs."""

import os
import pathlib
import sys
import time

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))


def _read(path):
  return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
  """Law: the tests below have something to test. Mutant: a wrong glob."""
  assert 'first_rollout' in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
  """Law: outputs and execution counts are cleared, and prose leads.

  Mutant: a notebook saved after it was run.
  """
  cells = _read(path).cells
  assert cells[0].cell_type == 'markdown'
  for cell in cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None
  prose = sum(len(c.source) for c in cells if c.cell_type == 'markdown')
  assert prose > 0.35 * sum(len(c.source) for c in cells)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
  """Law: a notebook runs from top to bottom, from its own folder, without
  the package being installed.

  Mutant: any function that it calls renamed.
  """
  nbclient = pytest.importorskip('nbclient')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.delenv('PYTHONPATH', raising=False)
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  # The kernel is the interpreter of the tests, whatever is registered.
  monkeypatch.setenv(
    'PATH',
    os.pathsep.join(
      [str(pathlib.Path(sys.executable).parent), os.environ['PATH']]
    ),
  )
  notebook = _read(path)
  started = time.monotonic()
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    kernel_name='python3',
    resources={'metadata': {'path': str(path.parent)}},
  ).execute()
  assert time.monotonic() - started < 600
  if os.environ.get('SHOW_NOTEBOOK_OUTPUTS'):
    for cell in notebook.cells:
      for output in cell.get('outputs', []):
        print(output.get('text') or output.get('data'))
