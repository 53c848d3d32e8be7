"""Sequences of faults: the run ends with the bits of an undisturbed one.

Forty sequences of three faults in one process; tests/test_crash.py does the
same to real processes.
"""

import collections
import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import time

from config_helpers import tiny_config
from config_helpers import train_quietly
import file_helpers
import pytest

from rlax_llm import train
from rlax_llm import train as training
from rlax_llm.components import Run
from rlax_llm.experience.evaluation import Evaluator
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.runtime.files import WriteError
from rlax_llm.runtime.stopping import Stopped
from rlax_llm.workdir import checkpoint
from rlax_llm.workdir.progress import Progress

SEED, SEQUENCES, FAULTS = 0, 40, 3
VALUES = (
  'tokens_sampled',
  'tokens_sha256',
  'parameters_sha256',
  'reward_first',
  'reward_last',
  'accuracy_before',
  'accuracy_after',
)
FILES = ('metrics.jsonl', 'evaluations.jsonl', 'samples.jsonl')
# Where faults come: a function that is called there, and its owner.
PLACES = {
  'step': (training, 'train_step'),
  'evaluation': (Evaluator, 'evaluate'),
  'checkpoint': (checkpoint.Checkpoints, 'save'),
  'warm start': (Run, 'warm_start'),
  'drafter warm-up': (DrafterTraining, 'warm_up'),
}
KINDS = ('stop', 'hard end', 'disk full')


class Killed(BaseException):
  """Ends a run without anything being saved for it."""


class Disturbance:
  """A clock whose readings count as events; at one of them a fault comes."""

  def __init__(self, kind=None, place=None, event=0):
    self._kind, self._place, self._left = kind, place, event
    self._inside = []
    self.events = collections.Counter()  # by place
    self.came = False
    self.stack = contextlib.ExitStack()

  def clock(self):
    if self._inside:
      self.event(self._inside[-1])
    return time.perf_counter()

  def event(self, place):
    self.events[place] += 1
    if place != self._place or self.came:
      return
    self._left -= 1
    if self._left >= 0:
      return
    self.came = True
    if self._kind == 'stop':
      os.kill(os.getpid(), signal.SIGTERM)
    elif self._kind == 'hard end':
      raise Killed
    else:
      self.stack.enter_context(file_helpers.room(1))

  def watch(self, monkeypatch):
    """Notes which place the run is in; saving has events of its own."""
    for place, (owner, name) in PLACES.items():

      def watched(*args, _place=place, _call=getattr(owner, name), **kwargs):
        self._inside.append(_place)
        try:
          if _place == 'checkpoint':
            self.event(_place)
          result = _call(*args, **kwargs)
          if _place == 'checkpoint':
            self.event(_place)
          return result
        finally:
          self._inside.pop()

      monkeypatch.setattr(owner, name, watched)


def _config():
  """Everything on whose state a continued run depends, few steps."""
  return tiny_config(
    num_steps=5,
    sft__steps=4,
    sft__sequences_per_step=8,
    sft__warmup_steps=2,
    algorithm__kl_coefficient=0.1,
    control__over_provision=1.5,
    rollout__drafter='model',
    drafter__warmup_updates=2,
    evaluate__every=2,
    checkpoint__every=3,
  )


def _run(folder, disturbance):
  """Runs until the end or the fault; returns the summary, if it came to one."""
  with pytest.MonkeyPatch.context() as patch, disturbance.stack:
    disturbance.watch(patch)
    try:
      return train_quietly(
        _config(),
        folder,
        clock=disturbance.clock,
        display=Progress(io.StringIO(), clock=disturbance.clock),
      )
    except (Stopped, Killed, WriteError):
      assert disturbance.came
  return None


@pytest.fixture(name='shared_executables')
def _shared_executables(monkeypatch):
  """Makes the parts of a run once: their programs are compiled once, too."""
  made = []
  make_run = train.make_run

  def make_once(config, *, clock, on_boundary):
    if not made:
      made.append(make_run(config))
    return dataclasses.replace(made[0], clock=clock, on_boundary=on_boundary)

  monkeypatch.setattr(train, 'make_run', make_once)


@pytest.mark.slow
@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_sequences_of_faults_change_no_bit(tmp_path, shared_executables):
  """Law: after stops, hard ends and full disks at any event of any place, one
  after another, the same call ends with the files and parameters of the
  undisturbed run, byte for byte.

  Mutants: an evaluation that was interrupted not repeated; evaluations.jsonl
  truncated to the restored step instead of the last known evaluation;
  metrics.jsonl not truncated.
  """
  whole = Disturbance()
  summary = _run(tmp_path / 'whole', whole)
  assert set(whole.events) == set(PLACES)
  print(f'seed {SEED}')
  rng = random.Random(SEED)
  seen = collections.Counter()
  for sequence in range(SEQUENCES):
    folder = tmp_path / str(sequence)
    history = []
    while len(history) < FAULTS:
      kind, place = rng.choice(KINDS), rng.choice(list(PLACES))
      disturbance = Disturbance(kind, place, rng.randrange(whole.events[place]))
      history.append((kind, place))
      if _run(folder, disturbance) is not None:
        break
      seen[kind, place] += 1
    got = _run(folder, Disturbance())
    for name in VALUES:
      assert got[name] == summary[name], (name, history)
    for name in FILES:
      assert (folder / name).read_bytes() == (
        tmp_path / 'whole' / name
      ).read_bytes(), (name, history)
  print(
    json.dumps({f'{kind}, {place}': n for (kind, place), n in seen.items()})
  )
  # Every kind of fault came in every place.
  assert len(seen) == len(KINDS) * len(PLACES)
