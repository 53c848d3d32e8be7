"""The experiment of verification rules: its decoding, and a tiny run of it."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.verification import decode as decoding
from experiments.verification import measure
from experiments.verification import rules
from experiments.verification import settings
from experiments.verification.decode import Pair
from rlax_llm import testing

WIDTH, ROWS, LONGEST = 4, 24, 15


@pytest.mark.slow
def test_a_drafter_that_is_the_target_is_always_right():
  """p = q: every draft is kept whole, W tokens for each forward.

  A drafter that reads a stale cache, other positions or another temperature
  stays lossless and is wrong now and then. EOS is out of reach, so that every
  row has T tokens. Prompts are of several lengths.

  Mutant: the drafter's cache takes the root at every place.
  """
  model = testing.tiny_model()
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  words = np.random.SeedSequence(1).generate_state(6 * ROWS)
  decode = jax.jit(
    lambda rule: decoding.decode(
      Pair(params, params),
      jnp.asarray(rng.integers(0, 7, (ROWS, 6)), jnp.int32),
      jnp.asarray(rng.integers(1, 7, ROWS), jnp.int32),
      jnp.linspace(0.3, 1.5, ROWS),
      rules.Noise(*jnp.asarray(words.reshape(3, ROWS, 2), jnp.uint32)),
      rule,
      models=Pair(model, model),
      branching=(1,) * (WIDTH - 1),
      max_new_tokens=LONGEST,
      eos_id=-1,
    )
  )
  for name in ('follow, race', 'chain rejection', 'block'):
    rows = decode(rules.number(name))
    np.testing.assert_array_equal(rows.tokens, LONGEST)
    np.testing.assert_array_equal(rows.forwards, -(-LONGEST // WIDTH), name)


def test_equal_nodes():
  """Every shape of a size has that many nodes, and its own form.

  Mutant: paths one token longer.
  """
  for nodes in (4, 8, 16):
    found = settings.shapes(nodes)
    assert len(set(found.values())) == len(found)
    for branching in found.values():
      assert np.sum(np.cumprod(branching)) == nodes
  assert len(settings.cells(4)) < len(settings.cells(8))


@pytest.mark.slow
def test_the_experiment_runs_tiny(tmp_path):
  """All of it with tiny models: laws pass, the planted one fails, tables add
  up, and `follow` samples the same tokens whatever is drafted.

  Mutant: the exact law goes on after EOS.
  """
  measure.run('smoke', 0, [4], tmp_path)

  def read(name):
    with open(tmp_path / name, encoding='utf-8', newline='') as file:
      return list(csv.DictReader(file))

  laws = read('laws.csv')
  assert {row['rule'] for row in laws} == {*rules.RULES, rules.PLANTED}
  for row in laws:
    assert (row['passes'] == 'True') == (row['rule'] != rules.PLANTED)
  efficiency = read('efficiency.csv')
  tokens = {}
  for row in efficiency:
    assert 1 <= float(row['block_efficiency']) <= 5
    assert float(row['block_efficiency']) == pytest.approx(
      int(row['tokens']) / int(row['forwards']), abs=1e-4
    )
    if row['rule'].startswith('follow'):
      tokens.setdefault(row['temperature'], set()).add(row['tokens'])
  assert len(tokens) == len(settings.TEMPERATURES)
  assert all(len(counts) == 1 for counts in tokens.values())
  for row in read('acceptance.csv'):
    bound, race, most = (
      float(row[name]) for name in ('race_bound', 'race', 'one_minus_tv')
    )
    assert bound <= race <= most < 1
  assert read('claims.csv')
  assert (tmp_path / 'efficiency.png').stat().st_size > 10_000
