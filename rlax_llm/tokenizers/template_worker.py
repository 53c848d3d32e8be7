"""A process that renders a chat template: JSON lines in, JSON lines out.

A template is a program that came with a model. It runs in jinja2's sandbox,
and in a process of its own because the sandbox bounds neither time nor memory:
nested loops, `'a' * 10**10` and a string doubled in a loop are all legal. A
rendering that exceeds its time is ended by the kernel, process and all.

The first line is {"source", "date"}; each further line is {name: value}, the
template's variables, or null, which asks for their names. End of input ends the
process.
"""

from collections.abc import Mapping
import datetime
import json
import os
import resource
import signal
import sys
from typing import Any
from typing import BinaryIO
from typing import NoReturn

import jinja2
from jinja2 import meta
from jinja2 import nodes
from jinja2 import sandbox
import jinja2.ext
import jinja2.parser

SECONDS = 2.0  # CPU time of one rendering
MEMORY = 256 * 2**20  # bytes that renderings may add to the process
CHARACTERS = 2**20  # of a rendering
_WALL_SECONDS = 30.0  # generous for a busy machine


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks what a model wrote."""

  tags = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
    """Returns the body: the marks themselves write nothing."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """The filter tojson; jinja2's own escapes HTML and sorts keys."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def compile_template(source: str, date: datetime.date) -> jinja2.Template:
  """Returns a template that renders as the transformers library renders it.

  Args:
    source: jinja2.
    date: what `strftime_now` formats, at midnight.

  Raises:
    jinja2.TemplateError: a mistake in the source.
  """
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  now = datetime.datetime.combine(date, datetime.time())
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = now.strftime
  return environment.from_string(source)


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  parts, size = [], 0
  for part in template.generate(variables):
    size += len(part)
    if size > CHARACTERS:
      raise ValueError(f'it writes more than {CHARACTERS} characters')
    parts.append(part)
  return ''.join(parts)


def _describe(error: BaseException) -> str:
  """Returns an exception as one short line."""
  name = type(error).__name__
  if isinstance(error, jinja2.TemplateSyntaxError):
    name += f' in line {error.lineno}'
  # A sandboxed template chooses what its exceptions say.
  return ' '.join(f'{name}: {error}'.split())[:300]


class _Renderer:
  """A template that is compiled by its first rendering, under its limits."""

  def __init__(self, source: str, date: datetime.date) -> None:
    self._source = source
    self._compile = lambda: compile_template(source, date)
    self._template: jinja2.Template | None = None

  def _names(self, template: jinja2.Template) -> list[str]:
    """Returns the variables that the template reads and does not set."""
    tree = template.environment.parse(self._source)
    return sorted(meta.find_undeclared_variables(tree))

  def answer(self, variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns {'text': the rendering} or {'error': what was wrong}.

    Args:
      variables: None: {'names': those the template reads} is wanted.
    """
    # The default action of both signals ends the process, inside C code too.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _WALL_SECONDS)
    try:
      self._template = self._template or self._compile()
      if variables is None:
        return {'names': self._names(self._template)}
      return {'text': _render(self._template, variables)}
    except Exception as error:  # Whatever the template's code may raise.
      return {'error': _describe(error)}
    finally:
      signal.setitimer(signal.ITIMER_PROF, 0)
      signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
  """Bounds the address space and turns off core dumps."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open('/proc/self/statm', encoding='ascii') as file:
      used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
  except (OSError, ValueError):
    pass  # Not Linux, or a lower limit is in force already.


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
  """Answers every line of `requests` with a line of `replies`."""
  setup = json.loads(requests.readline())
  renderer = _Renderer(
    setup['source'], datetime.date.fromisoformat(setup['date'])
  )
  _limit_memory()
  replies.write(b'{"ready": true}\n')
  replies.flush()
  for line in requests:
    replies.write(json.dumps(renderer.answer(json.loads(line))).encode())
    replies.write(b'\n')
    replies.flush()


def main() -> None:
  """Serves standard input until it ends."""
  for name in (signal.SIGPROF, signal.SIGALRM, signal.SIGPIPE):
    signal.signal(name, signal.SIG_DFL)
  replies = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)
  _serve(sys.stdin.buffer, replies)


if __name__ == '__main__':
  main()
