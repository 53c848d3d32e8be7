"""Models, prompts and timing that the benchmarks share."""

from collections.abc import Callable
import json
import statistics
from typing import Any

from absl import flags
import jax
import numpy as np

from rlax_llm.config import ControlConfig
from rlax_llm.config import freeze
from rlax_llm.config import MeshConfig
from rlax_llm.config import ModelConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.runtime import sharding
from rlax_llm.types import Request
from rlax_llm.types import TRAIN

# Shapes, by name. `tiny` is 1.1 M parameters.
MODELS: dict[str, dict[str, Any]] = {
  'tiny': dict(
    layers=4,
    width=128,
    heads=4,
    kv_heads=2,
    mlp_width=512,
    vocabulary=512,
    tied_head=False,
  ),
  '30m': dict(
    layers=8,
    width=512,
    heads=8,
    kv_heads=4,
    mlp_width=1536,
    vocabulary=4096,
    tied_head=True,
  ),
  # That of SmolLM2-135M.
  '135m': dict(
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    mlp_width=1536,
    vocabulary=49152,
    tied_head=True,
  ),
  '0.5b': dict(
    layers=24,
    width=896,
    heads=14,
    kv_heads=2,
    mlp_width=4864,
    vocabulary=151936,
    qkv_bias=True,
    rope_theta=1e6,
    max_positions=32768,
    tied_head=True,
  ),
}

MODEL = flags.DEFINE_enum('model', 'tiny', list(MODELS), 'Shape of the model.')
DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Of parameters and of the maths; head in float32.',
)
PROMPT = flags.DEFINE_integer('prompt', 32, 'Prompt length, tokens.')
NEW = flags.DEFINE_integer(
  'new', 128, 'New tokens per sample; there is no EOS.'
)
SAMPLES = flags.DEFINE_integer('samples', 8, 'Samples per prompt.')
REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed runs; medians are shown.')
SEED = flags.DEFINE_integer('seed', 0, 'Of parameters, prompts and noise.')

NO_EOS = (-1,)  # fixed work: no token stops a sample


def model_config() -> ModelConfig:
  """Returns the shape that the flags name."""
  return ModelConfig(**MODELS[MODEL.value])


def precision() -> PrecisionConfig:
  """Returns the dtypes that the flags name."""
  return freeze(PrecisionConfig(DTYPE.value, DTYPE.value))


def make_engine(
  model: LanguageModel, rows: int, samples: int, **options: Any
) -> RolloutEngine:
  """Returns an engine that samples --new tokens in one segment.

  Args:
    model: whose random parameters sample.
    rows: N.
    samples: of each prompt.
    **options: fields of RolloutConfig; and `own_drafter`, the engine's
      `drafter`, or `learned`.
  """
  given = {name: options.pop(name, None) for name in ('own_drafter', 'learned')}
  rollout = RolloutConfig(
    slots=rows,
    samples_per_prompt=samples,
    prompt_length=PROMPT.value,
    max_new_tokens=NEW.value,
    segment_forwards=NEW.value,
    **options,
  )
  return RolloutEngine(
    model,
    rollout=freeze(rollout),
    control=freeze(ControlConfig()),
    sampling=Sampling(),
    eos_ids=NO_EOS,
    seed=SEED.value,
    mesh=sharding.make_mesh(MeshConfig(data=1)),
    drafter=given['own_drafter'],
    learned=given['learned'],
  )


def make_requests(rows: int, samples: int, vocabulary: int) -> list[Request]:
  """Returns requests that fill `rows` slots once."""
  return [
    Request(prompt, samples, TRAIN, 0, i)
    for i, prompt in enumerate(random_prompts(rows // samples, vocabulary))
  ]


def random_prompts(count: int, vocabulary: int) -> list[np.ndarray]:
  """Returns prompts of random tokens."""
  rng = np.random.default_rng(SEED.value)
  return [
    rng.integers(3, vocabulary, PROMPT.value).astype(np.int32)
    for _ in range(count)
  ]


def median_seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
  """Returns the median time of `run`, which returns when its work is done."""
  seconds = []
  for _ in range(REPEATS.value):
    start = clock()
    run()
    seconds.append(clock() - start)
  return statistics.median(seconds)


def emit(**fields: Any) -> None:
  """Prints one JSON line, the device included."""
  device = jax.devices()[0]
  print(
    json.dumps(
      {
        **fields,
        'model': MODEL.value,
        'dtype': DTYPE.value,
        'device': f'{device.platform}:{device.device_kind}',
      }
    ),
    flush=True,
  )
