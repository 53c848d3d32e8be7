"""The quickstart over three seeds, and its control.

  python -m experiments.quickstart.run --runs=runs/quickstart-seeds

Trains configs/quickstart.py with seeds 0, 1 and 2, and once more with rewards
shuffled among the samples of each step, from which nothing must be learned.
Runs that are finished are read, not repeated. Writes results.csv and
accuracy.png into --out.
"""

import csv
import json
import pathlib

from absl import app
from absl import flags
import matplotlib

from configs import quickstart
from rlax_llm import train
from rlax_llm.workdir.metrics import read_jsonl

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402  pylint: disable=wrong-import-position

_RUNS = flags.DEFINE_string(
  'runs', 'runs/quickstart-seeds', 'Where the runs are kept.'
)
_OUT = flags.DEFINE_string(
  'out', 'experiments/quickstart', 'Where the table and the figure go.'
)

# Name -> (seed, rewards shuffled).
ARMS = {
  'seed 0': (0, False),
  'seed 1': (1, False),
  'seed 2': (2, False),
  'shuffled rewards': (0, True),
}


def run_arm(name: str, runs: pathlib.Path) -> pathlib.Path:
  """Trains an arm, unless it is finished; returns its folder."""
  workdir = runs / name.replace(' ', '_')
  if not (workdir / 'summary.json').exists():
    config = quickstart.get_config()
    config.seed, config.task.permute_rewards = ARMS[name]
    train.train(config, str(workdir))
  return workdir


def main(argv: list[str]) -> None:
  """Runs the arms and writes the table and the figure."""
  del argv
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  rows = []
  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for name in ARMS:
    workdir = run_arm(name, pathlib.Path(_RUNS.value))
    summary = json.loads((workdir / 'summary.json').read_text())
    rows.append(
      {
        'arm': name,
        'accuracy_before': summary['accuracy_before'],
        'accuracy_after': summary['accuracy_after'],
        'wall_seconds': round(summary['wall_seconds']),
        'tokens_sampled': summary['tokens_sampled'],
      }
    )
    points = [
      (line['step'], line['evaluate/accuracy'])
      for line in read_jsonl(workdir / 'evaluations.jsonl')
    ]
    style = '--' if ARMS[name][1] else '-'
    axes.plot(*zip(*points), style, marker='o', markersize=4, label=name)
  axes.set_xlabel('RL step')
  axes.set_ylabel('held-out accuracy, sampled at temperature 1')
  axes.set_ylim(0, 1)
  axes.legend(loc='lower right', frameon=False)
  figure.savefig(out / 'accuracy.png', dpi=110)
  with open(out / 'results.csv', 'w', encoding='utf-8', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  print(json.dumps(rows, indent=2))


if __name__ == '__main__':
  app.run(main)
