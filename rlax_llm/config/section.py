"""What a config is made of: sections that freeze, their errors, plain forms."""

from collections.abc import Iterator
from collections.abc import Mapping
import copy
import dataclasses
import difflib
from typing import Any

# Dotted names of fields that were renamed -> their names now.
RENAMED_FIELDS: dict[str, str] = {}


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


def field(
  default: Any,
  *,
  ge: float | None = None,
  gt: float | None = None,
  le: float | None = None,
  choices: tuple[str, ...] | None = None,
  read_by: tuple[str, tuple[str, ...] | None] | None = None,
) -> Any:
  """Returns a dataclass field with limits; `check_limits` enforces them.

  Args:
    default: of the field.
    ge: smallest value.
    gt: exclusive lower bound.
    le: largest value.
    choices: the values of a string.
    read_by: of an objective's number, see `config.algorithm`.
  """
  limits: dict[str, Any] = {'ge': ge, 'gt': gt, 'le': le, 'choices': choices}
  limits['read_by'] = read_by
  return dataclasses.field(default=default, metadata=limits)


def check_limits(path: str, value: Any, limits: Mapping[str, Any]) -> None:
  """Refuses a value outside the limits of its field.

  Args:
    path: the dotted name of the field.
    value: of the type of the field.
    limits: the field's metadata.

  Raises:
    ConfigError: one line that names the field, the value and the limit.
  """
  ge, gt, le = (limits.get(name) for name in ('ge', 'gt', 'le'))
  choices = limits.get('choices')
  if choices is not None and value not in choices:
    raise ConfigError(
      f'{path}={value!r} is unknown{nearest(str(value), choices)}; it is one '
      f'of {", ".join(choices)}'
    )
  if ge is not None and not value >= ge:
    raise ConfigError(f'{path}={value} must be at least {ge}')
  if gt is not None and not value > gt:
    raise ConfigError(f'{path}={value} must be above {gt}')
  if le is not None and not value <= le:
    raise ConfigError(f'{path}={value} must be at most {le}')


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
