"""The host's store of past rollouts, from which the tree cache is loaded."""

import base64
import collections
import io
import json
from typing import Any, Mapping, Sequence
import zipfile

import numpy as np

from rlax_llm.config import ConfigError
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.types import Request
from rlax_llm.types import Rollout

_TOKEN_BYTES = 4
# Bytes of a dict entry, an array object and its bookkeeping.
_OVERHEAD = 200


class RolloutStore:
  """The last R rollouts of every prompt, within a budget of bytes.

  Prompts are told apart by their tokens themselves, so that two of them
  cannot collide. When the budget is exceeded, the prompts that were sampled
  longest ago leave first. What is stored is a hint to the drafter and nothing
  else: no training value may read it.
  """

  def __init__(self,
               *,
               history: int,
               megabytes: int,
               tokenizer: str,
               shared: bool = False) -> None:
    """Makes an empty store.

    Args:
      history: R, rollouts kept for a prompt.
      megabytes: the budget, 2^20 bytes.
      tokenizer: names what the tokens mean; kept in the checkpoint.
      shared: one history for all prompts, as in SuffixDecoding.
    """
    self._history = history
    self._limit = megabytes << 20
    self._tokenizer = tokenizer
    self._shared = shared
    # Least recently sampled prompt first; newest completion last.
    self._prompts: collections.OrderedDict[
        bytes, list[np.ndarray]] = collections.OrderedDict()
    # Completions sampled ahead of their step, with the sample's own noise.
    self._hints: dict[tuple[int, int, int], np.ndarray] = {}
    self.bytes = 0

  def __len__(self) -> int:
    """Returns the number of prompts."""
    return len(self._prompts)

  def _key(self, request: Request) -> bytes:
    if self._shared:
      return b''
    return np.asarray(request.prompt, '<i4').tobytes()

  def history(self, request: Request) -> list[np.ndarray]:
    """Returns the stored completions of the request's prompt, oldest first."""
    return list(self._prompts.get(self._key(request), ()))

  def hint(self, request: Request, index: int) -> np.ndarray | None:
    """Returns what ran ahead for a sample, or None."""
    return self._hints.get((request.step, request.request, index))

  def add(self, rollouts: Sequence[Rollout]) -> None:
    """Stores the rollouts of a step; the newest replace the oldest."""
    for rollout in rollouts:
      self._add(self._key(rollout.request), rollout.tokens)
    self._evict()

  def _add(self, key: bytes, tokens: np.ndarray) -> None:
    if not self._history:
      return
    kept = self._prompts.pop(key, None)
    if kept is None:
      kept = []
      self.bytes += len(key) + _OVERHEAD
    kept.append(tokens)
    self.bytes += self._size(tokens)
    while len(kept) > self._history:
      self.bytes -= self._size(kept.pop(0))
    self._prompts[key] = kept  # now the most recently sampled

  def _evict(self) -> None:
    while self.bytes > self._limit and self._prompts:
      key, left = self._prompts.popitem(last=False)
      self.bytes -= len(key) + _OVERHEAD + sum(map(self._size, left))

  @staticmethod
  def _size(tokens: np.ndarray) -> int:
    return _TOKEN_BYTES * len(tokens) + _OVERHEAD

  def add_hint(self, request: Request, index: int, tokens: np.ndarray) -> None:
    """Stores what a sample of a coming step has come to so far."""
    self._hints[request.step, request.request, index] = tokens

  def drop_hints(self, step: int) -> None:
    """Forgets the hints for steps up to `step`."""
    self._hints = {k: v for k, v in self._hints.items() if k[0] > step}

  def dump(self) -> str:
    """Returns the store as text, for a checkpoint; `restore` reads it."""
    prompts = [np.frombuffer(key, '<i4') for key in self._prompts]
    kept = list(self._prompts.values())
    arrays: dict[str, Any] = {
        'counts': np.array([len(k) for k in kept], np.int32),
        'hint_keys': np.array(list(self._hints), np.int32).reshape(-1, 3),
        **_join('prompt', prompts),
        **_join('completion', [c for k in kept for c in k]),
        **_join('hint', list(self._hints.values())),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    packed = base64.b64encode(file.getvalue()).decode()
    return json.dumps({'tokenizer': self._tokenizer, 'rollouts': packed})

  def restore(self, text: str) -> None:
    """Takes over what `dump` of an earlier run returned.

    A smaller R or budget than that run's keeps the newest.

    Raises:
      ConfigError: it is of another tokenizer, or not what `dump` returns.
    """
    try:
      record = json.loads(text)
      theirs = record['tokenizer']
      file = io.BytesIO(base64.b64decode(record['rollouts'], validate=True))
      with np.load(file, allow_pickle=False) as arrays:
        prompts, completions, hints = (
            _split(name, arrays) for name in ('prompt', 'completion', 'hint'))
        counts = arrays['counts'].tolist()
        keys = arrays['hint_keys'].tolist()
      if (len(counts) != len(prompts) or sum(counts) != len(completions) or
          len(keys) != len(hints)):
        raise ValueError('its parts do not fit together')
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as e:
      raise ConfigError(
          f'the cached rollouts of the checkpoint are unreadable ({e}); delete '
          'that checkpoint') from e
    if theirs != self._tokenizer:
      raise ConfigError(
          f'the checkpoint caches rollouts of the tokenizer {theirs!r}, this '
          f'run has {self._tokenizer!r}; give another --workdir')
    left = iter(completions)
    for prompt, count in zip(prompts, counts):
      for _ in range(count):
        self._add(prompt.astype('<i4').tobytes(), next(left))
    self._evict()
    self._hints = {tuple(key): hint for key, hint in zip(keys, hints)}


def _join(name: str, parts: list[np.ndarray]) -> dict[str, np.ndarray]:
  """Returns arrays of different lengths as one, and their lengths."""
  tokens = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
  lengths = np.array([len(part) for part in parts], np.int64)
  return {f'{name}_tokens': tokens, f'{name}_lengths': lengths}


def _split(name: str, arrays: Mapping[str, Any]) -> list[np.ndarray]:
  """Undoes `_join`."""
  tokens, lengths = arrays[f'{name}_tokens'], arrays[f'{name}_lengths']
  if lengths.sum() != len(tokens) or (lengths < 0).any():
    raise ValueError(f'{len(tokens)} {name} tokens instead of {lengths.sum()}')
  return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


def corpus_texts(store: RolloutStore | None, requests: Sequence[Request],
                 rows: int,
                 shape: CorpusShape) -> tuple[np.ndarray, np.ndarray]:
  """Returns the texts with which prompts begin, as `Drafter.load` takes them.

  Args:
    store: of past rollouts; None: there are none.
    requests: at most `rows` of them.
    rows: K, prompts that are loaded together.
    shape: gives C and S; a completion that does not fit is cut.

  Returns:
    (int32[K, C, S], int32[K, C]).
  """
  texts = np.zeros((rows, shape.texts, shape.capacity), np.int32)
  length = np.zeros((rows, shape.texts), np.int32)
  first = shape.history + shape.group  # of the hints
  for row, request in enumerate(requests):
    prompt = request.prompt
    # The group's own texts begin as the prompt, which may be drafted from.
    texts[row, :, :len(prompt)] = prompt
    length[row, shape.history:first] = len(prompt)
    if store is None:
      continue
    completions: dict[int, np.ndarray] = {}
    if shape.history:
      completions |= enumerate(store.history(request)[-shape.history:])
    for index in range(min(shape.hints, request.samples)):
      hint = store.hint(request, index)
      if hint is not None:
        completions[first + index] = hint
    for text, completion in completions.items():
      end = min(len(prompt) + len(completion), shape.capacity)
      texts[row, text, len(prompt):end] = completion[:end - len(prompt)]
      length[row, text] = end
  return texts, length
