"""One run to a workdir: a lock that the death of its process frees."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import socket

from rlax_llm.config import ConfigError
from rlax_llm.runtime.files import writing

FILE = 'lock'


@contextlib.contextmanager
def lock_workdir(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Holds the workdir for this process.

  An fcntl lock: the kernel frees it when the process ends, however it ends.

  Args:
    workdir: the run's folder; made if missing.

  Raises:
    ConfigError: another process holds it, or it cannot be written to.
  """
  path = pathlib.Path(workdir) / FILE
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+', encoding='utf-8')
  except OSError as error:
    raise ConfigError(
      f'--workdir={workdir} cannot be written to '
      f'({error.strerror}); give another'
    ) from error
  with file:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.EACCES, errno.EAGAIN):
        raise ConfigError(
          f'--workdir={workdir} is on a file system without locks '
          f'({error.strerror}); give another'
        ) from error
      file.seek(0)
      holder = file.read().strip() or 'another process'
      raise ConfigError(
        f'--workdir={workdir} is in use by {holder}; stop it '
        'or give another --workdir'
      ) from error
    holder = f'process {os.getpid()} on {socket.gethostname()}\n'
    with writing(path):  # past the buffer, which close would write again
      os.ftruncate(file.fileno(), 0)
      os.write(file.fileno(), holder.encode())
    yield
