"""The supervised warm start, through the same update as everything else."""

from collections.abc import Callable
import dataclasses
import itertools

from rlax_llm.components import Run
from rlax_llm.config import freeze
from rlax_llm.learning import learner as learners
from rlax_llm.learning import presets
from rlax_llm.learning import sft
from rlax_llm.learning import update as updates
from rlax_llm.ops.sampling import Sampling
from rlax_llm.types import Params


def warm_start(
  run: Run,
  params: Params,
  show: Callable[[int, float], None],
  left_out: list[str] | None = None,
) -> Params:
  """Returns parameters after imitation of the task's traces.

  Args:
    run: the run.
    params: donated.
    show: receives (steps done, loss in nats per token) now and then.
    left_out: see `Run.demonstrations`.

  Raises:
    ConfigError: see `Run.demonstrations`.
  """
  config = run.config.sft
  optimizer = updates.make_optimizer(sft.learning_config(config), config.steps)
  learning = freeze(
    dataclasses.replace(
      run.config.learning, minibatches=1, old_logprobs='recompute'
    )
  )
  learner = learners.Learner(
    run,
    algorithm=presets.SUPERVISED,
    sampling=Sampling(),
    optimizer=optimizer,
    name='sft',
    learning=learning,
  )
  state = run.states.init_state(params, optimizer, 'sft')
  demonstrations = run.demonstrations(left_out)
  for step in range(config.steps):
    samples = list(itertools.islice(demonstrations, config.sequences_per_step))
    state, values = learner.update(state, learner.put(learner.pack(samples)))
    if step % 10 == 9 or step + 1 == config.steps:
      show(step + 1, float(values['learning/loss']))
  return state.params
