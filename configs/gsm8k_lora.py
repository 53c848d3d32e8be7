"""GRPO on GSM8K with low-rank adapters on a frozen, published model.

  python -m rlax_llm.train --config=configs/gsm8k_lora.py \
    --config.model.pretrained=FOLDER --workdir=DIR
  python -m rlax_llm.export --workdir=DIR --out=ADAPTER --adapter

The task of gsm8k_qwen2_5_0_5b.py. Only adapters of rank 32 (LoRA,
https://arxiv.org/abs/2106.09685) are trained, by GRPO with a small KL term: the
base is held once, in bfloat16, the optimizer keeps a state for adapters alone,
and the reference policy is the base itself. Not run yet: no hardware, time or
accuracy is recorded.
"""

from rlax_llm.config import Config


def get_config() -> Config:
  """Returns the config; `model.pretrained` is to be given."""
  config = Config()
  config.num_steps = 200
  config.algorithm.kl_coefficient = 0.005
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
  config.model.lora.rank = 32
  config.model.lora.alpha = 64.0
  config.mesh.data = 1
  config.rollout.samples_per_prompt = 8
  config.rollout.prompt_length = 320
  config.rollout.max_new_tokens = 512
  config.rollout.slots = 128
  config.rollout.min_capacity = 512
  config.control.widths = (1, 4, 8)
  # Adapters take rates far above those of full fine-tuning.
  config.learning.learning_rate = 2e-5
  config.learning.warmup_steps = 5
  config.learning.row_length = 1024
  config.learning.microbatch_rows = 2
  config.learning.remat = True
  config.learning.precision.parameters = 'bfloat16'
  config.learning.precision.compute = 'bfloat16'
  config.learning.precision.head = 'bfloat16'
  config.checkpoint.every = 20
  config.evaluate.every = 50
  config.evaluate.problems = 512
  return config
