"""What drafts save in training: none, past rollouts, a network, both.

  python -m experiments.tlt.end_to_end
  python -m experiments.tlt.end_to_end --size=100m --device=gpu

The same RL run of a warm-started policy on a long-tailed task, once for each
source of drafts; `chosen` drafts with what the cost model says, segment by
segment. In float32 drafts change no token, so every run trains on the same
samples, and the command stops if one does not; in bfloat16 (--size=100m) they
keep the law of the tokens only. "Taming the Long Tail: Efficient Reasoning RL
Training with Adaptive Drafter", https://arxiv.org/abs/2511.16665. Writes
end_to_end.csv into --out: forwards and seconds of rollouts per trained token
against those without drafts (seconds: the median over steps), and what share of
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
from rlax_llm.config import Config
from rlax_llm.runtime import executables
from rlax_llm.types import Params

_OUT = flags.DEFINE_string(
  'out', 'experiments/tlt', 'Where end_to_end.csv goes.'
)
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
  'chosen': 'hybrid',
}
_ARMS = long_tail.DEFINE_arms(list(ARMS))


def make_config(arm: str) -> Config:
  """Returns the config of an arm's run."""
  drafter = ARMS[arm]
  drafts: dict[str, Any] = {}
  if drafter != 'none':
    drafts |= dict(
      rollout__width=0 if arm == 'chosen' else _WIDTH.value,
      rollout__branching=_BRANCHING.value,
      control__widths=(1, _WIDTH.value),
    )
  if drafter in ('model', 'hybrid'):
    drafts |= dict(
      drafter__warmup_updates=_WARMUP.value, drafter__depth=_WIDTH.value // 2
    )
  return long_tail.make_config(
    _SEED.value,
    _SIZE.value,
    num_steps=_STEPS.value,
    rollout__drafter=drafter,
    evaluate__problems=16,
    **drafts,
  )


def run_arm(arm: str, warm: Params) -> tuple[dict[str, Any], list[float]]:
  """Returns what a run comes to, and its losses.

  Args:
    arm: its name.
    warm: the parameters after the warm start.
  """
  rows = []
  for step, values in enumerate(long_tail.train(make_config(arm), warm), 1):
    rows.append(values)
    seconds, tokens = values['time/rollout'], values['rollout/trained_tokens']
    print(
      f'{arm}: step {step}  reward {values["reward/mean"]:.3f}  '
      f'accept length {values["rollout/accept_length"]:.2f}  '
      f'rollout {seconds:.3f} s  '
      f'{tokens:.0f} tokens  compile {values["compile/seconds"]:.1f} s',
      flush=True,
    )
  column = lambda name: np.array([float(r.get(name, 0.0)) for r in rows])
  total = lambda name: float(np.sum(column(name)))
  tokens = total('rollout/trained_tokens')
  settled = column('compile/seconds') == 0
  return {
    'trained_tokens': int(tokens),
    'reward_last': round(float(column('reward/mean')[-1]), 4),
    'forwards': int(total('rollout/forwards')),
    'forwards_per_token': total('rollout/forwards') / tokens,
    'accept_length': round(float(column('rollout/accept_length').mean()), 3),
    'rollout_seconds': float(np.median(column('time/rollout')[settled])),
    'seconds_per_token': float(
      np.median(
        (column('time/rollout') / column('rollout/trained_tokens'))[settled]
      )
    ),
    'drafter_share': round(
      float(
        np.sum(column('time/drafter')[settled])
        / np.sum(column('time/step')[settled])
      ),
      4,
    ),
  }, [float(r['learning/loss']) for r in rows]


def main(argv: list[str]) -> None:
  """Trains every arm, prints and writes the table.

  Raises:
    RuntimeError: drafts have changed what was learned.
  """
  del argv
  config = long_tail.make_config(_SEED.value, _SIZE.value)
  exact = config.learning.precision.compute == 'float32'
  common.use_device(exact=exact)
  executables.enable_compilation_cache()
  warm = long_tail.warm_params(config, 'tally')
  rows: list[dict[str, Any]] = []
  plain: list[float] | None = None
  for name in [arm for arm in ARMS if arm in _ARMS.value]:
    row, losses = run_arm(name, warm)
    plain = plain or losses
    if exact and losses != plain:
      raise RuntimeError(f'drafts by {name} changed the losses')
    first = rows[0] if rows else row
    ratio = lambda key: round(row[key] / first[key], 3)
    rows.append(
      {'drafts': name}
      | row
      | {
        'forwards_ratio': ratio('forwards_per_token'),
        'rollout_ratio': ratio('seconds_per_token'),
      }
    )
    for key, digits in (
      ('forwards_per_token', 4),
      ('rollout_seconds', 4),
      ('seconds_per_token', 8),
    ):
      rows[-1][key] = round(row[key], digits)
    print(rows[-1], flush=True)
  common.write_csv(pathlib.Path(_OUT.value) / 'end_to_end.csv', rows)


if __name__ == '__main__':
  app.run(main)
