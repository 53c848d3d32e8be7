"""The order in which a batch is sampled: makespan, and what predicts lengths.

  python -m experiments.length_order.run
  python -m experiments.length_order.run --trained

Lengths are drawn: log-normal, between prompts and within them. Each prompt
comes once in an epoch; its predicted length is that of
`learning/length_ranker.py`, learned from the epochs before. Makespan is that of
the engine's logical time. "Efficient LLM Scheduling by Learning to Rank",
https://arxiv.org/abs/2408.15792. Writes orders.csv into --out.

With --trained a model is trained in each order instead, on a task with a long
tail, and trained.csv is written: forwards and seconds of its rollouts.
"""

import pathlib
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from experiments import long_tail
from rlax_llm.learning import length_ranker
from rlax_llm.rollout import control
from rlax_llm.runtime import executables
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_OUT = flags.DEFINE_string(
  'out', 'experiments/length_order', 'Where results go.'
)
_TRAINED = flags.DEFINE_boolean('trained', False, 'Train a model.')
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model, with --trained.')
_EPOCHS = flags.DEFINE_integer('epochs', 4, 'Times that a prompt comes.')
_PROMPTS = flags.DEFINE_integer('prompts', 32, 'Prompts of a step.')
_SEEDS = flags.DEFINE_integer('seeds', 20, 'Runs.')

_SAMPLES, _SLOTS = 8, 32
_STEPS = 4  # of an epoch
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
  kinds = rng.integers(0, 8, _PROMPTS.value * _STEPS)
  # Half of what a prompt's answers have in common shows in its first token.
  means = (
    np.linspace(-1, 1, 8)[kinds] * _BETWEEN * 1.1
    + rng.normal(size=len(kinds)) * _BETWEEN * 0.7
  )
  prompts = [
    np.r_[kind, rng.integers(8, 40, 9)].astype(np.int32) for kind in kinds
  ]
  history = length_ranker.LengthHistory()
  rows = []
  for epoch in range(_EPOCHS.value):
    for batch in rng.permutation(len(prompts)).reshape(_STEPS, _PROMPTS.value):
      logs = (
        means[batch, None]
        + rng.normal(size=(_PROMPTS.value, _SAMPLES)) * _WITHIN
      )
      lengths = np.clip(_MEDIAN * np.exp(logs), 1, _LONGEST).astype(int)
      mine = [prompts[i] for i in batch]
      predicted = history.predict(mine)
      actual = lengths.mean(axis=1)
      for name, key in (
        ('arrival', np.zeros(_PROMPTS.value)),
        ('shortest_first', predicted),
        ('longest_first', -predicted),
        ('longest_first, true prompt mean', -means[batch]),
        ('longest_first, group mean known', -actual),
      ):
        order = np.argsort(key, kind='stable')
        rows.append(
          {
            'epoch': epoch + 1,
            'order': name,
            'makespan': _makespan(lengths, order),
            'tau': length_ranker.kendall_tau(predicted, actual),
          }
        )
      history = history.observe(mine, list(lengths), keep=0.7)
  return rows


def train(order: str, seed: int, warm: Params) -> list[dict[str, Any]]:
  """Returns a row for each step of a training run.

  All slots stay to the end, and a free one is refilled at once, so that the
  forwards are the makespan in ticks.

  Args:
    order: `control.order`.
    seed: of the run.
    warm: the policy before.
  """
  config = long_tail.make_config(
    seed,
    _SIZE.value,
    num_steps=_EPOCHS.value * _STEPS,
    task__prompts_per_step=_PROMPTS.value,
    task__epoch_prompts=_PROMPTS.value * _STEPS,
    rollout__slots=_SLOTS,
    control__order=order,
    control__compact=False,
    control__refill_threshold=1 / _SLOTS,
    evaluate__problems=1,
  )
  rows = []
  for step, values in enumerate(long_tail.train(config, warm)):
    tokens, longest = values['rollout/tokens'], values['rollout/length_max']
    rows.append(
      {
        'order': order,
        'seed': seed,
        'epoch': step // _STEPS + 1,
        'forwards': values['rollout/forwards'],
        'over_bound': values['rollout/forwards']
        / max(tokens / _SLOTS, longest),
        'seconds': tokens / values['rollout/tokens_per_second'],
        'occupancy': values['rollout/occupancy'],
        'tail': longest / values['rollout/length_mean'],
        'tau': values.get('rollout/length_tau', 0.0),
        'tokens': tokens,
      }
    )
  return rows


def compare_trained() -> list[dict[str, Any]]:
  """Returns a row for each order and for the epochs with and without history.

  Raises:
    RuntimeError: the order changed what was sampled.
  """
  common.use_device()
  executables.enable_compilation_cache()
  warm = long_tail.warm_params(long_tail.make_config(0, _SIZE.value), 'tally')
  rows: list[dict[str, Any]] = []
  orders = ('arrival', 'longest_first', 'shortest_first')
  for seed in range(_SEEDS.value):
    for order in orders:
      rows += train(order, seed, warm)
      mine = [r['tokens'] for r in rows if r['seed'] == seed]
      if mine[: _EPOCHS.value * _STEPS] != mine[-_EPOCHS.value * _STEPS :]:
        raise RuntimeError(f'{order} has other tokens than {orders[0]}')
      print(rows[-1], flush=True)
  table = []
  for name, epochs in (('first', (1,)), ('later', range(2, _EPOCHS.value + 1))):
    total = lambda order, column, epochs=epochs: sum(
      r[column] for r in rows if r['order'] == order and r['epoch'] in epochs
    )
    for order in orders:
      count = sum(r['order'] == order and r['epoch'] in epochs for r in rows)
      ratio = lambda column, order=order: round(
        total(order, column) / total('arrival', column), 3
      )
      mean = lambda column, order=order, count=count: round(
        total(order, column) / count, 3
      )
      table.append(
        {
          'epochs': name,
          'order': order,
          'seeds': _SEEDS.value,
          'forwards_ratio': ratio('forwards'),
          'seconds_ratio': ratio('seconds'),
          'over_bound': mean('over_bound'),
          'occupancy': mean('occupancy'),
          'tail': mean('tail'),
          'tau': mean('tau'),
        }
      )
      print(table[-1], flush=True)
  return table


def main(argv: list[str]) -> None:
  """Runs every seed; one row for each epoch and order."""
  del argv
  if _TRAINED.value:
    common.write_csv(
      pathlib.Path(_OUT.value) / 'trained.csv', compare_trained()
    )
    return
  rows = [row for seed in range(_SEEDS.value) for row in run(seed)]
  table = []
  for epoch in range(1, _EPOCHS.value + 1):
    for order in dict.fromkeys(row['order'] for row in rows):
      mine = [r for r in rows if (r['epoch'], r['order']) == (epoch, order)]
      mean = lambda name, rows=mine: round(
        float(np.mean([r[name] for r in rows])), 3
      )
      table.append(
        {
          'epoch': epoch,
          'order': order,
          'makespan_over_bound': mean('makespan'),
          'tau': mean('tau'),
        }
      )
      print(table[-1], flush=True)
  common.write_csv(pathlib.Path(_OUT.value) / 'orders.csv', table)


if __name__ == '__main__':
  app.run(main)
