"""What drafting costs: seconds of a forward by what drafts, over W = 1.

  python -m experiments.benchmarks.drafting --model=135m --dtype=bfloat16 \
      --rows=8,32 --width=8 --device=gpu

Random parameters of target and drafter, random prompts, no EOS. One JSON line
for each number of rows and way to draft: the seconds of a segment over its
forwards, medians of --repeats after the first, which compiles. `wrong chain`
drafts constants: what verification costs by itself. `step` is that of one more
token drafted by the network, over a forward at W = 1.
"""

import statistics
from typing import Any

from absl import app
from absl import flags
import jax

from experiments.benchmarks import common
from experiments.common import constant_drafter
from experiments.common import use_device
from rlax_llm.config import freeze
from rlax_llm.drafting.drafters import Learned
from rlax_llm.models.draft_model import make_draft_model
from rlax_llm.models.transformer import make_transformer
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables

_ROWS = flags.DEFINE_list('rows', ['8', '32'], 'Rows decoded together.')
_WIDTH = flags.DEFINE_integer('width', 8, 'Nodes verified in one forward.')
_DEPTH = flags.DEFINE_integer('depth', 4, "Levels of the network's trees.")
_WAYS = flags.DEFINE_list('ways', [], 'To draft; none given: all.')


def list_ways(width: int, depth: int) -> dict[str, dict[str, Any]]:
  """Returns settings by name; `depth` is that of the network's drafts.

  Args:
    width: W of all but the first.
    depth: levels of the network's trees.
  """
  wide: dict[str, Any] = dict(width=width)
  return {
    'W = 1': dict(width=1),
    'wrong chain': wide | dict(own_drafter=constant_drafter(width)),
    'past rollouts': wide | dict(drafter='tree_cache'),
    'past rollouts (tree)': wide | dict(drafter='tree_cache', branching=2),
    'network': wide | dict(drafter='model', depth=width - 1),
    # Both choose W - 1 nodes of fewer: what is between them is drafting.
    'network (short)': wide | dict(drafter='model', depth=1),
    'network (long)': wide | dict(drafter='model', depth=width - 2),
    'network (tree)': wide | dict(drafter='model', depth=depth, branching=2),
    'hybrid': wide | dict(drafter='hybrid', depth=depth),
    'hybrid (tree)': wide | dict(drafter='hybrid', depth=depth, branching=2),
  }


def main(argv: list[str]) -> None:
  """Times segments."""
  del argv
  known = list_ways(_WIDTH.value, _DEPTH.value)
  for name in _WAYS.value:
    if name not in known:
      raise app.UsageError(f'--ways: {name!r} is none of {", ".join(known)}')
  use_device()
  executables.enable_compilation_cache()
  config, precision = freeze(common.model_config()), common.precision()
  model = make_transformer(config, precision)
  draft_model = make_draft_model(config, precision, model=model)
  key = jax.random.key(common.SEED.value)
  params, own = jax.jit(model.init)(key), jax.jit(draft_model.init)(key)
  width = _WIDTH.value
  for rows in map(int, _ROWS.value):
    samples = min(common.SAMPLES.value, rows)
    requests = common.make_requests(rows, samples, model.vocabulary)
    forward: dict[str, float] = {}
    for name, options in list_ways(width, _DEPTH.value).items():
      if _WAYS.value and name not in _WAYS.value:
        continue
      depth = options.pop('depth', None)
      learned = None if depth is None else Learned(draft_model, depth)
      engine = common.make_engine(
        model, rows, samples, learned=learned, **options
      )
      seconds = []
      for _ in range(common.REPEATS.value + 1):
        engine.generate(
          params,
          requests,
          RolloutState(),
          drafter_params=own if learned else (),
        )
        stats = engine.stats
        seconds.append(stats.segment_seconds / stats.forwards)
      forward[name] = statistics.median(seconds[1:])
      over = (
        {'over_w1': round(forward[name] / forward['W = 1'], 3)}
        if 'W = 1' in forward
        else {}
      )
      compared = {'W = 1', 'network (short)', 'network (long)'}
      if name == 'network (long)' and compared <= set(forward):
        more = (forward[name] - forward['network (short)']) / (width - 3)
        over['step'] = round(more / forward['W = 1'], 3)
      common.emit(
        rows=rows,
        drafts=name,
        width=options['width'],
        milliseconds=round(1e3 * forward[name], 4),
        accept_length=round(stats.tokens / stats.row_forwards, 3),
        compile_seconds=round(engine.pool.seconds, 1),
        **over,
      )


if __name__ == '__main__':
  app.run(main)
