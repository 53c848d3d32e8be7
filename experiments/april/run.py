"""APRIL in logical time: what over-provisioning gains, and whom it puts off.

  python -m experiments.april.run

Answers of lengths that are drawn, not sampled, go through the engine's own
logical time and stop policy (`rollout/control.py`) for many steps; a tick costs
c0 + c1 * (rows that decode). "APRIL: Active Partial Rollouts in Reinforcement
Learning to Tame Long-tail Generation", https://arxiv.org/abs/2509.18521.
Writes sweep.csv into --out.
"""

import dataclasses
import math
import pathlib
from typing import Any

from absl import app
from absl import flags
import numpy as np

from experiments import common
from rlax_llm.rollout import control
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_OUT = flags.DEFINE_string('out', 'experiments/april', 'Where results go.')
_STEPS = flags.DEFINE_integer('steps', 60, 'Steps of a run.')
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


def simulate(ratio: float, sigma: float, max_staleness: int, seed: int,
             steps: int) -> dict[str, Any]:
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
    open_samples = [(g, s)
                    for g, group in enumerate(groups)
                    for s in range(_SAMPLES)
                    if group.left[s]]
    time = control.LogicalTime([g.request for g in groups],
                               [g for g, _ in open_samples], _SLOTS)
    needed = [int(groups[g].left[s]) for g, s in open_samples]
    stop = control.stop_at_groups(min(wanted, len(groups)),
                                  step + 1 - max_staleness)
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


def main(argv: list[str]) -> None:
  """Sweeps the ratio by the tail of the lengths."""
  del argv
  rows = []
  for sigma in (0.0, 0.5, 1.0):
    base = None
    for ratio in (1.0, 1.25, 1.5, 2.0):
      found = [
          simulate(ratio, sigma, 4, seed, _STEPS.value)
          for seed in range(_SEEDS.value)
      ]
      mean = {k: float(np.mean([f[k] for f in found])) for k in found[0]}
      base = base or mean['tokens_per_cost']
      rows.append({
          'sigma': sigma,
          'ratio': ratio,
          'throughput': round(mean['tokens_per_cost'] / base, 3),
          'occupancy': round(mean['occupancy'], 3),
          'put_off': round(mean['put_off'], 3),
          'age_max': max(f['age_max'] for f in found),
          'versions_max': max(f['versions_max'] for f in found),
      })
      print(rows[-1], flush=True)
  common.write_csv(pathlib.Path(_OUT.value) / 'sweep.csv', rows)


if __name__ == '__main__':
  app.run(main)
