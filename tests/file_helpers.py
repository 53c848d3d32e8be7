"""Disks that are full and folders that are read-only, as the kernel has it."""

import contextlib
import os
import resource


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
