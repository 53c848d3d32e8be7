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
from rlax_llm.config import DRAFTERS
from rlax_llm.config import freeze
from rlax_llm.config import LEARNED
from rlax_llm.models.transformer import make_transformer
from rlax_llm.rollout.state import RolloutState

_ROWS = flags.DEFINE_list('rows', ['8', '32', '128'], 'Rows decoded together.')
_WIDTH = flags.DEFINE_integer('width', 1, 'Nodes verified in one forward.')
_DRAFTER = flags.DEFINE_enum(
  'drafter',
  'prompt_lookup',
  [d for d in DRAFTERS if d not in LEARNED],
  'With --width above 1.',
)


def main(argv: list[str]) -> None:
  """Times generate."""
  del argv
  use_device()
  model = make_transformer(freeze(common.model_config()), common.precision())
  params = jax.jit(model.init)(jax.random.key(common.SEED.value))
  for rows in map(int, _ROWS.value):
    samples = min(common.SAMPLES.value, rows)
    engine = common.make_engine(
      model, rows, samples, drafter=_DRAFTER.value, width=_WIDTH.value
    )
    requests = common.make_requests(rows, samples, model.vocabulary)
    generate = lambda: engine.generate(params, requests, RolloutState())
    generate()
    compile_seconds = engine.pool.seconds
    seconds = common.median_seconds(generate, time.perf_counter)
    stats = engine.stats.metrics()
    common.emit(
      rows=rows,
      width=_WIDTH.value,
      drafter=_DRAFTER.value if _WIDTH.value > 1 else 'none',
      new_tokens=common.NEW.value,
      tokens_per_second=round(rows * common.NEW.value / seconds),
      accept_length=round(stats['rollout/accept_length'], 3),
      seconds=round(seconds, 4),
      compile_seconds=round(compile_seconds, 2),
    )


if __name__ == '__main__':
  app.run(main)
