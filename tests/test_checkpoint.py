"""Checkpoints: exact round trips, and damage that is found and passed over."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlax_llm.checkpoint import Checkpoints
from rlax_llm.checkpoint import digest_arrays
from rlax_llm.config import ConfigError
from rlax_llm.types import TrainState

OPTIMIZER = optax.adamw(1e-3)


def _state(seed=0, width=96):
  noise = np.random.default_rng(seed).normal(size=(width, 64))
  params = {'layer': {'w': jnp.float32(noise), 'b': jnp.bfloat16(noise[0])}}
  return TrainState(step=jnp.int32(seed),
                    params=params,
                    opt_state=OPTIMIZER.init(params))


def _abstract(state):
  return jax.eval_shape(lambda: state)


def _save(folder, steps, keep=3):
  with Checkpoints(folder, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, {'policy': _state(step)}, {
          'cursor': step,
          'text': ['é', 1.5]
      })


def _restore(folder, wanted=None):
  warnings = []
  with Checkpoints(folder, warn=warnings.append) as checkpoints:
    found = checkpoints.restore({'policy': wanted or _abstract(_state())})
  if found:
    found = found[0], found[1]['policy'], found[2]
  return found, warnings


def test_round_trip_is_exact(tmp_path):
  _save(tmp_path, [1, 2])
  (step, state, host), warnings = _restore(tmp_path)
  assert (step, host, warnings) == (2, {'cursor': 2, 'text': ['é', 1.5]}, [])
  assert isinstance(state, TrainState)
  assert jax.tree.structure(state) == jax.tree.structure(_state())
  for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(_state(2))):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


def test_nothing_saved(tmp_path):
  assert _restore(tmp_path) == (None, [])
  assert not list(tmp_path.iterdir())


def test_keep(tmp_path):
  _save(tmp_path, range(1, 6), keep=2)
  assert Checkpoints(tmp_path).steps() == [4, 5]
  with pytest.raises(ConfigError, match='keep is 0'):
    Checkpoints(tmp_path, keep=0)


def test_donation_right_after_save(tmp_path):
  """Mutant: an asynchronous save that reads buffers donated meanwhile."""

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state):
    return jax.tree.map(lambda x: x + 1, state)

  state = _state(1)
  wanted = digest_arrays(state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'policy': state}, {})
    for _ in range(5):
      state = update(state)
    _, found, _ = checkpoints.restore({'policy': _abstract(_state())})
    restored = found['policy']
  assert digest_arrays(restored) == wanted


def _largest(path):
  return max((p for p in path.rglob('*') if p.is_file()),
             key=lambda p: p.stat().st_size)


def _flip(path):
  file = _largest(path / 'policy')
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


def _truncate(path):
  file = _largest(path / 'policy')
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def _delete(path):
  _largest(path / 'policy').unlink()


def _delete_item(path):
  shutil.rmtree(path / 'policy')


def _delete_host(path):
  shutil.rmtree(path / 'host')


def _tear_host(path):
  file = path / 'host' / 'metadata'
  file.write_text(file.read_text()[:-20])


def _edit_host(path):
  file = path / 'host' / 'metadata'
  text = file.read_text()
  assert '"cursor": 2' in text
  file.write_text(text.replace('"cursor": 2', '"cursor": 3'))


def _edit_leaves(path):
  file = path / 'host' / 'metadata'
  file.write_text(file.read_text().replace('[96, 64]', '[96, 65]'))


def _swap(path):
  """Whole and decodable, but of another step: only the digest tells."""
  shutil.rmtree(path / 'policy')
  shutil.copytree(path.parent / '1' / 'policy', path / 'policy')


def _empty(path):
  shutil.rmtree(path)
  path.mkdir()


@pytest.mark.parametrize('damage', [
    _flip, _truncate, _delete, _delete_item, _delete_host, _tear_host,
    _edit_host, _edit_leaves, _swap, _empty
])
def test_damage_falls_back_and_names_both(tmp_path, damage):
  """Mutants: no digest check (_swap, _edit_host); the newest is trusted."""
  _save(tmp_path, [1, 2])
  damage(tmp_path / 'checkpoints' / '2')
  (step, state, host), warnings = _restore(tmp_path)
  assert (step, host['cursor'], int(state.step)) == (1, 1, 1)
  assert digest_arrays(state) == digest_arrays(_state(1))
  (line,) = warnings
  assert 'checkpoints/2 is unreadable' in line
  assert 'using ' in line and 'checkpoints/1 instead' in line
  assert '\n' not in line


def test_warning_reaches_the_terminal(tmp_path, capsys):
  """Mutant: absl's logging, which entrypoints turn down to errors."""
  _save(tmp_path, [1, 2])
  _delete(tmp_path / 'checkpoints' / '2')
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore({'policy': _abstract(_state())})
  lines = capsys.readouterr().err.splitlines()
  assert [line[:9] for line in lines] == ['warning: ']


def test_run_goes_on_over_a_damaged_step(tmp_path):
  """Mutant: the damaged step stays, so that Orbax refuses to save it again."""
  _save(tmp_path, [1, 2])
  _truncate(tmp_path / 'checkpoints' / '2')
  (tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(tmp_path, warn=lambda _: None) as checkpoints:
    checkpoints.restore({'policy': _abstract(_state())})
    assert checkpoints.steps() == [1, 2]  # reading moves nothing
    checkpoints.save(2, {'policy': _state(7)}, {'cursor': 7})
    checkpoints.save(3, {'policy': _state(8)}, {'cursor': 8})
  (step, _, host), warnings = _restore(tmp_path)
  assert (step, host['cursor'], warnings) == (3, 8, [])
  assert (tmp_path / 'checkpoints' / '2.unreadable').is_dir()


def test_none_readable_does_not_start_again(tmp_path):
  """Mutant: return None, and the run silently starts from step 0."""
  _save(tmp_path, [1, 2])
  for step in ('1', '2'):
    _delete(tmp_path / 'checkpoints' / step)
  with pytest.raises(ConfigError) as e:
    _restore(tmp_path)
  assert 'checkpoints/2 is unreadable' in str(e.value)
  assert 'checkpoints/1 is unreadable' in str(e.value)


@pytest.mark.parametrize('wanted, words', [
    (lambda: _state(width=97),
     r'opt_state/0/mu/layer/w is float32\[96, 64\] there and float32\[97'),
    (lambda: _state().replace(params={}), r'params/layer/b is bfloat16\[64\] '
     'there and absent'),
])
def test_other_model_is_named(tmp_path, wanted, words):
  _save(tmp_path, [1])
  with pytest.raises(ConfigError, match=words):
    _restore(tmp_path, _abstract(wanted()))


def test_host_must_survive_json(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=r'host.a\[0\] has the key 3'):
      checkpoints.save(1, {'policy': _state()}, {'a': [{3: 'x'}]})


def test_same_step_twice_is_refused(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, {'policy': _state()}, {})
    with pytest.raises(ValueError, match='step 2 cannot be saved'):
      checkpoints.save(2, {'policy': _state()}, {})


def test_sharding_comes_from_the_target(tmp_path):
  _save(tmp_path, [1])
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  wanted = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      _abstract(_state()))
  (_, state, _), _ = _restore(tmp_path, wanted)
  assert all(x.sharding == sharding for x in jax.tree.leaves(state))


def test_digest_is_stable():
  """A literal: the digest is an interface, compared across versions."""
  tree = {'b': np.arange(3, dtype=np.int32), 'a': [jnp.bfloat16(1.5)]}
  digest = digest_arrays(tree)
  assert digest == (
      '40d781fa922123f5a6d3c4f1f1fe8fa18fec2c1b30a651dfd687fc0081045459')
  assert digest == digest_arrays({'a': (jnp.bfloat16(1.5),), 'b': tree['b']})


@pytest.mark.parametrize('other', [
    {
        'x': np.zeros((2, 3), np.int32)
    },
    {
        'x': np.zeros((3, 2), np.float32)
    },
    {
        'y': np.zeros((3, 2), np.int32)
    },
    {
        'x': np.array([[0, 0], [0, 0], [0, 1]], np.int32)
    },
])
def test_digest_covers_name_dtype_shape_and_bytes(other):
  assert digest_arrays({'x': np.zeros((3, 2),
                                      np.int32)}) != digest_arrays(other)


def test_digest_of_a_view_is_that_of_its_values():
  """Mutant: hashing the buffer under a transposed view."""
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  assert digest_arrays([array.T]) == digest_arrays([array.T.copy()])


def test_states_are_read_by_name(tmp_path):
  """Mutants: `_read` restores every item; the digest of `policy` for all."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {
        'policy': _state(1),
        'critic': _state(2, width=32)
    }, {})
  shape = _abstract(_state())
  with Checkpoints(tmp_path) as checkpoints:
    _, found, _ = checkpoints.restore({'critic': _abstract(_state(0, 32))})
    assert list(found) == ['critic']
    assert digest_arrays(found['critic']) == digest_arrays(_state(2, 32))
    wanted = {'policy': shape, 'drafter': shape}
    _, found, _ = checkpoints.restore(wanted, optional=('drafter',))
    assert list(found) == ['policy']
    with pytest.raises(ConfigError, match='drafter/.* is absent there'):
      checkpoints.restore(wanted)
