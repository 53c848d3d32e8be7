"""Scored groups for tests, made of numbers."""

import json
import types

import numpy as np

from rlax_llm.components import make_run
from rlax_llm.experience import groups as buffers
from rlax_llm.experience.collector import Collector
from rlax_llm.experience.groups import Buffer
from rlax_llm.experience.groups import Group
from rlax_llm.experience.training_state import restore_buffer
from rlax_llm.tasks.verifier.verifier import Scores
from rlax_llm.types import Request
from rlax_llm.types import Rollout


def make_group(
  rewards,
  *,
  correctness=None,
  known=None,
  unscorable=None,
  parts=None,
  lengths=None,
  texts=None,
  finished=None,
  survival=None,
  prompt='a',
):
  """A group; by default nothing is missing and nothing is shaped."""
  count = len(rewards)
  rewards = np.array(rewards, np.float32)
  correctness = (
    rewards if correctness is None else np.array(correctness, np.float32)
  )
  known = np.ones(count, bool) if known is None else np.array(known, bool)
  unscorable = ~known if unscorable is None else np.array(unscorable, bool)
  lengths = lengths or [3] * count
  request = Request(
    np.array([ord(c) for c in prompt], np.int32), count, 0, 0, 0
  )
  rollouts = tuple(
    Rollout(
      tokens=np.full(length, 2 + i % 4, np.int32),
      length=length,
      finished=finished[i] if finished else True,
      token_version=np.zeros(length, np.int32),
      behaviour_logprobs=np.zeros(length, np.float32),
      drafted=np.zeros(length, bool),
      forwards=length,
      request=request,
      index=i,
      survival=survival[i] if survival else 1.0,
    )
    for i, length in enumerate(lengths)
  )
  parts = parts or {'correct': correctness}
  return Group(
    problem=types.SimpleNamespace(prompt=prompt, prompt_id=prompt),
    rollouts=rollouts,
    texts=tuple(texts or ['1'] * count),
    rewards=rewards,
    correctness=correctness,
    known=known,
    unscorable=unscorable,
    parts={k: np.array(v, np.float32) for k, v in parts.items()},
  )


class ScriptedVerifier:
  """A verifier whose verdicts are scripted.

  Attributes:
    script: (index of the sample within a call, samples of the call) -> (what
      `correct` gives, whether the verifier fails).
    shaping: (name, weight, value by index); None: none.
    weight: of `correct`.
  """

  def __init__(self, script, shaping=None, weight=1.0):
    self.script, self.shaping, self.weight = script, shaping, weight

  def reward(self, problems, completions, *, tokens, finished):
    del problems, tokens, finished
    return self._scores(len(completions), self.shaping)

  def score(self, problems, completions):
    del problems
    return self._scores(len(completions), None)

  def _scores(self, count, shaping):
    found = [self.script(i, count) for i in range(count)]
    lost = np.array([fails for _, fails in found], bool)
    correct = np.array([value for value, _ in found], np.float32)
    parts = {'correct': np.where(lost, 0, correct)}
    rewards = correct * np.float32(self.weight if shaping else 1)
    if shaping:
      name, weight, value = shaping
      more = np.array([value(i) for i in range(count)], np.float32)
      parts[name] = np.where(lost, 0, more)
      rewards = rewards + np.float32(weight) * more
    return Scores(np.where(lost, 0, rewards), parts, lost, [{}] * len(lost))


def collect(config, verifier, *, collecting=None, steps=1, step=0):
  """Returns (run, collecting, groups of the last step) of a scripted verifier.

  Args:
    config: of the run.
    verifier: gives its rewards.
    collecting: one that continues; None: a new one.
    steps: how many to collect.
    step: the first of them.
  """
  collecting = collecting or Collecting(make_run(config), verifier)
  groups = []
  for number in range(step, step + steps):
    groups = collecting.collect(None, number)
    collecting.commit()
  return collecting.run, collecting, groups


class Collecting:
  """Collects the groups of steps as `train_step` does, without learning.

  Attributes:
    buffer: after the last step that was committed.
  """

  def __init__(self, run, verifier, score=None):
    self.run = run
    score = score or (
      lambda params, samples: [
        np.zeros(len(s.completion), np.float32) for s in samples
      ]
    )
    self.collector = Collector(
      run, run.engine(run.sampling), verifier, run.rollout_store(), score
    )
    self.buffer = self._next = Buffer()

  def collect(self, params, step):
    """The groups of a step; the buffer stays as it was before `commit`."""
    if params is None:
      params = self.run.states.init_params()
    self.collector.publish(step, params)
    for batch, groups in self.collector.plan(self.buffer, step):
      self.collector.dispatch(batch, step, groups)
      self.collector.reward(batch)
    found, self._next = self.collector.take(step)
    return found

  def commit(self):
    self.buffer = self._next

  def metrics(self):
    return self.collector.metrics()

  def dump(self):
    """The buffer as a checkpoint holds it."""
    return json.loads(json.dumps(buffers.dump(self.buffer)))

  def restore(self, record):
    self.buffer = restore_buffer(self.run, record)
