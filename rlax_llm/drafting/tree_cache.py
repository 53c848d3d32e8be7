"""SRT: draft from a tree of past rollouts, inside the jitted loop.

"SRT: Accelerating Reinforcement Learning via Speculative Rollout with
Tree-Structured Cache", https://arxiv.org/abs/2601.09083. Rollouts of one
prompt resemble one another: its rollouts of earlier epochs, and those of the
same group as they grow, are indexed as a tree of all their substrings; the
draft is what followed the row's last tokens there.

On the device the tree is never built. A prompt's rollouts lie in a `Corpus` as
arrays of fixed shape; every occurrence of the row's last tokens is found by
comparing packed words; counts of tree nodes are counts of occurrences with
equal continuations, which pairwise comparison gives in closed form:

  count_m(i, d) = #{j : match_j >= m, continuations of i and j agree to depth d}
  D_m(i, d)     = prod_{e <= d} count_m(i, e) / sum over siblings count_m(., e)

D_m(i, d) estimates the probability that verification accepts the node. For
each match length m the draft is scored by its expected accepted tokens, the
sum of D_m over its nodes (not by m: the longest match often ends where a
sibling has only just arrived); the best m wins.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlax_llm.drafting import corpus as corpora
from rlax_llm.drafting.corpus import Corpus
from rlax_llm.drafting.drafter import chain_parents
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.drafter import last_tokens
from rlax_llm.ops.trees import HASH_FACTOR
from rlax_llm.ops.trees import HASH_STEP
from rlax_llm.types import Array
from rlax_llm.types import DraftTree
from rlax_llm.types import Slots
from rlax_llm.types import UNUSED


class TreeCacheConfig(NamedTuple):
  """The static facts of drafting from a corpus.

  Attributes:
    shape: of the corpus.
    branching: children of a node at most; 1 drafts a chain.
    max_match: longest suffix compared, tokens; a multiple of 4. Lengths above
      4 are tried sparsely: 6, 9, 13, ...
    budget_factor: a match of m tokens is trusted for at most
      floor(budget_factor * m) nodes when drafts are compared.
    min_probability: nodes less probable than this count nothing.
    live: which texts of this step are drafted from: those of the `group`, the
      row's `own`, or `none`.
  """

  shape: CorpusShape
  branching: int = 1
  max_match: int = 8
  budget_factor: float = 2.0
  min_probability: float = 0.05
  live: str = 'group'


def match_lengths(words: Array, query: Array) -> Array:
  """Returns int32[C, S]: how many last tokens agree with the query's.

  Args:
    words: uint32[C, S], packed.
    query: uint32[Q], the row's last 4 Q tokens, latest word first.
  """
  total = jnp.zeros(words.shape, jnp.int32)
  going = jnp.ones(words.shape, bool)
  for i in range(query.shape[0]):
    differ = corpora.shifted(words, corpora.WORD * i) ^ query[i]
    same = jax.lax.clz(differ).astype(jnp.int32) >> 3
    total = total + jnp.where(going, same, 0)
    going = going & (same == corpora.WORD)
  return total


class Candidates(NamedTuple):
  """K places of one prompt's corpus where the row's last tokens occurred."""

  tokens: Array  # int32[K, depth]: what followed
  exists: Array  # bool[K, depth]: the text goes so far
  match: Array  # int32[K]: tokens that agree; 0: no candidate
  weight: Array  # int32[K]: how many occurrences it counts for


# A hint was sampled with the row's own noise: it outvotes every other text.
_HINT_WEIGHT = 64


def find_candidates(
  corpus: Corpus,
  query: Array,
  prompt: Array,
  hint: Array,
  length: Array,
  *,
  depth: int,
  allowed: Array | None = None,
) -> Candidates:
  """Returns the best match of every text of a prompt.

  Args:
    corpus: of all prompts.
    query: uint32[Q], see `match_lengths`.
    prompt: int32[], which prompt of the corpus.
    hint: int32[], the lookahead text of this very sample, or C.
    length: int32[], of the row.
    depth: tokens wanted after a match.
    allowed: bool[C], texts that may be used; None: all.
  """
  _, count, capacity = corpus.texts.shape
  most = corpora.WORD * query.shape[0]
  text = jnp.arange(count, dtype=jnp.int32)
  place = jnp.arange(capacity, dtype=jnp.int32)
  ends = corpus.length[prompt]
  if allowed is not None:
    ends = jnp.where(allowed, ends, 0)
  # Something must follow the match.
  usable = place[None] + 1 < ends[:, None]
  match = match_lengths(corpus.words[prompt], query)
  match = jnp.where(usable, match, 0)
  # Noise belongs to positions: where a hint stands at the row's own position
  # and agrees at all, it counts as a full match.
  aligned = (text[:, None] == hint) & (place[None] == length - 1) & (match > 0)
  match = jnp.where(aligned, most + 1, match)
  # Longest first, latest among equals, in one integer.
  rank = jnp.max(match * capacity + place[None], axis=-1)
  match, end = rank // capacity, rank % capacity
  after = end[:, None] + 1 + jnp.arange(depth, dtype=jnp.int32)[None]
  tokens = corpus.texts[prompt, text[:, None], jnp.minimum(after, capacity - 1)]
  return Candidates(
    tokens,
    after < ends[:, None],
    jnp.minimum(match, most),
    jnp.where(match > most, _HINT_WEIGHT, 1),
  )


class Estimates(NamedTuple):
  """Probabilities of the nodes of M trees over K candidates.

  Node (d, i) is the continuation of candidate i to depth d + 1. Several
  candidates may share a node; the first of them stands for it.
  """

  probability: list[Array]  # by depth float32[M, K]: D_m; 0 for no node
  agree: Array  # bool[K, depth, K]: [j, d, i] i and j share the node


def estimate(candidates: Candidates, thresholds: Array) -> Estimates:
  """Returns the nodes' probabilities among the matches of each length.

  Args:
    candidates: K of them.
    thresholds: int32[M], match lengths m >= 1.
  """
  depth = candidates.tokens.shape[1]
  exists = candidates.exists.T  # [depth, K]
  # Continuations agree where their hashes do; comparing those needs no
  # running operation over [K, depth, K], for which XLA's CPU backend is slow.
  state = jnp.zeros(candidates.match.shape, jnp.int32)
  states = [state]
  for d in range(depth):
    state = (state ^ candidates.tokens[:, d]) * HASH_FACTOR + HASH_STEP
    states.append(state)
  hashes = jnp.stack(states)  # [depth + 1, K]
  same = lambda h: h.T[:, :, None] == h[None]
  agree = same(hashes[1:]) & candidates.exists[:, :, None] & exists[None]
  # Those that agree so far and go one token further.
  before = same(hashes[:-1]) & candidates.exists[:, :, None]
  member = candidates.match[None] >= thresholds[:, None]
  weight = jnp.where(member, candidates.weight, 0).astype(jnp.float32)
  hits, total = _counts(weight, agree), _counts(weight, before)
  share = hits / jnp.maximum(total, 1.0)
  probability = [jnp.where(member, 1.0, 0.0)]
  for d in range(depth):
    probability.append(probability[-1] * share[:, d])
  return Estimates(probability[1:], agree)


def _counts(weight: Array, nodes: Array) -> Array:
  """Returns float32[M, depth, K]: sums of weight[m, j] over nodes[j, d, i]."""
  count, depth, _ = nodes.shape
  flat = nodes.astype(jnp.float32).reshape(count, depth * count)
  sums = jnp.matmul(weight, flat, precision=jax.lax.Precision.HIGHEST)
  return sums.reshape(-1, depth, count)


def _thresholds(max_match: int) -> tuple[int, ...]:
  """Returns the match lengths that are tried: dense, then sparser."""
  lengths, m = [], 1
  while m <= max_match:
    lengths.append(m)
    m += max(1, m // 2)
  return tuple(lengths)


def _budgets(thresholds: Array, nodes: int, factor: float) -> Array:
  """Returns int32[M]: how many nodes a match length is trusted for."""
  return jnp.clip(jnp.floor(thresholds * factor).astype(jnp.int32), 1, nodes)


def draft_chain(
  candidates: Candidates, *, max_match: int, factor: float, least: float
) -> Array:
  """Returns int32[depth], the continuation with the most expected tokens.

  It always has `depth` tokens: those after the end of the text, the budget or
  the minimum probability cost nothing. Without a match all are garbage.
  """
  depth = candidates.tokens.shape[1]
  thresholds = jnp.asarray(_thresholds(max_match), jnp.int32)
  budget = _budgets(thresholds, depth, factor)[:, None]
  expected = jnp.zeros((len(thresholds), len(candidates.match)))
  for d, found in enumerate(estimate(candidates, thresholds).probability):
    expected += jnp.where((found >= least) & (d < budget), found, 0.0)
  # Among equals the longest match, then the latest text.
  order = jnp.arange(expected.size, dtype=jnp.int32).reshape(expected.shape)
  top = expected == jnp.max(expected)
  best = jnp.max(jnp.where(top, order, 0)) % expected.shape[1]
  return candidates.tokens[best]


def draft_tree(
  candidates: Candidates,
  *,
  nodes: int,
  branching: int,
  max_match: int,
  factor: float,
  least: float,
) -> tuple[Array, Array, Array]:
  """Returns the `nodes` most probable nodes of the best tree.

  Args:
    candidates: K of them.
    nodes: W - 1.
    branching: children of a node at most.
    max_match: see `TreeCacheConfig`.
    factor: see `TreeCacheConfig.budget_factor`.
    least: see `TreeCacheConfig.min_probability`.

  Returns:
    (tokens int32[nodes], parents int32[nodes], probability float32[nodes]):
    parents count the root as 0 and these nodes from 1, UNUSED where a tree has
    fewer nodes; the probability is that of the line to the node.
  """
  count, depth = candidates.tokens.shape
  thresholds = jnp.asarray(_thresholds(max_match), jnp.int32)
  estimates = estimate(candidates, thresholds)
  probability = jnp.stack(estimates.probability, axis=1)  # [M, depth, K]
  agree = estimates.agree
  member = candidates.match[None] >= thresholds[:, None]
  order = jnp.arange(count)
  earlier = (order[:, None] < order[None])[:, None]  # [j, 1, i]
  # A node is its first candidate's.
  twin = member[:, :, None, None] & (agree & earlier)[None]
  own = jnp.where(jnp.any(twin, axis=1), 0.0, probability)
  # Siblings of more weight, the earlier among equals: [M, j, depth, i].
  before = jnp.pad(
    agree[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=True
  )
  theirs, mine = own.swapaxes(1, 2)[..., None], probability[:, None]
  first = jnp.argmax(member[:, :, None, None] & agree[None], axis=1)
  before_me = order[None, :, None, None] < first[:, None]  # [M, j, depth, i]
  heavier = (theirs > mine) | ((theirs == mine) & before_me)
  heavier = heavier & (theirs > 0) & (before & ~agree)[None]
  rank = jnp.sum(heavier, axis=1, dtype=jnp.int32)
  kept = jnp.cumprod((rank < branching).astype(jnp.int32), axis=1) > 0
  own = jnp.where(kept & (own >= least), own, 0.0)
  # Depth first in the flat order: among equals a parent comes first.
  flat = own.reshape(len(thresholds), depth * count)
  size = min(nodes, depth * count)
  best, chosen = jax.lax.top_k(flat, size)  # [M, size]
  allowed = (
    jnp.arange(size)[None] < _budgets(thresholds, nodes, factor)[:, None]
  )
  expected = jnp.sum(jnp.where(allowed, best, 0.0), axis=-1)
  m = len(thresholds) - 1 - jnp.argmax(expected[::-1])
  chosen, real = chosen[m], best[m] > 0
  level, candidate = chosen // count, chosen % count
  tokens = candidates.tokens[candidate, level]
  # The parent is the node of one token less; its first candidate has it.
  line = agree[:, jnp.maximum(level - 1, 0), candidate] & member[m][:, None]
  parent = (level - 1) * count + jnp.argmax(line, axis=0)
  is_parent = (chosen[:, None] == parent[None]) & real[:, None]
  found = jnp.any(is_parent, axis=0)
  parents = jnp.where(found, jnp.argmax(is_parent, axis=0) + 1, UNUSED)
  parents = jnp.where(level == 0, 0, parents)
  parents = jnp.where(real, parents, UNUSED).astype(jnp.int32)
  pad = (0, nodes - size)
  return (
    jnp.pad(tokens, pad),
    jnp.pad(parents, pad, constant_values=UNUSED),
    jnp.pad(jnp.where(real, best[m], 0.0), pad),
  )


def propose(
  corpus: Corpus, slots: Slots, config: TreeCacheConfig, width: int
) -> DraftTree:
  """Returns a draft of `width` nodes for every row.

  Args:
    corpus: of F prompts.
    slots: N rows.
    config: static.
    width: W >= 2; static.
  """
  draft: Callable = draft_chain
  if config.branching > 1:
    draft = functools.partial(
      draft_tree, nodes=width - 1, branching=config.branching
    )
  found = draft_rows(corpus, slots, config, width - 1, draft)
  root = last_tokens(slots)[:, None]
  if config.branching == 1:
    return DraftTree(
      jnp.concatenate([root, found], axis=1), chain_parents(width)
    )
  tokens, parents, _ = found
  return DraftTree(
    jnp.concatenate([root, tokens], axis=1),
    jnp.concatenate([jnp.full_like(root, UNUSED), parents], axis=1),
  )


def draft_rows(
  corpus: Corpus,
  slots: Slots,
  config: TreeCacheConfig,
  depth: int,
  draft: Callable,
) -> Any:
  """Returns what `draft` makes of the candidates of each row.

  Args:
    corpus: of F prompts.
    slots: N rows.
    config: static.
    depth: tokens of the longest line; static.
    draft: `draft_chain`, or `draft_tree` with its nodes and branching.
  """
  if config.max_match % corpora.WORD:
    raise ValueError(
      f'max_match={config.max_match} is no multiple of {corpora.WORD}'
    )
  tail = corpora.window(
    slots, slots.length - config.max_match, config.max_match
  )
  query = corpora.pack_words(tail)[:, corpora.WORD - 1 :: corpora.WORD][:, ::-1]
  shape = config.shape
  hint = jnp.where(
    slots.index < shape.hints,
    shape.history + shape.group + slots.index,
    shape.texts,
  )
  own = shape.history + slots.index % shape.group
  text = jnp.arange(shape.texts)
  live = (text >= shape.history) & (text < shape.history + shape.group)

  def one(
    query: Array, prompt: Array, hint: Array, length: Array, own: Array
  ) -> Any:
    allowed = {'group': None, 'own': ~live | (text == own), 'none': ~live}[
      config.live
    ]
    candidates = find_candidates(
      corpus, query, prompt, hint, length, depth=depth, allowed=allowed
    )
    return draft(
      candidates,
      max_match=config.max_match,
      factor=config.budget_factor,
      least=config.min_probability,
    )

  return jax.vmap(one)(query, slots.prompt, hint, slots.length, own)


@functools.cache
def tree_cache(width: int, config: TreeCacheConfig) -> Drafter:
  """Returns SRT's drafter; its state is a Corpus.

  Args:
    width: W >= 2.
    config: of the corpus, the same for every width.
  """
  return Drafter(
    init=lambda params, slots: corpora.empty_corpus(config.shape),
    load=lambda params, state, places, texts, length: corpora.load(
      state, places, texts, length
    ),
    propose=lambda params, state, slots: (
      propose(state, slots, config, width),
      state,
    ),
    observe=lambda params, state, slots, path, hidden: corpora.extend(
      state, slots, path, config.shape
    ),
    sync=lambda params, state, slots: corpora.copy_rows(
      state, slots, config.shape
    ),
    width=width,
    corpus=config.shape,
  )
