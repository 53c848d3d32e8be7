"""Accuracy on held-out problems: avg@k and the unbiased pass@k.

python -m rlax_llm.evaluate --config=configs/quickstart.py --workdir=DIR
"""

from collections.abc import Sequence
import json
import sys
from typing import Any

import numpy as np

from rlax_llm import early_stop
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import to_dict
from rlax_llm.ops import metrics as metric_ops
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.runtime import processes
from rlax_llm.tasks import task as tasks
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import EVALUATE
from rlax_llm.types import Params
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metric_names


def held_out_problems(run: Run) -> list[tasks.Problem]:
  """Returns different held-out problems, the same at every call.

  Raises:
    ConfigError: if the task has fewer than `evaluate.problems`.
  """
  try:
    return tasks.distinct_problems(
      run.task, 'held_out', run.config.evaluate.problems
    )
  except ValueError as error:
    raise ConfigError(str(error)) from error


def evaluation_sampling(run: Run) -> Sampling:
  """Returns the law that answers are sampled from."""
  e = run.config.evaluate
  return Sampling(temperature=e.temperature, top_p=e.top_p)


def summarize(judged: Judged) -> dict[str, float]:
  """Returns avg@k as `evaluate/accuracy` and pass@k for k = 2, 4, ...

  A sample that the verifier could not judge counts as wrong, as is the custom:
  accuracies then have one denominator. `evaluate/unscorable` counts them.

  Args:
    judged: of held-out problems.
  """
  correct = judged.correct
  samples = correct.shape[1]
  values = {
    'evaluate/accuracy': float(np.mean(correct)),
    'evaluate/unscorable': int(np.sum(~judged.known)),
  }
  k = 2
  while k <= samples:
    values[f'evaluate/pass_at_{k}'] = float(
      np.mean(
        [metric_ops.pass_at_k(samples, int(row.sum()), k) for row in correct]
      )
    )
    k *= 2
  return values


def evaluate(
  run: Run,
  engine: RolloutEngine,
  params: Params,
  verifier: Verifier,
  problems: Sequence[tasks.Problem],
  *,
  drafter_params: Params = (),
) -> dict[str, float]:
  """Returns the metrics of `summarize`, and the tokens that the answers took.

  Args:
    run: see `judge`.
    engine: likewise.
    params: likewise.
    verifier: likewise.
    problems: likewise.
    drafter_params: likewise.
  """
  judged, values = judge(
    run, engine, params, verifier, problems, drafter_params=drafter_params
  )
  return summarize(judged) | values


def judge(
  run: Run,
  engine: RolloutEngine,
  params: Params,
  verifier: Verifier,
  problems: Sequence[tasks.Problem],
  *,
  drafter_params: Params = (),
) -> tuple[Judged, dict[str, float]]:
  """Samples and verifies every problem `evaluate.samples` times.

  The noise is that of the problem, not of the training step: two evaluations
  of one run are paired, which takes most of the noise out of their
  difference.

  Args:
    run: the run.
    engine: of the evaluation's law.
    params: the policy's.
    verifier: scores completions.
    problems: from `held_out_problems`.
    drafter_params: see `RolloutEngine.generate`.

  Returns:
    (what the verifier says, metrics of the tokens that the answers took and
    those of the task's own `score`).
  """
  samples = run.config.evaluate.samples
  requests = run.requests(problems, samples=samples, domain=EVALUATE, step=0)
  values: dict[str, float] = {}
  if run.config.evaluate.early_stop:
    found = early_stop.sample(
      run, engine, params, requests, drafter_params=drafter_params
    )
    texts, count = found.texts, len(found.texts)
    values = {
      'evaluate/tokens_mean': found.tokens / count,
      'evaluate/probe_tokens_mean': found.probe_tokens / count,
      'evaluate/stopped_fraction': found.stopped / count,
    }
  else:
    rollouts, _ = engine.generate(
      params, requests, RolloutState(), drafter_params=drafter_params
    )
    texts = [run.tokenizer.decode(r.tokens) for r in rollouts]
    values['evaluate/tokens_mean'] = float(
      np.mean([r.length for r in rollouts])
    )

  def score(mine: Sequence[int]) -> list[list[Any]]:
    scores = verifier.score(
      [problems[i // samples] for i in mine], [texts[i] for i in mine]
    )
    known = ~scores.unscorable
    # Pairs, as JSON has them.
    return [
      [bool(right), bool(told), sorted(own.items())]
      for right, told, own in zip(
        (scores.rewards == 1.0) & known, known, scores.metrics
      )
    ]

  scored = processes.share(score, range(len(texts)))
  correct, known = (
    np.reshape([row[i] for row in scored], (len(problems), samples))
    for i in range(2)
  )
  values |= metric_names.user_means(
    (dict(own) for *_, own in scored), evaluated=True
  )
  return Judged(correct, known), values


def main(argv: list[str]) -> None:
  """Evaluates the newest checkpoint and prints one JSON line."""
  del argv
  config: Config = _CONFIG.value
  run = make_run(config)
  for line in run.tokenizer.warnings if processes.is_writer() else ():
    print(f'warning: {line}', file=sys.stderr)
  manifest.check_workdir(_WORKDIR.value, to_dict(run.config))
  problems = held_out_problems(run)
  run.check_prompts(problems)
  executables.enable_compilation_cache()
  step, params, drafts = run.states.restore_params(_WORKDIR.value, drafter=True)
  engine = run.engine(evaluation_sampling(run))
  with Verifier(run.config.task, run.config.seed) as verifier:
    values = evaluate(
      run, engine, params, verifier, problems, drafter_params=drafts
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
