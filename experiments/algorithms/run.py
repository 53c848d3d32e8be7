"""Every preset on one task, from one warm start, with one budget.

  python -m experiments.algorithms.run --runs=runs/algorithms

For each seed a policy imitates an impatient teacher (configs/quickstart.py);
from there every preset takes the same RL steps on the same problems, one
process after the other. Runs that are finished are read, not repeated; one that
was killed is made anew. After each run it writes into --out: curve.csv
(held-out accuracy against samples), final.csv (pass@1 and pass@8 at the end, by
seed), table.csv (means and deviations over seeds), the table of README.md if
that is there, and algorithms.png. --collect writes them from the finished runs
and starts nothing.
"""

from collections.abc import Sequence
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from absl import app
from absl import flags
import matplotlib
import numpy as np

from experiments import common
from experiments.algorithms import settings
from experiments.algorithms import single

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402  pylint: disable=wrong-import-position

_PRESETS = flags.DEFINE_list('presets', [], 'Which; none given: all.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds.')
_OUT = flags.DEFINE_string('out', 'experiments/algorithms', 'Where results go.')
_COLLECT = flags.DEFINE_boolean('collect', False, 'Only write what is there.')

_MARK = '<!-- table -->'
_MOST = f'pass_at_{settings.SAMPLES}'


def start(seed: int, arm: settings.Arm | None) -> bool:
  """Runs an arm or, without one, the warm start; returns whether it ended."""
  folder = pathlib.Path(flags.FLAGS.runs) / f'seed_{seed}'
  folder /= arm.folder if arm else 'warm'
  path, wanted = folder / single.RESULT, single.made_with(arm)
  if path.exists():
    found = json.loads(path.read_text())
    made = {name: found.get(name) for name in wanted}
    if made != wanted:
      sys.exit(
        f'{folder} was made with {made} and {wanted} is wanted; give '
        'another --runs'
      )
    return True
  options = (
    [f'--preset={arm.preset}', f'--staleness={arm.staleness}'] if arm else []
  )
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.algorithms.single',
      f'--runs={flags.FLAGS.runs}',
      f'--seed={seed}',
      f'--steps={flags.FLAGS.steps}',
      f'--size={flags.FLAGS.size}',
      f'--minibatches={flags.FLAGS.minibatches}',
      f'--device={common.DEVICE.value}',
      *options,
    ],
    check=False,
  )
  return done.returncode == 0


def read(
  seeds: Sequence[int], arms: Sequence[settings.Arm]
) -> list[dict[str, Any]]:
  """Returns the results of the runs that are finished, by arm and seed."""
  found = []
  for arm in arms:
    for seed in seeds:
      folder = pathlib.Path(flags.FLAGS.runs) / f'seed_{seed}'
      path = folder / arm.folder / single.RESULT
      if not path.exists():
        continue
      before = json.loads((folder / 'warm' / single.RESULT).read_text())
      found.append(
        {
          'arm': arm.name,
          'seed': seed,
          'pass_at_1_before': before['pass_at_1'],
          f'{_MOST}_before': before[_MOST],
          **json.loads(path.read_text()),
        }
      )
  return found


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each arm: means and deviations over its seeds."""
  rows = []
  for name in dict.fromkeys(r['arm'] for r in results):
    mine = [r for r in results if r['arm'] == name]
    row: dict[str, Any] = {'arm': name, 'seeds': len(mine)}
    for column in ('pass_at_1_before', 'pass_at_1', f'{_MOST}_before', _MOST):
      values = [r[column] for r in mine]
      row[column] = round(statistics.mean(values), 4)
      row[f'{column}_sd'] = (
        round(statistics.stdev(values), 4) if len(values) > 1 else ''
      )
    row['seconds'] = round(statistics.mean(r['seconds'] for r in mine), 1)
    rows.append(row)
  return rows


def draw(
  results: Sequence[dict[str, Any]],
  table: Sequence[dict[str, Any]],
  path: pathlib.Path,
) -> None:
  """Draws accuracy against samples, and pass@1 and pass@8 at the end."""
  figure, (left, right) = pyplot.subplots(
    1, 2, figsize=(14, 9), layout='constrained'
  )
  colours = pyplot.get_cmap('tab20')
  for i, row in enumerate(table):
    curves = [r['curve'] for r in results if r['arm'] == row['arm']]
    means = np.mean([[p['accuracy'] for p in curve] for curve in curves], 0)
    left.plot(
      [p['samples'] for p in curves[0]],
      means,
      color=colours(i % 20),
      linestyle='-' if i < 20 else '--',
      label=row['arm'],
    )
  left.set_xlabel('samples trained on')
  left.set_ylabel('held-out accuracy, mean over seeds')
  left.legend(frameon=False, fontsize=7, ncols=2)
  places = np.arange(len(table))
  for shift, name in ((-0.2, 'pass_at_1'), (0.2, _MOST)):
    right.barh(
      places + shift,
      [r[name] for r in table],
      height=0.38,
      xerr=[r[f'{name}_sd'] or 0 for r in table],
      label=name.replace('pass_at_', 'pass@'),
    )
  right.set_yticks(places, [r['arm'] for r in table], fontsize=8)
  right.invert_yaxis()
  right.legend(frameon=False, fontsize=8, loc='lower left')
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def to_markdown(table: Sequence[dict[str, Any]]) -> str:
  """Returns the table as a README shows it."""

  def cell(row: dict[str, Any], name: str) -> str:
    spread = row[f'{name}_sd']
    return f'{row[name]:.3f}' + (f' ± {spread:.3f}' if spread != '' else '')

  lines = [
    f'| objective | seeds | pass@1 | pass@{settings.SAMPLES} | seconds |',
    '|---|---|---|---|---|',
  ]
  first = table[0]
  lines.append(
    f'| (warm start) | {first["seeds"]} | '
    f'{cell(first, "pass_at_1_before")} | '
    f'{cell(first, f"{_MOST}_before")} | |'
  )
  lines += [
    f'| {row["arm"]} | {row["seeds"]} | {cell(row, "pass_at_1")} | '
    f'{cell(row, _MOST)} | {row["seconds"]:.0f} |'
    for row in table
  ]
  return '\n'.join(lines)


def collect(seeds: Sequence[int], arms: Sequence[settings.Arm]) -> None:
  """Writes tables and figure of the runs that are finished."""
  results = read(seeds, arms)
  if not results:
    return
  out, table = pathlib.Path(_OUT.value), summarize(results)
  rounded = lambda x: round(x, 4) if isinstance(x, float) else x
  common.write_csv(
    out / 'final.csv',
    [
      {name: rounded(value) for name, value in r.items() if name != 'curve'}
      for r in results
    ],
  )
  common.write_csv(
    out / 'curve.csv',
    [
      {
        'arm': r['arm'],
        'seed': r['seed'],
        **{name: rounded(value) for name, value in point.items()},
      }
      for r in results
      for point in r['curve']
    ],
  )
  common.write_csv(out / 'table.csv', table)
  draw(results, table, out / 'algorithms.png')
  readme = out / 'README.md'
  if readme.exists():
    head, _, rest = readme.read_text().partition(_MARK)
    _, _, tail = rest.partition(_MARK)
    readme.write_text(f'{head}{_MARK}\n{to_markdown(table)}\n{_MARK}{tail}')


def main(argv: list[str]) -> None:
  """Trains every preset over all seeds."""
  del argv
  seeds = [int(seed) for seed in _SEEDS.value]
  arms = [
    arm
    for arm in settings.list_arms()
    if not _PRESETS.value or arm.preset in _PRESETS.value
  ]
  failed = []
  for seed in [] if _COLLECT.value else seeds:
    if not start(seed, None):
      sys.exit(f'the warm start of seed {seed} failed; see above')
    if any(arm.distils for arm in arms):
      start(seed, settings.Arm(settings.TEACHER))
    for arm in arms:
      if not start(seed, arm):
        failed.append(f'{arm.name}, seed {seed}')
      collect(seeds, arms)
  collect(seeds, arms)
  if failed:
    sys.exit(f'failed, see above: {"; ".join(failed)}')


if __name__ == '__main__':
  app.run(main)
