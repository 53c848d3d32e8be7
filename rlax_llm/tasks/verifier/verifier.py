"""Scores completions in killable worker processes."""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import json
import selectors
import sys
import threading
import time
from typing import Any
from typing import NamedTuple

import numpy as np

from rlax_llm import config as config_lib
from rlax_llm.tasks import task as task_lib
from rlax_llm.tasks.verifier import process as verifier_process
from rlax_llm.tasks.verifier import worker as verifier_worker

_START_SECONDS = 180.0  # a cold import of reasoning-gym on a network disk
_WINDOW = 32  # samples handed to a worker before the first is answered
_MAX_FAILED_STARTS = 3
_MAX_WARNINGS = 20  # kinds of failures that are shown


@dataclasses.dataclass(frozen=True)
class Scores:
  """What the verifier says of n samples."""

  rewards: np.ndarray  # float32[n]; 0.0, a placeholder, where unscorable
  # By name, `correct` always among them: float32[n]; likewise.
  parts: Mapping[str, np.ndarray]
  unscorable: np.ndarray  # bool[n]: hung, crashed or raised in the verifier
  # Of each sample, the metrics of the user's own that it has, by name.
  metrics: Sequence[Mapping[str, float]]


class Judged(NamedTuple):
  """What the verifier says of k samples of each problem."""

  correct: np.ndarray  # bool[problems, k]; False where not known
  known: np.ndarray  # bool[problems, k]: the verifier could judge the sample


class Verifier:
  """Scores completions in `config.verifier_processes` processes.

  A sample has `config.verifier_seconds` of CPU time and 2 GiB of memory. One
  that hangs or kills its worker is tried once more, alone in a fresh worker;
  if that fails too it is marked unscorable: its reward is missing. The others
  are not affected: answers depend on time through these limits only.
  Construction returns at once: workers start in the background.
  """

  def __init__(
    self,
    config: config_lib.TaskConfig,
    seed: int,
    *,
    warn: Callable[[str], None] | None = None,
  ) -> None:
    """Starts the workers.

    Args:
      config: the task, and the limits.
      seed: the run's seed.
      warn: receives one text for each kind of failure, with a traceback where
        there is one; None: stderr does.

    Raises:
      ValueError: a limit that is not positive.
    """
    if config.verifier_processes < 1:
      raise ValueError(
        f'task.verifier_processes={config.verifier_processes}; '
        'it must be at least 1'
      )
    if not config.verifier_seconds > 0:
      raise ValueError(
        f'task.verifier_seconds={config.verifier_seconds}; it must be above 0'
      )
    self._seconds = config.verifier_seconds
    self._names = tuple(dict.fromkeys(['correct', *config.rewards]))
    self._setup = (
      json.dumps({'config': config_lib.to_dict(config), 'seed': seed}).encode()
      + b'\n'
    )
    self._lock = threading.Lock()
    self._failed_starts = 0
    self._warn = warn or _to_stderr
    self._warned: set[str] = set()
    self._ids = itertools.count()
    self._workers = [
      verifier_process.Worker(self._setup)
      for _ in range(config.verifier_processes)
    ]

  def __enter__(self) -> 'Verifier':
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the workers; the verifier cannot be used afterwards."""
    for worker in self._workers:
      worker.close()
    self._workers = []

  def score(
    self, problems: Sequence[task_lib.Problem], completions: Sequence[str]
  ) -> Scores:
    """Returns what the task's own verifier says: the reward `correct`.

    Args:
      problems: n problems; the samples of one problem repeat it.
      completions: n texts, without the prompts.

    Returns:
      Scores of n samples, in their order.

    Raises:
      ValueError: different numbers of problems and completions.
      RuntimeError: the workers cannot start, or the verifier is closed.
    """
    return self._run(_Batch(problems, completions, None, ('correct',)))

  def reward(
    self,
    problems: Sequence[task_lib.Problem],
    completions: Sequence[str],
    *,
    tokens: Sequence[int],
    finished: Sequence[bool],
  ) -> Scores:
    """Returns the weighted rewards of completions, by `config.rewards`.

    Args:
      problems: n problems; the samples of one problem repeat it.
      completions: n texts, without the prompts.
      tokens: n lengths, EOS included.
      finished: n times, whether EOS was emitted.

    Returns:
      Scores of n samples, in their order.

    Raises:
      ValueError: different numbers of these.
      RuntimeError: the workers cannot start, or the verifier is closed.
    """
    if not len(completions) == len(tokens) == len(finished):
      raise ValueError(
        f'{len(completions)} completions, {len(tokens)} lengths '
        f'and {len(finished)} ends; give one of each a sample'
      )
    ends = [(int(t), bool(f)) for t, f in zip(tokens, finished)]
    return self._run(_Batch(problems, completions, ends, self._names))

  def _run(self, batch: '_Batch') -> Scores:
    """Returns the scores of a batch."""
    with self._lock:
      if not self._workers:
        raise RuntimeError('the verifier is closed')
      try:
        while batch.unanswered:
          self._advance(batch)
      except BaseException:
        # Answers to this batch must not reach the next one.
        self._workers = [self._replace(worker) for worker in self._workers]
        raise
      for kind, text in batch.errors.items():
        self._warn_once(
          kind,
          'a sample is unscorable, further ones like it are only '
          f'counted: {text}',
        )
      for kind, text in batch.faults.items():
        self._warn_once(
          kind, f'a metric is left out, as further ones like it are: {text}'
        )
      return Scores(batch.rewards, batch.parts, batch.unscorable, batch.metrics)

  def _warn_once(self, kind: str, text: str) -> None:
    if kind not in self._warned and len(self._warned) < _MAX_WARNINGS:
      self._warned.add(kind)
      self._warn(text)

  def _advance(self, batch: '_Batch') -> None:
    """Hands out samples, waits for one event, takes the answers."""
    with selectors.DefaultSelector() as selector:
      share = min(_WINDOW, -(-len(batch.queue) // len(self._workers)))
      for worker in self._workers:
        # Refilled by halves: one event then carries several answers.
        if len(worker.pending) <= _WINDOW // 2 and not worker.alone:
          for _ in range(min(share, len(batch.queue))):
            self._hand_out(batch.queue.popleft(), worker, batch)
        worker.send()
        selector.register(worker.stdout, selectors.EVENT_READ)
        if worker.unsent:
          selector.register(worker.stdin, selectors.EVENT_WRITE)
      now = time.monotonic()
      limit = min(self._deadline(worker) for worker in self._workers)
      selector.select(min(max(0.0, limit - now), 60.0))
    for place, worker in enumerate(self._workers):
      for message in worker.receive():
        if not worker.fault:
          self._take(worker, message, batch)
      # Judged after reading: this process may have been the slow one.
      if not worker.ended and time.monotonic() > self._deadline(worker):
        worker.fault = verifier_process.TOO_LONG
      if worker.ended or worker.fault:
        self._workers[place] = self._recover(worker, batch)

  def _deadline(self, worker: verifier_process.Worker) -> float:
    """Returns the monotonic time at which a worker counts as hung."""
    if not worker.ready:
      return worker.since + _START_SECONDS
    if not worker.pending:
      return float('inf')
    # The worker's own timer goes first.
    return worker.since + verifier_worker.wall_seconds(self._seconds) + 1

  def _take(
    self,
    worker: verifier_process.Worker,
    message: dict[str, Any],
    batch: '_Batch',
  ) -> None:
    worker.since = time.monotonic()
    if 'failed' in message:
      raise RuntimeError(f'the verifier cannot start:\n{message["failed"]}')
    if 'ready' in message:
      worker.ready = True
      self._failed_starts = 0
      return
    # Samples are answered in their order; whoever says otherwise is a process
    # of the user's code that writes where it must not.
    if not worker.pending or message.get('id') != worker.pending[0].id:
      worker.fault = verifier_process.NO_ANSWER
      return
    worker.alone = False
    batch.answer(worker.pending.popleft().sample, message)

  def _recover(
    self, worker: verifier_process.Worker, batch: '_Batch'
  ) -> verifier_process.Worker:
    """Replaces a worker that died or hung; returns the new one."""
    fresh = self._replace(worker)
    if not worker.ready:
      self._failed_starts += 1
      if self._failed_starts >= _MAX_FAILED_STARTS:
        raise RuntimeError(
          f'{_MAX_FAILED_STARTS} verifier processes ended while starting '
          f'(exit status {worker.process.poll()}); see standard error'
        )
      if worker.alone:
        self._retry(worker.pending.popleft().sample, fresh, batch)
    elif worker.pending:
      # Samples are answered in order: the first is the one in flight.
      suspect = worker.pending.popleft().sample
      if worker.alone:
        end = worker.describe_end()
        batch.answer(suspect, {'error': end, 'kind': end})
      else:
        self._retry(suspect, fresh, batch)
    batch.queue.extendleft(p.sample for p in reversed(worker.pending))
    return fresh

  def _retry(
    self, index: int, worker: verifier_process.Worker, batch: '_Batch'
  ) -> None:
    worker.alone = True
    self._hand_out(index, worker, batch)

  def _hand_out(
    self, index: int, worker: verifier_process.Worker, batch: '_Batch'
  ) -> None:
    pending = verifier_process.Pending(next(self._ids), index)
    worker.add(pending, batch.line(pending))

  def _replace(
    self, worker: verifier_process.Worker
  ) -> verifier_process.Worker:
    worker.close()
    return verifier_process.Worker(self._setup)


class _Batch:
  """The samples of one call and what is known of them."""

  def __init__(
    self,
    problems: Sequence[task_lib.Problem],
    completions: Sequence[str],
    ends: list[tuple[int, bool]] | None,
    names: Sequence[str],
  ) -> None:
    """Args: ends: (tokens, finished); None: only `correct` is asked for."""
    count = len(problems)
    if count != len(completions):
      raise ValueError(
        f'{count} problems and {len(completions)} completions; '
        'repeat each problem for its samples'
      )
    self._problems = problems
    self._completions = completions
    self._ends = ends
    self._texts: dict[int, str] = {}  # by the problem's identity
    self.queue = collections.deque(range(count))
    self.unanswered = count
    self.rewards = np.zeros(count, np.float32)
    self.parts = {name: np.zeros(count, np.float32) for name in names}
    self.unscorable = np.zeros(count, np.bool_)
    self.metrics: list[Mapping[str, float]] = [{}] * count
    self.errors: dict[str, str] = {}  # the first of each kind
    self.faults: dict[str, str] = {}  # of metrics, the first of each kind

  def line(self, pending: verifier_process.Pending) -> bytes:
    """Returns the request for a sample."""
    index = pending.sample
    problem = self._problems[index]
    text = self._texts.get(id(problem))
    if text is None:
      text = task_lib.problem_json(problem)
      self._texts[id(problem)] = text
    sample: dict[str, Any] = {'completion': self._completions[index]}
    if self._ends is not None:
      sample['tokens'], sample['finished'] = self._ends[index]
    return (
      f'{{"id": {pending.id}, "problem": {text}, {json.dumps(sample)[1:]}\n'
    ).encode()

  def answer(self, index: int, message: Mapping[str, Any]) -> None:
    """Records what a worker says of a sample, or what became of the worker."""
    if 'reward' in message:
      self.rewards[index] = message['reward']
      for name, values in self.parts.items():
        values[index] = message['parts'][name]
      self.metrics[index] = message['metrics']
      self.faults = message['faults'] | self.faults
    else:
      self.unscorable[index] = True
      self.errors.setdefault(
        message['kind'],
        f'{message["error"].rstrip()}\n'
        f'prompt {self._problems[index].prompt[-200:]!r}, completion '
        f'{self._completions[index][-200:]!r}',
      )
    self.unanswered -= 1


def _to_stderr(text: str) -> None:
  print(f'warning: {text}', file=sys.stderr, flush=True)
