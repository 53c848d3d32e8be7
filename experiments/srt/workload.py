"""The rollouts whose speed is measured: the quickstart's problems, in steps."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import time
from typing import Any

from absl import flags

from rlax_llm.components import Run
from rlax_llm.config import freeze
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_CLOCK = flags.DEFINE_enum(
  'clock',
  'wall',
  ['wall', 'cpu'],
  'Seconds that pass, or (with --device=cpu) those that processors work for '
  'this process: other processes disturb these less.',
)
_SAMPLES = 8


def clock() -> Callable[[], float]:
  """Returns the clock that the command line names."""
  return time.process_time if _CLOCK.value == 'cpu' else time.perf_counter


def make_engine(
  run: Run,
  rows: int,
  *,
  widths: Sequence[int],
  drafter: Drafter | None = None,
  strategy: Strategy | None = None,
  **changes: Any,
) -> RolloutEngine:
  """Returns an engine of the run's model; keywords change its rollouts."""
  rollout = dataclasses.replace(run.config.rollout, slots=rows, **changes)
  control = dataclasses.replace(run.config.control, widths=tuple(widths))
  return RolloutEngine(
    run.model,
    rollout=freeze(rollout),
    control=freeze(control),
    sampling=run.sampling,
    eos_ids=run.tokenizer.eos_ids,
    seed=run.config.seed,
    mesh=run.mesh,
    clock=run.clock,
    drafter=drafter,
    strategy=strategy,
    pool=run.pool,
  )


def make_requests(run: Run, rows: int, step: int, first: int) -> list[Request]:
  """Returns the requests of one step: four times the rows, in samples.

  Args:
    run: gives the task.
    rows: N.
    step: names the noise.
    first: which problems, in units of a step.
  """
  prompts = max(4 * rows // _SAMPLES, 16)
  problems = [
    run.task.problem('train', first * prompts + i) for i in range(prompts)
  ]
  return run.requests(problems, samples=_SAMPLES, domain=TRAIN, step=step)
