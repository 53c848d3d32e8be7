"""A tiny model, a toy task and a tiny config, for tests and notebooks."""

from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

from rlax_llm.config import Config
from rlax_llm.config import freeze
from rlax_llm.config import ModelConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.config import TaskConfig
from rlax_llm.tasks import task as tasks

if TYPE_CHECKING:
  from rlax_llm.models.language_model import LanguageModel

ALPHABET = 'abcd.'


def tiny_model_config(vocabulary: int = 7, **overrides: Any) -> ModelConfig:
  """Returns the frozen config of `tiny_model`.

  Args:
    vocabulary: V.
    **overrides: fields of ModelConfig.
  """
  fields: dict[str, Any] = dict(
    vocabulary=vocabulary,
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    mlp_width=32,
    max_positions=256,
    init_scale=4.0,
  )
  return freeze(ModelConfig(**(fields | overrides)))


def tiny_model(vocabulary: int = 7, **overrides: Any) -> 'LanguageModel':
  """Returns a float32 transformer of two layers and width 16.

  Args:
    vocabulary: V.
    **overrides: fields of ModelConfig.
  """
  # Imported here: the toy task also runs in verifier processes, which start
  # ten times as fast without jax.
  from rlax_llm.models.transformer import make_transformer

  return make_transformer(
    tiny_model_config(vocabulary, **overrides), freeze(PrecisionConfig())
  )


class ToyTask:
  """Repeat the prompt's letter: the reward is its share of the completion.

  Dense, verifiable and learned from random parameters within some tens of
  steps; the best reward of every prompt is 1.
  """

  def __init__(self, config: TaskConfig, seed: int) -> None:
    del config, seed

  def problem(self, split: tasks.Split, index: int) -> tasks.Problem:
    """Returns one of two problems: a and b train, c and d are held out."""
    letter = ('ab' if split == 'train' else 'cd')[index % 2]
    return tasks.make_problem(
      'toy', letter, letter * 3, letter * 3, {'letter': letter}
    )

  def score(self, entry: Mapping[str, Any], completion: str) -> float:
    """Returns the share of the completion that is the prompt's letter."""
    return completion.count(entry['letter']) / max(len(completion), 1)

  def num_problems(self, split: tasks.Split) -> int:
    """Returns 2."""
    del split
    return 2


def tiny_config() -> Config:
  """Returns a config that trains the tiny model on the toy task in seconds."""
  config = Config()
  config.num_steps = 4
  config.task.name = 'rlax_llm.testing:ToyTask'
  config.task.prompts_per_step = 4
  config.task.answer_format = 'all'
  config.model.tokenizer = ALPHABET
  config.model.layers = 2
  config.model.width = 16
  config.model.heads = 4
  config.model.kv_heads = 2
  config.model.mlp_width = 32
  config.model.max_positions = 256
  config.rollout.slots = 8
  config.rollout.samples_per_prompt = 4
  config.rollout.prompt_length = 4
  config.rollout.max_new_tokens = 8
  config.rollout.min_capacity = 8
  config.rollout.width = 3
  config.control.min_slots = 8
  config.learning.learning_rate = 3e-3
  config.learning.microbatch_rows = 8
  config.evaluate.problems = 2
  config.checkpoint.every = 2
  return config
