"""The texts that are drafted from, as arrays of fixed shape."""

import flax.struct
import jax.numpy as jnp

from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.types import Array
from rlax_llm.types import Path
from rlax_llm.types import Slots

WORD = 4  # tokens in a packed word


class Corpus(flax.struct.PyTreeNode):
  """What may be drafted from: C texts for each of F prompts.

  A text is a prompt with a completion; `CorpusShape` says which texts are
  what. Those of the group being sampled grow as its samples grow.
  """

  texts: Array  # int32[F, C, S]
  words: Array  # uint32[F, C, S]: the last four tokens, a byte each
  length: Array  # int32[F, C]; 0: no text


def pack_words(texts: Array) -> Array:
  """Returns uint32[..., S]: at each place the last four tokens, a byte each.

  The latest token is in the highest byte, so that the leading zero bits of
  two words' exclusive or count the tokens that agree. Tokens beyond 255 share
  bytes: a draft is a hint.

  Args:
    texts: int32[..., S].
  """
  low = texts.astype(jnp.uint32) & 0xFF
  words = jnp.zeros_like(low)
  for back in range(WORD):
    words = words | (shifted(low, back) << (24 - 8 * back))
  return words


def shifted(x: Array, back: int) -> Array:
  """Returns x moved right along the last axis; zeros come in."""
  if back == 0:
    return x
  pad = [(0, 0)] * (x.ndim - 1) + [(back, 0)]
  return jnp.pad(x, pad)[..., : x.shape[-1]]


def empty_corpus(shape: CorpusShape) -> Corpus:
  """Returns a corpus without texts."""
  axes = (shape.prompts, shape.texts, shape.capacity)
  return Corpus(
    texts=jnp.zeros(axes, jnp.int32),
    words=jnp.zeros(axes, jnp.uint32),
    length=jnp.zeros(axes[:2], jnp.int32),
  )


def load(corpus: Corpus, places: Array, texts: Array, length: Array) -> Corpus:
  """Puts the texts of K prompts at their places.

  Args:
    corpus: of F prompts.
    places: int32[K]; those at or beyond F are left out.
    texts: int32[K, C, S].
    length: int32[K, C].
  """
  put = lambda old, new: old.at[places].set(new, mode='drop')
  return Corpus(
    put(corpus.texts, texts),
    put(corpus.words, pack_words(texts)),
    put(corpus.length, length),
  )


def window(slots: Slots, first: Array, size: int) -> Array:
  """Returns int32[N, size]: the text from `first` on, 0 before its start."""
  place = first[:, None] + jnp.arange(size)[None]
  last = slots.text.shape[1] - 1
  tokens = jnp.take_along_axis(slots.text, jnp.clip(place, 0, last), axis=1)
  return jnp.where(place >= 0, tokens, 0)


def copy_rows(corpus: Corpus, slots: Slots, shape: CorpusShape) -> Corpus:
  """Makes the texts of the group those of the rows that decode.

  Args:
    corpus: of F prompts.
    slots: N rows.
    shape: of the corpus.
  """
  prompts, _, capacity = corpus.texts.shape
  row = jnp.where(slots.done, prompts, slots.prompt)
  text = shape.history + slots.index % shape.group
  more = max(capacity - slots.text.shape[1], 0)
  tokens = jnp.pad(slots.text, ((0, 0), (0, more)))[:, :capacity]
  put = lambda old, new: old.at[row, text].set(new, mode='drop')
  return Corpus(
    put(corpus.texts, tokens),
    put(corpus.words, pack_words(tokens)),
    put(corpus.length, slots.length),
  )


def extend(
  corpus: Corpus, slots: Slots, path: Path, shape: CorpusShape
) -> Corpus:
  """Adds what a forward committed to the texts of the group.

  Args:
    corpus: of F prompts.
    slots: N rows, after the commit.
    path: what was committed.
    shape: of the corpus.
  """
  width = path.tokens.shape[1]
  first = slots.length - path.length
  tokens = window(slots, first - (WORD - 1), width + WORD - 1)
  words = pack_words(tokens)[:, WORD - 1 :]
  tokens = tokens[:, WORD - 1 :]
  order = jnp.arange(width)[None]
  prompts, count, capacity = corpus.texts.shape
  # A row that committed nothing may name a prompt that has been evicted.
  row = jnp.where(path.length > 0, slots.prompt, prompts)[:, None]
  # More samples than G share texts, which makes for worse hints only.
  text = (shape.history + slots.index % shape.group)[:, None]
  place = jnp.where(
    order < path.length[:, None], first[:, None] + order, capacity
  )
  put = lambda old, new: old.at[row, text, place].set(new, mode='drop')
  return Corpus(
    put(corpus.texts, tokens),
    put(corpus.words, words),
    corpus.length.at[row[:, 0], text[:, 0]].set(slots.length, mode='drop'),
  )
