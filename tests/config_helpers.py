"""Configs of tests."""

from rlax_llm import testing


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
