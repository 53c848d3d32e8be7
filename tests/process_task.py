"""A toy task of four prompts, and a reward that fails where it is told to."""

import errno
import os
import pathlib
import sys

from rlax_llm import testing
from rlax_llm.tasks import task as tasks

if os.environ.get('REWARD_FAILS') and 'verifier.worker' in ' '.join(
  sys.orig_argv
):
  raise OSError('there is no room for the verifier')

if os.environ.get('UNREADABLE'):
  _read_bytes = pathlib.Path.read_bytes

  def _refuse(path):
    if os.environ['UNREADABLE'] in path.parts:
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return _read_bytes(path)

  pathlib.Path.read_bytes = _refuse


class Pairs(testing.ToyTask):
  """The reward is the share of the prompt's first letter."""

  def problem(self, split, index):
    prompts = ('aa', 'ba', 'cb', 'bb') if split == 'train' else ('ca', 'db')
    prompt = prompts[index % len(prompts)]
    return tasks.make_problem(
      'pairs', prompt, None, None, {'letter': prompt[0]}
    )

  def num_problems(self, split):
    return 4 if split == 'train' else 2


class Reporting(Pairs):
  """Also reports how many letters a completion has."""

  def score(self, entry, completion):
    return tasks.Score(
      super().score(entry, completion), {'letters': len(completion)}
    )


def brevity(problem, completion, tokens, finished):
  del problem, completion
  return finished / tokens


def get_config():
  """Parameters divided over processes, drafts of past rollouts, two rewards."""
  config = testing.tiny_config()
  config.num_steps = 2
  config.task.name = 'process_task:Pairs'
  config.task.rewards = {'correct': 1.0, 'process_task:brevity': 0.5}
  config.model.layers = 1
  config.model.vocabulary = 8
  config.rollout.width = 0
  config.control.widths = (1, 3)
  config.mesh.fsdp, config.mesh.tensor = 4, 2
  config.learning.row_length = 64
  config.checkpoint.every = 1
  return config
