"""The train states before the first step of RL."""

from rlax_llm.experience.steps import Steps
from rlax_llm.types import TrainState
from rlax_llm.workdir.run_files import RunFiles


def initial_states(steps: Steps, files: RunFiles) -> dict[str, TrainState]:
  """Returns train states, after a warm start if the config has one.

  Args:
    steps: of the run.
    files: show and log the warm start, at step numbers below 0.
  """
  run, progress = steps.run, files.progress
  count, updates = run.config.sft.steps, run.config.drafter.warmup_updates
  params = run.states.init_params()

  def show(done: int, loss: float) -> None:
    values = {'sft/loss': loss}
    progress.update(done, values)
    files.writer.write(done - count - 1, values)
    run.on_boundary()

  def show_drafter(done: int, loss: float) -> None:
    progress.update(done, {'drafter/loss': loss})
    run.on_boundary()

  if count:
    progress.phase('warm start', count)
    left_out: list[str] = []
    params = run.warm_start(params, show, left_out)
    files.warn_left_out('demonstrations', left_out)
  states = run.states.init_all(params)
  if steps.leaps:
    states |= steps.leaps.init(states)
  if steps.drafter and updates:  # on the policy as RL finds it
    progress.phase('warm-up of the drafter', updates)
    left_out = []
    states['drafter'] = steps.drafter.warm_up(
      states['drafter'], states['policy'].params, show_drafter, left_out
    )
    files.warn_left_out('demonstrations', left_out)
  progress.phase('evaluate', 0)
  return states
