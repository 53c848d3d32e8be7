"""A whole GRPO step: rollout, advantages, packing, one update.

  python -m experiments.benchmarks.step --prompts=16

Rewards are random, so that every sample has a signal and is trained on. The
first step compiles and is not timed; medians of --repeats.
"""

import statistics
import time

from absl import app
from absl import flags
import jax
import numpy as np

from experiments.benchmarks import common
from experiments.common import use_device
from rlax_llm import components as runs
from rlax_llm.config import Config
from rlax_llm.experience import advantages as credit
from rlax_llm.learning.batch import Sample
from rlax_llm.rollout.state import RolloutState
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_PROMPTS = flags.DEFINE_integer('prompts', 16, 'Prompts of a step.')


def make_config() -> Config:
  """Returns the config that the flags describe."""
  config = Config(seed=common.SEED.value)
  config.task.name = 'rlax_llm.testing:ToyTask'
  config.task.prompts_per_step = _PROMPTS.value
  config.model = common.model_config()
  config.rollout.samples_per_prompt = common.SAMPLES.value
  config.rollout.slots = _PROMPTS.value * common.SAMPLES.value
  config.rollout.prompt_length = common.PROMPT.value
  config.rollout.max_new_tokens = common.NEW.value
  config.rollout.segment_forwards = common.NEW.value
  config.rollout.width = 1
  config.learning.row_length = common.PROMPT.value + common.NEW.value
  config.learning.microbatch_rows = 16
  config.learning.precision.parameters = common.DTYPE.value
  config.learning.precision.compute = common.DTYPE.value
  config.mesh.data = 1
  return config


def main(argv: list[str]) -> None:
  """Times the step's parts."""
  del argv
  use_device()
  run = runs.make_run(make_config())
  # No EOS: fixed work.
  engine = run.engine(run.sampling, eos_ids=common.NO_EOS)
  learner = run.learner()
  state = run.states.init_state(run.states.init_params())
  prompts = common.random_prompts(_PROMPTS.value, run.model.vocabulary)
  rng = np.random.default_rng(common.SEED.value)
  shape = (_PROMPTS.value, common.SAMPLES.value)
  rollout_seconds, update_seconds = [], []
  for step in range(common.REPEATS.value + 1):
    start = time.perf_counter()
    requests = [
      Request(prompt, common.SAMPLES.value, TRAIN, step, i)
      for i, prompt in enumerate(prompts)
    ]
    rollouts, _ = engine.generate(state.params, requests, RolloutState(step))
    middle = time.perf_counter()
    rewards = rng.random(shape, np.float32)
    lengths = np.array([r.length for r in rollouts]).reshape(shape)
    advantages = credit.group_advantages(run, rewards, lengths, rewards, None)
    samples = [
      Sample(r.request.prompt, r.tokens, float(a), r.behaviour_logprobs)
      for r, a in zip(rollouts, advantages.reshape(-1))
    ]
    prepared, _ = learner.prepare(state.params, samples, None)
    state, _ = learner.learn(state, prepared)
    jax.block_until_ready(state)
    end = time.perf_counter()
    if step:
      rollout_seconds.append(middle - start)
      update_seconds.append(end - middle)
  rollout = statistics.median(rollout_seconds)
  update = statistics.median(update_seconds)
  common.emit(
    rows=_PROMPTS.value * common.SAMPLES.value,
    new_tokens=common.NEW.value,
    rollout_s=round(rollout, 3),
    update_s=round(update, 3),
    step_s=round(rollout + update, 3),
    compile_seconds=round(run.pool.seconds, 2),
  )


if __name__ == '__main__':
  app.run(main)
