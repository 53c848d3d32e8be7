"""Whether the values of a config have the types of their fields."""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

from rlax_llm.config import ConfigError
from rlax_llm.config import Section


def check_types(section: Section, prefix: str = '') -> None:
  """Refuses values of another type: a config file may assign anything."""
  for field in dataclasses.fields(section):  # type: ignore[arg-type]
    value, kind = getattr(section, field.name), field.type
    if isinstance(value, Section) and value.__class__ is kind:
      check_types(value, f'{prefix}{field.name}.')
    else:
      _check_value(value, kind, f'{prefix}{field.name}')


# What `Any` stands for: the types of JSON, so that the manifest can hold them.
_JSON = (type(None), bool, int, float, str, tuple, Mapping)
_DEEPEST = 32  # brackets in one another
_LARGEST_INT = 2**31 - 1  # counters and shapes are int32
# Magnitudes that float32 holds, with room to compute.
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1e-30, 1e30


def _check_value(value: Any, kind: Any, path: str, depth: int = 0) -> None:
  """Refuses a value that is not of a type, or an element of it.

  Args:
    value: of a field, or in one.
    kind: its annotation.
    path: names it.
    depth: brackets around it.
  """
  if depth > _DEEPEST:
    raise ConfigError(
      f'{path[:80]}... lies in more than {_DEEPEST} brackets; flatten it'
    )
  union = isinstance(kind, types.UnionType)
  kinds = _JSON if kind is Any else typing.get_args(kind) if union else (kind,)
  kinds = tuple(typing.get_origin(k) or k for k in kinds)
  if float in kinds:
    kinds += (int,)
  if tuple in kinds:
    kinds += (list,)  # freezing makes it one
  if not isinstance(value, kinds) or (
    isinstance(value, bool) and bool not in kinds
  ):
    names = ' or '.join(dict.fromkeys(k.__name__ for k in kinds))
    raise ConfigError(
      f'{path}={_show(value)} is of type '
      f'{type(value).__name__}; give it as {names}'
    )
  items = typing.get_args(kind)
  if isinstance(value, Mapping):
    for name, item in value.items():
      _check_value(name, str, f'a key of {path}')
      _check_value(
        item, items[1] if items else Any, f'{path}[{name!r}]', depth + 1
      )
  elif isinstance(value, (list, tuple)):
    for i, item in enumerate(value):
      _check_value(item, items[0] if items else Any, f'{path}[{i}]', depth + 1)
  elif isinstance(value, str):
    _check_text(value, path)
  elif value:
    _check_number(value, path)


def _check_text(value: str, path: str) -> None:
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ConfigError(
      f'{path}={_show(value)} is no Unicode text at character '
      f'{error.start}; write it in UTF-8'
    ) from None


def _check_number(value: int | float, path: str) -> None:
  if isinstance(value, int):
    if abs(value) > _LARGEST_INT:
      raise ConfigError(f'{path}={_show(value)} must be at most {_LARGEST_INT}')
  elif not _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT:
    raise ConfigError(
      f'{path}={value} is no finite number of float32; give 0, or a '
      f'magnitude from {_SMALLEST_FLOAT} to {_LARGEST_FLOAT}'
    )


def _show(value: Any) -> str:
  """Returns a value for a message: one short line."""
  try:
    text = ' '.join(repr(value).split())
  except ValueError:  # Python writes no integer of thousands of digits.
    text = 'a number of thousands of digits'
  return text if len(text) <= 80 else f'{text[:80]}...'
