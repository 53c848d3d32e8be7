"""One segment of the decode loop: its program, its limits, its commits."""

import functools

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_helpers as helpers

from rlax_llm import testing
from rlax_llm.drafting import drafter as drafting
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout import slots as slot_ops

DRAFTERS = {
  'none': drafting.no_drafter(),
  'chain': drafting.prompt_lookup(4),
  'tree': helpers.random_tree(5, 6),
  'cache': helpers.tree_cache(4),
  'cache tree': helpers.tree_cache(6, branching=3),
}
MODEL = testing.tiny_model(layers=1)
CONFIG = segments.SegmentConfig(Sampling(), (6,))


def _function(drafter, config=CONFIG):
  """Returns the whole of a segment as a function of arrays."""

  def run(params, slots, limits):
    state = drafter.init(params, slots)
    return segments.segment(
      params, slots, state, limits, model=MODEL, drafter=drafter, config=config
    )

  return run


@functools.cache
def _compiled(name):
  return jax.jit(_function(DRAFTERS[name]))


def _limits(forwards, done_rows, rows=4):
  return segments.Limits(
    jnp.int32(forwards), jnp.int32(done_rows), jnp.ones(rows, bool)
  )


def _shapes(rows=4, capacity=32):
  params = jax.eval_shape(MODEL.init, jax.random.key(0))
  slots = jax.eval_shape(lambda: slot_ops.empty_slots(MODEL, rows, capacity))
  return params, slots, jax.eval_shape(lambda: _limits(1, 1))


def _slots(prompts, capacity, limit):
  """Slots that hold the prompts; one more row than prompts, which is free."""
  rows = len(prompts) + 1
  tokens = np.zeros((rows, 6), np.int32)
  length = np.ones(rows, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    length[row] = len(prompt)
  params = jax.jit(MODEL.init)(jax.random.key(0))
  prefill = functools.partial(slot_ops.prefill, model=MODEL)
  block = jax.jit(prefill)(params, jnp.asarray(tokens), jnp.asarray(length))
  order = jnp.arange(rows, dtype=jnp.int32)
  admission = slot_ops.Admission(
    order < len(prompts),
    order,
    jnp.asarray(length),
    jnp.full(rows, limit, jnp.int32),
    order * 0,
    order * 0,
    order,
    order * 0,
    order,
  )
  empty = slot_ops.empty_slots(MODEL, rows, capacity)
  admit = jax.jit(functools.partial(slot_ops.admit, seed=0))
  return params, admit(empty, block, admission)


@pytest.mark.parametrize('name', DRAFTERS)
def test_no_host_in_the_loop(name):
  """No callback, infeed or print anywhere in a segment; one while loop.

  Mutants: jax.debug.print or io_callback in the body; a Python loop over
  forwards, which leaves no `while`.
  """
  jaxpr = jax.make_jaxpr(_function(DRAFTERS[name]))(*_shapes())
  names = list(helpers.all_primitives(jaxpr.jaxpr))
  assert len(names) > 100 and 'dot_general' in names
  assert not [
    n
    for n in names
    if any(word in n for word in ('callback', 'feed', 'debug', 'print'))
  ]
  assert [e.primitive.name for e in jaxpr.jaxpr.eqns].count('while') == 1


def test_the_search_for_callbacks_finds_one():
  """The search above is not blind to what is nested.

  Mutant: `all_primitives` looks at the outermost equations only.
  """

  def looped(x):

    def body(i, x):
      jax.debug.print('{}', i)
      return x

    return jax.lax.fori_loop(0, 3, jax.jit(body), x)

  names = list(helpers.all_primitives(jax.make_jaxpr(looped)(0.0).jaxpr))
  assert any('debug' in n or 'callback' in n for n in names)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('name', DRAFTERS)
def test_lowers_for_accelerators(name, platform):
  """A segment lowers for TPU and CUDA on this machine.

  Mutant: an operation of CPU only (a callback, an FFI call) in the loop.
  """
  exported = export.export(
    jax.jit(_function(DRAFTERS[name])), platforms=[platform]
  )(*_shapes())
  assert exported.platforms == (platform,)
  assert 'while' in exported.mlir_module()


def test_a_segment_ends_where_it_is_told():
  """Forwards, done rows, capacity: each ends the loop; free rows stay free.

  Mutants: `<=` in any of the limits; free rows decode; the row forwards of
  done rows are counted.
  """
  run = _compiled('none')
  params, slots = _slots([[1, 2], [3], [0, 1, 2, 3, 4]], 16, 11)
  assert slots.done.tolist() == [False, False, False, True]
  start = np.asarray(slots.length)

  def spent(forwards, done_rows):
    after, _, counters = run(params, slots, _limits(forwards, done_rows))
    gained = np.asarray(after.length) - start
    assert gained[3] == 0 and int(counters.tokens) == gained.sum()
    assert int(counters.row_forwards) == gained.sum()  # W = 1
    assert np.asarray(after.forwards).tolist() == gained.tolist()
    np.testing.assert_array_equal(after.cache.length, after.length - 1)
    return int(counters.forwards), after

  assert spent(0, 4)[0] == 0
  assert spent(3, 4)[0] == 3
  assert spent(99, 1)[0] == 0  # the free row counts as done
  forwards, after = spent(99, 4)
  # Capacity 16: row 2 holds 5 + 11 = 16 tokens at its limit, all fit.
  assert after.done.all() and forwards == (after.length - start).max()
  forwards, after = spent(99, 2)
  assert after.done.sum() >= 2
  again, _, counters = run(params, after, _limits(99, 2))
  assert int(counters.forwards) == 0
  np.testing.assert_array_equal(again.length, after.length)


def test_capacity_ends_a_segment():
  """No row is decoded that has no room for W more tokens, but to the last one.

  Without EOS, so that every row gets there. Mutants: `length + W < capacity`;
  `length <= capacity`.
  """
  for name, drafter in DRAFTERS.items():
    params, slots = _slots([[1, 2], [3], [4, 4]], 16, 60)
    run = jax.jit(_function(drafter, segments.SegmentConfig(Sampling(), ())))
    after, _, counters = run(params, slots, _limits(99, 4))
    longest = int(after.length.max())
    assert 16 - drafter.width < longest <= 16
    if name == 'none':
      assert longest == 16 and int(counters.forwards) == 14


@pytest.mark.parametrize('name', ['chain', 'tree'])
def test_segments_are_transparent(name):
  """Decoding by segments of one forward ends with the text of one segment.

  And what follows does not read what lies beyond `length`. Mutants: the
  race's place is the node's index; the root is `text[length]`.
  """
  run = _compiled(name)
  params, slots = _slots([[1, 2], [3], [4, 4, 4]], 16, 8)
  whole, _, _ = run(params, slots, _limits(99, 4))
  while not bool(slots.done.all()):
    beyond = jnp.arange(16)[None] >= slots.length[:, None]
    slots, _, _ = run(
      params,
      slots.replace(text=jnp.where(beyond, 5, slots.text)),
      _limits(1, 4),
    )
  np.testing.assert_array_equal(slots.length, whole.length)
  for row, length in enumerate(np.asarray(whole.length)):
    np.testing.assert_array_equal(
      slots.text[row, :length], whole.text[row, :length]
    )
