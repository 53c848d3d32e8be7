"""SRT's drafts: matches, probabilities, trees; against plain tries."""

import collections
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm.drafting import corpus as corpora
from rlax_llm.drafting import tree_cache as trees
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.types import UNUSED

# --- Pieces, by definition.


def test_match_lengths_are_those_of_a_comparison():
  """Counts of agreeing last tokens, by a loop over places.

  Mutants: the bytes of a word in reverse; a second word compared though the
  first differs; no shift between words.
  """
  rng = np.random.default_rng(0)
  texts = rng.integers(0, 3, (5, 40))
  for end in (0, 2, 3, 4, 11, 39):
    query = corpora.pack_words(jnp.asarray(texts[0]))
    query = jnp.stack(
      [query[end - 4 * i] if end >= 4 * i else query[0] * 0 for i in range(3)]
    )
    got = trees.match_lengths(corpora.pack_words(jnp.asarray(texts)), query)
    padded = np.pad(texts, ((0, 0), (12, 0)))
    for text in range(5):
      for place in range(40):
        want = 0
        while (
          want < 12
          and padded[text, 12 + place - want] == padded[0, 12 + end - want]
        ):
          want += 1
        assert got[text, place] == want, (text, place)


def _candidates(seed, count=9, depth=5, vocabulary=3):
  rng = np.random.default_rng(seed)
  known = rng.integers(0, depth + 1, count)
  return trees.Candidates(
    tokens=jnp.asarray(rng.integers(0, vocabulary, (count, depth)), jnp.int32),
    exists=jnp.asarray(np.arange(depth)[None] < known[:, None]),
    match=jnp.asarray(rng.integers(0, 5, count), jnp.int32),
    weight=jnp.asarray(rng.integers(1, 4, count), jnp.int32),
  )


def _trie(candidates, least_match):
  """Returns {prefix: weight} of the continuations of matches that long."""
  counts = collections.Counter()
  tokens, exists, match, weight = map(np.asarray, candidates)
  for i in range(len(match)):
    if match[i] >= least_match:
      for d in range(int(exists[i].sum())):
        counts[tuple(tokens[i, : d + 1])] += int(weight[i])
  return counts


def _probabilities(counts):
  """Returns {prefix: product of conditional frequencies}."""
  total = collections.Counter()
  for prefix, count in counts.items():
    total[prefix[:-1]] += count
  result = {}
  for prefix in sorted(counts, key=len):
    parent = result[prefix[:-1]] if len(prefix) > 1 else 1.0
    result[prefix] = parent * counts[prefix] / total[prefix[:-1]]
  return result


@pytest.mark.parametrize('seed', range(8))
def test_probabilities_are_those_of_a_trie(seed):
  """D_m of every node equals the product of a trie's frequencies.

  Mutants: texts that end there count in the denominator; weights ignored;
  hashes of sibling branches confused; `>` for `>=` in the threshold.
  """
  candidates = _candidates(seed)
  thresholds = jnp.asarray([1, 2, 4])
  found = trees.estimate(candidates, thresholds).probability
  for m, least in enumerate([1, 2, 4]):
    want = _probabilities(_trie(candidates, least))
    for i in range(9):
      for d in range(5):
        prefix = tuple(np.asarray(candidates.tokens[i, : d + 1]))
        there = (
          bool(candidates.exists[i, d]) and int(candidates.match[i]) >= least
        )
        assert float(found[d][m, i]) == pytest.approx(
          want[prefix] if there else 0.0, abs=1e-6
        )


SETTINGS = dict(max_match=4, factor=2.0, least=0.1)


@pytest.mark.parametrize('seed', range(8))
def test_the_chain_has_the_most_expected_tokens(seed):
  """No continuation at any match length promises more accepted tokens.

  Mutants: the longest match wins; the sum includes nodes beyond the budget.
  """
  candidates = _candidates(seed)
  chain = np.asarray(trees.draft_chain(candidates, **SETTINGS))
  scores = {}
  for m in (1, 2, 3, 4):
    known = _probabilities(_trie(candidates, m))
    for i in range(9):
      if int(candidates.match[i]) >= m:
        line = tuple(np.asarray(candidates.tokens[i]))
        depth = min(int(candidates.exists[i].sum()), 2 * m)
        values = [known[line[: d + 1]] for d in range(depth)]
        score = sum(v for v in values if v >= 0.1)
        scores[line] = max(score, scores.get(line, 0.0))
  assert scores[tuple(chain)] == pytest.approx(max(scores.values()), abs=1e-5)


def test_a_short_match_is_not_trusted_far():
  """One token that agrees speaks for two nodes; two, for all that follow.

  Mutant: the sum goes beyond the budget of the match length.
  """
  candidates = trees.Candidates(
    tokens=jnp.asarray([[1] * 5, [2] * 5], jnp.int32),
    exists=jnp.arange(5)[None] < jnp.asarray([[5], [3]]),
    match=jnp.asarray([1, 2]),
    weight=jnp.asarray([8, 1]),
  )
  chain = trees.draft_chain(candidates, **SETTINGS)
  assert np.asarray(chain).tolist() == [2] * 5


@pytest.mark.parametrize('branching', [2, 9])
@pytest.mark.parametrize('seed', range(6))
def test_the_tree_has_the_most_probable_nodes(seed, branching):
  """The nodes are the best-first growth of the best match length's trie.

  Mutants: parents by candidate instead of by node; siblings beyond
  `branching` kept; twins of one node both drafted.
  """
  candidates, nodes = _candidates(seed, count=12), 6
  tokens, parents, chances = map(
    np.asarray,
    trees.draft_tree(candidates, nodes=nodes, branching=branching, **SETTINGS),
  )
  lines = {0: ()}
  for i in range(nodes):
    if parents[i] != UNUSED:
      assert 0 <= parents[i] <= i  # a parent comes first
      assert 0 < chances[i] <= ([1.0, *chances][parents[i]])
      lines[i + 1] = lines[parents[i]] + (int(tokens[i]),)
  drafted = [line for node, line in lines.items() if node]
  assert len(set(drafted)) == len(drafted)
  children = collections.Counter(line[:-1] for line in drafted)
  assert max(children.values(), default=0) <= branching
  options = []
  for m in (1, 2, 3, 4):
    known = _probabilities(_trie(candidates, m))
    grown = _best_first(known, nodes, branching)
    options.append((sum(known[g] for g in grown[: 2 * m]), grown, known))
  best = max(score for score, _, _ in options)
  assert any(
    sum(known.get(d, 0.0) for d in drafted)
    == pytest.approx(sum(known[g] for g in grown), abs=1e-5)
    for score, grown, known in options
    if score == pytest.approx(best, abs=1e-6)
  )


def test_twins_of_a_kept_node_keep_their_children():
  """Among equal siblings the first two stay, with all that follows them.

  Mutant: ties are broken by the candidate instead of by its node.
  """
  tokens = np.asarray([[7, 1], [8, 2], [9, 2], [7, 3], [8, 3], [9, 3]])
  candidates = trees.Candidates(
    jnp.asarray(tokens, jnp.int32),
    jnp.ones((6, 2), bool),
    jnp.full(6, 4),
    jnp.ones(6, jnp.int32),
  )
  tokens, parents, _ = trees.draft_tree(
    candidates, nodes=6, branching=2, **SETTINGS
  )
  lines = [
    (int(tokens[p - 1]), int(t)) for t, p in zip(tokens, parents) if p > 0
  ]
  assert sorted(lines) == [(7, 1), (7, 3), (8, 2), (8, 3)]


def _best_first(known, nodes, branching):
  """Returns the prefixes in the order of their probabilities."""
  children = collections.defaultdict(list)
  for prefix in known:
    children[prefix[:-1]].append(prefix)
  grown, heap = [], []

  def push(prefix):
    ranked = sorted(children[prefix], key=lambda c: -known[c])
    for child in ranked[:branching]:
      if known[child] >= 0.1:
        heapq.heappush(heap, (-known[child], len(child), child))

  push(())
  while heap and len(grown) < nodes:
    grown.append(heapq.heappop(heap)[2])
    push(grown[-1])
  return grown


# --- The whole drafter, on text.


class _Plan:
  """Text for one prompt: a walk over phrases, with slips of the pen."""

  def __init__(self, seed, *, phrases=24, length=10, vocabulary=64):
    rng = np.random.default_rng(seed)
    self.length, self.vocabulary = length, vocabulary
    self.body = rng.integers(0, vocabulary, (phrases, length))
    self.body[:, 0] = (np.arange(phrases) * 5 + seed) % vocabulary
    self.next = np.stack([rng.permutation(phrases)[:3] for _ in range(phrases)])
    self.weights = rng.dirichlet([0.6] * 3, phrases)

  def sample(self, rng, tokens):
    text, phrase = [], 0
    while len(text) < tokens:
      line = np.where(
        rng.random(self.length) < 0.04,
        rng.integers(0, self.vocabulary, self.length),
        self.body[phrase],
      )
      text.extend(line)
      phrase = self.next[phrase, rng.choice(3, p=self.weights[phrase])]
    return np.asarray(text[:tokens], np.int32)


class _Trie:
  """Every substring of the texts up to 24 tokens, counted."""

  def __init__(self):
    self.count = collections.Counter()
    self.children = collections.defaultdict(set)

  def add(self, text, start):
    """Adds the substrings that end at or after `start`."""
    for end in range(start, len(text)):
      for first in range(max(0, end - 23), end + 1):
        key = tuple(text[first : end + 1])
        self.count[key] += 1
        self.children[key[:-1]].add(key[-1])

  def draft(self, text, budget):
    """SRT's rule: at every match length a chain; the largest sum wins."""
    best, chain = -1.0, []
    for m in range(1, min(len(text), 23) + 1):
      node = tuple(text[len(text) - m :])
      if node not in self.count:
        break
      line, total, probability = [], 0.0, 1.0
      while len(line) < min(budget, 2 * m) and self.children[node]:
        token = max(self.children[node], key=lambda t: self.count[(*node, t)])
        probability *= self.count[(*node, token)] / sum(
          self.count[(*node, t)] for t in self.children[node]
        )
        if probability < 0.05:
          break
        line, total, node = [*line, token], total + probability, (*node, token)
      if line and total >= best:
        best, chain = total, line
    return chain


def _accepted(draft, text, place):
  """Returns the tokens that one forward commits."""
  count = 0
  while (
    count < len(draft)
    and place + count < len(text)
    and draft[count] == text[place + count]
  ):
    count += 1
  return min(count + 1, len(text) - place)


def _per_forward(texts, propose):
  """Returns tokens per forward of the last epoch of [epoch][prompt][sample].

  Args:
    texts: what the target says, whatever is drafted.
    propose: (prompt, the group so far) -> a draft for each of the group.
  """
  for epoch in texts:
    forwards = tokens = 0
    for prompt, group in enumerate(epoch):
      propose(prompt, None, epoch)
      so_far = [0] * len(group)
      while min(so_far) < len(group[0]):
        known = [text[:n] for text, n in zip(group, so_far)]
        drafts = propose(prompt, known, epoch)
        for i, text in enumerate(group):
          if so_far[i] < len(text):
            forwards += 1
            so_far[i] += _accepted(drafts[i], text, so_far[i])
      tokens += sum(map(len, group))
  return tokens / forwards


def _reference(budget):
  """A drafter of exact tries: history and the growing group."""
  tries, lengths = {}, {}

  def propose(prompt, known, epoch):
    del epoch
    if known is None:
      lengths.clear()
      return []
    trie = tries.setdefault(prompt, _Trie())
    for i, text in enumerate(known):
      trie.add(text, lengths.get(i, 0))
      lengths[i] = len(text)
    return [trie.draft(text, budget) for text in known]

  return propose


def _device(width, *, group, capacity, branching=1, history=16):
  """The drafter under test, driven text by text."""
  shape = CorpusShape(1, capacity, history, group)
  config = trees.TreeCacheConfig(shape, branching)
  past = collections.defaultdict(list)

  @jax.jit
  def draft(texts, length):
    corpus = corpora.load(
      corpora.empty_corpus(shape),
      jnp.zeros(1, jnp.int32),
      texts[None],
      length[None],
    )
    rows, ends = texts[history:], length[history:]

    def one(row, end):
      words = corpora.pack_words(row)
      query = words[jnp.maximum(end - 1 - 4 * jnp.arange(2), 0)]
      return trees.draft_chain(
        trees.find_candidates(
          corpus,
          query,
          jnp.int32(0),
          jnp.int32(shape.texts),
          end,
          depth=width - 1,
        ),
        max_match=config.max_match,
        factor=config.budget_factor,
        least=config.min_probability,
      )

    return jax.vmap(one)(rows, ends)

  def propose(prompt, known, epoch):
    if known is None:
      propose.latest = [*past[prompt]][-history:]
      past[prompt].extend(epoch[prompt])
      return []
    texts = np.zeros((shape.texts, capacity), np.int32)
    length = np.zeros(shape.texts, np.int32)
    for i, text in [
      *enumerate(propose.latest),
      *((history + i, text) for i, text in enumerate(known)),
    ]:
      texts[i, 0], texts[i, 1 : 1 + len(text)] = 255, text  # a prompt of one
      length[i] = 1 + len(text)
    return np.asarray(draft(texts, length)).tolist()

  return propose


def _workload(prompts, group, tokens, epochs):
  rng = np.random.default_rng(7)
  plans = [_Plan(p) for p in range(prompts)]
  return [
    [[plan.sample(rng, tokens) for _ in range(group)] for plan in plans]
    for _ in range(epochs)
  ]


@pytest.mark.parametrize(
  'size', [(2, 4, 80, 2), pytest.param((6, 8, 200, 3), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('width', [5, 9, 17])
def test_drafts_are_as_good_as_an_exact_trie(width, size):
  """Tokens per forward on text of phrases: within 3 % of exact tries.

  History and live group, max-sum rule, both on the same texts. Mutants: the
  longest match wins; the group's own texts are left out; no text of earlier
  epochs; the frontier of a sibling counts as a match.
  """
  texts = _workload(*size)
  want = _per_forward(texts, _reference(width - 1))
  got = _per_forward(texts, _device(width, group=size[1], capacity=208))
  print(f'W = {width}: {got:.3f} tokens per forward, exact tries {want:.3f}')
  assert got >= 0.97 * want and want > 1.5
