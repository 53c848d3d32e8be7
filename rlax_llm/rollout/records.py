"""Rollouts as JSON-able records, for checkpoints: bit for bit."""

import base64
from collections.abc import Sequence
from typing import Any
import zlib

import numpy as np

from rlax_llm.types import Request
from rlax_llm.types import Rollout

# By field of Rollout: what stands at each token.
_BY_TOKEN = {
  'tokens': '<i4',
  'token_version': '<i4',
  'behaviour_logprobs': '<f4',
  'drafted': '|b1',
}


def pack_array(array: np.ndarray) -> dict[str, Any]:
  """Returns an array as a record; `unpack_array` undoes it."""
  data = zlib.compress(np.ascontiguousarray(array).tobytes(), level=1)
  return {
    'dtype': array.dtype.str,
    'shape': list(array.shape),
    'data': base64.b64encode(data).decode(),
  }


def unpack_array(record: dict[str, Any]) -> np.ndarray:
  """Returns the array of a record.

  Raises:
    ValueError, zlib.error: the record is damaged.
  """
  data = zlib.decompress(base64.b64decode(record['data'], validate=True))
  array = np.frombuffer(data, record['dtype'])
  return array.reshape(record['shape']).copy()


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
  """Returns rollouts of one request as a record, without its prompt.

  Args:
    rollouts: at least one; they share a request.
  """
  request = rollouts[0].request
  scored = [r.scored_logprobs for r in rollouts]
  record: dict[str, Any] = {
    'request': [request.samples, request.domain, request.step, request.request],
    'index': [r.index for r in rollouts],
    'length': [r.length for r in rollouts],
    'finished': [r.finished for r in rollouts],
    'suspended': [r.suspended for r in rollouts],
    'forwards': [r.forwards for r in rollouts],
    'survival': [r.survival for r in rollouts],
    'weight': [r.weight for r in rollouts],
    'scored': [-1 if s is None else len(s) for s in scored],
    'scored_logprobs': pack_array(
      np.concatenate(
        [np.zeros(0, '<f4'), *(s for s in scored if s is not None)]
      )
    ),
  }
  for name, dtype in _BY_TOKEN.items():
    parts = [getattr(r, name).astype(dtype) for r in rollouts]
    record[name] = pack_array(np.concatenate(parts))
  return record


def unpack_rollouts(
  record: dict[str, Any], prompt: np.ndarray
) -> tuple[Rollout, ...]:
  """Returns the rollouts of a record.

  Args:
    record: from `pack_rollouts`.
    prompt: int32[prompt_length], of the request.
  """
  samples, domain, step, number = record['request']
  request = Request(prompt, samples, domain, step, number)
  ends = np.cumsum(record['length'])[:-1]
  arrays = {
    name: np.split(unpack_array(record[name]), ends) for name in _BY_TOKEN
  }
  known = np.maximum(record['scored'], 0)
  scored = np.split(
    unpack_array(record['scored_logprobs']), np.cumsum(known)[:-1]
  )
  return tuple(
    Rollout(
      length=length,
      finished=record['finished'][i],
      forwards=record['forwards'][i],
      survival=record['survival'][i],
      weight=record['weight'][i],
      request=request,
      index=record['index'][i],
      suspended=record['suspended'][i],
      scored_logprobs=None if record['scored'][i] < 0 else scored[i],
      **{name: parts[i] for name, parts in arrays.items()},
    )
    for i, length in enumerate(record['length'])
  )
