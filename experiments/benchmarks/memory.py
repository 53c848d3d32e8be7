"""What the largest steps of a config need on each device, without running it.

  python -m experiments.benchmarks.memory --config=configs/gsm8k_lora.py \
    --config.model.pretrained=FOLDER [--devices=8]

Compiles the widest segment and the update from shapes alone and prints XLA's
memory analysis: nothing is allocated, no weights are read. Compiled for the
devices that are there; --devices simulates as many on CPU. There XLA widens
bfloat16 maths to float32 and drops the barriers by which rematerialisation
works: the update's figure is then an upper bound.
"""

import os

from absl import flags as absl_flags
import jax
import numpy as np

from rlax_llm import config as config_lib
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.learning import learner as learners
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.runtime import flags
from rlax_llm.runtime import sharding
from rlax_llm.types import Batch

_DEVICES = absl_flags.DEFINE_integer(
  'devices', 0, 'simulated on CPU; 0: those there are'
)


def abstract_batch(run: Run, learner: learners.Learner) -> Batch:
  """Returns the shapes of the largest batch, of completions of T tokens."""
  rollout = run.config.rollout
  group = config_lib.largest_group(rollout, run.config.control)
  count = (
    run.config.task.prompts_per_step * group // run.config.learning.minibatches
  )
  sample = Sample(
    prompt=np.zeros(rollout.prompt_length, np.int32),
    completion=np.zeros(rollout.max_new_tokens, np.int32),
    advantage=1.0,
    behaviour_logprobs=np.zeros(rollout.max_new_tokens, np.float32),
  )
  batch = learner.pack([sample] * count)
  rows = sharding.microbatches(run.mesh)
  anywhere = sharding.replicated(run.mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      np.shape(x),
      np.asarray(x).dtype,
      sharding=rows if np.ndim(x) else anywhere,
    ),
    batch,
  )


def measure(run: Run) -> dict[str, int]:
  """Returns bytes on one device: of the state, the update and the segment."""
  learner = run.learner()
  state = run.states.abstract_state()
  learner.compile_update(state, abstract_batch(run, learner))
  engine = run.engine(run.sampling)
  engine.compile_largest(
    state.params, drafter_params(run.states.abstract_all())
  )
  held = sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(state)
  )
  return {'state': held, 'update': run.pool.memory_bytes('update')} | {
    f'segment, {rows} rows, W = {arm.width}': size
    for (rows, _, arm), size in engine.segment_bytes().items()
  }


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  if _DEVICES.value:
    jax.config.update('jax_platforms', 'cpu')
    os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '')
      + f' --xla_force_host_platform_device_count={_DEVICES.value}'
    )
  run = make_run(_CONFIG.value)
  for name, size in measure(run).items():
    print(f'{name:24} {size / 1e9:8.2f} GB on each of {run.mesh.size} devices')


if __name__ == '__main__':
  _CONFIG = flags.DEFINE_config()
  flags.run(main)
