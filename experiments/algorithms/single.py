"""One run of the experiment, in a process of its own; `run` starts them.

  python -m experiments.algorithms.single --runs=DIR --preset=dapo --seed=0

Without --preset it makes the seed's warm start, from which all its runs begin.
A run that ended leaves result.json in its folder; one that was killed before
that is made anew.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging

from experiments import common
from experiments.algorithms import settings
from rlax_llm import export
from rlax_llm import train
from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.experience import evaluation
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.workdir.metrics import read_jsonl

_RUNS = flags.DEFINE_string('runs', 'runs/algorithms', 'Where runs are kept.')
_PRESET = flags.DEFINE_string('preset', '', "Which; '': the warm start.")
_SEED = flags.DEFINE_integer('seed', 0, 'Of the run.')
_STALENESS = flags.DEFINE_integer('staleness', 0, 'See control.staleness.')
_STEPS = flags.DEFINE_integer('steps', 40, 'Steps of RL.')
_MINIBATCHES = flags.DEFINE_integer('minibatches', 1, 'Updates on a batch.')
_SIZE = flags.DEFINE_enum('size', 'quickstart', settings.SIZES, 'See settings.')

RESULT = 'result.json'


def made_with(arm: settings.Arm | None) -> dict[str, Any]:
  """Returns the flags that decide what a run, or the warm start, comes to."""
  made: dict[str, Any] = {'size': _SIZE.value}
  if arm is not None:
    made |= {'steps': _STEPS.value, 'minibatches': _MINIBATCHES.value}
  return made


def judge(config: Config, workdir: str) -> dict[str, float]:
  """Returns accuracy and pass@k of a run's last parameters."""
  config.evaluate.samples = settings.SAMPLES
  run = make_run(config)
  _, params, _ = run.states.restore_params(workdir)
  with Verifier(run.config.task, run.config.seed) as verifier:
    engine = run.engine(evaluation.evaluation_sampling(run))
    return evaluation.Evaluator(run, engine, verifier).evaluate(
      params, evaluation.held_out_problems(run)
    )


def write_result(
  config: Config, workdir: pathlib.Path, seconds: float, made: dict[str, Any]
) -> dict[str, Any]:
  """Evaluates a run that is trained, and writes its result.json."""
  values = judge(config, str(workdir))
  each = config.task.prompts_per_step * config.rollout.samples_per_prompt
  result = {
    **made,
    'pass_at_1': values['evaluate/accuracy'],
    f'pass_at_{settings.SAMPLES}': values[
      f'evaluate/pass_at_{settings.SAMPLES}'
    ],
    'seconds': seconds,
    'curve': [
      {
        'step': row['step'],
        'samples': row['step'] * each,
        'accuracy': row['evaluate/accuracy'],
      }
      for row in read_jsonl(workdir / 'evaluations.jsonl')
    ],
  }
  temporary = workdir / f'{RESULT}.partial'
  temporary.write_text(json.dumps(result), encoding='utf-8')
  temporary.rename(workdir / RESULT)
  return result


def main(argv: list[str]) -> None:
  """Trains and evaluates one run, from its start."""
  del argv
  logging.set_verbosity(logging.WARNING)  # checkpoints say much
  common.use_device()
  runs = pathlib.Path(_RUNS.value) / f'seed_{_SEED.value}'
  warm, teacher = runs / 'warm', runs / settings.Arm(settings.TEACHER).folder
  arm = None
  if _PRESET.value:
    arm = settings.Arm(_PRESET.value, _STALENESS.value)
    workdir = runs / arm.folder
    config = settings.make_config(
      arm,
      _SEED.value,
      _SIZE.value,
      _STEPS.value,
      _MINIBATCHES.value,
      str(warm / 'weights'),
      str(teacher),
    )
  else:
    workdir = warm
    config = settings.make_warm_config(_SEED.value, _SIZE.value)
  shutil.rmtree(workdir, ignore_errors=True)
  start = time.perf_counter()
  train.train(dataclasses.replace(config), str(workdir), with_report=False)
  seconds = time.perf_counter() - start
  if workdir == warm:
    export.export(str(workdir), str(workdir / 'weights'))
  print(write_result(config, workdir, seconds, made_with(arm)), flush=True)
  if workdir != teacher:  # The others' parameters are of no further use.
    shutil.rmtree(workdir / 'checkpoints')


if __name__ == '__main__':
  app.run(main)
