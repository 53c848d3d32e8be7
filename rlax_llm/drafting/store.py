"""The host's store of past rollouts, from which the tree cache is loaded."""

import base64
import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import hashlib
import json
import zlib

import numpy as np

from rlax_llm.config import ConfigError
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.types import Request
from rlax_llm.types import Rollout

_TOKEN_BYTES = 4
_MOST_BYTES = 1 << 34  # that a checkpoint may inflate to
# Bytes of a dict entry, an array object and its bookkeeping.
_OVERHEAD = 200


class RolloutStore:
  """The last R rollouts of every prompt, within a budget of bytes.

  Prompts are told apart by their tokens themselves, so that two of them
  cannot collide. When the budget is exceeded, the prompts that were sampled
  longest ago leave first; hints for a coming step come on top. What is stored
  is a hint to the drafter and nothing else: no training value may read it.
  """

  def __init__(
    self,
    *,
    history: int,
    megabytes: int,
    tokenizer: str,
    shared: bool = False,
    part: tuple[int, int] = (0, 1),
  ) -> None:
    """Makes an empty store.

    Args:
      history: R, rollouts kept for a prompt.
      megabytes: the budget, 2^20 bytes.
      tokenizer: names what the tokens mean; kept in the checkpoint.
      shared: one history for all prompts, as in SuffixDecoding.
      part: (i, n): keeps the i-th of n parts of all prompts, told apart by a
        hash, and passes over what is of another part.
    """
    self._history = history
    self._limit = megabytes << 20
    self._tokenizer = tokenizer
    self._shared = shared
    self._part = part
    # Least recently sampled prompt first; newest completion last.
    self._prompts: collections.OrderedDict[bytes, list[np.ndarray]] = (
      collections.OrderedDict()
    )
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

  def _keeps(self, key: bytes) -> bool:
    part, parts = self._part
    digest = hashlib.sha256(key).digest()
    return int.from_bytes(digest[:8], 'little') % parts == part

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
    if not self._history or not self._keeps(key):
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
    """Stores the tokens sampled so far of a sample of a coming step."""
    if self._keeps(self._key(request)):
      self._hints[request.step, request.request, index] = tokens

  def drop_hints(self, step: int, kept: Iterable[Request] = ()) -> None:
    """Forgets the hints for steps up to `step`, but for the kept requests."""
    open_still = {(r.step, r.request) for r in kept}
    self._hints = {
      k: v for k, v in self._hints.items() if k[0] > step or k[:2] in open_still
    }

  def dump(self) -> str:
    """Returns the store as text, for a checkpoint; `restore` reads it."""
    prompts = [np.frombuffer(key, '<i4') for key in self._prompts]
    kept = list(self._prompts.values())
    record = {
      'tokenizer': self._tokenizer,
      'prompts': _pack(prompts),
      'completions': _pack([c for k in kept for c in k]),
      'counts': _pack([np.array([len(k) for k in kept], '<i4')]),
      'hints': _pack(list(self._hints.values())),
      'hint_keys': _pack([np.array(key, '<i4') for key in self._hints]),
    }
    return json.dumps(record)

  def restore(self, text: str) -> None:
    """Takes over what `dump` of an earlier run returned.

    A smaller R or budget than that run's keeps the newest. What several
    stores, each a part, have dumped is restored one by one.

    Raises:
      ConfigError: it is of another tokenizer.
      ValueError: it is not what `dump` returns; the store is unchanged.
    """
    try:
      record = json.loads(text)
      theirs = record['tokenizer']
      prompts, completions, counts, hints, keys = (
        _unpack(record[name])
        for name in ('prompts', 'completions', 'counts', 'hints', 'hint_keys')
      )
      if (
        len(counts) != 1
        or len(counts[0]) != len(prompts)
        or (counts[0] < 1).any()
        or counts[0].sum() != len(completions)
        or len(keys) != len(hints)
        or any(len(key) != 3 for key in keys)
      ):
        raise ValueError('its parts do not fit together')
    except (ValueError, KeyError, TypeError, zlib.error) as error:
      raise ValueError(
        f'the cached rollouts are unreadable ({error})'
      ) from error
    if theirs != self._tokenizer:
      raise ConfigError(
        f'the checkpoint caches rollouts of the tokenizer {theirs!r}, this '
        f'run has {self._tokenizer!r}; give another --workdir'
      )
    left = iter(completions)
    for prompt, count in zip(prompts, counts[0]):
      for _ in range(count):
        self._add(prompt.tobytes(), next(left))
    self._evict()
    # Of all parts: which one they belong to is not recorded.
    self._hints |= {
      (int(step), int(request), int(index)): hint
      for (step, request, index), hint in zip(keys, hints)
    }


def _pack(parts: list[np.ndarray]) -> list[str]:
  """Returns arrays of different lengths as two texts: tokens and lengths."""
  lengths = np.array([len(part) for part in parts], '<i4')
  tokens = np.concatenate([np.zeros(0, '<i4'), *parts]).astype('<i4')
  return [
    base64.b64encode(zlib.compress(x.tobytes(), level=1)).decode()
    for x in (tokens, lengths)
  ]


def _unpack(texts: list[str]) -> list[np.ndarray]:
  """Undoes `_pack`.

  Raises:
    ValueError, zlib.error: the texts are damaged.
  """
  tokens, lengths = (_inflate(text) for text in texts)
  if lengths.sum() != len(tokens) or (lengths < 0).any():
    raise ValueError(f'{len(tokens)} tokens instead of {lengths.sum()}')
  # Copies: a view would keep the whole buffer alive.
  ends = np.cumsum(lengths)
  return [tokens[e - n : e].copy() for e, n in zip(ends, lengths)]


def _inflate(text: str) -> np.ndarray:
  stream = zlib.decompressobj()
  raw = stream.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
  if not stream.eof:
    raise ValueError(f'more than {_MOST_BYTES} bytes, or cut off')
  return np.frombuffer(raw, '<i4')


def _completions(
  store: RolloutStore, requests: Sequence[Request], shape: CorpusShape
) -> list[tuple[int, int, np.ndarray]]:
  """Returns (row, text, completion) of whatever the store holds."""
  found = []
  for row, request in enumerate(requests):
    if shape.history:
      kept = store.history(request)[-shape.history :]
      found += [(row, text, tokens) for text, tokens in enumerate(kept)]
    for index in range(min(shape.hints, request.samples)):
      hint = store.hint(request, index)
      if hint is not None:
        found.append((row, shape.history + shape.group + index, hint))
  return found


def corpus_texts(
  store: RolloutStore | None,
  requests: Sequence[Request],
  rows: int,
  shape: CorpusShape,
  *,
  merge: Callable[[list], list] = list,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the texts with which prompts begin, as `Drafter.load` takes them.

  Args:
    store: of past rollouts; None: there are none.
    requests: at most `rows` of them.
    rows: K, prompts that are loaded together.
    shape: gives C and S; a completion that does not fit is cut.
    merge: joins what stores that are parts of one have found.

  Returns:
    (int32[K, C, S], int32[K, C]).
  """
  texts = np.zeros((rows, shape.texts, shape.capacity), np.int32)
  length = np.zeros((rows, shape.texts), np.int32)
  first = shape.history + shape.group  # of the hints
  for row, request in enumerate(requests):
    prompt = request.prompt
    # The group's own texts begin as the prompt, which may be drafted from.
    texts[row, :, : len(prompt)] = prompt
    length[row, shape.history : first] = len(prompt)
  if store is None:
    return texts, length
  for row, text, completion in merge(_completions(store, requests, shape)):
    start = len(requests[row].prompt)
    end = min(start + len(completion), shape.capacity)
    texts[row, text, start:end] = completion[: end - start]
    length[row, text] = end
  return texts, length
