"""Many steps: memory stays flat and steps stay as fast as they were.

`pytest -m slow tests/test_soak.py --full` takes 2,000 steps instead of 500.
"""

import ctypes
import gc
import io
import itertools
import os
import statistics

from config_helpers import train_quietly
import jax
import pytest

from rlax_llm import testing
from rlax_llm.workdir.progress import Progress

_LIBC = ctypes.CDLL(None)


class _Mallinfo(ctypes.Structure):
  _fields_ = [
    (name, ctypes.c_size_t)
    for name in (
      'arena',
      'ordblks',
      'smblks',
      'hblks',
      'hblkhd',
      'usmblks',
      'fsmblks',
      'uordblks',
      'fordblks',
      'keepcost',
    )
  ]


def _allocated():
  """Returns the bytes that the process has asked malloc for and not freed.

  Resident pages would also hold what malloc keeps for later: in a process that
  ran other tests they grow and shrink by more than a leak of 1 %.
  """
  info = _LIBC.mallinfo2()
  return info.uordblks + info.hblkhd


class _Watch(Progress):
  """Notes memory and step times instead of showing anything."""

  def __init__(self):
    super().__init__(io.StringIO())
    self.allocated, self.arrays, self.seconds = [], [], []
    self.compiling = []

  def update(self, step, values=None):
    if not values or 'time/step' not in values:
      return
    self.seconds.append(values['time/step'])
    self.compiling.append(values['compile/seconds'])
    if step % 10 == 0:
      gc.collect()
    self.allocated.append(_allocated())
    self.arrays.append(sum(x.nbytes for x in jax.live_arrays()))


@pytest.mark.slow
@pytest.mark.skipif(
  not hasattr(_LIBC, 'mallinfo2'), reason='host memory is counted by glibc 2.33'
)
def test_memory_and_step_time_stay_flat(tmp_path, request):
  """Law: after a fifth of a run host memory grows by less than 1 %, after a
  half device memory does not, nothing is traced, and steps do not slow down.

  Mutants: the shapes of the drafter's state found anew at each `generate`;
  0.6 MB kept by each save, or evaluation; 12 MB kept once.
  """
  _LIBC.mallinfo2.restype = _Mallinfo
  config = testing.tiny_config()
  config.mesh.data = 1
  config.num_steps = 2000 if request.config.getoption('--full') else 500
  config.task.epoch_prompts = 2
  config.checkpoint.every = 50
  config.evaluate.every = 50
  watch = _Watch()
  train_quietly(config, tmp_path, display=watch)
  half = config.num_steps // 2
  assert len(watch.seconds) == config.num_steps
  assert not any(watch.compiling[half:])
  # The least of a stretch, for what a save or an evaluation takes comes and
  # goes; the median of growths, for now and then the checkpoint library keeps
  # one more compressor (3.6 MB) over several saves, at most one for each core.
  least = [
    min(watch.allocated[i : i + 50])
    for i in range(config.num_steps // 5, config.num_steps, 50)
  ]
  growth = statistics.median(b - a for a, b in itertools.pairwise(least))
  assert growth * (len(least) - 1) < 0.01 * least[0]
  assert least[-1] < 1.01 * least[0] + 3.7e6 * (os.cpu_count() or 1)
  assert min(watch.arrays[-50:]) == min(watch.arrays[half : half + 50])
  late = statistics.median(watch.seconds[-half // 2 :])
  assert late < 1.5 * statistics.median(watch.seconds[half // 2 : half])
