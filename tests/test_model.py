"""The model: cached and uncached passes agree; scores; attention's masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlax_llm import testing
from rlax_llm.config import freeze
from rlax_llm.config import ModelConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.models import attention
from rlax_llm.models import kv_cache
from rlax_llm.models import rotary
from rlax_llm.models.language_model import score
from rlax_llm.models.language_model import score_tokens
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops import sampling as sampling_ops
from rlax_llm.ops import verification
from rlax_llm.ops.sampling import Sampling
from rlax_llm.types import Path
from rlax_llm.types import UNUSED

VOCABULARY = 11
SETTINGS = {
  'llama, 4 / 2': {},
  'llama, 4 / 1, untied': dict(kv_heads=1, tied_head=False),
  'qwen2, 4 / 4': dict(kv_heads=4, qkv_bias=True, rope_theta=1e6),
  'qwen3, wide heads': dict(qk_norm=True, head_dim=6, tied_head=False),
  'all': dict(qkv_bias=True, qk_norm=True, head_dim=10),
}


def _jitted(model):
  return model._replace(
    hidden=jax.jit(model.hidden),
    extend=jax.jit(model.extend),
    logits=jax.jit(model.logits),
  )


@functools.cache
def _world(name):
  """Returns (model, params); norms and biases moved off 1 and 0."""
  model = _jitted(
    testing.tiny_model(VOCABULARY, init_scale=1.0, **SETTINGS[name])
  )
  params = jax.jit(model.init)(jax.random.key(1))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return model, tree.unflatten(
    [
      x + 0.2 * jax.random.normal(k, x.shape) if x.ndim == 1 else x
      for x, k in zip(leaves, keys)
    ]
  )


def _tokens(*shape, seed=0):
  return (
    np.random.default_rng(seed).integers(0, VOCABULARY, shape).astype(np.int32)
  )


def _order(tokens):
  return jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )


def _uncached(model, params, tokens):
  """Logits [R, L, V] of rows of one segment; padded, to compile once."""
  length = tokens.shape[1]
  padded = jnp.zeros((tokens.shape[0], -(-length // 16) * 16), jnp.int32)
  padded = padded.at[:, :length].set(tokens)
  order = _order(padded)
  segments = jnp.where(order < length, 1, 0)
  hidden = model.hidden(params, padded, order, segments)
  return model.logits(params, hidden)[:, :length]


_commit = jax.jit(kv_cache.commit)


def _prefilled(model, params, tokens, length, capacity):
  """A cache with the first `length[n]` tokens of every row."""
  rows, width = tokens.shape
  cache = model.init_cache(rows, capacity)
  _, nodes = model.extend(
    params,
    tokens,
    _order(tokens),
    jnp.tril(jnp.ones((width, width), bool)),
    cache,
  )
  return _commit(
    cache, nodes, Path(_order(tokens), tokens, jnp.asarray(length))
  )


def _fill_garbage(cache, value):
  """Writes `value` at and beyond the length of every row."""
  order = jnp.arange(cache.capacity)[None, None, None]
  free = order >= cache.length[:, None, None, None]
  return cache.replace(
    keys=tuple(jnp.where(free, value, x) for x in cache.keys),
    values=tuple(
      jnp.where(free.swapaxes(2, 3), value, x) for x in cache.values
    ),
  )


@pytest.mark.parametrize('name', SETTINGS)
def test_cached_equals_uncached(name):
  """Chunks of 1 and 4 tokens through the cache give the uncached logits.

  Rows are ragged: row n starts from a prefix of its own length. Mutants:
  nodes take positions from 0; the cache's mask is `<= length`.
  """
  model, params = _world(name)
  tokens = _tokens(3, 16)
  want = _uncached(model, params, tokens)
  start = np.asarray([0, 3, 4], np.int32)
  cache = _prefilled(model, params, jnp.asarray(tokens[:, :4]), start, 16)
  at = start.copy()
  for width in (1, 4, 1, 1):
    place = at[:, None] + np.arange(width)
    rows = np.arange(3)[:, None]
    hidden, nodes = model.extend(
      params,
      jnp.asarray(tokens[rows, place]),
      jnp.asarray(place, jnp.int32),
      jnp.tril(jnp.ones((width, width), bool)),
      cache,
    )
    np.testing.assert_allclose(
      model.logits(params, hidden), want[rows, place], atol=1e-5
    )
    every = jnp.broadcast_to(jnp.arange(width), place.shape)
    cache = _commit(
      cache, nodes, Path(every, every, jnp.full(3, width, jnp.int32))
    )
    at += width
  np.testing.assert_array_equal(cache.length, at)


@pytest.mark.parametrize('name', ['llama, 4 / 2', 'qwen3, wide heads'])
def test_tree_nodes_see_their_root_path(name):
  """A node's logits are the uncached ones of prefix + path; so is its commit.

  After the accepted path of a branch is committed, the next token's logits
  are those of the text. Mutants: node_mask = causal by index; positions by
  index in place of depth; commit writes nodes 0..n in place of the path.
  """
  model, params = _world(name)
  parents = np.asarray([UNUSED, 0, 0, 1, 2, 4, 4, UNUSED, 1])
  prefix, drafts = _tokens(2, 6, seed=1), _tokens(2, 9, seed=2)
  length = np.asarray([6, 2], np.int32)
  cache = _prefilled(model, params, jnp.asarray(prefix), length, 16)
  mask = verification.ancestors(jnp.asarray(parents))
  depth = np.asarray(
    verification.depths(verification.ancestors(jnp.asarray(parents)))
  )
  hidden, nodes = model.extend(
    params,
    jnp.asarray(drafts),
    jnp.asarray(length[:, None] + depth),
    mask,
    cache,
  )
  logits = model.logits(params, hidden)

  def text(row, node):
    line = np.flatnonzero(np.asarray(mask)[node])
    return np.r_[prefix[row, : length[row]], drafts[row, line]]

  for row in range(2):
    for node in range(9):
      want = _uncached(model, params, text(row, node)[None])[0, -1]
      np.testing.assert_allclose(logits[row, node], want, atol=1e-5)

  path = Path(
    jnp.asarray([[0, 2, 4, 6] + [0] * 5, [0, 1, 3] + [0] * 6]),
    jnp.asarray(drafts),
    jnp.asarray([4, 3], jnp.int32),
  )
  cache = _fill_garbage(_commit(cache, nodes, path), 7.0)
  after = np.asarray([[1], [2]], np.int32)
  hidden, _ = model.extend(
    params,
    jnp.asarray(after),
    cache.length[:, None],
    jnp.ones((1, 1), bool),
    cache,
  )
  for row, last in ((0, 6), (1, 3)):
    want = _uncached(model, params, np.r_[text(row, last), after[row]][None])
    np.testing.assert_allclose(
      model.logits(params, hidden)[row, 0], want[0, -1], atol=1e-5
    )


def test_rows_that_commit_nothing_keep_their_cache():
  """Length 0 in a full row changes nothing; a longer cache reads the same.

  Mutant: rejected nodes are written behind `length` modulo the capacity.
  """
  model, params = _world('llama, 4 / 2')
  tokens = jnp.asarray(_tokens(2, 8))
  cache = _prefilled(model, params, tokens, jnp.asarray([8, 5]), 8)
  _, nodes = model.extend(
    params,
    tokens[:, :3],
    _order(tokens[:, :3]) + 5,
    jnp.tril(jnp.ones((3, 3), bool)),
    cache,
  )
  none = Path(
    jnp.zeros((2, 3), jnp.int32), tokens[:, :3], jnp.asarray([0, 2], jnp.int32)
  )
  after = _commit(cache, nodes, none)
  for old, new in zip(cache.keys, after.keys):
    np.testing.assert_array_equal(old[0], new[0])
    np.testing.assert_array_equal(old[1, ..., :5], new[1, ..., :5])
    np.testing.assert_array_equal(old[1, ..., 7:], new[1, ..., 7:])
  for old, new in zip(cache.values, after.values):
    np.testing.assert_array_equal(old[0], new[0])
    np.testing.assert_array_equal(old[1, :, :5], new[1, :, :5])
    np.testing.assert_array_equal(old[1, :, 7:], new[1, :, 7:])
  grown = kv_cache.grow(after, 24)
  step = functools.partial(
    model.extend,
    params,
    tokens[:, :1],
    jnp.asarray([[8], [7]]),
    jnp.ones((1, 1), bool),
  )
  np.testing.assert_allclose(step(grown)[0], step(after)[0], atol=1e-5)


@pytest.mark.parametrize('garbage', [1e9, -1e9, 3.0])
def test_garbage_beyond_length_is_never_attended(garbage):
  """Whatever finite lies at or beyond `length` changes no bit of a forward.

  The invariant is finite garbage: masked scores are replaced, but a value of
  weight 0 is multiplied, and 0 * NaN is NaN. Caches start as zeros and hold
  finite keys and values only. Row 1 holds no token at all. Mutants: the mask
  of the cache is `<= length`, or is left out.
  """
  model, params = _world('all')
  tokens = jnp.asarray(_tokens(2, 6))
  cache = _prefilled(model, params, tokens, jnp.asarray([4, 0]), 12)
  step = functools.partial(
    model.extend,
    params,
    tokens[:, :2],
    jnp.asarray([[4, 5], [0, 1]]),
    jnp.tril(jnp.ones((2, 2), bool)),
  )
  want, _ = step(cache)
  got, _ = step(_fill_garbage(cache, garbage))
  np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize('name', SETTINGS)
def test_packed_segments_equal_separate_rows(name):
  """Three segments in a row give the logits of three rows.

  Mutants: the mask leaves out the segment; positions run on.
  """
  model, params = _world(name)
  lengths = (5, 1, 6)
  parts = [_tokens(1, n, seed=n) for n in lengths]
  pad = np.zeros((1, 3), np.int32)
  tokens = jnp.asarray(np.concatenate([*parts, pad], 1))
  positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])[None]
  segments = np.repeat([1, 2, 3, 0], (*lengths, 3))[None]
  hidden = model.hidden(
    params,
    tokens,
    jnp.asarray(positions, jnp.int32),
    jnp.asarray(segments, jnp.int32),
  )
  logits = model.logits(params, hidden)
  start = 0
  for part in parts:
    span = slice(start, start + part.shape[1])
    np.testing.assert_allclose(
      logits[:, span], _uncached(model, params, part), atol=1e-5
    )
    start = span.stop


def test_causality():
  """The logits at l do not depend on later tokens or other segments.

  By the gradient with respect to the embedding rows of distinct tokens.
  Mutants: order[:, None] > order[None] reversed; no segment in the mask.
  """
  model, params = _world('llama, 4 / 1, untied')
  tokens = jnp.arange(8, dtype=jnp.int32)[None]
  segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2]], jnp.int32)
  positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2]], jnp.int32)

  def logit(embedding, place):
    hidden = model.hidden(
      {**params, 'embedding': embedding}, tokens, positions, segments
    )
    return jnp.sum(model.logits(params, hidden)[0, place] ** 2)

  for place in range(8):
    gradient = jax.grad(logit)(params['embedding'], place)
    touched = np.flatnonzero(np.abs(gradient).sum(-1))
    first = 0 if place < 5 else 5
    assert touched.tolist() == list(range(first, place + 1))


def _pack():
  """Rows of two segments and padding."""
  tokens = jnp.asarray(_tokens(2, 12, seed=9))
  segments = jnp.asarray(
    np.repeat([[1, 2, 0], [1, 2, 2]], [6, 4, 2], axis=1), jnp.int32
  )
  positions = jnp.asarray(
    [[*range(6), *range(4), 0, 1], [*range(6), *range(6)]], jnp.int32
  )
  return tokens, positions, segments


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('chunk', [1, 5, 22, 4096])
def test_score_is_the_log_softmax(chunk, temperature):
  """score_tokens equals a direct log-softmax and its entropy, for any chunk.

  0 at the first token of a segment and where there is no token. Mutants: the
  value stands at the token before; temperature ignored; the last chunk cut.
  """
  model, params = _world('qwen2, 4 / 4')
  tokens, positions, segments = _pack()
  got = score_tokens(
    params,
    tokens,
    positions,
    segments,
    model=model,
    sampling=Sampling(temperature),
    chunk=chunk,
  )
  logits = model.logits(
    params, model.hidden(params, tokens, positions, segments)
  )
  law = np.asarray(jax.nn.log_softmax(logits / temperature))
  for r in range(2):
    for i in range(12):
      s = np.asarray(segments[r])
      if i and s[i] == s[i - 1] and s[i]:
        np.testing.assert_allclose(
          got.logprobs[r, i], law[r, i - 1, tokens[r, i]], atol=1e-5
        )
        p = law[r, i - 1].astype(np.float64)
        np.testing.assert_allclose(
          got.entropy[r, i], -(np.exp(p) * p).sum(), atol=1e-5
        )
      else:
        assert got.logprobs[r, i] == 0 and got.entropy[r, i] == 0


def test_score_gradient_does_not_depend_on_the_chunk():
  """Gradients of chunks of 5 equal those of one chunk, head included.

  Mutants: stop_gradient on the hidden states of a chunk; the padding of the
  last chunk counted.
  """
  model, params = _world('qwen3, wide heads')
  arrays = _pack()

  def loss(params, chunk):
    got = score_tokens(
      params, *arrays, model=model, sampling=Sampling(0.7), chunk=chunk
    )
    return jnp.sum(jnp.sin(got.logprobs)) + 0.1 * jnp.sum(got.entropy)

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  want, got = gradient(params, 4096), gradient(params, 5)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize(
  'differentiate', [False, True], ids=['value', 'gradient']
)
def test_score_memory_does_not_grow_with_the_vocabulary(differentiate):
  """Temporary memory of L = 2048 exceeds L = 512 by far less than L * V.

  Mutants: no chunks (one of L * V); no rematerialisation, which keeps the
  logits of every chunk for the backward pass.
  """
  vocabulary, chunk = 8192, 64
  model = testing.tiny_model(
    vocabulary, layers=1, width=8, mlp_width=8, heads=1, kv_heads=1
  )
  params = jax.eval_shape(model.init, jax.random.key(0))

  def run(params, tokens, positions, segments):
    return jnp.sum(
      score(
        params,
        tokens,
        positions,
        segments,
        model=model,
        sampling=Sampling(),
        chunk=chunk,
      )
    )

  def temporary(rows):
    # Rows of 64 tokens: attention is as small for many rows as for few.
    shape = jax.ShapeDtypeStruct((rows, 64), jnp.int32)
    function = jax.grad(run) if differentiate else run
    compiled = jax.jit(function).lower(params, shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporary(8), temporary(32)
  one_row_of_logits = vocabulary * 4
  assert many - few < 0.1 * (32 - 8) * 64 * one_row_of_logits
  assert many < 10 * chunk * one_row_of_logits + 4 * 2**20


def test_bfloat16_is_close():
  """bfloat16 parameters and maths: finite, near float32, logits float32.

  Mutants: rotary angles in bfloat16 (position 250 and 251 coincide); the
  cache keeps float32.
  """
  fields = ModelConfig(
    vocabulary=VOCABULARY,
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    mlp_width=64,
    max_positions=512,
  )
  exact = _jitted(make_transformer(freeze(fields), freeze(PrecisionConfig())))
  low = freeze(PrecisionConfig('bfloat16', 'bfloat16', 'float32'))
  model = _jitted(make_transformer(freeze(fields), low))
  params = jax.jit(exact.init)(jax.random.key(0))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  tokens = jnp.asarray(_tokens(1, 320))
  law = lambda model, params: sampling_ops.log_law(
    _uncached(model, params, tokens), Sampling()
  )
  want, got = law(exact, params), law(model, rounded)
  assert got.dtype == jnp.float32
  assert np.abs(want - got).max() < 0.1
  cache = _prefilled(model, rounded, tokens[:, :300], jnp.asarray([300]), 304)
  assert cache.keys[0].dtype == jnp.bfloat16
  hidden, _ = model.extend(
    rounded,
    tokens[:, 300:303],
    jnp.asarray([[300, 301, 302]]),
    jnp.tril(jnp.ones((3, 3), bool)),
    cache,
  )
  cached = sampling_ops.log_law(model.logits(rounded, hidden), Sampling())
  assert np.abs(cached - want[:, 300:303]).max() < 0.1


@pytest.mark.parametrize(
  'head, tied', [('bfloat16', True), ('float32', True), ('bfloat16', False)]
)
def test_rounded_parameters_change_no_bit(head, tied):
  """Law: what `rounded` gives is what a forward rounds to anyway.

  Mutants: norms rounded; a tied embedding rounded beside a float32 head.
  """
  fields = ModelConfig(
    vocabulary=VOCABULARY,
    layers=2,
    width=64,
    mlp_width=64,
    qkv_bias=True,
    qk_norm=True,
    tied_head=tied,
  )
  fields.lora.rank = 2
  model = _jitted(
    make_transformer(
      freeze(fields), freeze(PrecisionConfig('float32', 'bfloat16', head))
    )
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(1, 0.1, x.shape), x.dtype),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  rounded = model.rounded(params)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  assert size(rounded) < (0.7 if head == 'float32' else 0.55) * size(params)
  tokens = jnp.asarray(_tokens(2, 12))
  np.testing.assert_array_equal(
    _uncached(model, params, tokens), _uncached(model, rounded, tokens)
  )


def _numpy_logits(params, tokens, name):
  """The decoder by its definition, one row in float64."""
  setting = dict(kv_heads=2, head_dim=4, rope_theta=1e4) | SETTINGS[name]
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  length, half = len(tokens), setting['head_dim'] // 2

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale['scale']

  def dense(x, weights):
    return x @ weights['kernel'] + weights.get('bias', 0)

  def turn(x):
    angle = np.arange(length)[:, None] * setting['rope_theta'] ** (
      -np.arange(half) / half
    )
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)

  x = p['embedding'][tokens]
  for i in range(2):
    layer = p[f'layer_{i}']
    y = norm(x, layer['attention_norm'])
    # By KV head: its queries, its key, its value.
    joint = np.tensordot(y, layer['query_key_value']['kernel'], 1)
    joint = joint + layer['query_key_value'].get('bias', 0)
    q = joint[..., :-2, :].reshape(length, -1, setting['head_dim'])
    k, v = joint[..., -2, :], joint[..., -1, :]
    if setting.get('qk_norm'):
      q, k = norm(q, layer['query_norm']), norm(k, layer['key_norm'])
    q, k = turn(q), turn(k)
    k, v = (np.repeat(z, 4 // setting['kv_heads'], axis=1) for z in (k, v))
    scores = np.einsum('qhd,khd->hqk', q, k) / np.sqrt(setting['head_dim'])
    scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum('hqk,khd->qhd', weights, v).reshape(length, -1)
    x = x + dense(out, layer['output'])
    y = norm(x, layer['mlp_norm'])
    gate, up = np.moveaxis(np.tensordot(y, layer['gate_up']['kernel'], 1), 1, 0)
    x = x + dense(gate / (1 + np.exp(-gate)) * up, layer['down'])
  return norm(x, p['final_norm']) @ p.get('head', p['embedding'].T)


@pytest.mark.parametrize('name', SETTINGS)
def test_transformer_equals_its_definition(name):
  """The uncached logits are those of a decoder written out in numpy.

  What both passes share, their agreement cannot show. Mutants: keys are not
  rotated; keys are not normalised (qk_norm); gate and up exchanged; the
  attention norm used twice.
  """
  model, params = _world(name)
  tokens = _tokens(1, 16, seed=5)
  np.testing.assert_allclose(
    _uncached(model, params, tokens)[0],
    _numpy_logits(params, tokens[0], name),
    atol=2e-5,
  )


def test_attention_equals_its_definition():
  """Query head h reads KV head h // (H / KH), as in the Hugging Face models.

  A loop over heads and positions in float64; the cache holds the first three
  positions. Mutants: heads read KV head h % KH, which no comparison of the
  cached with the uncached pass can see; no 1 / sqrt(head_dim).
  """
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(1, 5, 6, 4))
  keys, values = rng.normal(size=(2, 1, 2, 5, 4))
  want = np.zeros((5, 6, 4))
  for i in range(5):
    for h in range(6):
      k, v = keys[0, h // 3, : i + 1], values[0, h // 3, : i + 1]
      weights = np.exp(k @ queries[0, i, h] / 2)
      want[i, h] = weights @ v / weights.sum()
  want = want.reshape(5, 24)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (queries, keys, values))
  mask = jnp.tril(jnp.ones((1, 5, 5), bool))
  got = attention.packed_attention(q, k, v, mask)[0]
  np.testing.assert_allclose(got, want, atol=1e-5)
  got = attention.cached_attention(
    q[:, 3:],
    k[:, :, 3:],
    v[:, :, 3:],
    k.swapaxes(2, 3),
    v,
    jnp.asarray([3]),
    mask[0, 3:, 3:],
  )[0]
  np.testing.assert_allclose(got, want[3:], atol=1e-5)


def test_rotation_equals_its_definition():
  """Pair (i, i + half) is turned by position * theta^(-i / half).

  As complex numbers in float64. Mutants: adjacent pairs; the sine's sign.
  """
  x = np.random.default_rng(1).normal(size=(3, 2, 8))
  positions = np.asarray([0, 7, 1000])
  angle = positions[:, None] * 100.0 ** (-np.arange(4) / 4)
  z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None]
  got = rotary.rotate(
    jnp.asarray(x, jnp.float32),
    rotary.rotary_table(jnp.asarray(positions, jnp.int32), 8, 100.0),
  )
  np.testing.assert_allclose(
    got, np.concatenate([z.real, z.imag], -1), atol=1e-3
  )


def _stretched(wave, kind):
  """The wavelength of a pair, by the definition, one number at a time."""
  factor, low, high, original = 8.0, 1.0, 4.0, 64
  if kind == 'linear' or wave > original / low:
    return wave * factor
  if wave < original / high:
    return wave
  keep = (original / wave - low) / (high - low)
  return 1 / ((1 - keep) / (wave * factor) + keep / wave)


@pytest.mark.parametrize('kind', ['linear', 'llama3'])
def test_scaled_frequencies_equal_their_definition(kind):
  """Law: long waves are stretched, short ones stay, and llama3 blends between.

  The three branches all occur. Mutants: `low` and `high` swapped; factor
  applied to short waves; no blend (a step at `low`).
  """
  waves = 2 * np.pi * 500.0 ** (np.arange(12) / 12)
  assert (waves < 16).any() and (waves > 64).any()
  assert ((waves > 16) & (waves < 64)).sum() > 1
  want = [2 * np.pi / _stretched(wave, kind) for wave in waves]
  got = rotary.rotary_frequencies(
    24, 500.0, rotary.RopeScaling(kind, 8.0, 1.0, 4.0, 64)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_model_scales_its_rotary_positions():
  """Law: with linear scaling by 4, positions 0, 4, 8, ... are 0, 1, 2, ...

  Mutant: the model's table leaves the scaling out.
  """
  tokens = jnp.arange(6)[None] % 5
  segments, order = jnp.ones((1, 6), jnp.int32), jnp.arange(6)[None]
  plain = testing.tiny_model(layers=1)
  scaled = testing.tiny_model(layers=1, rope_scaling='linear', rope_factor=4.0)
  params = jax.jit(plain.init)(jax.random.key(0))
  hidden = jax.jit(scaled.hidden)
  want = jax.jit(plain.hidden)(params, tokens, order, segments)
  got = hidden(params, tokens, order * 4, segments)
  np.testing.assert_allclose(got, want, atol=1e-5)
  got = hidden(params, tokens, order, segments)
  assert not np.allclose(got, want, atol=1e-3)


def test_rotary_angles_are_float32():
  """A rotation by position p in bfloat16 is that of float32, rounded.

  Mutant: angles computed in x's dtype, for which 256 and 257 are one.
  """
  x = jax.random.normal(jax.random.key(0), (3, 2, 8))
  positions = jnp.asarray([257, 1001, 4095], jnp.int32)
  table = rotary.rotary_table(positions, 8, 1e4)
  want = rotary.rotate(x, table)
  got = rotary.rotate(x.astype(jnp.bfloat16), table)
  np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.05)
  # Only differences of positions matter to a product.
  a, b = x[:1], x[1:2]
  turn = lambda x, p: rotary.rotate(
    x, rotary.rotary_table(jnp.asarray([p]), 8, 1e4)
  )
  dot = lambda p, q: jnp.sum(turn(a, p) * turn(b, q))
  np.testing.assert_allclose(dot(7, 3), dot(1004, 1000), atol=1e-3)


def test_remat_changes_nothing():
  """remat=True has the values and gradients of remat=False.

  Mutant: the last layer is left out under remat.
  """
  config = freeze(ModelConfig(vocabulary=VOCABULARY, layers=2, width=16))
  arrays = _pack()
  results = []
  for remat in (False, True):
    model = make_transformer(config, freeze(PrecisionConfig()), remat=remat)
    params = jax.jit(model.init)(jax.random.key(0))
    loss = lambda params: jnp.sum(  # noqa: E731
      score(params, *arrays, model=model, sampling=Sampling(), chunk=8)
    )
    results.append(jax.jit(jax.value_and_grad(loss))(params))
  for a, b in zip(*map(jax.tree.leaves, results)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
