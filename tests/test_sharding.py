"""Meshes: placement, memory, and values that do not depend on them."""

import functools

import file_helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rollout_helpers as helpers

from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.learning import algorithms
from rlax_llm.learning.batch import Sample
from rlax_llm.rollout.state import RolloutState
from rlax_llm.types import TRAIN
from rlax_llm.workdir import checkpoint

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]
# Stores the gradient: two updates compare without an optimizer's
# amplification of rounding.
CAPTURE = optax.GradientTransformation(
  init=lambda params: jax.tree.map(jnp.zeros_like, params),
  update=lambda g, state, params=None: (jax.tree.map(jnp.zeros_like, g), g),
)


@functools.cache
def _run(mesh=(1, 1, 1), gather=True, width=16):
  """A model whose two KV heads are fewer than 8 tensor ways."""
  config = testing.tiny_config()
  config.model.width = width
  config.model.heads = 8
  config.model.mlp_width = 2 * width
  config.model.head_dim = 4
  config.model.vocabulary = 8
  config.model.qkv_bias = config.model.qk_norm = True
  config.model.tied_head = False
  config.model.init_scale = 4.0
  config.rollout.slots = 16
  config.rollout.max_new_tokens = 24
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
  config.mesh.gather_for_rollout = gather
  config.learning.row_length = 64
  return make_run(config)


def _generate(run):
  requests = run.requests(run.problems(0), samples=6, domain=TRAIN, step=0)
  engine = run.engine(run.sampling)
  rollouts, _ = engine.generate(
    run.states.init_params(), requests, RolloutState(store=run.rollout_store())
  )
  return rollouts, engine.stats


class _Margins(helpers.World):
  """What `assert_same_tokens` asks of a world, of a run's model."""

  def __init__(self, run):
    self.model, self.params = run.model, run.states.init_params()
    self.seed, self.sampling = run.config.seed, run.sampling


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh, gather',
  [(m, g) for m in MESHES for g in (True, False) if g or m[1] > 1],
  ids=str,
)
def test_no_mesh_changes_a_token(mesh, gather):
  """Law: the tokens of one device, near ties apart.

  With drafts, so that verification and the tree cache are divided as well.
  """
  want, _ = _generate(_run())
  got, stats = _generate(_run(mesh, gather))
  helpers.assert_same_tokens(_Margins(_run()), want, got)
  assert (stats.reshard_seconds > 0) == (gather and mesh[1] > 1)


def _samples():
  rng = np.random.default_rng(0)
  sizes = rng.integers(4, 24, 24)
  return [
    Sample(
      prompt=rng.integers(2, 7, 3).astype(np.int32),
      completion=rng.integers(0, 7, size).astype(np.int32),
      advantage=float(rng.normal()),
      behaviour_logprobs=rng.normal(size=size).astype(np.float32),
    )
    for size in sizes
  ]


def _gradient(run, params=None):
  learner = run.learner(
    algorithm=algorithms.PRESETS['grpo'],
    sampling=run.sampling,
    optimizer=CAPTURE,
    name='capture',
    learning=run.config.learning,
  )
  params = run.states.init_params() if params is None else params
  state = run.states.init_state(params, CAPTURE, 'capture')
  state, _ = learner.update(state, learner.put(learner.pack(_samples())))
  leaves = jax.tree.leaves(jax.device_get(state.opt_state))
  return np.concatenate([x.ravel() for x in leaves]), state


@pytest.mark.parametrize(
  'mesh',
  [
    (2, 2, 2),
    *(
      pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != (2, 2, 2)
    ),
  ],
  ids=str,
)
def test_no_mesh_changes_the_gradient(mesh):
  """Law: gradients within 1e-5 relative L2 of one device's."""
  want, _ = _gradient(_run())
  got, state = _gradient(_run(mesh))
  assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
  placement = _run(mesh).states.params_placement()
  jax.tree.map(
    lambda x, where: (
      x.sharding.is_equivalent_to(where, x.ndim)
      or pytest.fail(f'{x.shape} lies at {x.sharding}')
    ),
    state.params,
    placement,
  )


@pytest.mark.slow
def test_memory_shrinks_with_fsdp():
  """A device's need for an update falls as fsdp ways divide the state."""
  needs = []
  for fsdp in (1, 2, 4, 8):
    run = _run((1, fsdp, 1), width=256)
    state = run.states.init_state(run.states.init_params())
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
    learner = run.learner()
    learner.update(state, learner.put(learner.pack(_samples())))
    needs.append((sum(held), run.pool.memory_bytes('update')))
  for (held, need), (next_held, next_need) in zip(needs, needs[1:]):
    assert next_held < 0.6 * held
    assert next_need < 0.8 * need, needs


@pytest.mark.parametrize(
  'target',
  [
    (1, 1, 1),
    pytest.param((2, 2, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, target):
  """Law: a checkpoint of eight devices restores on 1, 2 and 4 with bit-equal
  leaves where the new mesh wants them, and a gradient within 1e-5 relative L2.
  """
  first, second = _run((2, 2, 2)), _run(target)
  state = first.states.init_state(first.states.init_params())
  with checkpoint.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(3, {'policy': state}, {})
    saved.wait()
  step, found = file_helpers.read_states(second.states, str(tmp_path))
  restored = found['policy']
  assert step == 3
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(state),
    jax.device_get(restored),
  )
  want = second.states.params_placement()
  assert jax.tree.all(
    jax.tree.map(
      lambda x, w: x.sharding.is_equivalent_to(w, x.ndim), restored.params, want
    )
  )
  before, _ = _gradient(first, state.params)
  after, _ = _gradient(second, restored.params)
  assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'mesh.fsdp': 3}, ['8 devices', 'fsdp x tensor = 3', 'mesh.data']),
    ({'mesh.data': 4, 'mesh.tensor': 4}, ['needs 16 devices', 'there are 8']),
    ({'mesh.tensor': 16}, ['needs 16 devices', 'lower fsdp or tensor']),
    ({'mesh.tensor': 8}, ['model.heads=4', 'mesh.tensor=8', 'the next is 8']),
    (
      {'mesh.tensor': 2, 'model.vocabulary': 9},
      ['model.vocabulary=9', 'the next is 10'],
    ),
    (
      {'mesh.fsdp': 8, 'model.head_dim': 4, 'model.width': 12},
      ['model.width=12', 'mesh.fsdp=8'],
    ),
    (
      {'mesh.tensor': 4, 'model.mlp_width': 30},
      ['model.mlp_width=30', 'mesh.tensor=4'],
    ),
    ({'mesh.fsdp': 8, 'rollout.slots': 12}, ['rollout.slots=12', '8 ways']),
  ],
  ids=str,
)
def test_what_does_not_divide_is_refused(changes, words):
  """One line that names the field, the ways and the way out."""
  config = testing.tiny_config()
  config.model.vocabulary = 8
  for path, value in changes.items():
    section, field = path.split('.')
    setattr(getattr(config, section), field, value)
  with pytest.raises(ConfigError) as error:
    make_run(config)
  assert all(word in str(error.value) for word in words), error.value
