"""The drafter interface, and the two drafters that need no state."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import DraftTree
from rlax_llm.types import Path
from rlax_llm.types import Slots
from rlax_llm.types import UNUSED


class CorpusShape(NamedTuple):
  """The earlier texts that a drafter wants, C = texts for each of F prompts.

  Attributes:
    prompts: F, places for prompts.
    capacity: S, tokens of a text (the prompt and a completion).
    history: R, earlier rollouts of a prompt: its first texts.
    group: G, samples of a prompt that are being sampled: the next texts.
    hints: how many texts foretell the samples of the group, one each: G with
      run-ahead, else 0.
  """

  prompts: int
  capacity: int
  history: int
  group: int
  hints: int = 0

  @property
  def texts(self) -> int:
    return self.history + self.group + self.hints


class RowOperations(NamedTuple):
  """What boundaries do to a state that is indexed by the rows of the slots.

  Attributes:
    admit: (params, state, slots, tokens int32[K, P], length int32[K], hidden
      [K, P, D], take bool[N], source int32[N]) -> state: the rows that take
      begin a sample of a prefilled prompt; the slots are those after the
      admission, hidden are the target's states at the prompt's tokens.
    gather: (state, rows int32[N']) -> state: the named rows, in that order.
    grow: (state, capacity) -> state: S is larger.
  """

  admit: Callable[..., Any]
  gather: Callable[[Any, Array], Any]
  grow: Callable[..., Any]


def _no_axes(state: Any) -> Any:
  """Every device holds the whole state."""
  return jax.tree.map(lambda leaf: (), state)


class Drafter(NamedTuple):
  """A drafter as data: functions of explicit state. Hashable, static.

  A draft is a hint. Verification takes the target's own tokens, so nothing
  that a drafter does can change what is sampled. `params` are DraftParams.

  Attributes:
    init: (params, slots) -> state; a pytree of arrays, or ().
    load: (params, state, places int32[K], texts int32[K, C, S], length
      int32[K, C]) -> state: the texts of K prompts that begin to be sampled;
      `Slots.prompt` will name their places. A place at or beyond F is to be
      left out. Called only if there is a `corpus`.
    propose: (params, state, slots) -> (DraftTree, state). Node 0 of each tree
      is the row's last token; W is the width the drafter was made for.
      `parents` may be int32[W] when all rows share it (every chain).
    observe: (params, state, slots, path, hidden) -> state; the slots are those
      after the commit of the path, hidden is [N, W, D] at the tree's nodes.
      Between `propose` and `observe` the state may hold more than otherwise.
    sync: (params, state, slots) -> state: rows went on without `observe`, or
      took samples without `admit`, in segments of W = 1; the state takes up
      what they hold now.
    width: W, nodes of a tree.
    corpus: which texts it wants loaded; None: none.
    rows: what is done to its rows; None: the state has none.
    axes: (state or its shapes) -> the same tree, a tuple of logical axis names
      for each leaf; see `sharding.TABLE`.
  """

  init: Callable[[DraftParams, Slots], Any]
  load: Callable[[DraftParams, Any, Array, Array, Array], Any]
  propose: Callable[[DraftParams, Any, Slots], tuple[DraftTree, Any]]
  observe: Callable[[DraftParams, Any, Slots, Path, Array], Any]
  sync: Callable[[DraftParams, Any, Slots], Any]
  width: int
  corpus: CorpusShape | None = None
  rows: RowOperations | None = None
  axes: Callable[[Any], Any] = _no_axes


def chain_parents(width: int) -> Array:
  """Returns int32[W], the parents of a chain: UNUSED, 0, 1, ..., W - 2."""
  return jnp.arange(width, dtype=jnp.int32) - 1


assert UNUSED == -1  # The root of a chain comes out of the arithmetic above.


def last_tokens(slots: Slots) -> Array:
  """Returns int32[N], the last committed token of each row."""
  rows = jnp.arange(slots.length.shape[0])
  return slots.text[rows, jnp.maximum(slots.length - 1, 0)]


def stateless(propose: Callable[[Slots], DraftTree], width: int) -> Drafter:
  """Returns a drafter whose trees are a function of the slots alone."""
  return Drafter(
    init=lambda params, slots: (),
    load=lambda params, state, places, texts, length: state,
    propose=lambda params, state, slots: (propose(slots), state),
    observe=lambda params, state, slots, path, hidden: state,
    sync=lambda params, state, slots: state,
    width=width,
  )


def _root_alone(slots: Slots) -> DraftTree:
  return DraftTree(tokens=last_tokens(slots)[:, None], parents=chain_parents(1))


@functools.cache  # Equal arguments give the same, hence equal, static value.
def no_drafter() -> Drafter:
  """Returns the drafter of W = 1: the root alone, which is plain sampling."""
  return stateless(_root_alone, 1)


@functools.cache
def prompt_lookup(width: int, *, max_match: int = 4) -> Drafter:
  """Drafts what followed the longest earlier match of the row's last tokens.

  The suffix of the row (at most `max_match` tokens) is looked for in the
  row's own prompt and completion; the longest match wins, the latest among
  equals; the draft is the chain of the W - 1 tokens after it. No match: the
  draft repeats garbage, which verification rejects. Prompt lookup decoding,
  https://github.com/apoorvumang/prompt-lookup-decoding.

  Args:
    width: W >= 2.
    max_match: longest suffix compared, tokens.
  """

  def one(text: Array, length: Array) -> Array:
    capacity = text.shape[0]
    end = jnp.arange(capacity)  # the match ends at this token, inclusive
    matched = jnp.zeros(capacity, jnp.int32)
    alive = end < length - 1
    for back in range(max_match):
      wanted = text[jnp.maximum(length - 1 - back, 0)]
      here = jnp.roll(text, back)  # here[i] = text[i - back]
      alive = alive & (here == wanted) & (end >= back)
      matched = matched + alive
    # Longest first, latest among equals; capacity bounds the tie-break.
    best = jnp.argmax(matched * capacity + end)
    draft = text[jnp.minimum(best + 1 + jnp.arange(width - 1), capacity - 1)]
    last = text[jnp.maximum(length - 1, 0)]
    return jnp.concatenate([last[None], draft])

  def propose(slots: Slots) -> DraftTree:
    return DraftTree(
      tokens=jax.vmap(one)(slots.text, slots.length),
      parents=chain_parents(width),
    )

  return stateless(propose, width)
