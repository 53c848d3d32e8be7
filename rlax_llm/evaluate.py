"""Held-out accuracy of the newest checkpoint: avg@k and pass@k.

python -m rlax_llm.evaluate --config=configs/quickstart.py --workdir=DIR
"""

import json
import sys

from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.config import to_dict
from rlax_llm.experience import evaluation
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.runtime import processes
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.workdir import manifest


def main(argv: list[str]) -> None:
  """Evaluates the newest checkpoint and prints one JSON line."""
  del argv
  config: Config = _CONFIG.value
  run = make_run(config)
  for line in run.tokenizer.warnings if processes.is_writer() else ():
    print(f'warning: {line}', file=sys.stderr)
  manifest.check_workdir(_WORKDIR.value, to_dict(run.config))
  problems = evaluation.held_out_problems(run)
  run.check_prompts(problems)
  executables.enable_compilation_cache()
  step, params, drafts = run.states.restore_params(_WORKDIR.value, drafter=True)
  engine = run.engine(evaluation.evaluation_sampling(run))
  with Verifier(run.config.task, run.config.seed) as verifier:
    values = evaluation.Evaluator(run, engine, verifier).evaluate(
      params, problems, drafter_params=drafts
    )
  if processes.is_writer():
    if engine.stats.warning():
      print(f'warning: {engine.stats.warning()}', file=sys.stderr)
    json.dump({'step': step, **values}, sys.stdout)
    print()


if __name__ == '__main__':
  _CONFIG = flags.DEFINE_config()
  _WORKDIR = flags.DEFINE_workdir()
  flags.DEFINE_processes()
  flags.run(main)
