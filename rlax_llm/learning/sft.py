"""The supervised warm start: imitation of written-step traces."""

from collections.abc import Sequence

import numpy as np

from rlax_llm.config import ConfigError
from rlax_llm.config import LearningConfig
from rlax_llm.config import SFTConfig
from rlax_llm.learning.batch import Sample


def learning_config(sft: SFTConfig) -> LearningConfig:
  """Returns the optimizer's settings: a warm-up, then cosine to 0."""
  return LearningConfig(
    learning_rate=sft.learning_rate,
    warmup_steps=sft.warmup_steps,
    schedule='cosine',
  )


def make_sample(
  prompt: Sequence[int], trace: Sequence[int], eos_id: int, longest: int
) -> Sample:
  """Returns a prompt and its trace, closed by EOS, as a training sample.

  Args:
    prompt: token ids.
    trace: token ids, without EOS.
    eos_id: what a completion ends with.
    longest: most tokens of both together.

  Raises:
    ConfigError: if they do not fit.
  """
  if len(prompt) + len(trace) + 1 > longest:
    raise ConfigError(
      f'a prompt of {len(prompt)} and a trace of {len(trace) + 1} tokens '
      f'exceed rollout.prompt_length + max_new_tokens = {longest}; raise '
      'rollout.max_new_tokens or take easier problems'
    )
  return Sample(
    prompt=np.asarray(prompt, np.int32),
    completion=np.asarray([*trace, eos_id], np.int32),
  )
