"""The supervised warm start, through the same update as everything else."""

from collections.abc import Callable
from collections.abc import Iterator
import itertools

from rlax_llm.config import SFTConfig
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.learner import Learner
from rlax_llm.types import TrainState


def fine_tune(
  state: TrainState,
  *,
  learner: Learner,
  demonstrations: Iterator[Sample],
  config: SFTConfig,
  show: Callable[[int, float], None],
) -> TrainState:
  """Returns a state after `config.steps` updates on demonstrations.

  Args:
    state: donated.
    learner: of the objective `presets.SUPERVISED`.
    demonstrations: prompts with their completions.
    config: of the warm start.
    show: receives (steps done, loss in nats per token) every ten steps.
  """
  for step in range(config.steps):
    samples = list(itertools.islice(demonstrations, config.sequences_per_step))
    state, values = learner.update(state, learner.put(learner.pack(samples)))
    if step % 10 == 9 or step + 1 == config.steps:
      show(step + 1, float(values['learning/loss']))
  return state
