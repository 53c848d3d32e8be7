"""Answers that are stopped once they no longer change. Evaluation only.

Every so many tokens a text is appended that asks for the answer, and what the
model says is read and taken back. When the last answers are equal, the sample
ends there: the probes of Dynasor, "Efficiently Serving LLM Reasoning Programs
with Certaindex", https://arxiv.org/abs/2412.20993.

Stopping by content changes the law that samples come from, and a sample of
that law has no known log-probability: training refuses it.
"""

import collections
from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from rlax_llm.components import Run
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.table import sample_key
from rlax_llm.tasks import extract
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Rollout


class Stopped(NamedTuple):
  """What samples came to."""

  texts: list[str]  # in the order of requests and of their samples
  tokens: int  # of the samples
  probe_tokens: int  # of what was asked in between, and of its answers
  stopped: int  # samples that ended because their answers were equal


def sample(
  run: Run,
  engine: RolloutEngine,
  params: Params,
  requests: Sequence[Request],
  *,
  drafter_params: Params = (),
) -> Stopped:
  """Samples requests with probes.

  A probe continues the sample's own tokens with the probe's; the sample then
  goes on as if it had never been asked, with the noise of its own positions.

  Args:
    run: its config says when to probe, and where answers stand.
    engine: of the evaluation's law.
    params: the policy's.
    requests: what to sample.
    drafter_params: see `RolloutEngine.generate`.
  """
  config, longest = run.config.evaluate, run.config.rollout.max_new_tokens
  decode = run.tokenizer.decode
  probe = np.asarray(run.encode(config.probe, prompt=False), np.int32)
  room = longest - len(probe) - config.probe_tokens
  known: dict[tuple, Rollout] = {}
  ends: dict[tuple, str] = {}
  answers: dict[tuple, list[str]] = collections.defaultdict(list)
  probe_tokens = stopped = 0

  def generate(earlier: dict[tuple, Rollout], limit: int) -> list[Rollout]:
    state = RolloutState(earlier=earlier)
    return engine.generate(
      params, requests, state, limit=limit, drafter_params=drafter_params
    )[0]

  while True:
    known = _by_key(generate(known, config.probe_every))
    going = {
      key: r for key, r in known.items() if r.suspended and r.length <= room
    }
    if not any(r.suspended for r in known.values()):
      break
    asked = {
      key: dataclasses.replace(r, suspended=key in going)
      for key, r in known.items()
    }
    asked |= {key: _with_tokens(r, probe) for key, r in going.items()}
    found = _by_key(generate(asked, config.probe_tokens))
    for key in going:
      probe_tokens += found[key].length - going[key].length
      text = decode(found[key].tokens)
      answer = extract.extract_answer(text, run.config.task.answer_format)
      answers[key].append(answer or '')
      last = answers[key][-config.early_stop :]
      if len(last) == config.early_stop and last[0] and len(set(last)) == 1:
        ends[key] = text
        stopped += 1
        known[key] = dataclasses.replace(known[key], suspended=False)
  texts = [ends.get(key) or decode(r.tokens) for key, r in known.items()]
  return Stopped(
    texts, sum(r.length for r in known.values()), probe_tokens, stopped
  )


def _by_key(rollouts: Sequence[Rollout]) -> dict[tuple, Rollout]:
  return {sample_key(r.request, r.index): r for r in rollouts}


def _with_tokens(rollout: Rollout, tokens: np.ndarray) -> Rollout:
  """Returns a rollout continued by tokens that nobody sampled."""
  count = len(tokens)
  return dataclasses.replace(
    rollout,
    tokens=np.concatenate([rollout.tokens, tokens]),
    length=rollout.length + count,
    token_version=np.concatenate(
      [rollout.token_version, np.zeros(count, np.int32)]
    ),
    behaviour_logprobs=np.concatenate(
      [rollout.behaviour_logprobs, np.zeros(count, np.float32)]
    ),
    drafted=np.concatenate([rollout.drafted, np.zeros(count, bool)]),
  )
