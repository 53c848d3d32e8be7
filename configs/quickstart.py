"""Arithmetic with written steps: the first thing to run.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR
"""

from rlax_llm.config import Config


def get_config() -> Config:
  """Returns the quickstart's config."""
  config = Config()
  config.num_steps = 100
  config.task.name = 'chain_sum'
  config.task.options = dict(min_terms=4,
                             max_terms=7,
                             min_digits=1,
                             max_digits=1)
  config.task.prompt_format = 'short'
  config.task.answer_format = 'scratchpad'
  config.task.trace_unfinished = 0.55
  config.task.prompts_per_step = 32
  config.model.tokenizer = '0123456789+-*/=()'
  config.model.layers = 4
  config.model.width = 128
  config.model.mlp_width = 384
  config.sft.steps = 400
  config.sft.learning_rate = 3e-3
  config.sft.sequences_per_step = 128
  config.rollout.prompt_length = 16
  config.rollout.max_new_tokens = 44
  config.rollout.slots = 256
  config.control.draft_max_rows = 32
  config.learning.learning_rate = 1e-4
  config.learning.b2 = 0.99
  config.learning.warmup_steps = 10
  config.evaluate.problems = 1024
  config.evaluate.every = 20
  return config
