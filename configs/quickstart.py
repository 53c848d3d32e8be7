"""Arithmetic with written steps: the first thing to run.

  python -m rlax_llm.train --config=configs/quickstart.py --workdir=DIR

Problems: reasoning-gym's chain_sum, 4 to 7 one-digit terms, in the short form
'4+3-2+6='. The model has 0.8 M parameters over an alphabet of 17 characters. It
is first fine-tuned on worked solutions, '(+3=7-2=5+6=11)11', 55 % of which stop
before the last term and answer with the sum so far. Imitation therefore stays
below half. GRPO rewards right answers only, and the policy learns to finish.

Over seeds 0, 1, 2 held-out accuracy (1,024 problems, temperature 1) goes from
0.43-0.45 after imitation to 0.81-0.89 after 100 steps, in 291 to 351 s on 2
cores of an AMD EPYC that other work shared. With rewards shuffled among samples
(--config.task.permute_rewards) it goes from 0.43 to 0.42.
"""

from rlax_llm.config import Config


def get_config() -> Config:
  """Returns the quickstart's config."""
  config = Config()
  config.num_steps = 100
  config.algorithm.divergence = 'k3'
  config.algorithm.kl_coefficient = 0.2
  config.task.name = 'chain_sum'
  config.task.options = dict(
    min_terms=4, max_terms=7, min_digits=1, max_digits=1
  )
  config.task.prompt_format = 'short'
  config.task.answer_format = 'scratchpad'
  config.task.trace_unfinished = 0.55
  config.task.prompts_per_step = 32
  # Problems recur every 10 steps: what was sampled then is drafted from.
  config.task.epoch_prompts = 320
  config.model.tokenizer = '0123456789+-*/=()'
  config.model.layers = 4
  config.model.width = 128
  config.model.mlp_width = 384
  config.sft.steps = 550
  config.sft.learning_rate = 3e-3
  config.sft.sequences_per_step = 128
  config.rollout.prompt_length = 16
  config.rollout.max_new_tokens = 44
  config.rollout.slots = 256
  # Annealed weights are easily upset: a low rate, reached slowly; and an
  # epsilon above the gradient's own size (some 1e-4), so that Adam does not
  # blow up directions in which there is only noise to full steps.
  config.learning.learning_rate = 1e-4
  config.learning.epsilon = 1e-3
  config.learning.b2 = 0.99
  config.learning.warmup_steps = 10
  # Late in the run few samples have a signal: small microbatches pad less.
  config.learning.row_length = 192
  config.learning.microbatch_rows = 1
  config.mesh.data = 1  # too small to divide
  config.evaluate.problems = 1024
  config.evaluate.every = 25
  return config
