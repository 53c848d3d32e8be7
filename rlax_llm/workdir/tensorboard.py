"""TensorBoard's copy of the metrics."""

from collections.abc import Callable
from collections.abc import Mapping
import io
import os
import socket
import struct
import time
from typing import Any

from tensorboardX import proto
from tensorboardX import record_writer
from tensorboardX import summary

FOLDER = 'tensorboard'
_Event = proto.event_pb2.Event


class Board:
  """An event file. It is a copy: where it is lost, the run goes on without.

  tensorboardX's own SummaryWriter writes from a thread; when that dies of a
  full disk, the run would wait for it forever.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    purge_step: int | None,
    run_id: str,
    warn: Callable[[str], None],
  ) -> None:
    """Opens a file of its own in workdir/tensorboard.

    Args:
      workdir: the run's folder.
      purge_step: TensorBoard hides what earlier files have from this step on;
        None: nothing.
      run_id: tells the file from those of the runs continued here.
      warn: receives one line when the file is given up.
    """
    self._warn = warn
    self._file: io.FileIO | None = None
    try:
      folder = os.path.join(workdir, FOLDER)
      os.makedirs(folder, exist_ok=True)
      name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'
      # Unbuffered: what could not be written must not be tried again by close.
      self._file = open(
        os.path.join(folder, f'{name}.{run_id}'), 'ab', buffering=0
      )
    except OSError as error:
      self._give_up(error)
    self._add(_Event(file_version='brain.Event:2'))
    if purge_step is not None:
      log = proto.event_pb2.SessionLog
      self._add(_Event(step=purge_step, session_log=log(status=log.START)))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes scalars by name; what is not finite, too."""
    for name, value in values.items():
      self._add(_Event(step=step, summary=summary.scalar(name, float(value))))

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def _add(self, event: Any) -> None:
    """Appends a record: length, its checksum, the event, its checksum."""
    if self._file is None:
      return
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    record = memoryview(
      b''.join((length, _checksum(length), data, _checksum(data)))
    )
    try:
      while record:
        record = record[self._file.write(record) :]
    except OSError as error:
      self._file.close()
      self._give_up(error)

  def _give_up(self, error: OSError) -> None:
    self._file = None
    self._warn(
      f'TensorBoard gets nothing more of this run ({error.strerror}); '
      'the .jsonl files have everything'
    )


def _checksum(data: bytes) -> bytes:
  return struct.pack('<I', record_writer.masked_crc32c(data))
