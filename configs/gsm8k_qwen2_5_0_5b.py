"""GRPO on GSM8K from a published Qwen2.5-0.5B-Instruct.

  python -m rlax_llm.train --config=configs/gsm8k_qwen2_5_0_5b.py \
    --config.model.pretrained=FOLDER --workdir=DIR

FOLDER holds the published config.json, safetensors and tokenizer files. The
dataset ("Training Verifiers to Solve Math Word Problems",
https://arxiv.org/abs/2110.14168) is read from where tensorflow-datasets
prepared it; without it the run names the command that does.

Objective: GRPO (https://arxiv.org/abs/2402.03300) with clip-higher and without
a KL term; the reward is 1 for the right number in \\boxed{} and 0.1 for a box.
Parameters and optimizer state are float32, maths is bfloat16. For one
accelerator of 40 GB or more: experiments/benchmarks/memory.py prints what its
steps need. Not run yet: no hardware, time or accuracy is recorded.
"""

from rlax_llm.config import Config


def get_config() -> Config:
  """Returns the config; `model.pretrained` is to be given."""
  config = Config()
  config.num_steps = 200
  config.algorithm.clip_high = 0.28
  config.task.name = 'gsm8k'
  config.task.prompts_per_step = 32
  config.task.answer_format = 'boxed'
  config.task.match = 'numeric'
  config.task.instruction = (
    'Reason step by step, and put the final number within \\boxed{}.'
  )
  config.task.chat_template = True
  config.task.rewards = {'correct': 1.0, 'format': 0.1}
  config.task.verifier_processes = 4
  config.model.pretrained = 'Qwen2.5-0.5B-Instruct'
  config.mesh.data = 1
  config.rollout.samples_per_prompt = 8
  config.rollout.prompt_length = 320
  config.rollout.max_new_tokens = 512
  config.rollout.slots = 128
  config.rollout.min_capacity = 512
  config.control.widths = (1, 4, 8)
  config.control.run_ahead_rows = 32
  config.learning.learning_rate = 1e-6
  config.learning.warmup_steps = 5
  config.learning.b2 = 0.99
  config.learning.row_length = 1024
  config.learning.microbatch_rows = 2
  config.learning.remat = True
  config.learning.precision.parameters = 'float32'
  config.learning.precision.compute = 'bfloat16'
  config.learning.precision.head = 'bfloat16'
  config.checkpoint.every = 20
  config.evaluate.every = 50
  config.evaluate.problems = 512
  return config
