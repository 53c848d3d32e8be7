"""One worker process of the verifier, seen from the parent."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any
from typing import NamedTuple

from rlax_llm.tasks.verifier import worker as verifier_worker

TOO_LONG = 'its process exceeded its time'
NO_ANSWER = 'its process wrote what is no answer'


class Pending(NamedTuple):
  """A sample that a worker has."""

  id: int  # no two are alike: an answer that comes twice is not another's
  sample: int  # its place in the batch


class Worker:
  """A process, its pipes, and the samples it was given."""

  def __init__(self, setup: bytes) -> None:
    # The packages and modules that this process sees, wherever they are.
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    # A verifier must not take the accelerator, and one thread is enough.
    environment = {
      **os.environ,
      'PYTHONPATH': path,
      'JAX_PLATFORMS': 'cpu',
      'OMP_NUM_THREADS': '1',
      'OPENBLAS_NUM_THREADS': '1',
    }
    # Its own session, so that Ctrl-C reaches only the parent, which closes it.
    self.process = subprocess.Popen(
      [sys.executable, '-m', verifier_worker.__name__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      bufsize=0,
      env=environment,
      start_new_session=True,
    )
    assert self.process.stdin is not None and self.process.stdout is not None
    self.stdin = self.process.stdin.fileno()
    self.stdout = self.process.stdout.fileno()
    os.set_blocking(self.stdin, False)
    os.set_blocking(self.stdout, False)
    self.unsent = bytearray(setup)
    self.received = b''
    self.pending: collections.deque[Pending] = collections.deque()
    self.alone = False  # retries one sample: gets no other until it answers
    self.ready = False
    self.ended = False
    self.fault = ''  # why it is ended by this process
    self.since = time.monotonic()  # of the start, or of the last answer
    self.send()

  def add(self, pending: Pending, line: bytes) -> None:
    """Queues a sample."""
    if not self.pending:
      self.since = time.monotonic()
    self.pending.append(pending)
    self.unsent += line

  def send(self) -> None:
    """Writes what the pipe takes."""
    try:
      while self.unsent:
        # A slice: deleting from the front of a long bytearray is cheap.
        del self.unsent[: os.write(self.stdin, self.unsent[:65536])]
    except BlockingIOError:
      pass
    except BrokenPipeError:
      self.unsent.clear()  # its end is read from the other pipe

  def receive(self) -> list[dict[str, Any]]:
    """Returns the messages that have arrived; {} for what is none."""
    chunks = [self.received]
    try:
      while chunk := os.read(self.stdout, 65536):
        chunks.append(chunk)
      self.ended = True
    except BlockingIOError:
      pass
    *lines, self.received = b''.join(chunks).split(b'\n')
    messages: list[dict[str, Any]] = []
    for line in lines:
      try:
        message = json.loads(line)
      except ValueError:
        message = None
      if not isinstance(message, dict):
        # No answer to anything. What came before it holds: that the process
        # was ready, say.
        return [*messages, {}]
      messages.append(message)
    return messages

  def _await_end(self) -> None:
    """Lets a process whose pipe is closed end by itself, for its status."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    for _ in range(100):
      if os.waitid(os.P_PID, self.process.pid, flags):
        return
      time.sleep(0.01)

  def describe_end(self) -> str:
    """Returns how the process ended, once it is closed."""
    if self.fault:
      return self.fault
    code = self.process.returncode
    if -code in (signal.SIGPROF, signal.SIGALRM):
      return TOO_LONG
    if code < 0:
      return f'its process was killed by {signal.Signals(-code).name}'
    return f'its process ended with exit status {code}'

  def close(self) -> None:
    """Kills the process and waits for it."""
    if self.process.returncode is None:  # its number is still its own
      if self.ended:
        self._await_end()
      # With what the verifier's code may have started.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.process.pid, signal.SIGKILL)
    with self.process:  # closes the pipes
      pass
