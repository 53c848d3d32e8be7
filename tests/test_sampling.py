"""The law that tokens are sampled from, and the noise that samples it."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlax_llm.ops import sampling
from rlax_llm.ops.sampling import Sampling

ORACLE = pathlib.Path(__file__).parent / 'oracles' / 'entropy_logprob.json'
LEAST_P = 1e-4  # fixed seeds: a p-value below this is a defect
LAWS = [
  Sampling(temperature, top_k, top_p, min_p)
  for temperature, top_k, top_p, min_p in itertools.product(
    (1.0, 0.7, 1.5), (0, 1, 3), (1.0, 0.9, 0.4), (0.0, 0.2)
  )
]


def numpy_law(logits, law):
  """The law by its definition, one row in float64; ties are all kept."""
  x = np.asarray(logits, np.float64)
  if law.temperature == 0:
    return np.eye(len(x))[np.argmax(x)]
  normalise = lambda w: w / w.sum()
  p = normalise(np.exp((x - x.max()) / law.temperature))
  if law.top_k:
    p = normalise(np.where(p >= np.sort(p)[::-1][law.top_k - 1], p, 0))
  if law.top_p < 1:
    mass, least = 0.0, 0.0
    for q in np.sort(p)[::-1]:
      if mass >= law.top_p:
        break
      mass, least = mass + q, q
    p = normalise(np.where(p >= least, p, 0))
  if law.min_p:
    p = normalise(np.where(p >= law.min_p * p.max(), p, 0))
  return p


def logits_rows():
  """Rows with random logits, with ties, and with -inf."""
  rng = np.random.default_rng(0)
  rows = rng.normal(0, 2, (24, 9)).astype(np.float32)
  rows[8:16] = np.round(rows[8:16])  # ties, also at the cut
  rows[16:20, 2:5] = -np.inf
  rows[20] = [0, 0, 0] + [-np.inf] * 6
  rows[21] = [-np.inf] * 8 + [3]
  rows[22] += 100
  return rows


@pytest.mark.parametrize('law', LAWS, ids=str)
def test_law_equals_its_definition(law):
  """log_law is the numpy law, normalised, -inf exactly where that is 0.

  Mutants: top-k keeps k + 1; the cut of top-p compares the sum *with* the
  token; min-p without the logarithm; temperature multiplies.
  """
  rows = logits_rows()
  got = np.asarray(sampling.log_law(jnp.asarray(rows), law))
  want = np.stack([numpy_law(row, law) for row in rows])
  np.testing.assert_array_equal(np.isneginf(got), want == 0)
  np.testing.assert_allclose(np.exp(got), want, atol=1e-5)
  np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-5)


def test_greedy_law_is_one_hot():
  """Temperature 0 puts everything on the first best token, other cuts or not.

  Mutant: greedy marks every best token, so that ties sum to more than 1.
  """
  rows = logits_rows()
  for law in (Sampling(0.0), Sampling(0.0, 2, 0.5, 0.1)):
    got = np.exp(np.asarray(sampling.log_law(jnp.asarray(rows), law)))
    np.testing.assert_array_equal(got, np.eye(9)[rows.argmax(-1)])


def test_greedy_race_is_argmax():
  """A race at temperature 0 is argmax whatever the clocks say.

  Mutant: race adds the clocks to the log-probabilities without the floor.
  """
  rows = logits_rows()
  law = sampling.log_law(jnp.asarray(rows), Sampling(0.0))
  for position in range(3):
    got = jax.vmap(sampling.race, (None, None, 0))(
      _key(position), jnp.int32(position), law
    )
    np.testing.assert_array_equal(got, rows.argmax(-1))


def test_oracle():
  """Log-probabilities, entropies and their gradient of an outside oracle.

  Mutants: entropy without the minus sign, temperature ignored.
  """
  oracle = json.loads(ORACLE.read_text())
  logits = jnp.asarray(oracle['inputs']['logits'], jnp.float32)
  tokens = np.asarray(oracle['inputs']['tokens'])[..., None]
  expected = oracle['expected']
  for temperature, suffix in ((1.0, ''), (0.7, '_T0_7')):
    law = sampling.log_law(logits, Sampling(temperature))
    np.testing.assert_allclose(
      np.take_along_axis(np.asarray(law), tokens, -1)[..., 0],
      expected['logprob' + (suffix or '_T1')],
      atol=1e-5,
    )
    np.testing.assert_allclose(
      sampling.entropy(law), expected['entropy' + suffix], atol=1e-5
    )
  gradient = jax.grad(
    lambda x: sampling.entropy(sampling.log_law(x, Sampling())).sum()
  )(logits)
  np.testing.assert_allclose(gradient, expected['dH_dlogits'], atol=1e-5)


def test_entropy_of_excluded_tokens():
  """-inf counts 0, in the value and in the gradient.

  Mutant: p * log p without the inner where (0 * inf is NaN).
  """

  def total(x):
    return sampling.entropy(sampling.log_law(x, Sampling(top_k=2)))

  x = jnp.asarray([1.0, 0.5, -1.0, -jnp.inf])
  p = numpy_law(x[:2], Sampling())
  np.testing.assert_allclose(total(x), -(p * np.log(p)).sum(), atol=1e-6)
  gradient = np.asarray(jax.grad(total)(x))
  assert np.isfinite(gradient).all() and (gradient[2:] == 0).all()


def _key(*entropy):
  words = np.random.SeedSequence([7, *entropy]).generate_state(2)
  return jnp.asarray(words, jnp.uint32)


def _keys(count, seed=0):
  words = np.random.SeedSequence(seed).generate_state(2 * count)
  return jnp.asarray(words.reshape(count, 2), jnp.uint32)


@jax.jit
def _grid(keys, positions):
  """Uniforms [keys, positions, 96] of the clocks."""
  one = lambda k, t: -jnp.expm1(-sampling.clocks(k, t, 96))
  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, positions)


def _grid_u(keys, first=0):
  return np.asarray(_grid(keys, jnp.arange(first, first + 40)))


def test_clocks_are_exponential():
  """1 - exp(-E) is uniform: over all, and for each position and token apart.

  Mutants: one mixing round less in the bits; E = -log u of u in [0, 0.5).
  """
  u = _grid_u(_keys(256))
  assert stats.kstest(u.reshape(-1), 'uniform').pvalue > LEAST_P
  counts = np.stack([(np.floor(u * 16) == b).sum() for b in range(16)])
  assert stats.chisquare(counts).pvalue > LEAST_P
  for axes in ((0, 1), (0, 2), (1, 2)):
    # Means of n uniforms are normal with variance 1 / (12 n).
    n = np.prod([u.shape[a] for a in axes])
    z = (u.mean(axes, dtype=np.float64) - 0.5) * np.sqrt(12 * n)
    assert stats.kstest(z, 'norm').pvalue > LEAST_P


def _assert_independent(a, b, what):
  """Chi-square of an 8 x 8 table, and the correlation."""
  a, b = a.reshape(-1), b.reshape(-1)
  table = np.histogram2d(a, b, bins=8, range=((0, 1), (0, 1)))[0]
  assert stats.chisquare(table.reshape(-1)).pvalue > LEAST_P, what
  z = np.corrcoef(a, b)[0, 1] * np.sqrt(a.size)
  assert abs(z) < 4.5, what


def test_neighbours_are_independent():
  """No pair of clocks tells of one another, shifts of (t, v) included.

  Mutants: the position enters as key[0] + t * golden without a mix, so that
  position t + 1 is position t shifted by one token; the second word left out.
  """
  u = _grid_u(_keys(64, 1))
  for dt, dv in itertools.product(range(4), range(-4, 5)):
    if (dt, dv) > (0, 0):
      a = u[:, : 40 - dt, max(0, -dv) : 96 - max(0, dv)]
      b = u[:, dt:, max(0, dv) : 96 - max(0, -dv)]
      _assert_independent(a, b, (dt, dv))


def _words(first, second):
  return jnp.asarray([[first, second]], jnp.uint32)


@pytest.mark.parametrize(
  'other',
  [
    lambda k: k + _words(1, 0),
    lambda k: k + _words(0, 1),
    lambda k: k + _words(1, 1),
    lambda k: k ^ _words(1 << 31, 0),
    lambda k: k ^ _words(0, 1 << 31),
    lambda k: k[:, ::-1],
    lambda k: k + _words(0x9E3779B9, 0),
    lambda k: k + _words(0, 0x85EBCA6B),
  ],
  ids=['word0', 'word1', 'both', 'top0', 'top1', 'swapped', 'golden0', 'weyl1'],
)
def test_related_keys_are_independent(other):
  """Clocks of keys that differ by a structured step are independent.

  golden0 makes key' at t the same first word as key at t + 1. Mutants: the
  hash reads key[0] only (word1); the second word leaves out the position
  (golden0); the words enter as a sum (swapped).
  """
  keys = _keys(64, 2)
  u, w = _grid_u(keys), _grid_u(other(keys))
  _assert_independent(u, w, 0)
  _assert_independent(u[:, 1:], w[:, :-1], 1)
  _assert_independent(u[:, :-1], w[:, 1:], -1)
  _assert_independent(u[:, :, 1:], w[:, :, :-1], 'token')


def test_clocks_do_not_depend_on_the_vocabulary():
  """Shard invariance: V = 64 is a prefix of V = 512, bit for bit.

  Mutant: the vocabulary size enters the hash or the counter (t * V + v).
  """
  for t in (0, 1, 77):
    small = sampling.clocks(_key(3), jnp.int32(t), 64)
    large = sampling.clocks(_key(3), jnp.int32(t), 512)
    np.testing.assert_array_equal(small, large[:64])


def test_small_clocks_are_resolved():
  """Clocks below 2^-19 have the right number and are nearly all distinct.

  Winners of a large vocabulary are decided there. Mutants: u = (bits >> 8) *
  2^-24 (32 values are left below 2^-19); u taken near 1 instead of near 0.
  """
  one = lambda t: sampling.clocks(_key(5), t, 1 << 17)
  e = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(256))).reshape(-1)
  small = e[e < 2.0**-19]
  mean = e.size * 2.0**-19  # 64
  assert (
    stats.poisson(mean).ppf(1e-4) < len(small) < stats.poisson(mean).isf(1e-4)
  )
  assert len(set(small)) >= len(small) - 2
  assert e.min() > 0 and np.isfinite(e).all()
  least = e.reshape(256, -1).min(-1) * (1 << 17)
  assert stats.kstest(least, 'expon').pvalue > LEAST_P


@jax.jit
def _races(keys, positions, law):
  one = jax.vmap(sampling.race, (None, 0, None))
  return jax.vmap(one, (0, None, None))(keys, positions, law)


RACES = {
  'uniform': np.full(8, 1 / 8),
  'skewed': np.asarray([0.9, 0.05, 0.03, 0.01, 0.01]),
  'with zeros': np.asarray([0, 0.5, 0, 0.3, 0.2, 0]),
  'certain': np.asarray([0, 0, 1.0]),
  'geometric': 2.0 ** -np.arange(1, 12) / (1 - 2.0**-11),
  'many': np.random.default_rng(3).dirichlet(np.full(300, 0.3)),
}


@pytest.mark.parametrize('name', RACES)
def test_race_samples_the_law(name):
  """The winner of argmin E_v / p_v is distributed as p; p = 0 never wins.

  Mutants: E * p; E + log p without the race; -log(1 - u) squared.
  """
  p = RACES[name]
  tokens = np.asarray(
    _races(_keys(1000, 4), jnp.arange(60), jnp.log(jnp.asarray(p, jnp.float32)))
  )
  counts = np.bincount(tokens.reshape(-1), minlength=len(p))
  expected = p * tokens.size
  assert (counts[p == 0] == 0).all()
  rare = expected < 10
  pool = lambda x: np.append(x[~rare], x[rare].sum())
  counts, expected = pool(counts), pool(expected)
  counts, expected = counts[expected > 0], expected[expected > 0]
  expected *= counts.sum() / expected.sum()
  if len(counts) > 1:
    assert stats.chisquare(counts, expected).pvalue > LEAST_P


def test_race_of_a_large_vocabulary():
  """V = 150k: 100 tokens of p = 1e-3 win a tenth, tiny ones share the rest.

  Mutants: u resolved to 2^-24 only, or ties given to the first token.
  """
  vocabulary, special = 150_000, 700 + 1000 * np.arange(100)
  p = np.full(vocabulary, 0.9 / (vocabulary - 100))
  p[special] = 1e-3
  law = jnp.log(jnp.asarray(p, jnp.float32))
  race = jax.jit(sampling.race)
  tokens = np.asarray(
    [race(key, jnp.int32(t), law) for key in _keys(50, 5) for t in range(30)]
  )
  wins = np.isin(tokens, special)
  assert stats.binomtest(int(wins.sum()), len(tokens), 0.1).pvalue > LEAST_P
  assert stats.kstest(tokens[~wins] / vocabulary, 'uniform').pvalue > LEAST_P


def test_race_is_invariant_to_shifts_of_the_law():
  """Unnormalised log-probabilities give the same winner: a race is a ratio.

  Mutant: race draws by an inverse CDF, which needs the sum.
  """
  law = jnp.log(jnp.asarray(RACES['many'], jnp.float32))
  keys, positions = _keys(30, 6), jnp.arange(10)
  np.testing.assert_array_equal(
    _races(keys, positions, law), _races(keys, positions, law + 4.0)
  )


@pytest.mark.parametrize('mix', [0.02, 0.2, 0.6, 1.0])
def test_race_of_a_draft_law_matches(mix):
  """Racing q and p with one noise agrees with P >= (1 - TV) / (1 + TV).

  Mutant: an inverse CDF in place of the race; noise that depends on the law.
  """
  rng = np.random.default_rng(4)
  p, other = rng.dirichlet(np.ones(40), 2)
  q = (1 - mix) * p + mix * other
  bound = np.abs(p - q).sum() / 2
  bound = (1 - bound) / (1 + bound)
  log = lambda x: jnp.log(jnp.asarray(x, jnp.float32))
  keys, positions = _keys(400, 8), jnp.arange(50)
  same = np.asarray(
    _races(keys, positions, log(p)) == _races(keys, positions, log(q))
  )
  sigma = np.sqrt(bound * (1 - bound) / same.size)
  assert same.mean() > bound - 4 * sigma
  # Not by being blind to the law: q != p must part somewhere.
  assert same.mean() < 1


def test_sample_keys_are_distinct():
  """No two samples share a key: domains, steps, requests, indices, seeds.

  The grid holds all pairs swapped ((step 2, request 3) and (3, 2)). Mutants:
  the domain or the index left out; the values folded in as their sum.
  """
  grid = np.stack(
    np.meshgrid(
      np.arange(2),
      np.r_[np.arange(12), 255, 65536],
      np.arange(12),
      np.arange(12),
      indexing='ij',
    ),
    -1,
  ).reshape(-1, 4)
  columns = [jnp.asarray(c, jnp.int32) for c in grid.T]
  keys = [
    np.asarray(sampling.sample_keys(seed, *columns)) for seed in (0, 1, 17)
  ]
  rows = np.concatenate(keys)
  assert len(np.unique(rows, axis=0)) == len(rows)
  # Each word alone is used as well: a stuck word would halve the key.
  for word in rows.T:
    assert len(np.unique(word)) > 0.99 * len(rows)


@pytest.mark.parametrize('field', range(4))
def test_neighbouring_samples_are_independent(field):
  """The clocks of samples next to one another in any field are independent.

  Mutant: the key is (seed, a linear sum of the fields).
  """
  base = np.stack(
    np.meshgrid([0], np.arange(4), np.arange(4), np.arange(4), indexing='ij'),
    -1,
  ).reshape(-1, 4)
  after = base.copy()
  after[:, field] += 1
  u, w = (
    _grid_u(sampling.sample_keys(0, *(jnp.asarray(c, jnp.int32) for c in x.T)))
    for x in (base, after)
  )
  _assert_independent(u, w, field)
  _assert_independent(u[:, 1:], w[:, :-1], field)
