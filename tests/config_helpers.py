"""Configs of tests, and runs of them."""

import io

from rlax_llm import testing
from rlax_llm import train
from rlax_llm.workdir.progress import Progress


def tiny_config(**changes):
  """The tiny config on one device, with dotted changes ('a__b' is a.b)."""
  config = testing.tiny_config()
  config.mesh.data = 1
  for path, value in changes.items():
    *sections, name = path.split('__')
    section = config
    for part in sections:
      section = getattr(section, part)
    setattr(section, name, value)
  return config


def train_quietly(config, folder, **options):
  """Trains without a report, which takes longer than most runs of tests.

  Args:
    config: of the run.
    folder: the run's.
    **options: as `train.train`.
  """
  options.setdefault('display', Progress(io.StringIO()))
  return train.train(config, str(folder), with_report=False, **options)
