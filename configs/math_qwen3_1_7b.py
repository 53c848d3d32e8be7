"""DeepScaleR-style maths from a published Qwen3-1.7B, over a mesh.

  python -m rlax_llm.train --config=configs/math_qwen3_1_7b.py \
    --config.model.pretrained=FOLDER --config.task.path=TRAIN.jsonl \
    --config.task.held_out_path=MATH500.jsonl --workdir=DIR

Files of one JSON object per line with `problem` and `answer`, as MATH-500 and
AIME collections have. Answers are compared as mathematical objects by
math-verify (extra [math]). As in DeepScaleR, the context is short at first: to
lengthen it, raise rollout.max_new_tokens and go on from the export of the
first stage. Objective: DAPO's token mean, clip-higher and soft overlong
punishment (https://arxiv.org/abs/2503.14476).

Parameters and optimizer state are divided over fsdp ways, and gathered in
bfloat16 once for each rollout phase. For 8 accelerators. Not run yet: no
hardware, time or accuracy is recorded.
"""

from rlax_llm.config import Config


def get_config() -> Config:
  """Returns the config; `model.pretrained` and the files are to be given."""
  config = Config()
  config.num_steps = 500
  config.algorithm.name = 'dapo'
  config.task.name = 'jsonl'
  config.task.path = 'train.jsonl'
  config.task.options = {'question_field': 'problem', 'answer_field': 'answer'}
  config.task.prompts_per_step = 128
  config.task.answer_format = 'boxed'
  config.task.match = 'math'
  config.task.instruction = (
    'Reason step by step, and put the final answer within \\boxed{}.'
  )
  config.task.chat_template = True
  config.task.rewards = {'correct': 1.0, 'length': 0.5}
  config.task.length_limit = 4096
  config.task.length_cache = 1024
  config.task.verifier_processes = 16
  config.model.pretrained = 'Qwen3-1.7B'
  config.mesh.fsdp = 8
  config.rollout.samples_per_prompt = 16
  config.rollout.prompt_length = 512
  config.rollout.max_new_tokens = 4096
  config.rollout.slots = 512
  config.rollout.history = 4
  config.rollout.min_capacity = 1024
  config.control.widths = (1, 4, 8)
  config.control.run_ahead_rows = 64
  config.learning.learning_rate = 1e-6
  config.learning.warmup_steps = 10
  config.learning.b2 = 0.99
  config.learning.row_length = 8192
  config.learning.microbatch_rows = 8
  config.learning.remat = True
  config.learning.precision.parameters = 'float32'
  config.learning.precision.compute = 'bfloat16'
  config.learning.precision.head = 'bfloat16'
  config.checkpoint.every = 20
  config.evaluate.every = 50
  config.evaluate.problems = 500
  return config
