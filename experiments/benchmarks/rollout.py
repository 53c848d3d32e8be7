"""Rollout speed: one JSON line for each number of rows.

  python -m experiments.benchmarks.rollout --rows=8,32,128 --width=1

Random parameters, random prompts, no EOS: every sample has --new tokens. The
first generate compiles and is not timed; medians of --repeats.
"""

import time

from absl import app
from absl import flags
import jax

from experiments.benchmarks import common
from experiments.common import use_device
from rlax_llm import sharding
from rlax_llm.config import ControlConfig
from rlax_llm.config import DRAFTERS
from rlax_llm.config import freeze
from rlax_llm.config import LEARNED
from rlax_llm.config import MeshConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

_ROWS = flags.DEFINE_list('rows', ['8', '32', '128'], 'Rows decoded together.')
_WIDTH = flags.DEFINE_integer('width', 1, 'Nodes verified in one forward.')
_DRAFTER = flags.DEFINE_enum('drafter', 'prompt_lookup',
                             [d for d in DRAFTERS if d not in LEARNED],
                             'With --width above 1.')


def main(argv: list[str]) -> None:
  """Times generate."""
  del argv
  use_device()
  dtype = common.DTYPE.value
  config = freeze(common.model_config())
  model = make_transformer(config, freeze(PrecisionConfig(dtype, dtype)))
  params = jax.jit(model.init)(jax.random.key(common.SEED.value))
  mesh = sharding.make_mesh(MeshConfig(data=1))
  for rows in map(int, _ROWS.value):
    samples = min(common.SAMPLES.value, rows)
    engine = RolloutEngine(model,
                           rollout=freeze(
                               RolloutConfig(
                                   slots=rows,
                                   samples_per_prompt=samples,
                                   prompt_length=common.PROMPT.value,
                                   max_new_tokens=common.NEW.value,
                                   drafter=_DRAFTER.value,
                                   width=_WIDTH.value,
                                   segment_forwards=common.NEW.value)),
                           control=freeze(ControlConfig()),
                           sampling=Sampling(),
                           eos_ids=common.NO_EOS,
                           seed=common.SEED.value,
                           mesh=mesh)
    requests = [
        Request(prompt, samples, TRAIN, 0, i) for i, prompt in enumerate(
            common.random_prompts(rows // samples, model.vocabulary))
    ]
    generate = lambda: engine.generate(params, requests, RolloutState())
    generate()
    compile_seconds = engine.pool.seconds
    seconds = common.median_seconds(generate, time.perf_counter)
    stats = engine.stats.metrics()
    common.emit(rows=rows,
                width=_WIDTH.value,
                drafter=_DRAFTER.value if _WIDTH.value > 1 else 'none',
                new_tokens=common.NEW.value,
                tokens_per_second=round(rows * common.NEW.value / seconds),
                accept_length=round(stats['rollout/accept_length'], 3),
                seconds=round(seconds, 4),
                compile_seconds=round(compile_seconds, 2))


if __name__ == '__main__':
  app.run(main)
