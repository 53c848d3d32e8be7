"""Probing at small scale: accuracy against tokens.

  python -m experiments.early_stop.run

Two warm-started policies answer held-out problems whole, and with probes after
every few tokens that end an answer once so many of them agree. One of them
says its result again and again, as reasoning models do; the other writes a
tally whose last number is not known before its end. "Efficiently Serving LLM
Reasoning Programs with Certaindex", https://arxiv.org/abs/2412.20993. Writes
stops.csv into --out.
"""

import pathlib
import statistics
from typing import Any

from absl import app
from absl import flags
import jax

from experiments import common
from experiments import long_tail
from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.experience import evaluation
from rlax_llm.runtime import executables
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import Params

_OUT = flags.DEFINE_string('out', 'experiments/early_stop', 'Where results go.')
_SIZE = flags.DEFINE_string('size', 'small', 'Of the model and the batch.')
_PROBLEMS = flags.DEFINE_integer('problems', 256, 'Held-out problems.')
_SEEDS = flags.DEFINE_integer('seeds', 2, 'Evaluations of a setting.')
_TASKS = flags.DEFINE_list('tasks', ['hesitating', 'tally'], 'Of `TASKS`.')
_SETTINGS = flags.DEFINE_list(
  'settings',
  ['2x4', '3x4', '4x4', '5x3', '2x8', '3x8', '2x16'],
  'Probes that must agree x tokens between two of them.',
)

TASKS = {
  'hesitating': 'experiments.early_stop.task:Hesitating',
  'tally': 'experiments.srt.task:LongTail',
}


def _config(task: str, seed: int, **changes: Any) -> Config:
  """Returns the config of a task, with room for what is said again."""
  return long_tail.make_config(
    seed,
    _SIZE.value,
    task__name=TASKS[task],
    task__answer_format='scratchpad',
    rollout__max_new_tokens=256,
    rollout__slots=64,
    evaluate__problems=_PROBLEMS.value,
    **changes,
  )


def measure(task: str, warm: Params, setting: str, seed: int) -> dict[str, Any]:
  """Returns the metrics of one evaluation.

  Args:
    task: of `TASKS`.
    warm: the policy.
    setting: 'AxB': A probes agree, one after every B tokens; '' for none.
    seed: of problems and noise.
  """
  agree, _, every = setting.partition('x')
  probes = (
    dict(
      evaluate__early_stop=int(agree),
      evaluate__probe=')',
      evaluate__probe_every=int(every),
      evaluate__probe_tokens=5,
    )
    if setting
    else {}
  )
  run = make_run(_config(task, seed, **probes))
  with Verifier(run.config.task, run.config.seed) as verifier:
    evaluator = evaluation.Evaluator(run, run.engine(run.sampling), verifier)
    return evaluator.evaluate(
      jax.tree.map(jax.numpy.asarray, warm), evaluation.held_out_problems(run)
    )


def summarize(
  task: str,
  setting: str,
  found: list[dict[str, Any]],
  plain: list[dict[str, Any]],
) -> dict[str, Any]:
  """Returns the row of a setting.

  Args:
    task: of `TASKS`.
    setting: see `measure`.
    found: by seed.
    plain: without probes, by seed.
  """
  mean = lambda name, of: statistics.mean(f.get(name, 0.0) for f in of)
  change = [
    f['evaluate/accuracy'] - p['evaluate/accuracy']
    for f, p in zip(found, plain)
  ]
  tokens = mean('evaluate/tokens_mean', found)
  probes = mean('evaluate/probe_tokens_mean', found)
  whole = mean('evaluate/tokens_mean', plain)
  return {
    'task': task,
    'setting': setting or 'whole',
    'accuracy': round(mean('evaluate/accuracy', found), 3),
    'accuracy_change': round(statistics.mean(change), 4),
    'accuracy_change_min': round(min(change), 4),
    'tokens': round(tokens, 1),
    'tokens_saved': round(1 - tokens / whole, 3),
    'probe_tokens': round(probes, 1),
    'saved_with_probes': round(1 - (tokens + probes) / whole, 3),
    'stopped': round(mean('evaluate/stopped_fraction', found), 3),
  }


def main(argv: list[str]) -> None:
  """Evaluates every task and setting; prints the shares of tokens saved."""
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  rows = []
  for task in _TASKS.value:
    warm = long_tail.warm_params(_config(task, 0), task)
    plain: list[dict[str, Any]] = []
    for setting in ['', *_SETTINGS.value]:
      found = [measure(task, warm, setting, s) for s in range(_SEEDS.value)]
      plain = plain or found
      rows.append(summarize(task, setting, found, plain))
      print(rows[-1], flush=True)
      common.write_csv(pathlib.Path(_OUT.value) / 'stops.csv', rows)


if __name__ == '__main__':
  app.run(main)
