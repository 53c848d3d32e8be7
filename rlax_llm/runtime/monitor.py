"""Health of a run: divergence, sampling faults, unexpected compilations."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import pathlib
from typing import Any

import jax

from rlax_llm.config import LearningConfig
from rlax_llm.runtime import executables
from rlax_llm.runtime.executables import ExecutablePool

_WARM_STEPS = 2  # after these, only the pool compiles
_WARNINGS = 5  # of a kind, at most
# Nats by which a sampled token's log-probability may differ from the
# recomputed one, by the dtype of the trunk's maths: far above what another
# order of summation makes of it, far below a wrong law.
_GAPS = {'float32': 1e-2, 'bfloat16': 0.5}


class HealthMonitor:
  """Looks at the values of every step and says what is not as it should be."""

  def __init__(
    self,
    pool: ExecutablePool,
    learning: LearningConfig,
    warn: Callable[[str], None],
  ) -> None:
    """Begins to look.

    Args:
      pool: compiles everything that steps run.
      learning: frozen section.
      warn: receives one line for each finding.
    """
    self._pool = pool
    self._learning = learning
    self._warn = warn
    self._gap = learning.gap_alarm or _GAPS[learning.precision.compute]
    self._left = {'gap': _WARNINGS, 'compile': _WARNINGS, 'sampling': _WARNINGS}
    self._looked = 0
    self._skipped = 0  # in a row
    self._compiled = self._outside()
    self.abort_reason = ''  # why the run cannot continue

  def check_sampling(self, when: str, warning: str) -> None:
    """Passes on what `RolloutStats.warning` says of a step or evaluation."""
    if warning:
      self._once('sampling', f'{when}: {warning}')

  def check(self, step: int, values: Mapping[str, Any]) -> None:
    """Looks at the values of a step, from 1."""
    self._look_at_update(step, values)
    # Absent where the step sampled nothing.
    gap = values.get('policy/behaviour_gap_max', 0.0)
    if not gap <= self._gap:  # NaN is above, too.
      self._once(
        'gap',
        f'step {step}: policy/behaviour_gap_max is {gap:.3g} nats, '
        f'above {self._gap:.3g}: tokens were not sampled from the law that '
        'they are trained under',
      )
    self._looked += 1
    compiled, self._compiled = self._compiled, self._outside()
    if self._looked > _WARM_STEPS and self._compiled > compiled:
      self._once(
        'compile',
        f'step {step}: {self._compiled - compiled} programs were '
        'compiled outside of the pool: shapes leak into an eager operation',
      )

  def _look_at_update(self, step: int, values: Mapping[str, Any]) -> None:
    if not values['learning/skipped']:
      self._skipped = 0
      return
    self._skipped += 1
    what = ', '.join(
      f'{name} {values[name]}'
      for name in ('learning/loss', 'learning/grad_norm', 'critic/loss')
      if name in values
    )
    self._warn(f'step {step}: the update was skipped: {what}')
    if self._skipped >= self._learning.most_skipped:
      self.abort_reason = (
        f'{self._skipped} updates in a row were not finite '
        f'({what}); stopped after step {step}, whose state is saved; '
        'lower learning.learning_rate or learning.max_grad_norm, or '
        f'raise learning.most_skipped={self._learning.most_skipped}'
      )

  def _once(self, kind: str, line: str) -> None:
    if self._left[kind]:
      self._left[kind] -= 1
      self._warn(f'warning: {line}')

  def _outside(self) -> int:
    """Returns how many programs were compiled, those of the pool apart."""
    return executables.compile_totals()[0] - self._pool.count


@contextlib.contextmanager
def no_surprises() -> Iterator[None]:
  """Refuses implicit reads of a device, and broadcasts of unequal ranks."""
  with (
    jax.transfer_guard_device_to_host('disallow'),
    jax.numpy_rank_promotion('raise'),
  ):
    yield


def steps_within(
  steps: tuple[int, int] | None, first: int, last: int
) -> tuple[int, int] | None:
  """Returns the part of a range of steps that a run takes; None: no step."""
  if not steps:
    return None
  steps = max(steps[0], first), min(steps[1], last)
  return steps if steps[0] <= steps[1] else None


@contextlib.contextmanager
def profiled(
  step: int, steps: tuple[int, int] | None, workdir: str
) -> Iterator[None]:
  """Traces the named steps into workdir/profile, for TensorBoard or XProf.

  Args:
    step: from 1.
    steps: the first and the last to trace, both of which will come; None: no
      trace.
    workdir: the run's folder.
  """
  if steps and step == steps[0]:
    jax.profiler.start_trace(str(pathlib.Path(workdir) / 'profile'))
  try:
    yield
  finally:
    if steps and step == steps[1]:
      jax.profiler.stop_trace()
