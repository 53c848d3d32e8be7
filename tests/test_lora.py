"""LoRA: the adapted model, what is trained, and the merge."""

import dataclasses
import functools
import json

from config_helpers import train_quietly
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlax_llm import export
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import LORA_TARGETS
from rlax_llm.config import LoRAConfig
from rlax_llm.config.validation import validate
from rlax_llm.learning import learner as learners
from rlax_llm.models import lora

PARTIAL = ('q_proj', 'v_proj', 'up_proj')


def _config(targets=LORA_TARGETS, rank=3):
  config = testing.tiny_config()
  config.model.lora.rank = rank
  config.model.lora.alpha = 6.0
  config.model.lora.targets = targets
  config.algorithm.kl_coefficient = 0.1
  config.mesh.data = 1
  config.checkpoint.every = 1
  return config


def _exportable(targets, rank=3):
  """A Qwen2: biases on queries, keys and values."""
  config = _config(targets, rank)
  config.model.qkv_bias = True
  config.model.heads = 8  # four to a KV head
  config.model.tokenizer = testing.ALPHABET
  return config


def _without_gaps(tree):
  """Returns a tree without its adapters."""
  if not isinstance(tree, dict):
    return tree
  return {
    k: _without_gaps(v)
    for k, v in tree.items()
    if not k.startswith(lora.PREFIX)
  }


def _moved(params, seed=7):
  """Adapters away from 0, so that each of them matters."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(params)
  rng = np.random.default_rng(seed)
  values = [
    jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
    if lora.PREFIX in str(path)
    else x
    for path, x in leaves
  ]
  return jax.tree.unflatten(tree, values)


@functools.cache
def _model(targets, rank=3):
  settings = LoRAConfig(rank=rank, alpha=6.0, targets=targets)
  return testing.tiny_model(lora=freeze(settings), qkv_bias=True, qk_norm=True)


def _logits(model, params):
  tokens = np.random.default_rng(0).integers(0, 7, (2, 9)).astype(np.int32)
  order = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
  run = lambda p: model.logits(p, model.hidden(p, tokens, order, order * 0 + 1))
  return jax.jit(run)(params)


@pytest.mark.parametrize(
  'targets', [LORA_TARGETS, PARTIAL, ('o_proj',)], ids=['all', 'some', 'one']
)
def test_merged_weights_are_the_adapted_model(targets):
  """Law: logits with adapters are those of W + (alpha / r) A B.

  A fresh adapter changes nothing; every target changes the logits. Mutants:
  alpha not divided by r in `merge`.
  """
  model, plain = _model(targets), _model((), 0)
  fresh = model.init(jax.random.key(0))
  base = plain.init(jax.random.key(0))
  np.testing.assert_array_equal(_logits(model, fresh), _logits(plain, fresh))
  params = _moved(fresh)
  merged = lora.merge(params, LoRAConfig(rank=3, alpha=6.0, targets=targets))
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  adapted = _logits(model, params)
  assert np.max(np.abs(adapted - _logits(model, fresh))) > 1e-2
  np.testing.assert_allclose(adapted, _logits(plain, merged), atol=2e-5)
  for name in targets:
    only = jax.tree_util.tree_map_with_path(
      lambda path, old, new, name=name: (
        new if lora.PREFIX + name in str(path) else old
      ),
      fresh,
      params,
    )
    assert np.max(np.abs(_logits(model, only) - _logits(model, fresh))) > 1e-4


def test_only_adapters_are_trained(tmp_path):
  """Base leaves keep their bits; the optimizer knows adapters only.

  And the reference policy is the base: with fresh adapters its log-probs are
  the policy's, and no copy of the base is made for it. Mutant: `split` of
  everything in `update`.
  """
  run = make_run(_config())
  params = run.states.init_params()
  before = jax.device_get(params)
  state = run.states.init_state(params)
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  adapters = jax.tree.leaves(
    lora.split(state.params, lora.trainable(state.params))[0]
  )
  assert sorted(x.shape for x in moments) == sorted(
    x.shape for x in adapters * 2
  )
  reference = run.states.reference(str(tmp_path), state.params, 0)
  assert len(jax.tree.leaves(reference)) == len(adapters)
  learner = run.learner()
  samples = [
    learners.Sample(
      prompt=np.array([2, 3], np.int32),
      completion=np.arange(5, dtype=np.int32) + i % 2,
      advantage=(-1.0) ** i,
      behaviour_logprobs=np.zeros(5, np.float32),
    )
    for i in range(16)
  ]
  for step in range(3):
    prepared, _ = learner.prepare(state.params, samples, reference)
    state, values = learner.learn(state, prepared)
    assert (values['policy/kl_reference'] < 1e-7) == (step == 0)
  after = jax.device_get(state.params)
  trained = lora.trainable(after)
  same = jax.tree.map(np.array_equal, before, after)
  assert jax.tree.map(lambda x: not x, trained) == same


@pytest.mark.slow
def test_a_stopped_run_continues(tmp_path):
  """Law: killed and continued, a run with adapters has the same bits."""
  config = _config(rank=2)
  config.num_steps = 3
  whole = train_quietly(config, tmp_path / 'whole')
  config.num_steps = 1
  train_quietly(config, tmp_path / 'parts')
  config.num_steps = 3
  parts = train_quietly(config, tmp_path / 'parts')
  assert parts['parameters_sha256'] == whole['parameters_sha256']


@pytest.mark.parametrize(
  'targets', [LORA_TARGETS, PARTIAL], ids=['all', 'some']
)
def test_exported_adapters_add_up(tmp_path, targets):
  """Law: base + (alpha / r) B A, tensor by published tensor, is the merged
  export; a run that begins from the base folder has the base's weights and
  fresh adapters.

  Mutants: k_proj's part at v_proj's place; A not turned; heads before groups
  in B.
  """
  run = make_run(_exportable(targets))
  params = _moved(run.states.init_params())
  model = run.states.model_config
  base = dataclasses.replace(model, lora=freeze(LoRAConfig()))
  _, frozen = lora.split(params, lora.trainable(params))
  plain = {k: _without_gaps(v) for k, v in frozen.items()}
  write = functools.partial(export.export_folder, token_ids={}, files=[])
  write(str(tmp_path / 'base'), base, plain)
  write(str(tmp_path / 'merged'), model, params)
  export.export_adapter(str(tmp_path / 'adapter'), model, params)
  read = lambda name, file: safetensors.numpy.load_file(tmp_path / name / file)
  want = read('merged', 'model.safetensors')
  got = read('base', 'model.safetensors')
  adapter = read('adapter', 'adapter_model.safetensors')
  settings = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
  assert settings['target_modules'] == list(targets)
  assert len(adapter) == 2 * len(targets) * model.layers
  scale = settings['lora_alpha'] / settings['r']
  for name, a in adapter.items():
    if '.lora_A.' in name:
      b = adapter[name.replace('lora_A', 'lora_B')]
      module = name.removeprefix('base_model.model.').replace('.lora_A', '')
      got[module] = got[module] + scale * (b @ a)
  assert want.keys() == got.keys()
  for name, tensor in want.items():
    np.testing.assert_allclose(got[name], tensor, atol=1e-6, err_msg=name)

  config = _exportable(targets)
  config.model.pretrained = str(tmp_path / 'base')
  begun = make_run(config).states.init_params()
  trained = lora.trainable(begun)
  jax.tree.map(
    np.testing.assert_array_equal,
    lora.split(begun, trained)[1],
    lora.split(params, trained)[1],
  )
  added = lora.split(begun, trained)[0]
  assert all(
    np.any(x) == ("'a'" in str(path))
    for path, x in jax.tree_util.tree_leaves_with_path(added)
  )


def test_a_run_without_adapters_exports_none(tmp_path):
  """--adapter without adapters is refused by name."""
  run = make_run(_exportable(LORA_TARGETS, rank=0))
  with pytest.raises(ConfigError, match='--adapter.*model.lora.rank=0'):
    export.export_adapter(str(tmp_path / 'a'), run.states.model_config, {})


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(targets=('q_pro',)), ["'q_pro'", "did you mean 'q_proj'"]),
    (dict(rank=4, targets=()), ['model.lora.targets=()', 'q_proj']),
    (dict(rank=-1), ['model.lora.rank=-1', 'at least 0']),
    (dict(rank=4, alpha=0.0), ['model.lora.alpha=0.0', 'above 0']),
  ],
)
def test_bad_adapters_are_refused(changes, words):
  """One line that names the field and the way out."""
  config = testing.tiny_config()
  for name, value in changes.items():
    setattr(config.model.lora, name, value)
  with pytest.raises(ConfigError) as error:
    validate(config)
  assert all(word in str(error.value) for word in words), error.value


def test_rollouts_copy_no_base():
  """Law: rollouts round the adapters and read the base where it lies.

  Mutant: every leaf through the executable that rounds.
  """
  config = _config()
  config.learning.precision.parameters = 'bfloat16'
  config.learning.precision.compute = 'bfloat16'
  config.learning.precision.head = 'bfloat16'
  run = make_run(config)
  params = run.states.init_params()
  engine = run.engine(run.sampling)
  # pylint: disable=protected-access
  gathered = engine._executor.gather_params(
    params, run.states.rollout_placement()
  )
  trained = lora.trainable(params)
  same = jax.tree.map(lambda a, b: a is b, params, gathered)
  assert same == jax.tree.map(lambda x: not x, trained)
  assert all(
    x.dtype == jnp.bfloat16
    for x in jax.tree.leaves(lora.split(gathered, trained)[0])
  )


def test_a_target_that_cannot_be_made_is_refused(tmp_path):
  """One line that names the folder. Mutant: the OSError passed on."""
  (tmp_path / 'file').write_text('')
  run = make_run(_exportable(LORA_TARGETS))
  with pytest.raises(ConfigError, match='--out=.*cannot be written'):
    export.export_adapter(
      str(tmp_path / 'file' / 'out'), run.states.model_config, {}
    )
