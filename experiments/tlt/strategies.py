"""Strategies on recorded segments: what each would have taken.

  python -m experiments.tlt.strategies --rows=8,32,128 --trace=FILE

The workload of experiments/srt/speed.py, generated in turn with each static
arm; of every segment the trace holds n, N, S, W, seconds and how often each
node of the draft was reached. Tokens are the same for every arm, so the work
of a step at one (N, S) is, and a strategy can be run on the trace: it is asked
for an arm, and told what that arm's segments took and gave there in that step,
until their shares of the arm's tokens there come to one. After the first epoch,
in which the tree cache is empty, the second is replayed --passes times, all of
it --orders times, each time from another step on. Writes strategies.csv into
--out: for each N mean seconds over those of W = 1 and over those of the static
arm that was best there in hindsight, and the most over the latter.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import pathlib
import statistics
from typing import Any

from absl import app
from absl import flags

from configs import quickstart
from experiments import common
from experiments.srt import workload
from experiments.tlt import replay
from experiments.tlt.replay import Record
from rlax_llm.components import make_run
from rlax_llm.config import ControlConfig
from rlax_llm.config import freeze
from rlax_llm.config import RolloutConfig
from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import list_arms
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.drafting.strategy.make import make_strategy
from rlax_llm.drafting.strategy.table import fixed
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables

_ROWS = flags.DEFINE_list('rows', ['8', '32', '128'], 'Slots of an engine.')
_WIDTHS = flags.DEFINE_list('widths', ['1', '2', '4', '8'], 'W of the arms.')
_STEPS = flags.DEFINE_integer('steps', 11, 'Steps in an epoch.', lower_bound=1)
_PASSES = flags.DEFINE_integer(
  'passes', 4, 'Replays of the second epoch.', lower_bound=1
)
_ORDERS = flags.DEFINE_integer(
  'orders', 5, 'Steps to begin with.', lower_bound=1
)
_TRACE = flags.DEFINE_string(
  'trace', None, 'A file that is replayed, or else recorded.', required=True
)
_OUT = flags.DEFINE_string('out', 'experiments/tlt', 'Where the table goes.')


class Recorder:
  """The strategy of one arm that times every segment and notes it."""

  def __init__(self, arm: Arm, slots: int) -> None:
    self._arm = arm
    self._slots = slots
    self.where = (0, 0)  # epoch, step; negative: not noted
    self.records: list[Record] = []

  def choose(self, occupancy: Occupancy, forwards: int) -> Choice:
    """See `Strategy`."""
    del occupancy
    return Choice(self._arm, forwards, True)

  def observe(self, occupancy: Occupancy, arm: Arm, spent: Spent) -> None:
    """See `Strategy`."""
    if self.where[0] >= 0 and spent.seconds is not None and spent.forwards:
      self.records.append(
        Record(
          self._slots,
          *self.where,
          arm.width,
          *occupancy,
          spent.seconds,
          spent.preparation,
          spent.forwards,
          spent.row_forwards,
          tuple(spent.accepted),
        )
      )

  def reachable(self, least: int, most: int) -> list[Arm]:
    """See `Strategy`."""
    del least, most
    return [self._arm]

  def dump(self) -> dict[str, Any]:
    """See `Strategy`."""
    return {}

  def restore(self, saved: dict[str, Any]) -> None:
    """See `Strategy`."""


def record(
  rows: Iterable[int], widths: Sequence[int], steps: int
) -> list[Record]:
  """Returns the segments of every arm, generated in turn, step by step."""
  config = quickstart.get_config()
  config.task.epoch_prompts = 0  # epochs are made here
  run = make_run(config, clock=workload.clock())
  params = run.warm_start(run.states.init_params(), lambda done, loss: None)
  records: list[Record] = []
  for slots in rows:
    recorders = {w: Recorder(_arm(w), slots) for w in widths}
    # One S for all arms: each engine could draft with the widest.
    engines = {
      w: workload.make_engine(
        run, slots, widths=widths, width=0, strategy=recorders[w]
      )
      for w in widths
    }
    stores = {w: run.rollout_store() for w in widths}
    # The first compiles and warms up, with problems that do not come again.
    plan = [(-1, steps + 1)] * 3
    plan += [(epoch, step) for epoch in (0, 1) for step in range(steps)]
    for number, (epoch, step) in enumerate(plan):
      first = number % len(widths)
      for width in [*widths[first:], *widths[:first]]:
        recorders[width].where = (epoch, step)
        requests = workload.make_requests(
          run, slots, max(epoch, 0) * steps + step, step
        )
        engines[width].generate(
          params, requests, RolloutState(store=stores[width])
        )
    for recorder in recorders.values():
      records += recorder.records
  return records


def _arm(width: int) -> Arm:
  return list_arms(RolloutConfig(width=width), ControlConfig())[-1]


def compare(
  records: Sequence[Record], passes: int, orders: int, seed: int
) -> list[dict[str, Any]]:
  """Returns a row for each (slots, N, strategy)."""
  steps = 1 + max(r.step for r in records)
  firsts = [steps * i // orders for i in range(orders)]
  table: list[dict[str, Any]] = []
  for slots in sorted({r.slots for r in records}):
    trace = replay.Trace([r for r in records if r.slots == slots])
    widths = trace.widths
    made = lambda **control: make_strategy(
      RolloutConfig(), freeze(ControlConfig(**control)), seed=seed
    )
    top = (10**6, *widths)
    strategies: dict[str, Callable[[], Strategy]] = {
      f'W = {w}': functools.partial(fixed, _arm(w)) for w in widths
    }
    strategies |= {
      'cost_model': lambda: made(widths=tuple(widths)),
      # The published table, as far as these widths go.
      'table': lambda: made(
        strategy='table', buckets=((20, widths[-1]), (32, widths[-2]))
      ),
      'bandit': lambda: made(
        strategy='bandit', buckets=((8, *widths), (32, *widths), top)
      ),
    }
    taken = {
      name: [replay.replay(trace, make(), passes, first) for first in firsts]
      for name, make in strategies.items()
    }
    for rows in sorted(taken['W = 1'][0]):
      # In whatever order, a static arm takes the same.
      static = {w: taken[f'W = {w}'][0][rows] for w in widths}
      best = min(static, key=static.__getitem__)
      for name, replays in taken.items():
        spent = [seconds[rows] for seconds in replays]
        mean = statistics.mean(spent)
        table.append(
          {
            'slots': slots,
            'rows': rows,
            'strategy': name,
            'seconds': round(mean, 3),
            'over_w1': round(mean / static[1], 3),
            'best_static': f'W = {best}',
            'over_best_static': round(mean / static[best], 3),
            'most_over_best_static': round(max(spent) / static[best], 3),
            'regret_seconds': round(mean - static[best], 3),
          }
        )
  return table


def main(argv: list[str]) -> None:
  """Records a trace, unless there is one, and replays it."""
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  path = pathlib.Path(_TRACE.value)
  if not path.exists():
    widths = sorted({1, *map(int, _WIDTHS.value)})
    replay.write(path, record(map(int, _ROWS.value), widths, _STEPS.value))
  table = compare(replay.read(path), _PASSES.value, _ORDERS.value, seed=0)
  common.write_csv(pathlib.Path(_OUT.value) / 'strategies.csv', table)
  for row in table:
    print(*row.values(), sep='\t')


if __name__ == '__main__':
  app.run(main)
