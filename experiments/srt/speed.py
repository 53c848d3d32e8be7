"""Speculation against W = 1, on the same rollouts, in interleaved pairs.

  python -m experiments.srt.speed --rows=8,32,128

The quickstart's model after its warm start generates steps of problems,
twice: in the first epoch the tree cache holds nothing, in the second it holds
the first. In turn: W = 1; the tree cache at W = --width; the cost model; and,
for the price of drafting, a constant draft of the same width. Parameters stay
as they are. Writes speed.csv into --out: ratios of times by pair, compilation
apart, and what accept length over the cost of verification would allow.
"""

import functools
import pathlib
import statistics
from typing import Any

from absl import app
from absl import flags

from configs import quickstart
from experiments import common
from experiments.srt import workload
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables

_ROWS = flags.DEFINE_list('rows', ['8', '32', '128'], 'Rows decoded together.')
_WIDTH = flags.DEFINE_integer('width', 4, 'W of the fixed arm.')
_PAIRS = flags.DEFINE_integer('pairs', 11, 'Of times that are compared.')
_STEPS = flags.DEFINE_integer('steps', 1, 'Of a pair; more: less noise.')
_OUT = flags.DEFINE_string('out', 'experiments/srt', 'Where the table goes.')


def make_engines(run: Run, rows: int, width: int) -> dict[str, RolloutEngine]:
  """Returns an engine for each arm."""
  make = functools.partial(workload.make_engine, run, rows, widths=(1, width))
  return {
    'W = 1': make(width=1),
    'W = 1 again': make(width=1),  # the noise of the comparison
    'tree cache': make(width=width),
    'cost model': make(width=0),
    'constant': make(drafter=common.constant_drafter(width)),
  }


def measure(
  run: Run, params: Any, rows: int, width: int, pairs: int, steps: int
) -> list[dict[str, Any]]:
  """Returns a row for each (epoch, arm).

  Args:
    run: gives model and task.
    params: the policy's.
    rows: N.
    width: W of the arms that draft.
    pairs: of times in an epoch.
    steps: of each pair.

  Raises:
    RuntimeError: an arm's tokens are not those of W = 1.
  """
  engines = make_engines(run, rows, width)
  stores = {name: run.rollout_store() for name in engines}
  clock = workload.clock()
  seconds: dict[tuple[int, str], list[float]] = {}
  totals: dict[tuple[int, str], list[float]] = {}

  def generate(name: str, epoch: int, first: int) -> Any:
    requests = workload.make_requests(
      run, rows, epoch * pairs * steps + first, first
    )
    engine = engines[name]
    compiled, start = run.pool.seconds, clock()
    rollouts, _ = engine.generate(
      params, requests, RolloutState(store=stores[name])
    )
    spent = clock() - start - (run.pool.seconds - compiled)
    return spent, engine.stats, [r.tokens.tolist() for r in rollouts]

  for name in engines:  # compiles; of problems that do not come again
    for _ in range(3):
      generate(name, 9, pairs * steps + 1)
  for epoch in (0, 1):
    for step in range(pairs * steps):
      names = list(engines)
      want = None
      first = step % len(names)
      for name in names[first:] + names[:first]:
        spent, stats, tokens = generate(name, epoch, step)
        want = want or tokens
        if tokens != want:
          raise RuntimeError(f'{name} changed a token in step {step}')
        seconds.setdefault((epoch, name), []).append(spent)
        total = totals.setdefault((epoch, name), [0, 0, 0, 0])
        for i, value in enumerate(
          (
            stats.tokens,
            stats.row_forwards,
            stats.forwards,
            stats.segment_seconds,
          )
        ):
          total[i] += value
  table = []
  paired = {
    key: [sum(mine[i : i + steps]) for i in range(0, len(mine), steps)]
    for key, mine in seconds.items()
  }
  for (epoch, name), mine in sorted(paired.items()):
    plain = paired[epoch, 'W = 1']
    low, middle, high = common.ratio_bounds(mine, plain)
    # Of segments alone: what the host does between them is in the times.
    forward = lambda n, e=epoch: totals[e, n][3] / totals[e, n][2]
    tokens, row_forwards, _, inside = totals[epoch, name]
    accept = tokens / row_forwards
    bound = accept / (forward('constant') / forward('W = 1'))
    table.append(
      {
        'rows': rows,
        'epoch': epoch + 1,
        'arm': name,
        'accept_length': round(accept, 3),
        'forward_over_w1': round(forward(name) / forward('W = 1'), 3),
        'drafting_share': round(1 - forward('constant') / forward(name), 3)
        if name == 'tree cache'
        else '',
        'bound': round(bound, 3) if name == 'tree cache' else '',
        'share_of_bound': round(1 / middle / bound, 3)
        if name == 'tree cache'
        else '',
        'between_segments': round(1 - inside / sum(mine), 3),
        'time_over_w1': round(middle, 3),
        'low': round(low, 3),
        'high': round(high, 3),
        'speedup': round(1 / middle, 3),
        'median_seconds': round(statistics.median(mine) / steps, 4),
      }
    )
  return table


def main(argv: list[str]) -> None:
  """Warm-starts the quickstart's model and measures."""
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  config = quickstart.get_config()
  config.task.epoch_prompts = 0  # epochs are made here
  run = make_run(config, clock=workload.clock())
  params = run.warm_start(run.states.init_params(), lambda done, loss: None)
  table: list[dict[str, Any]] = []
  for rows in map(int, _ROWS.value):
    table += measure(
      run, params, rows, _WIDTH.value, _PAIRS.value, _STEPS.value
    )
    common.write_csv(pathlib.Path(_OUT.value) / 'speed.csv', table)


if __name__ == '__main__':
  app.run(main)
