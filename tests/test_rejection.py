"""Rejection rules, draft trees and coupled races: laws against enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.verification import rules
from rlax_llm.ops import draft_trees
from rlax_llm.ops import rejection
from rlax_llm.ops import sampling
from rlax_llm.ops import verification
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
  return np.maximum(law, 1e-3).astype(np.float32) / np.maximum(
      law, 1e-3).sum(-1, keepdims=True).astype(np.float32)


# Markov laws of order 2: [token before, token, next token].
TARGET = random_laws(1, V, V, V)
DRAFT = 0.5 * TARGET + 0.5 * random_laws(2, V, V, V)


def table_law(table, previous, tree):
  """Returns log-laws [W, V] after each node; `previous` is behind the root."""
  before = jnp.where(tree.parents == UNUSED, previous,
                     tree.tokens[jnp.maximum(tree.parents, 0)])
  return jnp.log(jnp.asarray(table))[before, tree.tokens]


def make_noise(rows, seed):
  words = np.random.SeedSequence(seed).generate_state(6 * rows)
  return rules.Noise(*jnp.asarray(words.reshape(3, rows, 2), jnp.uint32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(rule, branching, noise):
  """Returns int32[N, LENGTH] in rounds of a rule, and tokens by round 1."""
  rows = noise.target.shape[0]
  width = draft_trees.width(branching)
  order = jnp.arange(width)[None]

  def body(state):
    text, length, _ = state
    at = lambda back: text[jnp.arange(rows), length - back]
    previous, root = at(2), at(1)
    law = lambda table, tree: jax.vmap(functools.partial(table_law, table))(
        previous, tree)
    tree, draft, _ = rules.propose(rule,
                                   root,
                                   noise,
                                   length - 2,
                                   lambda tree: (law(DRAFT, tree), None),
                                   branching=branching)
    path = jax.vmap(rule.verify)(tree, law(TARGET, tree), draft, noise,
                                 length - 2)
    live = length < LENGTH + 2
    place = jnp.where(
        live[:, None] & (order < path.length[:, None]),
        length[:, None] + order, text.shape[1])
    text = text.at[jnp.arange(rows)[:, None], place].set(path.tokens,
                                                         mode='drop')
    return text, length + jnp.where(live, path.length, 0), path.length

  start = (jnp.zeros((rows, LENGTH + 2 + width), jnp.int32),
           jnp.full(rows, 2, jnp.int32), jnp.zeros(rows, jnp.int32))
  first = body(start)[2]
  text = jax.lax.while_loop(lambda s: jnp.any(s[1] < LENGTH + 2), body,
                            start)[0]
  return text[:, 2:LENGTH + 2], first


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


def p_value(rule, branching, seed):
  """Returns the chi-square p-value of the joint law, and tokens by round."""
  tokens, first = decode(rule, branching, make_noise(SAMPLES, seed))
  number = np.asarray(tokens) @ V**np.arange(LENGTH)[::-1]
  counts = np.bincount(number, minlength=V**LENGTH)
  return (stats.chisquare(counts, exact() * SAMPLES).pvalue,
          float(np.mean(np.asarray(first))))


CASES = [(name, shape)
         for name, rule in rules.RULES.items()
         for shape in SHAPES
         if shape == 'chain' or not rule.chain_only]


@pytest.mark.parametrize('name, shape', CASES)
def test_law(name, shape):
  """Four tokens of several rounds have the target's joint law.

  Mutants:
  """
  pvalue, _ = p_value(rules.RULES[name], SHAPES[shape], 3)
  assert pvalue > LEAST_P


def test_planted_bias_fails():
  """The same test refuses a rule that draws from p after a rejection.

  Mutant: the planted rule is `rejection.chain` itself.
  """
  pvalue, _ = p_value(rules.PLANTED, SHAPES['chain'], 3)
  assert pvalue < 1e-12
