"""What drafts save in training: none, past rollouts, a network, both.

  python -m experiments.tlt.end_to_end

The same RL run of a warm-started policy on a long-tailed task, once for each
source of drafts; drafts change no token, so every run trains on the same
samples, and the command stops if one does not. "Taming the Long Tail: Efficient
Reasoning RL Training with Adaptive Drafter", https://arxiv.org/abs/2511.16665.
Writes end_to_end.csv into --out: forwards per trained token and the seconds of
a step's rollouts (the median) against those without drafts, and what share of
the time the drafter's training took. Steps in which something was compiled
count for the tokens and forwards only.
"""

import pathlib
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from experiments import long_tail
from rlax_llm import executables
from rlax_llm.config import Config
from rlax_llm.types import Params

_OUT = flags.DEFINE_string('out', 'experiments/tlt',
                           'Where end_to_end.csv goes.')
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model and the batch.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the runs.')
_STEPS = flags.DEFINE_integer('steps', 24, 'RL steps.')
_WIDTH = flags.DEFINE_integer('width', 8, 'Nodes verified in one forward.')
_BRANCHING = flags.DEFINE_integer('branching', 2, 'Children of a node at most.')
_WARMUP = flags.DEFINE_integer('warmup', 300, 'Updates of a drafter before RL.')

# Name -> `rollout.drafter`; the first is the yardstick.
ARMS = {
    'none': 'none',
    'past rollouts': 'tree_cache',
    'network': 'model',
    'hybrid': 'hybrid',
}
_ARMS = long_tail.DEFINE_arms(list(ARMS))


def make_config(drafter: str) -> Config:
  """Returns the config of a run that a source drafts for."""
  drafts: dict[str, Any] = {}
  if drafter != 'none':
    drafts |= dict(rollout__width=_WIDTH.value,
                   rollout__branching=_BRANCHING.value)
  if drafter in ('model', 'hybrid'):
    drafts |= dict(drafter__warmup_updates=_WARMUP.value,
                   drafter__depth=_WIDTH.value // 2)
  return long_tail.make_config(_SEED.value,
                               _SIZE.value,
                               num_steps=_STEPS.value,
                               rollout__drafter=drafter,
                               evaluate__problems=16,
                               **drafts)


def run_arm(drafter: str, warm: Params) -> tuple[dict[str, Any], list[float]]:
  """Returns what a run comes to, and its losses.

  Args:
    drafter: `rollout.drafter`.
    warm: the parameters after the warm start.
  """
  rows = list(long_tail.train(make_config(drafter), warm))
  column = lambda name: np.array([float(r.get(name, 0.0)) for r in rows])
  total = lambda name: float(np.sum(column(name)))
  tokens = total('rollout/trained_tokens')
  settled = column('compile/seconds') == 0
  return {
      'trained_tokens':
          int(tokens),
      'reward_last':
          round(float(column('reward/mean')[-1]), 4),
      'forwards':
          int(total('rollout/forwards')),
      'forwards_per_token':
          total('rollout/forwards') / tokens,
      'accept_length':
          round(float(column('rollout/accept_length').mean()), 3),
      'rollout_seconds':
          float(np.median(column('time/rollout')[settled])),
      'drafter_share':
          round(
              float(
                  np.sum(column('time/drafter')[settled]) /
                  np.sum(column('time/step')[settled])), 4),
  }, [float(r['learning/loss']) for r in rows]


def main(argv: list[str]) -> None:
  """Trains every arm, prints and writes the table.

  Raises:
    RuntimeError: drafts have changed what was learned.
  """
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  warm = long_tail.warm_params(long_tail.make_config(_SEED.value, _SIZE.value),
                               'tally')
  rows: list[dict[str, Any]] = []
  plain: list[float] | None = None
  for name in [arm for arm in ARMS if arm in _ARMS.value]:
    row, losses = run_arm(ARMS[name], warm)
    plain = plain or losses
    if losses != plain:
      raise RuntimeError(f'drafts by {name} changed the losses')
    first = rows[0] if rows else row
    ratio = lambda key: round(row[key] / first[key], 3)
    rows.append({'drafts': name} | row | {
        'forwards_ratio': ratio('forwards_per_token'),
        'rollout_ratio': ratio('rollout_seconds')
    })
    for key in ('forwards_per_token', 'rollout_seconds'):
      rows[-1][key] = round(row[key], 4)
    print(rows[-1], flush=True)
  common.write_csv(pathlib.Path(_OUT.value) / 'end_to_end.csv', rows)


if __name__ == '__main__':
  app.run(main)
