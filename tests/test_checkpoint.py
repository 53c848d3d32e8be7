"""Checkpoints: exact round trips, and damage that is found and passed over."""

import contextlib
import errno
import functools
import json
import os
import random
import resource
import shutil

import file_helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.runtime.files import ReadError
from rlax_llm.types import TrainState
from rlax_llm.workdir import checkpoint
from rlax_llm.workdir.checkpoint import Checkpoints
from rlax_llm.workdir.checkpoint import digest_arrays

OPTIMIZER = optax.adamw(1e-3)


def _state(seed=0, width=96):
  noise = np.random.default_rng(seed).normal(size=(width, 64))
  params = {'layer': {'w': jnp.float32(noise), 'b': jnp.bfloat16(noise[0])}}
  return TrainState(
    step=jnp.int32(seed), params=params, opt_state=OPTIMIZER.init(params)
  )


def _abstract(state):
  return jax.eval_shape(lambda: state)


def _save(folder, steps, keep=3):
  with Checkpoints(folder, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(
        step, {'policy': _state(step)}, {'cursor': step, 'text': ['é', 1.5]}
      )


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
  return max(
    (p for p in path.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size
  )


def _flip(path):
  file = _largest(path / 'policy')
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


def _truncate(path):
  file = _largest(path / 'policy')
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


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


def _delete_tree(path):
  (path / 'policy' / '_METADATA').unlink()


def _tear_tree(path):
  file = path / 'policy' / '_METADATA'
  file.write_text(file.read_text()[:-20])


def _rename_in_tree(path):
  file = path / 'policy' / '_METADATA'
  file.write_text(file.read_text().replace('"key": "w"', '"key": "v"'))


def _tear_shapes(path):
  (path / 'policy' / 'array_metadatas' / 'process_0').write_text('{')


def _folder_for_a_file(path):
  file = _largest(path / 'policy')
  file.unlink()
  file.mkdir()


def _delete_index(path):
  (path / 'policy' / 'manifest.ocdbt').unlink()


@pytest.mark.parametrize(
  'damage',
  [
    _flip,
    _truncate,
    _delete,
    _delete_item,
    _delete_host,
    _tear_host,
    _edit_host,
    _edit_leaves,
    _swap,
    _empty,
    _delete_tree,
    _tear_tree,
    _rename_in_tree,
    _tear_shapes,
    _folder_for_a_file,
    _delete_index,
  ],
)
def test_damage_falls_back_and_names_both(tmp_path, damage):
  """Mutants: no digest check (_swap, _edit_host); the newest is trusted; what
  Orbax raises for an altered text passed on (_rename_in_tree)."""
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


def _files(path):
  return sorted(p for p in path.rglob('*') if p.is_file())


def _as_user_if(wanted):
  return file_helpers.unprivileged() if wanted else contextlib.nullcontext()


def _open_to_all(path):
  """Other users can enter the folders above a test's own."""
  for folder in (path, *path.parents):
    if folder.stat().st_uid == os.geteuid():
      folder.chmod(folder.stat().st_mode | 0o11)


def _forbid(path):
  path.chmod(0)


def _break_link(path):
  """Opening it is an error of the system; it is there, though."""
  path.unlink()
  path.symlink_to(path.name)


def _fail_to_read(path):
  """As a broken disk: the kernel opens this file and refuses to read it."""
  path.unlink()
  path.symlink_to('/proc/self/mem')


_TEXTS = (
  'host/metadata',
  'policy/_METADATA',
  'policy/array_metadatas/process_0',
)
_ARRAYS = ('policy/manifest.ocdbt', 'policy/d', 'policy/ocdbt.process_0/d')


# Reads that were under way when one failed are abandoned.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(
  'trouble, code, places',
  [
    (_forbid, errno.EACCES, _TEXTS + _ARRAYS + ('host', 'policy')),
    (_break_link, errno.ELOOP, _TEXTS + ('policy/manifest.ocdbt',)),
    (_fail_to_read, errno.EIO, _TEXTS),
  ],
)
def test_storage_that_does_not_answer_is_no_damage(
  tmp_path, trouble, code, places
):
  """Law: an error of the system is raised, in one line that names the cause; no
  older checkpoint is used, and nothing is set aside: once the storage answers,
  the checkpoint is there.

  Mutants: every exception counts as damage; a folder that cannot be entered
  counts as empty (`policy`).
  """
  _open_to_all(tmp_path)
  for i, place in enumerate(places):
    folder = tmp_path / str(i)
    folder.mkdir()
    _save(folder, [1, 2])
    whole = tmp_path / f'{i}.whole'
    shutil.copytree(folder, whole, symlinks=True)
    path = folder / 'checkpoints' / '2' / place
    modes = path.stat().st_mode
    trouble(path)
    with _as_user_if(trouble is _forbid):
      with pytest.raises(ReadError) as e:
        _restore(folder)
    assert os.strerror(code) in str(e.value), place
    assert 'checkpoints/2' in str(e.value) and '\n' not in str(e.value)
    if trouble is _forbid:
      path.chmod(modes)
    else:
      path.unlink()
      shutil.copyfile(whole / 'checkpoints' / '2' / place, path)
    (step, _, _), warnings = _restore(folder)
    assert (step, warnings) == (2, []), place
    assert not list(folder.rglob('*.unreadable'))


def test_a_folder_that_cannot_be_listed_is_no_new_run(tmp_path):
  """Law: a run does not start again because its checkpoints cannot be seen.

  Mutant: `steps` returns [] for whatever the system says.
  """
  _open_to_all(tmp_path)
  _save(tmp_path, [1])
  root = tmp_path / 'checkpoints'
  root.chmod(0)
  with file_helpers.unprivileged():
    with pytest.raises(ReadError, match='Permission denied'):
      Checkpoints(tmp_path).steps()
  root.chmod(0o755)


# asyncio leaves a loop behind that it could not give its descriptors.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_too_many_open_files_are_no_damage(tmp_path):
  """Law: as above, for what this process lacks. Mutant: as above."""
  _save(tmp_path, [1, 2])
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  with Checkpoints(tmp_path) as checkpoints:
    used = len(os.listdir('/proc/self/fd'))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1, before[1]))
    try:
      with pytest.raises(ReadError, match=os.strerror(errno.EMFILE)):
        checkpoints.restore({'policy': _abstract(_state())})
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert checkpoints.restore({'policy': _abstract(_state())})[0] == 2


class _Unknown(Exception):
  pass


def _raise(error):
  raise error


@pytest.mark.parametrize(
  'error, found',
  [
    (MemoryError(), ReadError),
    (
      jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
      ReadError,
    ),
    (TimeoutError(errno.ETIMEDOUT, 'Connection timed out'), ReadError),
    (
      ValueError("ABORTED: Error reading local file: [os_error_code='116']"),
      ReadError,
    ),
    (
      ValueError(
        'FAILED_PRECONDITION: Error reading local file: Transport '
        "endpoint is not connected [os_error_code='107']"
      ),
      ReadError,
    ),
    (TypeError('a mistake in this program'), TypeError),
    (_Unknown(), _Unknown),
  ],
)
def test_whatever_else_is_raised_is_no_damage(
  tmp_path, monkeypatch, error, found
):
  """Law: what does not prove damage is raised, and the checkpoint stays the
  newest. The texts are those of TensorStore for a system that refuses.

  Mutants: TypeError counts as damage; FAILED_PRECONDITION alone does.
  """
  _save(tmp_path, [1, 2])
  with monkeypatch.context() as patch:
    patch.setattr(
      jax, 'make_array_from_callback', lambda *a, **k: _raise(error)
    )
    patch.setattr(
      jax, 'make_array_from_single_device_arrays', lambda *a, **k: _raise(error)
    )
    with pytest.raises(found):
      _restore(tmp_path)
  (step, _, _), warnings = _restore(tmp_path)
  assert (step, warnings) == (2, [])


def test_an_altered_text_is_damage_or_harmless(tmp_path):
  """Law: whichever byte of the texts beside the arrays is altered, or torn off,
  the state is read as it was saved or the step is passed over.

  Mutants: `_check_texts` not asked; no look at the names.
  """
  _save(tmp_path, [1, 2])
  rng = random.Random(0)
  passed_over = 0
  for place in _TEXTS:
    path = tmp_path / 'checkpoints' / '2' / place
    good = path.read_bytes()
    for _ in range(12):
      bad = bytearray(good)
      at = rng.randrange(len(bad))
      bad[at] ^= 1 << rng.randrange(7)
      path.write_bytes(bad if rng.random() < 0.8 else good[:at])
      (step, state, _), warnings = _restore(tmp_path)
      assert digest_arrays(state) == digest_arrays(_state(step))
      assert len(warnings) == 2 - step
      passed_over += len(warnings)
    path.write_bytes(good)
  assert passed_over > 18


def test_none_readable_does_not_start_again(tmp_path):
  """Mutant: return None, and the run silently starts from step 0."""
  _save(tmp_path, [1, 2])
  for step in ('1', '2'):
    _delete(tmp_path / 'checkpoints' / step)
  with pytest.raises(ConfigError) as e:
    _restore(tmp_path)
  assert 'checkpoints/2 is unreadable' in str(e.value)
  assert 'checkpoints/1 is unreadable' in str(e.value)


@pytest.mark.parametrize(
  'wanted, words',
  [
    (
      lambda: _state(width=97),
      r'opt_state/0/mu/layer/w is float32\[96, 64\] there and float32\[97',
    ),
    (
      lambda: _state().replace(params={}),
      r'params/layer/b is bfloat16\[64\] '
      'there and absent',
    ),
  ],
)
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
    _abstract(_state()),
  )
  (_, state, _), _ = _restore(tmp_path, wanted)
  assert all(x.sharding == sharding for x in jax.tree.leaves(state))


def test_digest_is_stable():
  """A literal: the digest is an interface, compared across versions."""
  tree = {'b': np.arange(3, dtype=np.int32), 'a': [jnp.bfloat16(1.5)]}
  digest = digest_arrays(tree)
  assert digest == (
    '40d781fa922123f5a6d3c4f1f1fe8fa18fec2c1b30a651dfd687fc0081045459'
  )
  assert digest == digest_arrays({'a': (jnp.bfloat16(1.5),), 'b': tree['b']})


@pytest.mark.parametrize(
  'other',
  [
    {'x': np.zeros((2, 3), np.int32)},
    {'x': np.zeros((3, 2), np.float32)},
    {'y': np.zeros((3, 2), np.int32)},
    {'x': np.array([[0, 0], [0, 0], [0, 1]], np.int32)},
  ],
)
def test_digest_covers_name_dtype_shape_and_bytes(other):
  assert digest_arrays({'x': np.zeros((3, 2), np.int32)}) != digest_arrays(
    other
  )


def test_digest_of_a_view_is_that_of_its_values():
  """Mutant: hashing the buffer under a transposed view."""
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  assert digest_arrays([array.T]) == digest_arrays([array.T.copy()])


def test_states_are_read_by_name(tmp_path):
  """Mutants: `_read` restores every item; the digest of `policy` for all."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(
      1, {'policy': _state(1), 'critic': _state(2, width=32)}, {}
    )
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


def _earlier_form(path):
  """Rewrites a record as earlier versions wrote it: one digest by state."""
  file = path / 'host' / 'metadata'
  record = json.loads(file.read_text())
  del record['record_sha256']
  record['sha256'] = {'policy': digest_arrays(_state(int(path.name)))}
  # pylint: disable-next=protected-access
  record['record_sha256'] = checkpoint._digest_json(record)
  file.write_text(json.dumps(record))


def _drop_arrays(path, prefix):
  """Deletes the arrays whose names begin so from the files of an item."""
  store = tensorstore.KvStore.open(
    {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{path}/'}}
  ).result()
  keys = [key for key in store.list().result() if key.startswith(prefix)]
  assert keys
  for key in keys:
    store.write(key, None).result()


def test_parameters_alone_are_read(tmp_path):
  """Law: with `policy/params` no array of the optimizer is read: they may be
  gone. What is read is verified, and the whole state still needs them.

  Mutants: the item is read whole; digests of the part not compared.
  """
  _save(tmp_path, [1, 2])
  with Checkpoints(tmp_path, warn=lambda _: None) as checkpoints:
    _drop_arrays(tmp_path / 'checkpoints' / '2' / 'policy', b'opt_state')
    wanted = {'policy/params': _abstract(_state()).params}
    step, found, host = checkpoints.restore(wanted)
    assert (step, list(found), host['cursor']) == (2, ['policy/params'], 2)
    assert digest_arrays(found['policy/params']) == digest_arrays(
      _state(2).params
    )
    assert checkpoints.restore({'policy': _abstract(_state())})[0] == 1
    assert (
      checkpoints.restore({'policy/step': _abstract(_state()).step})[1][
        'policy/step'
      ]
      == 2
    )
    _swap(tmp_path / 'checkpoints' / '2')
    assert checkpoints.restore(wanted)[0] == 1
    with pytest.raises(
      ConfigError, match='params/layer/b is bfloat16.* there and absent'
    ):
      checkpoints.restore({'policy/params': {'layer': {}}})


@pytest.mark.parametrize('wanted', ['policy', 'policy/params'])
def test_a_checkpoint_of_an_earlier_version(tmp_path, wanted):
  """Law: a record with one digest for a state is verified and read, as a whole
  and in part; damage of what is not wanted is then damage too.

  Mutants: digests taken for a dict; a part of an old state not verified.
  """
  _save(tmp_path, [1, 2])
  for step in (1, 2):
    _earlier_form(tmp_path / 'checkpoints' / str(step))
  pick = lambda state: state if wanted == 'policy' else state.params
  with Checkpoints(tmp_path, warn=lambda _: None) as checkpoints:
    damages = [
      lambda path: None,
      lambda path: _drop_arrays(path / 'policy', b'opt_'),
      _swap,
    ]
    whole = tmp_path / 'whole'
    shutil.copytree(tmp_path / 'checkpoints' / '2', whole)
    for damage, want in zip(damages, (2, 1, 1)):
      path = tmp_path / 'checkpoints' / '2'
      shutil.rmtree(path)
      shutil.copytree(whole, path)
      damage(path)
      got, found, _ = checkpoints.restore({wanted: pick(_abstract(_state()))})
      assert got == want
      assert digest_arrays(found[wanted]) == digest_arrays(pick(_state(want)))
      assert jax.tree.structure(found[wanted]) == jax.tree.structure(
        pick(_state(want))
      )


@pytest.mark.parametrize('kind', ['prompt_lookup', 'model'])
def test_entrypoints_read_no_optimizer(tmp_path, kind):
  """Law: what evaluate, sample, export and teachers call reads parameters only,
  the drafter's where it is wanted and there; else it is fresh.

  Mutants: the states read whole; a drafter read that nobody asked for.
  """
  config = testing.tiny_config()
  config.mesh.data = 1
  config.rollout.drafter = kind
  states = make_run(config).states
  made = states.init_all(states.init_params())
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'policy': made['policy']}, {})
    checkpoints.save(2, made, {})
  for item in (tmp_path / 'checkpoints').glob('*/[pd]*'):
    _drop_arrays(item, b'opt_state')
  policy = digest_arrays(made['policy'].params)
  step, params, drafts = states.restore_params(str(tmp_path), drafter=True)
  assert (step, digest_arrays(params)) == (2, policy)
  if kind == 'prompt_lookup':
    assert drafts == ()
    return
  drafter = digest_arrays(made['drafter'].params)
  assert digest_arrays(drafts) == drafter
  _, _, fresh = states.restore_params(str(tmp_path), step=1, drafter=True)
  assert digest_arrays(fresh) == drafter
  shutil.rmtree(tmp_path / 'checkpoints' / '2' / 'drafter')
  step, params, drafts = states.restore_params(str(tmp_path))
  assert (step, digest_arrays(params), drafts) == (2, policy, ())
