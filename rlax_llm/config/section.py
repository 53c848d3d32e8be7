"""What a config is made of: sections that freeze, their errors, plain forms."""

from collections.abc import Iterator
from collections.abc import Mapping
import copy
import dataclasses
import difflib
from typing import Any


class ConfigError(ValueError):
  """A user's mistake: entrypoints report it in one line and exit with 2."""


class FrozenDict(Mapping[str, Any]):
  """A read-only, hashable mapping; what a config's dict fields freeze to."""

  def __init__(self, items: Mapping[str, Any]) -> None:
    self._items = {k: freeze(v) for k, v in items.items()}

  def __getitem__(self, name: str) -> Any:
    return self._items[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._items)

  def __len__(self) -> int:
    return len(self._items)

  def __hash__(self) -> int:
    return hash(tuple(sorted(self._items.items())))

  def __eq__(self, other: object) -> bool:
    if isinstance(other, Mapping):
      return self._items == dict(other)
    return NotImplemented

  def __repr__(self) -> str:
    return repr(self._items)


class Section:
  """Base of the config dataclasses: mutable until frozen, then hashable."""

  def __setattr__(self, name: str, value: Any) -> None:
    if self.__dict__.get('_frozen'):
      raise dataclasses.FrozenInstanceError(
        f'{type(self).__name__}.{name} cannot change: the config is frozen; '
        'copy the unvalidated one'
      )
    object.__setattr__(self, name, value)


def freeze(value: Any) -> Any:
  """Returns a deeply frozen, hashable copy of a section or a field."""
  if isinstance(value, Section):
    frozen = copy.copy(value)
    for field in dataclasses.fields(frozen):  # type: ignore[arg-type]
      object.__setattr__(frozen, field.name, freeze(getattr(value, field.name)))
    object.__setattr__(frozen, '_frozen', True)
    return frozen
  if isinstance(value, Mapping):
    return FrozenDict(value)
  if isinstance(value, (list, tuple)):
    return tuple(freeze(item) for item in value)
  return value


def to_dict(config: Any) -> Any:
  """Returns the config as plain dicts, lists and scalars, for JSON."""
  if isinstance(config, Section):
    return {
      f.name: to_dict(getattr(config, f.name))
      for f in dataclasses.fields(config)  # type: ignore[arg-type]
    }
  if isinstance(config, Mapping):
    return {k: to_dict(v) for k, v in config.items()}
  if isinstance(config, (list, tuple)):
    return [to_dict(v) for v in config]
  return config


def nearest(name: str, names: Any) -> str:
  """Returns a 'did you mean' clause for an unknown name, or ''."""
  close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
  return f'; did you mean {" or ".join(map(repr, close))}?' if close else ''
