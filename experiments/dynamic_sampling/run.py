"""Dynamic sampling and extra samples at small scale: signal against tokens.

  python -m experiments.dynamic_sampling.run

Trains a warm-started policy with every arm and seed: as many groups as come,
only groups whose rewards differ (DAPO, https://arxiv.org/abs/2503.14476), more
samples for hard prompts (DARS, https://arxiv.org/abs/2508.13755), and both.
Writes runs.csv and arms.csv into --out.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import pathlib
import statistics
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from experiments import long_tail
from rlax_llm.runtime import executables
from rlax_llm.types import Params

_OUT = flags.DEFINE_string(
  'out', 'experiments/dynamic_sampling', 'Where results go.'
)
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model and the batch.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of an arm.')
_STEPS = flags.DEFINE_integer('steps', 40, 'Steps of a run.')
_PROBLEMS = flags.DEFINE_integer('problems', 512, 'Held-out problems.')

_PLAIN = 'what comes'
_SIGNAL = dict(control__dynamic_sampling=3)
_EXTRA = dict(control__extra_samples=24)
ARMS: Mapping[str, dict[str, Any]] = {
  _PLAIN: {},
  'groups with signal': _SIGNAL,
  'extra samples': _EXTRA,
  'both': _SIGNAL | _EXTRA,
}

_ARMS = long_tail.DEFINE_arms(list(ARMS))


def run_arm(arm: str, seed: int, warm: Params) -> dict[str, Any]:
  """Returns what a run comes to.

  Args:
    arm: of `ARMS`.
    seed: of the run.
    warm: the policy before.
  """
  config = long_tail.make_config(
    seed,
    _SIZE.value,
    num_steps=_STEPS.value,
    rollout__slots=64,
    evaluate__problems=_PROBLEMS.value,
    **ARMS[arm],
  )
  steps = list(long_tail.train(config, warm))
  total = lambda name: sum(s.get(name, 0) for s in steps)
  mean = lambda name: float(np.mean([s[name] for s in steps]))
  groups = total('reward/groups_with_signal') * config.task.prompts_per_step
  return {
    'arm': arm,
    'seed': seed,
    'accuracy': steps[-1]['evaluate/accuracy'],
    'groups_with_signal': round(mean('reward/groups_with_signal'), 3),
    'sampled_tokens': total('rollout/sampled_tokens'),
    'dropped_tokens': total('rollout/dropped_tokens'),
    'tokens_by_signal': round(
      float(total('rollout/sampled_tokens') / groups), 1
    ),
    'extra_samples': total('rollout/extra_samples'),
    'refills': round(mean('rollout/refills'), 2),
  }


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each arm, compared by seed with the plain one."""
  plain = {r['seed']: r for r in rows if r['arm'] == _PLAIN}
  table = []
  for arm in ARMS:
    mine = [r for r in rows if r['arm'] == arm]
    if not mine:
      continue
    mean = lambda name, mine=mine: statistics.mean(r[name] for r in mine)
    low, middle = common.lower_bound(
      [r['accuracy'] - plain[r['seed']]['accuracy'] for r in mine]
    )
    tokens = statistics.mean(
      r['sampled_tokens'] / plain[r['seed']]['sampled_tokens'] for r in mine
    )
    table.append(
      {
        'arm': arm,
        'seeds': len(mine),
        'accuracy': round(mean('accuracy'), 4),
        'accuracy_change': round(middle, 4),
        'accuracy_change_low': round(low, 4),
        'groups_with_signal': round(mean('groups_with_signal'), 3),
        'sampled_ratio': round(tokens, 2),
        'dropped_share': round(
          mean('dropped_tokens') / mean('sampled_tokens'), 3
        ),
        'tokens_by_signal': round(mean('tokens_by_signal'), 0),
        'extra_samples': round(mean('extra_samples'), 1),
        'refills': round(mean('refills'), 2),
      }
    )
  return table


def main(argv: list[str]) -> None:
  """Runs every seed and arm; prints the table after each seed."""
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  warm = long_tail.warm_params(long_tail.make_config(0, _SIZE.value), 'tally')
  arms = [arm for arm in ARMS if arm in _ARMS.value]
  long_tail.run_arms(
    arms,
    _SEEDS.value,
    functools.partial(run_arm, warm=warm),
    summarize,
    pathlib.Path(_OUT.value),
  )


if __name__ == '__main__':
  app.run(main)
