"""The order in which a batch is sampled: makespan, and what predicts lengths.

  python -m experiments.length_order.run

Lengths are drawn: log-normal, between prompts and within them. Each prompt
comes once in an epoch; its predicted length is that of
`learning/length_ranker.py`, learned from the epochs before. Makespan is that of
the engine's logical time. "Efficient LLM Scheduling by Learning to Rank",
https://arxiv.org/abs/2408.15792. Writes orders.csv into --out.
"""

import pathlib
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from rlax_llm.learning import length_ranker
from rlax_llm.rollout import control
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_OUT = flags.DEFINE_string('out', 'experiments/length_order',
                           'Where results go.')
_SEEDS = flags.DEFINE_integer('seeds', 20, 'Runs.')

_PROMPTS, _SAMPLES, _SLOTS = 32, 8, 32
_EPOCHS, _STEPS = 4, 4  # steps of an epoch
_BETWEEN, _WITHIN, _MEDIAN, _LONGEST = 0.7, 0.6, 60.0, 480


def _makespan(lengths: np.ndarray, order: np.ndarray) -> float:
  """Returns the ticks that a batch takes, over the least that it can.

  Args:
    lengths: int[B, G].
    order: int[B], of the groups.
  """
  numbers = np.repeat(np.arange(len(order)), lengths.shape[1]).tolist()
  requests = [
      Request(np.zeros(1, np.int32), lengths.shape[1], TRAIN, 0, i)
      for i in range(len(order))
  ]
  needed = lengths[order].reshape(-1).tolist()
  time = control.LogicalTime(requests, numbers, _SLOTS)
  for _ in time.advance(needed, [True] * len(needed)):
    pass
  return time.tick / max(lengths.sum() / _SLOTS, lengths.max())


def run(seed: int) -> list[dict[str, Any]]:
  """Returns a row for each (epoch, order)."""
  rng = np.random.default_rng(seed)
  kinds = rng.integers(0, 8, _PROMPTS * _STEPS)
  # Half of what a prompt's answers have in common shows in its first token.
  means = (np.linspace(-1, 1, 8)[kinds] * _BETWEEN * 1.1 +
           rng.normal(size=len(kinds)) * _BETWEEN * 0.7)
  prompts = [
      np.r_[kind, rng.integers(8, 40, 9)].astype(np.int32) for kind in kinds
  ]
  history = length_ranker.LengthHistory()
  rows = []
  for epoch in range(_EPOCHS):
    for batch in rng.permutation(len(prompts)).reshape(_STEPS, _PROMPTS):
      logs = means[batch,
                   None] + rng.normal(size=(_PROMPTS, _SAMPLES)) * _WITHIN
      lengths = np.clip(_MEDIAN * np.exp(logs), 1, _LONGEST).astype(int)
      mine = [prompts[i] for i in batch]
      predicted = history.predict(mine)
      actual = lengths.mean(axis=1)
      for name, key in (('arrival', np.zeros(_PROMPTS)),
                        ('shortest_first', predicted), ('longest_first',
                                                        -predicted),
                        ('longest_first, true prompt mean', -means[batch]),
                        ('longest_first, group mean known', -actual)):
        order = np.argsort(key, kind='stable')
        rows.append({
            'epoch': epoch + 1,
            'order': name,
            'makespan': _makespan(lengths, order),
            'tau': length_ranker.kendall_tau(predicted, actual),
        })
      history = history.observe(mine, list(lengths), keep=0.7)
  return rows


def main(argv: list[str]) -> None:
  """Runs every seed; one row for each epoch and order."""
  del argv
  rows = [row for seed in range(_SEEDS.value) for row in run(seed)]
  table = []
  for epoch in range(1, _EPOCHS + 1):
    for order in dict.fromkeys(row['order'] for row in rows):
      mine = [r for r in rows if (r['epoch'], r['order']) == (epoch, order)]
      mean = lambda name, rows=mine: round(
          float(np.mean([r[name] for r in rows])), 3)
      table.append({
          'epoch': epoch,
          'order': order,
          'makespan_over_bound': mean('makespan'),
          'tau': mean('tau'),
      })
      print(table[-1], flush=True)
  common.write_csv(pathlib.Path(_OUT.value) / 'orders.csv', table)


if __name__ == '__main__':
  app.run(main)
