"""JSON for reasoning-gym items, which hold tuples and other plain objects.

Some scorers tell a tuple from a list, so that a bare round trip through JSON
would turn right answers wrong.
"""

from typing import Any

_TAG = '__type__'


def encode(value: Any) -> Any:
  """Returns an equal value made of JSON types; tuples and dicts are tagged.

  What has no JSON form (a sympy number, a date) becomes its text.
  """
  if value is None or isinstance(value, (bool, int, float, str)):
    # Subclasses (enums, numpy floats) would not survive.
    for plain in (bool, int, float, str):
      if isinstance(value, plain):
        return plain(value)
    return None
  if isinstance(value, dict):
    if all(type(k) is str for k in value) and _TAG not in value:
      return {k: encode(v) for k, v in value.items()}
    pairs = [[encode(k), encode(v)] for k, v in value.items()]
    return {_TAG: 'dict', 'items': pairs}
  if isinstance(value, list):
    return [encode(v) for v in value]
  if isinstance(value, tuple):
    return {_TAG: 'tuple', 'items': [encode(v) for v in value]}
  if isinstance(value, (set, frozenset)):
    # The order of a set differs from process to process.
    return {_TAG: 'set', 'items': [encode(v) for v in sorted(value, key=repr)]}
  if hasattr(value, 'tolist'):  # numpy scalars and arrays
    return encode(value.tolist())
  return str(value)


def decode(value: Any) -> Any:
  """Inverts `encode`."""
  if isinstance(value, list):
    return [decode(v) for v in value]
  if not isinstance(value, dict):
    return value
  kind = value.get(_TAG)
  if kind is None:
    return {k: decode(v) for k, v in value.items()}
  if kind == 'dict':
    return {decode(k): decode(v) for k, v in value['items']}
  items = [decode(v) for v in value['items']]
  return tuple(items) if kind == 'tuple' else set(items)
