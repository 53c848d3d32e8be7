"""APRIL in logical time: what over-provisioning gains, and whom it puts off.

  python -m experiments.april.run
  python -m experiments.april.run --trained

Answers of lengths that are drawn, not sampled, go through the engine's own
logical time and stop policy (`rollout/control.py`) for many steps; a tick costs
c0 + c1 * (rows that decode). "APRIL: Active Partial Rollouts in Reinforcement
Learning to Tame Long-tail Generation", https://arxiv.org/abs/2509.18521.
Writes sweep.csv into --out.

With --trained a model is trained instead, on a task with a long tail, and
trained.csv is written: the throughput of its rollouts, and its accuracy. With
--nocompact rows that idle stay, as in the paper's baseline: to
trained_idle_rows.csv.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from experiments import long_tail
from rlax_llm.rollout import control
from rlax_llm.runtime import executables
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_OUT = flags.DEFINE_string('out', 'experiments/april', 'Where results go.')
_STEPS = flags.DEFINE_integer('steps', 60, 'Steps of a run.')
_TRAINED = flags.DEFINE_boolean('trained', False, 'Train a model.')
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model, with --trained.')
_COMPACT = flags.DEFINE_boolean(
  'compact', True, 'Whether idle rows are given up, with --trained.'
)
_PROBLEMS = flags.DEFINE_integer(
  'problems', 512, 'Held-out problems, with --trained.'
)
_RATIOS = flags.DEFINE_list(
  'ratios',
  ['1', '1.25', '1.5', '2'],
  'Values of over_provision; the first is 1.',
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of a setting.')

_PROMPTS, _SAMPLES, _SLOTS = 16, 8, 64
_MEDIAN, _LONGEST = 60.0, 1000
_FIXED, _BY_ROW = 1.0, 1 / 128  # of a tick: memory-bound, as on accelerators


@dataclasses.dataclass
class _Group:
  """A group on its way: the tokens that its samples still need."""

  request: Request
  left: np.ndarray  # int[G]
  taken: np.ndarray  # int[G], tokens it has
  versions: int = 1  # policies that its tokens come from


def _seconds(time: control.LogicalTime, end: int) -> tuple[float, float]:
  """Returns (cost of the ticks up to the end, mean rows that decode)."""
  rows = np.zeros(end + 1)
  for sample, begin in time.begin.items():
    rows[min(begin, end)] += 1
    rows[min(time.end.get(sample, end), end)] -= 1
  decoding = np.cumsum(rows)[:end]
  return float(np.sum(_FIXED + _BY_ROW * decoding)), float(decoding.mean())


def simulate(
  ratio: float, sigma: float, max_staleness: int, seed: int, steps: int
) -> dict[str, Any]:
  """Returns what a run of `steps` steps comes to.

  Args:
    ratio: `control.over_provision`.
    sigma: of the lengths' logarithm; half of the variance is the prompt's.
    max_staleness: `control.max_staleness`.
    seed: of the lengths.
    steps: of the run; the first ten warm up.
  """
  rng = np.random.default_rng(seed)
  pending: list[_Group] = []
  surplus: list[_Group] = []
  cost, tokens, occupancy = 0.0, 0, []
  ages: list[int] = []
  spans: list[int] = []
  for step in range(steps):
    wanted = _PROMPTS - len(surplus)
    asked = math.ceil(round(ratio * wanted, 6))
    new = []
    for i in range(max(asked - len(pending), 0)):
      prompt = rng.normal() * sigma / 2**0.5
      logs = prompt + rng.normal(size=_SAMPLES) * sigma / 2**0.5
      lengths = np.clip(_MEDIAN * np.exp(logs), 1, _LONGEST).astype(int)
      request = Request(np.zeros(1, np.int32), _SAMPLES, TRAIN, step, i)
      new.append(_Group(request, lengths, np.zeros(_SAMPLES, int)))
    groups = [*pending, *new]
    open_samples = [
      (g, s)
      for g, group in enumerate(groups)
      for s in range(_SAMPLES)
      if group.left[s]
    ]
    time = control.LogicalTime(
      [g.request for g in groups], [g for g, _ in open_samples], _SLOTS
    )
    needed = [int(groups[g].left[s]) for g, s in open_samples]
    stop = control.stop_at_groups(
      min(wanted, len(groups)), step + 1 - max_staleness
    )
    for view in time.advance(needed, [True] * len(needed)):
      if stop(view):
        break
    for order, (g, s) in enumerate(open_samples):
      done = time.tokens_at_tick(order)
      done = needed[order] if done is None else done
      groups[g].left[s] -= done
      groups[g].taken[s] += done
    if step >= 10:
      spent, rows = _seconds(time, time.tick)
      cost += spent
      occupancy.append(rows / _SLOTS)
    complete = surplus + [g for g in groups if not g.left.any()]
    complete.sort(key=lambda g: (g.request.step, g.request.request))
    pending = [g for g in groups if g.left.any()]
    for group in pending:
      group.versions += 1
    batch, surplus = complete[:_PROMPTS], complete[_PROMPTS:]
    if step >= 10:
      tokens += sum(int(g.taken.sum()) for g in batch)
      ages += [step - g.request.step for g in batch]
      spans += [g.versions for g in batch]
  return {
    'tokens_per_cost': tokens / cost,
    'occupancy': float(np.mean(occupancy)),
    'put_off': float(np.mean(np.array(ages) > 0)),
    'age_max': max(ages),
    'versions_max': max(spans),
  }


def train(ratio: float, seed: int, warm: Params) -> dict[str, float]:
  """Returns what a training run of `--steps` steps comes to.

  Args:
    ratio: `control.over_provision`.
    seed: of the run.
    warm: the policy before.
  """
  config = long_tail.make_config(
    seed,
    _SIZE.value,
    num_steps=_STEPS.value,
    rollout__slots=64,
    rollout__segment_forwards=8,
    control__over_provision=ratio,
    control__compact=_COMPACT.value,
    learning__old_logprobs='scored',
    evaluate__problems=_PROBLEMS.value,
  )
  steps = list(long_tail.train(config, warm))
  total = lambda name: float(sum(s[name] for s in steps))
  # What is put off at the end is not trained on, and not counted.
  tokens = total('rollout/trained_tokens')
  cost = _FIXED * total('rollout/forwards') + _BY_ROW * total(
    'rollout/sampled_tokens'
  )
  seconds = sum(
    (s['rollout/sampled_tokens'] + s['rollout/discarded_tokens'])
    / s['rollout/tokens_per_second']
    for s in steps
  )
  return {
    'tokens_per_second': tokens / seconds,
    'tokens_per_cost': tokens / cost,
    'occupancy': total('rollout/occupancy') / len(steps),
    'tail': total('rollout/length_max') / total('rollout/length_mean'),
    'stale_tokens': total('policy/staleness_mean') / len(steps),
    'age_max': max(s['policy/staleness_max'] for s in steps),
    'discarded': total('rollout/discarded_tokens')
    / total('rollout/sampled_tokens'),
    'accuracy': steps[-1]['evaluate/accuracy'],
  }


def sweep_trained() -> None:
  """Trains with every seed and ratio; writes a row for each ratio."""
  common.use_device()
  executables.enable_compilation_cache()
  warm = long_tail.warm_params(long_tail.make_config(0, _SIZE.value), 'tally')
  ratios = [float(ratio) for ratio in _RATIOS.value]
  found = []  # by seed, then by ratio: what disturbs the machine meets all
  for seed in range(_SEEDS.value):
    found.append({ratio: train(ratio, seed, warm) for ratio in ratios})
    # After every seed: a command that is stopped leaves what it has.
    rows = _table(found, ratios)
    name = 'trained.csv' if _COMPACT.value else 'trained_idle_rows.csv'
    common.write_csv(pathlib.Path(_OUT.value) / name, rows)
    for row in rows:
      print(row, flush=True)


def _table(
  found: Sequence[Mapping[float, Mapping[str, float]]], ratios: Sequence[float]
) -> list[dict[str, Any]]:
  """Returns a row for each ratio, from what runs came to by seed."""
  rows = []
  for ratio in ratios:
    mine, base = zip(*((f[ratio], f[1.0]) for f in found))
    row: dict[str, Any] = {'ratio': ratio, 'seeds': len(found)}
    for name in ('tokens_per_second', 'tokens_per_cost'):
      row[name] = round(
        float(np.mean([m[name] / b[name] for m, b in zip(mine, base)])), 3
      )
    low, middle = common.lower_bound(
      [m['accuracy'] - b['accuracy'] for m, b in zip(mine, base)]
    )
    for name in (
      'occupancy',
      'tail',
      'stale_tokens',
      'age_max',
      'discarded',
      'accuracy',
    ):
      row[name] = round(float(np.mean([m[name] for m in mine])), 3)
    rows.append(
      row
      | {
        'accuracy_change': round(middle, 4),
        'accuracy_change_low': round(low, 4),
      }
    )
  return rows


def main(argv: list[str]) -> None:
  """Sweeps the ratio by the tail of the lengths, or trains by ratio."""
  del argv
  if _TRAINED.value:
    sweep_trained()
    return
  rows = []
  for sigma in (0.0, 0.5, 1.0):
    base = None
    for ratio in map(float, _RATIOS.value):
      found = [
        simulate(ratio, sigma, 4, seed, _STEPS.value)
        for seed in range(_SEEDS.value)
      ]
      mean = {k: float(np.mean([f[k] for f in found])) for k in found[0]}
      base = base or mean['tokens_per_cost']
      rows.append(
        {
          'sigma': sigma,
          'ratio': ratio,
          'throughput': round(mean['tokens_per_cost'] / base, 3),
          'occupancy': round(mean['occupancy'], 3),
          'put_off': round(mean['put_off'], 3),
          'age_max': max(f['age_max'] for f in found),
          'versions_max': max(f['versions_max'] for f in found),
        }
      )
      print(rows[-1], flush=True)
  common.write_csv(pathlib.Path(_OUT.value) / 'sweep.csv', rows)


if __name__ == '__main__':
  app.run(main)
