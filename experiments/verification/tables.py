"""Tables and the figure of the verification experiment."""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import Any

import matplotlib
import numpy as np

from experiments.verification import rules
from experiments.verification import settings

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402  pylint: disable=wrong-import-position

# Cell: (drafted nodes, shape, rule) -> (tokens, forwards), each [T, problems].
Results = dict[tuple[int, str, str], tuple[np.ndarray, np.ndarray]]


def ratio(tokens: np.ndarray, forwards: np.ndarray) -> tuple[float, np.ndarray]:
  """Returns tokens / forwards, and each problem's relative influence on it.

  Args:
    tokens: [temperatures, problems].
    forwards: the same.
  """
  value = tokens.sum() / forwards.sum()
  influence = (tokens / tokens.sum() - forwards / forwards.sum()).sum(axis=0)
  return float(value), influence


def efficiency_table(results: Results) -> list[dict[str, Any]]:
  """Returns a row for each cell and temperature, with standard errors."""
  table = []
  for (nodes, shape, rule), (tokens, forwards) in results.items():
    for i, temperature in enumerate(settings.TEMPERATURES):
      value, influence = ratio(tokens[i : i + 1], forwards[i : i + 1])
      table.append(
        {
          'nodes': nodes,
          'shape': shape,
          'rule': rule,
          'temperature': temperature,
          'tokens': int(tokens[i].sum()),
          'forwards': int(forwards[i].sum()),
          'block_efficiency': round(value, 4),
          'standard_error': round(
            value * float(np.sqrt(np.sum(influence**2))), 4
          ),
        }
      )
  return table


# Name -> (cell above, cell below) as (shape, rule).
CLAIMS: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
  'block over chain rejection': (
    ('chain', 'block'),
    ('chain', 'chain rejection'),
  ),
  'traversal over multi-round, 2 paths': (
    ('2 paths', 'traversal'),
    ('2 paths', 'multi-round'),
  ),
  'traversal over multi-round, 4 paths': (
    ('4 paths', 'traversal'),
    ('4 paths', 'multi-round'),
  ),
  'multi-round over independent follow, 2 paths': (
    ('2 paths', 'multi-round'),
    ('2 paths', 'follow, independent'),
  ),
  'multi-round 2 paths over chain rejection': (
    ('2 paths', 'multi-round'),
    ('chain', 'chain rejection'),
  ),
  'delayed over 2 paths, traversal': (
    ('delayed', 'traversal'),
    ('2 paths', 'traversal'),
  ),
  'delayed over 2 paths, multi-round': (
    ('delayed', 'multi-round'),
    ('2 paths', 'multi-round'),
  ),
  'race over independent follow, chain': (
    ('chain', 'follow, race'),
    ('chain', 'follow, independent'),
  ),
  'race over best token, chain': (
    ('chain', 'follow, race'),
    ('chain', 'follow, best'),
  ),
  'race over chain rejection': (
    ('chain', 'follow, race'),
    ('chain', 'chain rejection'),
  ),
  'race over traversal, 2 paths': (
    ('2 paths', 'follow, race'),
    ('2 paths', 'traversal'),
  ),
  'race over best token, 2 paths': (
    ('2 paths', 'follow, race'),
    ('2 paths', 'follow, best'),
  ),
}


def claims_table(results: Results) -> list[dict[str, Any]]:
  """Returns ratios of block efficiencies over all temperatures.

  Standard errors pair the problems of the two cells.
  """
  table = []
  for name, (above, below) in CLAIMS.items():
    for nodes in sorted({cell[0] for cell in results}):
      if (nodes, *above) not in results or (nodes, *below) not in results:
        continue
      a, da = ratio(*results[nodes, *above])
      b, db = ratio(*results[nodes, *below])
      table.append(
        {
          'claim': name,
          'nodes': nodes,
          'above': round(a, 3),
          'below': round(b, 3),
          'ratio': round(a / b, 4),
          'standard_error': round(
            a / b * float(np.sqrt(np.sum((da - db) ** 2))), 4
          ),
        }
      )
  return table


def draw(table: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws block efficiency by temperature: a panel for each size and shape."""
  nodes = sorted({row['nodes'] for row in table})
  shapes = list(settings.shapes(max(8, *nodes)))
  names = list(rules.RULES)
  figure, axes = pyplot.subplots(
    len(nodes),
    len(shapes),
    figsize=(3 * len(shapes), 2.6 * len(nodes)),
    sharex=True,
    sharey='row',
    squeeze=False,
    layout='constrained',
  )
  for i, count in enumerate(nodes):
    for j, shape in enumerate(shapes):
      axis = axes[i, j]
      axis.set_title(f'{shape}, {count} nodes', fontsize=9)
      for k, name in enumerate(names):
        mine = [
          row
          for row in table
          if (row['nodes'], row['shape'], row['rule']) == (count, shape, name)
        ]
        if mine:
          axis.errorbar(
            [row['temperature'] for row in mine],
            [row['block_efficiency'] for row in mine],
            [row['standard_error'] for row in mine],
            color=f'C{k}',
            marker='o',
            markersize=3,
            label=name,
          )
      if axis.has_data():
        axis.legend(fontsize=6, frameon=False)
      else:  # This size has no such shape.
        axis.set_axis_off()
  figure.supxlabel('temperature', fontsize=9)
  figure.supylabel('tokens per target forward', fontsize=9)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)
