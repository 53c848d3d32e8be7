"""Held-out accuracy: avg@k and the unbiased pass@k."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.experience import early_stop
from rlax_llm.ops import metrics as metric_ops
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.state import RolloutStats
from rlax_llm.runtime import processes
from rlax_llm.tasks import task as tasks
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import EVALUATE
from rlax_llm.types import Params
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
  """Returns the distribution that answers are sampled from."""
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


class Evaluator:
  """Judges policies on held-out problems.

  Attributes:
    stats: speed values of the last evaluation.
  """

  def __init__(
    self, run: Run, engine: RolloutEngine, verifier: Verifier
  ) -> None:
    """Makes an evaluator.

    Args:
      run: the run.
      engine: of the distribution that answers are sampled from.
      verifier: scores completions.
    """
    self._run = run
    self._engine = engine
    self._verifier = verifier

  @property
  def stats(self) -> RolloutStats:
    return self._engine.stats

  def evaluate(
    self,
    params: Params,
    problems: Sequence[tasks.Problem],
    *,
    drafter_params: Params = (),
  ) -> dict[str, float]:
    """Returns the metrics of `summarize` and the mean tokens of an answer.

    Args:
      params: see `judge`.
      problems: likewise.
      drafter_params: likewise.
    """
    judged, values = self.judge(params, problems, drafter_params=drafter_params)
    return summarize(judged) | values

  def judge(
    self,
    params: Params,
    problems: Sequence[tasks.Problem],
    *,
    drafter_params: Params = (),
  ) -> tuple[Judged, dict[str, float]]:
    """Samples and verifies every problem `evaluate.samples` times.

    The noise belongs to the problem, not to the training step: two evaluations
    of one run are paired, which removes most of the noise from their
    difference.

    Args:
      params: the policy's.
      problems: from `held_out_problems`.
      drafter_params: see `RolloutEngine.generate`.

    Returns:
      (verdicts of the verifier; metrics: mean tokens of an answer, and those of
      the task's own `score`).
    """
    samples = self._run.config.evaluate.samples
    requests = self._run.requests(
      problems, samples=samples, domain=EVALUATE, step=0
    )
    values: dict[str, float] = {}
    if self._run.config.evaluate.early_stop:
      found = early_stop.sample(
        self._run, self._engine, params, requests, drafter_params=drafter_params
      )
      texts, count = found.texts, len(found.texts)
      values = {
        'evaluate/tokens_mean': found.tokens / count,
        'evaluate/probe_tokens_mean': found.probe_tokens / count,
        'evaluate/stopped_fraction': found.stopped / count,
      }
    else:
      rollouts, _ = self._engine.generate(
        params, requests, RolloutState(), drafter_params=drafter_params
      )
      texts = [self._run.tokenizer.decode(r.tokens) for r in rollouts]
      values['evaluate/tokens_mean'] = float(
        np.mean([r.length for r in rollouts])
      )

    def score(mine: Sequence[int]) -> list[list[Any]]:
      scores = self._verifier.score(
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
