"""Chat templates of published models, rendered in a process of their own."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import datetime
import json
import os
import subprocess
import sys
import threading
from typing import Any
import weakref

from rlax_llm.config import ConfigError
from rlax_llm.tokenizers import template_worker

# What `strftime_now` tells. Templates write "today's date" into prompts; a
# clock would make a run depend on the day it is resumed. This is the date that
# Llama 3's templates write where they find no clock.
DATE = datetime.date(2024, 7, 26)

_LIMITS = (
  f'{template_worker.SECONDS:g} s of CPU time or '
  f'{template_worker.MEMORY >> 20} MiB'
)


def _start(source: str, date: datetime.date) -> subprocess.Popen:
  path = os.pathsep.join(p or os.getcwd() for p in sys.path)
  # Its own session, so that Ctrl-C reaches only the parent.
  process = subprocess.Popen(
    [sys.executable, '-m', template_worker.__name__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': path},
    start_new_session=True,
  )
  setup = {'source': source, 'date': date.isoformat()}
  if _exchange(process, setup) is None:
    _end(process)
    raise RuntimeError(
      'the process that renders the chat template cannot '
      'start; see standard error'
    )
  return process


def _exchange(
  process: subprocess.Popen, message: dict[str, Any] | None
) -> dict[str, Any] | None:
  """Returns the answer to a message; None: the process ended."""
  assert process.stdin is not None and process.stdout is not None
  try:
    process.stdin.write(json.dumps(message).encode() + b'\n')
    process.stdin.flush()
  except BrokenPipeError:
    return None
  line = process.stdout.readline()
  return json.loads(line) if line.endswith(b'\n') else None


def _end(process: subprocess.Popen) -> None:
  """Kills the process and waits for it."""
  process.kill()
  with contextlib.suppress(BrokenPipeError):  # unsent bytes
    assert process.stdin is not None
    process.stdin.close()
  with process:  # closes the other pipe
    pass


class ChatTemplate:
  """A jinja2 template from messages to text.

  One rendering has the limits of `template_worker`: CPU time, memory and
  length. Its process starts with the first rendering.
  """

  def __init__(
    self, source: str, *, origin: str, date: datetime.date = DATE
  ) -> None:
    """Keeps the source; nothing is compiled yet.

    Args:
      source: jinja2.
      origin: where it came from, for error messages.
      date: what `strftime_now` formats.
    """
    self._source = source
    self._origin = origin
    self._date = date
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    self._finalizer: weakref.finalize | None = None

  def close(self) -> None:
    """Ends the process; the next rendering starts another one."""
    if self._finalizer is not None:
      self._finalizer()
    self._process = None

  def render(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
  ) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each with a role and a content.
      add_generation_prompt: end with the header of the model's own turn.
      variables: further variables of the template; JSON types.

    Raises:
      ConfigError: the template is wrong, refuses the messages, or exceeds its
        time, memory or length.
      RuntimeError: the process cannot start.
    """
    request = {
      'tools': None,
      'documents': None,
      **variables,
      'messages': [dict(message) for message in messages],
      'add_generation_prompt': add_generation_prompt,
    }
    return self._answer(request)['text']

  def names(self) -> frozenset[str]:
    """Returns the variables that the template reads and does not set.

    Raises:
      ConfigError: as `render`.
      RuntimeError: the process cannot start.
    """
    return frozenset(self._answer(None)['names'])

  def _answer(self, request: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the process's answer to a request."""
    with self._lock:
      if self._process is None:
        self._process = _start(self._source, self._date)
        self._finalizer = weakref.finalize(self, _end, self._process)
      answer = _exchange(self._process, request)
      if answer is None:
        self.close()
        answer = {'error': f'it exceeds {_LIMITS}'}
    if 'error' in answer:
      raise ConfigError(
        f'the chat template of {self._origin} cannot be rendered '
        f'({answer["error"]}); mend it, change task.system_prompt, or set '
        'task.chat_template=False'
      )
    return answer
