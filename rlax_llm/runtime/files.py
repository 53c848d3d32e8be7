"""Files of a run: what is written is whole, and what cannot be is said once."""

from collections.abc import Iterator
import contextlib
import os
import pathlib


class WriteError(RuntimeError):
  """A file of the run cannot be written: full, read-only or broken storage.

  Entrypoints report it in one line. What was written before stays as it was, so
  that the same command goes on from there.
  """


class ReadError(RuntimeError):
  """A file of the run cannot be read at present: its content is not in doubt.

  Storage that does not answer, missing permissions, too little memory.
  Entrypoints report it in one line. No file has been changed.
  """


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an OSError or MemoryError of the block into a `ReadError`."""
  try:
    yield
  except (OSError, MemoryError) as error:
    reason = getattr(error, 'strerror', None) or 'out of memory'
    raise ReadError(
      f'{os.fspath(path)} cannot be read ({reason}); no file was changed and '
      'nothing else was used in its place: remove the cause, then run the '
      'same command again'
    ) from error


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an OSError of the block into a `WriteError` that names `path`."""
  try:
    yield
  except OSError as error:
    raise WriteError(
      f'{os.fspath(path)} cannot be written ({error.strerror}); make room '
      'for it or mend its folder, then run the same command again: it goes '
      'on from the newest checkpoint'
    ) from error


def write_atomic(path: pathlib.Path, text: str | bytes) -> None:
  """Replaces a file's content; a reader sees the old or the new, never a part.

  Args:
    path: the file.
    text: its new content.

  Raises:
    WriteError: it cannot be written; the old content is still there.
  """
  data = text.encode('utf-8') if isinstance(text, str) else text
  temporary = path.with_name(path.name + '.tmp')
  with writing(path):
    try:
      with open(temporary, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except OSError:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise


class JsonlFile:
  """A file that grows by whole lines."""

  def __init__(self, path: pathlib.Path) -> None:
    """Opens for appending, on a line of its own even after a torn one.

    Args:
      path: the file; made if missing.

    Raises:
      WriteError: it cannot be written.
    """
    self._path = path
    with writing(path):
      torn = False
      if path.is_file() and path.stat().st_size:
        with open(path, 'rb') as file:
          file.seek(-1, os.SEEK_END)
          torn = file.read(1) != b'\n'
      # Unbuffered: what could not be written must not be tried again by close.
      self._file = open(path, 'ab', buffering=0)
    if torn:
      self.write('')

  def write(self, line: str) -> None:
    """Appends a line, wholly or not at all.

    Args:
      line: without a line break. A lone surrogate (undecodable bytes of a
        completion) becomes \\udcXX, which is how JSON escapes it.

    Raises:
      WriteError: it cannot be written.
    """
    rest = memoryview(f'{line}\n'.encode('utf-8', 'backslashreplace'))
    with writing(self._path):
      before = os.fstat(self._file.fileno()).st_size
      try:
        while rest:
          rest = rest[self._file.write(rest) :]
      except OSError:
        with contextlib.suppress(OSError):
          self._file.truncate(before)
        raise

  def close(self) -> None:
    """Closes the file."""
    with writing(self._path):
      self._file.close()
