"""Checkpoints as they are; disks that are full, folders that are read-only."""

import contextlib
import os
import resource

from rlax_llm.learning.train_states import OPTIONAL
from rlax_llm.workdir.checkpoint import Checkpoints


@contextlib.contextmanager
def room(size):
  """No file may grow beyond a size, in bytes, while this lasts."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def unprivileged():
  """Permissions bind within, also where the tests run as root."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


def read_states(states, workdir, step=None):
  """Returns (step, train states by name) of a checkpoint, all of each state."""
  with Checkpoints(workdir) as saved:
    found = saved.restore(states.abstract_all(), step=step, optional=OPTIONAL)
  return found[:2]
