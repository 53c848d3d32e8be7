"""Online pruning at small scale: tokens against accuracy.

  python -m experiments.arrol.run

Trains a warm-started policy with every arm and seed: whole groups, groups of
which half goes on behind their first tokens, drawn at random, by the quality
head with inverse survival weights, and by the head without them. "Prune as You
Generate: Online Rollout Pruning for Faster and Better RLVR",
https://arxiv.org/abs/2603.24840. Writes runs.csv and arms.csv into --out.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import pathlib
import statistics
from typing import Any

from absl import app
from absl import flags

from experiments import common
from experiments import long_tail
from rlax_llm.runtime import executables
from rlax_llm.types import Params

_OUT = flags.DEFINE_string('out', 'experiments/arrol', 'Where results go.')
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model and the batch.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Runs of an arm.')
_STEPS = flags.DEFINE_integer('steps', 40, 'Steps of a run.')
_SAMPLES = flags.DEFINE_integer('samples', 16, 'Samples per prompt.')
_PRUNE_AT = flags.DEFINE_integer('prune_at', 8, 'Tokens before pruning.')
_PROBLEMS = flags.DEFINE_integer('problems', 512, 'Held-out problems.')

_UNPRUNED = 'whole groups'
ARMS: Mapping[str, dict[str, Any]] = {
  _UNPRUNED: {},
  'random half': dict(control__prune_steps=1 << 20),
  'head weighted': dict(control__prune_steps=4),
  'head unweighted': dict(control__prune_steps=4, control__prune_weights=False),
}

_ARMS = long_tail.DEFINE_arms(list(ARMS))


def run_arm(arm: str, seed: int, warm: Params) -> dict[str, Any]:
  """Returns what a run comes to.

  Args:
    arm: of `ARMS`.
    seed: of the run.
    warm: the policy before.
  """
  changes = dict(ARMS[arm])
  if changes:
    changes['control__prune_at'] = _PRUNE_AT.value
  config = long_tail.make_config(
    seed,
    _SIZE.value,
    num_steps=_STEPS.value,
    rollout__samples_per_prompt=_SAMPLES.value,
    rollout__slots=64,
    evaluate__problems=_PROBLEMS.value,
    **changes,
  )
  steps = list(long_tail.train(config, warm))
  later = [s for s in steps if 'prune/success' in s][4:]
  mean = lambda name: (
    round(statistics.mean(s[name] for s in later), 4) if later else ''
  )
  total = lambda name: sum(s[name] for s in steps)
  return {
    'arm': arm,
    'seed': seed,
    'accuracy': steps[-1]['evaluate/accuracy'],
    'sampled_tokens': total('rollout/sampled_tokens'),
    'trained_tokens': total('rollout/trained_tokens'),
    'rollout_seconds': round(total('time/rollout'), 2),
    'step_seconds': round(total('time/step') - total('compile/seconds'), 2),
    'success': mean('prune/success'),
    'kept_success': mean('prune/kept_success'),
    'head_loss': mean('prune/head_loss'),
    'effective_share': mean('prune/effective_share'),
    'signal': round(
      statistics.mean(float(s['reward/groups_with_signal']) for s in steps), 3
    ),
  }


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each arm, compared by seed with whole groups."""
  plain = {r['seed']: r for r in rows if r['arm'] == _UNPRUNED}
  table = []
  for arm in ARMS:
    mine = [r for r in rows if r['arm'] == arm and r['seed'] in plain]
    if not mine:
      continue
    change = [r['accuracy'] - plain[r['seed']]['accuracy'] for r in mine]
    total = lambda name, of: sum(r[name] for r in of)
    base = [plain[r['seed']] for r in mine]
    ratio = lambda name, mine=mine, base=base: round(
      1 - total(name, mine) / total(name, base), 3
    )
    low, middle = common.lower_bound(change)
    table.append(
      {
        'arm': arm,
        'seeds': len(mine),
        'accuracy': round(statistics.mean(r['accuracy'] for r in mine), 4),
        'accuracy_change': round(middle, 4),
        'accuracy_change_low': round(low, 4),
        'sampled_saved': ratio('sampled_tokens'),
        'trained_saved': ratio('trained_tokens'),
        'seconds_saved': ratio('step_seconds'),
        'signal': round(statistics.mean(r['signal'] for r in mine), 3),
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
