"""Rejection rules, draft trees and coupled races: laws against enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.verification import draft_trees
from experiments.verification import rejection
from experiments.verification import rules
from rlax_llm.ops import sampling
from rlax_llm.types import DraftTree
from rlax_llm.types import UNUSED

V, LENGTH = 3, 4  # tokens; tokens of a sequence: several rounds
SAMPLES = 60_000
LEAST_P = 1e-4  # fixed seeds: a p-value below this is a defect
SHAPES = {
  'chain': (1, 1, 1),
  'paths': (3, 1),
  'delayed': (1, 3, 1),
  'full': (2, 2),
}


def random_laws(seed, *shape, concentration=0.8):
  """Laws float32[*shape] over the last axis."""
  rng = np.random.default_rng(seed)
  law = rng.dirichlet([concentration] * shape[-1], shape[:-1])
  return np.maximum(law, 1e-3).astype(np.float32) / np.maximum(law, 1e-3).sum(
    -1, keepdims=True
  ).astype(np.float32)


# Markov laws of order 2: [token before, token, next token].
TARGET = random_laws(1, V, V, V)
DRAFT = 0.5 * TARGET + 0.5 * random_laws(2, V, V, V)


def table_law(table, previous, tree):
  """Returns log-laws [W, V] after each node; `previous` is behind the root."""
  before = jnp.where(
    tree.parents == UNUSED, previous, tree.tokens[jnp.maximum(tree.parents, 0)]
  )
  return jnp.log(jnp.asarray(table))[before, tree.tokens]


def make_noise(rows, seed):
  words = np.random.SeedSequence(seed).generate_state(6 * rows)
  return rules.Noise(*jnp.asarray(words.reshape(3, rows, 2), jnp.uint32))


@functools.partial(jax.jit, static_argnums=1)
def _decode(rule, branching, noise):
  """Returns int32[N, LENGTH] in rounds of a rule, and tokens by round 1."""
  rows = noise.target.shape[0]
  width = draft_trees.width(branching)
  order = jnp.arange(width)[None]

  def body(state):
    text, length, _ = state
    at = lambda back: text[jnp.arange(rows), length - back]
    previous, root = at(2), at(1)
    law = lambda table, tree: jax.vmap(functools.partial(table_law, table))(
      previous, tree
    )
    tree, draft, _ = rules.propose(
      rule,
      root,
      noise,
      length - 2,
      lambda tree: (law(DRAFT, tree), None),
      branching=branching,
    )
    path = rules.verify(rule, tree, law(TARGET, tree), draft, noise, length - 2)
    live = length < LENGTH + 2
    place = jnp.where(
      live[:, None] & (order < path.length[:, None]),
      length[:, None] + order,
      text.shape[1],
    )
    text = text.at[jnp.arange(rows)[:, None], place].set(
      path.tokens, mode='drop'
    )
    return text, length + jnp.where(live, path.length, 0), path.length

  start = (
    jnp.zeros((rows, LENGTH + 2 + width), jnp.int32),
    jnp.full(rows, 2, jnp.int32),
    jnp.zeros(rows, jnp.int32),
  )
  first = body(start)[2]
  text = jax.lax.while_loop(lambda s: jnp.any(s[1] < LENGTH + 2), body, start)[
    0
  ]
  return text[:, 2 : LENGTH + 2], first


def decode(name, branching, noise):
  return _decode(rules.number(name), branching, noise)


@functools.cache
def exact():
  """Probability of every sequence, in the order of their base-V numbers."""
  result = []
  for sequence in itertools.product(range(V), repeat=LENGTH):
    p, before, token = 1.0, 0, 0
    for x in sequence:
      p, before, token = p * float(TARGET[before, token, x]), token, x
    result.append(p)
  return np.asarray(result) / np.sum(result)


def p_value(name, branching, seed):
  """Returns the chi-square p-value of the joint law, and tokens by round."""
  tokens, first = decode(name, branching, make_noise(SAMPLES, seed))
  number = np.asarray(tokens) @ V ** np.arange(LENGTH)[::-1]
  counts = np.bincount(number, minlength=V**LENGTH)
  return (
    stats.chisquare(counts, exact() * SAMPLES).pvalue,
    float(np.mean(np.asarray(first))),
  )


CASES = [
  (name, shape)
  for name, rule in rules.RULES.items()
  for shape in SHAPES
  if shape == 'chain' or rule.works_on != 'chain'
]
# The shape that says most of each rule; the others are slow tests.
FIRST = [
  (name, 'chain' if rule.works_on == 'chain' else 'delayed')
  for name, rule in rules.RULES.items()
]


@pytest.mark.parametrize(
  'name, shape',
  [
    pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow)
    for case in CASES
  ],
)
def test_law(name, shape):
  """Four tokens of several rounds have the target's joint law.

  Mutants: the residual is p; multi-round tries every child against the first p;
  block keeps a prefix with probability w instead of h; siblings are drawn with
  one noise.
  """
  pvalue, _ = p_value(name, SHAPES[shape], 3)
  assert pvalue > LEAST_P


def test_planted_bias_fails():
  """The same test refuses a rule that draws from p after a rejection.

  Mutant: the planted rule is chain rejection itself.
  """
  pvalue, _ = p_value(rules.PLANTED, SHAPES['chain'], 3)
  assert pvalue < 1e-12


def test_follow_has_the_tokens_of_plain_sampling():
  """Tokens are those of races one by one, whatever the draft and its shape.

  Mutant: all depths race with the clocks of the root.
  """
  noise = make_noise(512, 5)
  want = np.asarray(decode('follow, independent', (), noise)[0])
  for name, shape in FIRST:
    if name.startswith('follow'):
      got = np.asarray(decode(name, SHAPES[shape], noise)[0])
      np.testing.assert_array_equal(got, want, f'{name} {shape}')


def first_kept(name):
  """Returns the probability that the first token of a chain is kept."""
  p, q = TARGET[0, 0].astype(float), DRAFT[0, 0].astype(float)
  return {
    'follow, race': float(rejection.race_agreement(p, q)),
    'follow, best': p[np.argmax(q)],
    'follow, independent': p @ q,
    'chain rejection': 1 - np.abs(p - q).sum() / 2,
  }[name]


@pytest.mark.parametrize(
  'name',
  ['follow, race', 'follow, best', 'follow, independent', 'chain rejection'],
)
def test_acceptance_of_one_token(name):
  """The first token of a chain is kept as often as the formula says.

  For chain rejection that is 1 - TV(p, q).

  Mutant: chain rejection keeps a token if and only if p >= q.
  """
  _, first = decode(name, (1, 1, 1), make_noise(SAMPLES, 7))
  kept = int(np.sum(np.asarray(first) > 1))
  assert stats.binomtest(kept, SAMPLES, first_kept(name)).pvalue > LEAST_P


def test_tokens_of_a_round():
  """Chain rejection and block keep as many tokens as enumeration says.

  P(the first i are kept | x) is prod min(1, p / q) by token and
  w_i = min(1, w_{i-1} p / q) by block; the latter is more.

  Mutant: block stops at the first prefix that is not kept.
  """
  expected = {'chain rejection': 1.0, 'block': 1.0}
  for x in itertools.product(range(V), repeat=3):
    before, token, drawn, product, weight = 0, 0, 1.0, 1.0, 1.0
    for i, y in enumerate(x):
      p, q = float(TARGET[before, token, y]), float(DRAFT[before, token, y])
      drawn, product = drawn * q, product * min(1, p / q)
      weight = min(1, weight * p / q)
      before, token = token, y
      # Each prefix of i tokens is met once for each way to go on.
      share = drawn if i == 2 else drawn / V ** (2 - i)
      expected['chain rejection'] += share * product
      expected['block'] += share * weight
  assert expected['block'] > 1.01 * expected['chain rejection']
  for name, want in expected.items():
    _, first = decode(name, (1, 1, 1), make_noise(SAMPLES, 11))
    first = np.asarray(first)
    error = first.std() / np.sqrt(SAMPLES)
    assert abs(first.mean() - want) < 4.5 * error, name


def race_pairs():
  """Pairs of laws, peaked and flat, near and far, with zeros and one-hot."""
  rng = np.random.default_rng(4)
  pairs = []
  for concentration in (0.2, 1.0, 5.0):
    for mix in (0.1, 0.5, 1.0):
      p, other = rng.dirichlet([concentration] * 6, 2)
      pairs.append((p, (1 - mix) * p + mix * other))
  p = rng.dirichlet([1.0] * 6)
  pairs += [(p, p), (p, np.eye(6)[2]), (p, np.roll(p, 1))]
  pairs.append((np.r_[p[:3], 0, 0, 0] / p[:3].sum(), p))
  pairs.append((np.r_[1, 1, 0, 0, 0, 0] / 2, np.r_[0, 0, 1, 1, 0, 0] / 2))
  return np.asarray(pairs, np.float32)


def test_race_agreement():
  """Two races with one noise agree as often as the formula says.

  Within 0.02 by sampling, at least (1 - TV) / (1 + TV), at most 1 - TV; at no
  price where the drafter is sure.

  Mutants: the formula leaves out q_j / q_i; TV without the half.
  """
  keys = make_noise(40_000, 9).target

  def agree(key, pair):
    race = jax.vmap(sampling.race, (None, None, 0))
    tokens = race(key, jnp.int32(0), jnp.log(pair))
    return tokens[0] == tokens[1]

  every = jax.jit(jax.vmap(jax.vmap(agree, (0, None)), (None, 0)))
  for pair, rate in zip(
    race_pairs(), np.asarray(every(keys, race_pairs())).mean(-1)
  ):
    formula = float(rejection.race_agreement(*pair))
    tv = float(rejection.total_variation(*pair))
    assert abs(rate - formula) < 0.02
    assert (1 - tv) / (1 + tv) - 1e-6 <= formula <= 1 - tv + 1e-6
  p, sure = race_pairs()[10]
  np.testing.assert_allclose(rejection.race_agreement(p, sure), p[2], rtol=1e-6)


def random_rows(branching, count, seed):
  """Returns (trees, p, q, uniforms, clocks) of independent draws, V = 4."""
  rng = np.random.default_rng(seed)
  width = draft_trees.width(branching)
  laws = rng.dirichlet([0.7] * 4, (2, count, width)) + 1e-3
  p, q = (laws / laws.sum(-1, keepdims=True)).astype(np.float32)
  keys = make_noise(count, seed).draft

  def draw(key, law):
    level = lambda depth, tree: draft_trees.grow_independent(
      tree, jnp.log(law), key, jnp.int32(0), depth, branching=branching
    )
    return jax.lax.fori_loop(
      0, len(branching), level, draft_trees.plant(jnp.int32(0), branching)
    )

  return (
    jax.jit(jax.vmap(draw))(keys, q),
    p,
    q,
    rng.random((count, width)).astype(np.float32),
    rng.exponential(size=(count, 4)).astype(np.float32),
  )


def kept(rule, *args):
  """Returns [(nodes, tokens)] that a rule keeps of each row."""
  path = jax.device_get(jax.jit(jax.vmap(rule))(*args))
  return [
    (nodes[:length].tolist(), tokens[:length].tolist())
    for nodes, tokens, length in zip(path.nodes, path.tokens, path.length)
  ]


def test_on_a_chain_tree_rules_are_chain_rules():
  """Multi-round is chain rejection and traversal is block, draw by draw.

  Mutant: a child's weight without its parent's.
  """
  tree, *rest = random_rows((1,) * 5, 4000, 1)
  for on_tree, on_chain in (
    (rejection.multi_round, rejection.chain),
    (rejection.traversal, rejection.block),
  ):
    assert kept(on_tree, tree, *rest) == kept(on_chain, tree.tokens, *rest)


def plain_multi_round(children, tokens, p, q, uniforms, clocks):
  """SpecInfer's rule by recursion over lists of children."""
  nodes, law = [0], p[0]
  trying = list(children[0])
  while trying:
    child = trying.pop(0)
    here, x = nodes[-1], tokens[child]
    if uniforms[child] < law[x] / q[here][x]:
      nodes.append(child)
      law, trying = p[child], list(children[child])
    else:
      law = np.maximum(law - q[here], 0)
      law = law / law.sum()
  return nodes, law


def plain_traversal(children, tokens, p, q, uniforms, clocks):
  """Traversal by its definition: weights anew after every deletion."""
  p, q, weight = [*p], [*q], {0: 1.0}
  distinct = {
    n: [
      c
      for i, c in enumerate(cs)
      if tokens[c] not in {tokens[d] for d in cs[:i]}
    ]
    for n, cs in children.items()
  }

  def weigh(node):
    for child in distinct[node]:
      x = tokens[child]
      weight[child] = min(1, weight[node] * p[node][x] / q[node][x])
      weigh(child)

  weigh(0)
  while True:
    nodes = [0]
    while distinct[nodes[-1]]:
      nodes.append(distinct[nodes[-1]][0])
    leaf = nodes[-1]
    if leaf == 0 or uniforms[leaf] < weight[leaf]:
      return nodes, p[leaf]
    above = nodes[-2]
    distinct[above].remove(leaf)
    left = np.maximum(weight[above] * p[above] - q[above], 0)
    # Where nothing is left the weight is 0, and p is never asked for.
    p[above] = left / max(left.sum(), 1e-30)
    weight[above] = left.sum() / (left.sum() + 1 - weight[above])
    q[above] = np.where(np.arange(4) == tokens[leaf], 0, q[above])
    q[above] = q[above] / max(q[above].sum(), 1e-30)
    weigh(above)


@pytest.mark.parametrize('branching', [(4,), (3, 1, 1), (1, 3, 1), (2, 2, 2)])
def test_tree_rules_equal_their_definition(branching):
  """Multi-round and traversal keep what plain Python keeps, row by row.

  The law alone would not tell a rule that accepts too little.

  Mutants: multi-round goes on with the same p after a rejection; traversal
  leaves a deleted token in q, counts twins, or weighs a bereaved parent by S.
  """
  count = 1500
  tree, *rest = random_rows(branching, count, 2)
  tokens, parents = np.asarray(tree.tokens), np.asarray(tree.parents)
  for rule, plain in (
    (rejection.multi_round, plain_multi_round),
    (rejection.traversal, plain_traversal),
  ):
    got = kept(rule, tree, *rest)
    differ = 0
    for row in range(count):
      children = {
        n: np.flatnonzero(parents[row] == n).tolist()
        for n in range(parents.shape[1])
      }
      arrays = [np.asarray(x[row], np.float64) for x in rest]
      nodes, law = plain(children, tokens[row], *arrays)
      last = int(np.argmin(arrays[-1] / np.maximum(law, 1e-30)))
      want = [*tokens[row][nodes[1:]], last]
      differ += got[row] != (nodes, want)
    # float32 against float64: a test that is nearly a tie may differ.
    assert differ <= 2, (rule.__name__, differ)
    longest = max(len(nodes) for nodes, _ in got)
    assert longest == len(branching) + 1


def test_shapes_by_hand():
  """Parents and W of chains, paths, late branches and full trees.

  Mutant: every depth branches as the widest does.
  """
  for branching, parents in {
    (): [-1],
    (1, 1): [-1, 0, 1],
    (2, 1): [-1, 0, 0, 1, 2],
    (1, 2): [-1, 0, 1, 1],
    (2, 2): [-1, 0, 0, 1, 1, 2, 2],
  }.items():
    tree = draft_trees.plant(jnp.int32(7), branching)
    assert tree.parents.tolist() == parents
    assert tree.tokens.tolist() == [7] * len(parents)
    assert draft_trees.width(branching) == len(parents)


def test_trees_hold_what_they_were_drawn_from():
  """Children of a race are its first arrivals; twins' children hang on the
  first of them, and nothing else is moved.

  Mutants: children of second twins stay where they are; every depth of a race
  uses the clocks of the root.
  """
  law = jnp.log(random_laws(6, 7, 5, concentration=0.3))
  grow = functools.partial(draft_trees.grow_race, branching=(2, 2))
  key, place = make_noise(1, 12).target[0], jnp.int32(4)
  tree = draft_trees.plant(jnp.int32(0), (2, 2))
  for depth in range(2):
    tree = grow(tree, law, key, place, jnp.int32(depth))
  for node, children in ((0, [1, 2]), (1, [3, 4]), (2, [5, 6])):
    scores = sampling.race_scores(key, place + (node > 0), law[node])
    best = np.argsort(np.asarray(scores))[:2]
    assert tree.tokens[jnp.asarray(children)].tolist() == best.tolist()
  twins = 0
  tree = random_rows((2, 2), 200, 8)[0]
  for tokens, parents in zip(
    np.asarray(tree.tokens), np.asarray(tree.parents).tolist()
  ):
    twin = tokens[1] == tokens[2]
    twins += twin
    assert parents == [-1, 0, 0, 1, 1, *([1, 1] if twin else [2, 2])]
  assert 0 < twins < 200


def test_rules_refuse_wrong_shapes():
  """One q too few, or integers for laws, end while tracing.

  Mutant: only ranks are checked.
  """
  tree, p, q, uniforms, clocks = (
    jax.tree.map(lambda x: x[0], part) for part in random_rows((1, 1), 1, 0)
  )
  assert isinstance(tree, DraftTree)
  for rule, draft in (
    (rejection.chain, tree.tokens),
    (rejection.block, tree.tokens),
    (rejection.multi_round, tree),
    (rejection.traversal, tree),
  ):
    with pytest.raises(AssertionError):
      rule(draft, p, q[:-1], uniforms, clocks)
    with pytest.raises(AssertionError):
      rule(draft, p.astype(np.int32), q, uniforms, clocks)
