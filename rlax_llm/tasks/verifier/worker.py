"""A process that scores completions: JSON lines in, JSON lines out.

The first line holds the task's config; each further line is a sample. A
sample that exceeds its time is ended by the kernel, process and all, whatever
code it is in. End of input ends the process.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any
from typing import BinaryIO
import warnings

from rlax_llm import config as config_lib
from rlax_llm.tasks import registry
from rlax_llm.tasks import rewards as rewards_lib
from rlax_llm.tasks import task as task_lib

_MEMORY = 2 * 2**30  # bytes a sample may add to the process


def wall_seconds(cpu_seconds: float) -> float:
  """Returns the wall time for one sample, generous for a busy machine."""
  return 5 * cpu_seconds + 1


def _limit_memory() -> None:
  """Bounds the address space and turns off core dumps."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open('/proc/self/statm', encoding='ascii') as file:
      used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
  except (OSError, ValueError):
    pass  # Not Linux, or a lower limit is in force already.


def _score(
  rewards: rewards_lib.Rewards, sample: dict[str, Any], seconds: float
) -> dict[str, Any]:
  """Returns {'reward', 'parts', 'metrics', 'faults'} of `rewards.Result`, or
  {'error': the traceback, 'kind': what was raised, and where}.

  A sample without its number of tokens is scored by `correct` alone.
  """
  # The default action of both signals ends the process, inside C code too. An
  # earlier sample's code may have set another.
  for name in (signal.SIGPROF, signal.SIGALRM):
    signal.signal(name, signal.SIG_DFL)
  signal.setitimer(signal.ITIMER_PROF, seconds)
  signal.setitimer(signal.ITIMER_REAL, wall_seconds(seconds))
  try:
    problem = task_lib.Problem(**sample['problem'])
    completion, tokens = sample['completion'], sample.get('tokens')
    if tokens is None:
      rewards = rewards.only_correct()
    result = rewards(
      problem, completion, tokens or 0, sample.get('finished', False)
    )
    return {
      'reward': result.total,
      'parts': result.parts,
      'metrics': result.metrics,
      'faults': result.faults,
    }
  except BaseException as error:  # pylint: disable=broad-exception-caught
    place = traceback.extract_tb(error.__traceback__)[-1]
    kind = f'{type(error).__name__} {place.filename}:{place.lineno}'
    return {'error': traceback.format_exc(limit=20)[-4000:], 'kind': kind}
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
  """Answers every line of `requests` with a line of `replies`."""

  def reply(message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b'\n')
    replies.flush()

  setup = json.loads(requests.readline())
  config = config_lib.TaskConfig(**setup['config'])
  # The limits of prompts do not concern scoring.
  config = dataclasses.replace(config, epoch_prompts=0)
  try:
    task = registry.make_task(config, setup['seed'])
    rewards = rewards_lib.make_rewards(config, task)
  except BaseException:  # pylint: disable=broad-exception-caught
    reply({'failed': traceback.format_exc(limit=20)[-4000:]})
    return
  _limit_memory()
  process = os.getpid()
  reply({'ready': True})
  for line in requests:
    sample = json.loads(line)
    answer = _score(rewards, sample, config.verifier_seconds)
    if os.getpid() != process:
      os._exit(0)  # a fork of the user's that came back: one answers
    reply({'id': sample['id'], **answer})


def main() -> None:
  """Serves standard input until it ends."""
  # Prints of verifier code go to standard error, and its reads find nothing.
  requests = os.fdopen(os.dup(0), 'rb')
  replies = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)
  nothing = os.open(os.devnull, os.O_RDONLY)
  os.dup2(nothing, 0)
  os.close(nothing)
  warnings.simplefilter('ignore')
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  try:
    _serve(requests, replies)
  finally:
    sys.stdout.flush()


if __name__ == '__main__':
  main()
