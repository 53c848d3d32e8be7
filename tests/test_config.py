"""Configs: what is refused and how, freezing, round trips, the files."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import published
import pytest

from experiments.benchmarks import memory
from rlax_llm import config as config_lib
from rlax_llm import executables
from rlax_llm import flags
from rlax_llm import testing
from rlax_llm import validation
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.drafting import drafters
from rlax_llm.learning import algorithms
from rlax_llm.run import make_run

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / 'configs').glob('[!_]*.py'))

# (changes, what the message names: the value, and the limit or the way out)
BAD = [
    ({
        'rollout.drafter': 'promt_lookup'
    }, ["'promt_lookup'", "did you mean 'prompt_lookup'"]),
    ({
        'learning.schedule': 'cosin'
    }, ["'cosin'", 'cosine']),
    ({
        'learning.old_logprobs': 'both'
    }, ["'both'", 'recompute, sampler']),
    ({
        'learning.precision.compute': 'float16'
    }, ["'float16'", 'bfloat16']),
    ({
        'task.prompt_format': 'long'
    }, ["'long'", 'question, short']),
    ({
        'task.answer_format': 'tags'
    }, ["'tags'", "did you mean 'tag'"]),
    ({
        'task.match': 'fuzzy'
    }, ["'fuzzy'", 'numeric, exact']),
    ({
        'seed': -1
    }, ['seed=-1', 'at least 0']),
    ({
        'num_steps': -1
    }, ['num_steps=-1', 'at least 0']),
    ({
        'rollout.width': -1
    }, ['rollout.width=-1', 'at least 0']),
    ({
        'rollout.width': 65
    }, ['rollout.width', '65', 'at most 64']),
    ({
        'rollout.width': 0,
        'control.widths': (1, 400)
    }, ['control.widths', '400', 'at most 64']),
    ({
        'rollout.width': 0,
        'control.widths': ()
    }, ['rollout.width=0', 'control.widths is empty']),
    ({
        'control.widths': (1, 2.5)
    }, ['control.widths', '2.5', 'whole numbers']),
    ({
        'rollout.history': 10**7
    }, ['rollout.history=10000000', 'MiB', 'lower rollout.history']),
    ({
        'rollout.drafter': 'none',
        'rollout.width': 4
    }, ["'none'", '=4', 'width to 1']),
    ({
        'rollout.drafter': 'prompt_lookup',
        'control.run_ahead_rows': 4
    }, ['run_ahead_rows=4', "'tree_cache'", 'set it to 0']),
    ({
        'rollout.cache_megabytes': 0
    }, ['cache_megabytes=0', 'at least 1']),
    ({
        'drafter.depth': 3
    }, ['drafter.depth=3', 'no effect', "'tree_cache'", "'model' or 'hybrid'"]),
    ({
        'rollout.drafter': 'model',
        'drafter.warmup_updates': 5
    }, ['drafter.warmup_updates=5', 'sft.steps=0', 'give steps']),
    ({
        'rollout.drafter': 'model',
        'drafter.share': 0.0
    }, ['drafter.share=0', 'drafter.every=1', 'every to 0']),
    ({
        'rollout.drafter': 'model',
        'drafter.share': 1.5
    }, ['drafter.share=1.5', 'at most 1']),
    ({
        'rollout.drafter': 'hybrid',
        'drafter.sources': ('tree_cache', 'modle')
    }, ['modle', "did you mean 'model'"]),
    ({
        'rollout.drafter': 'model',
        'drafter.sources': ('model',)
    }, ['drafter.sources', "'hybrid'", 'leave it']),
    ({
        'rollout.branching': 0
    }, ['branching=0', 'at least 1']),
    ({
        'rollout.draft_least': 1.5
    }, ['draft_least=1.5', 'at most 1']),
    ({
        'learning.microbatch_rows': 0
    }, ['microbatch_rows=0', 'at least 1']),
    ({
        'checkpoint.keep': 0
    }, ['checkpoint.keep=0', 'at least 1']),
    ({
        'evaluate.temperature': -1.0
    }, ['evaluate.temperature=-1', 'at least 0']),
    ({
        'learning.learning_rate': 0.0
    }, ['learning_rate=0', 'above 0']),
    ({
        'learning.learning_rate': float('nan')
    }, ['learning_rate=nan', 'above']),
    ({
        'learning.max_grad_norm': float('inf')
    }, ['max_grad_norm=inf', 'above']),
    ({
        'learning.b2': 1.0
    }, ['learning.b2=1.0', '[0, 1)']),
    ({
        'control.refill_threshold': 1.5
    }, ['refill_threshold=1.5', 'at most 1']),
    ({
        'evaluate.top_p': 0.0
    }, ['evaluate.top_p=0', '(0, 1]']),
    ({
        'learning.minibatches': 3
    }, ['prompts_per_step=4', 'minibatches=3']),
    ({
        'learning.row_length': 10
    }, ['row_length=10', 'at least 12']),
    ({
        'model.kv_heads': 3
    }, ['model.heads=4', 'model.kv_heads=3']),
    ({
        'model.width': 18
    }, ['model.width=18', 'model.heads=4', 'head_dim']),
    ({
        'model.head_dim': 3
    }, ['head dimension is 3', 'even']),
    ({
        'model.max_positions': 14
    }, ['= 15', 'max_positions=14', 'shorten']),
    ({
        'rollout.temperature': 0.0
    }, ['temperature=0', 'evaluate.temperature']),
    ({
        'rollout.top_p': 0.9
    }, ['rollout.top_p=0.9', 'use evaluate.top_p']),
    ({
        'rollout.top_k': 5
    }, ['top_k=5', 'training needs 1, 0, 0']),
    ({
        'rollout.min_p': 0.1
    }, ['min_p=0.1', 'training needs 1, 0, 0']),
    ({
        'num_steps': '5'
    }, ["num_steps='5'", 'give it as int']),
    ({
        'num_steps': True
    }, ['num_steps=True', 'give it as int']),
    ({
        'learning.learning_rate': '1e-3'
    }, ["'1e-3'", 'give it as float']),
    ({
        'task': None
    }, ['task=None', 'TaskConfig']),
    ({
        'task.options': [1]
    }, ['task.options=[1]', 'Mapping']),
    ({
        'task.system_prompt': 'Be brief.'
    }, ['task.system_prompt', 'set task.chat_template=True']),
    ({
        'task.chat_variables': {
            'enable_thinking': False
        }
    }, ['task.chat_variables', 'set task.chat_template=True']),
    # What needs the tokenizer, the task, the algorithms or the devices.
    ({
        'mesh.data': 16
    }, ['mesh.data=16', '8 devices', 'mesh.data=0']),
    ({
        'rollout.slots': 12
    }, ['rollout.slots=12', '8 ways', 'multiple']),
    ({
        'learning.microbatch_rows': 6
    }, ['microbatch_rows=6', '8 ways']),
    ({
        'model.vocabulary': 3
    }, ['model.vocabulary=3', '7 ids', 'raise it']),
    ({
        'model.tokenizer': 'abca'
    }, ["'a' twice", "'bytes'"]),
    ({
        'model.tokenizer': 'pretrained'
    }, ['model.pretrained', 'not set', "'bytes'"]),
    ({
        'model.pretrained': 'no/such/folder'
    }, ["'no/such/folder'", 'config.json', 'give the folder']),
    ({
        'model.rope_scaling': 'yarn'
    }, ["'yarn'", 'linear, llama3']),
    ({
        'model.rope_factor': 8.0
    }, ['rope_factor=8.0', 'no effect', "'none'"]),
    ({
        'model.rope_scaling': 'linear',
        'model.rope_low': 2.0
    }, ['rope_low=2.0', 'no effect', "'linear'"]),
    ({
        'model.rope_scaling': 'llama3',
        'model.rope_low': 4.0
    }, ['rope_low=4.0', 'below', 'rope_high=4.0']),
    ({
        'model.rope_factor': 0.0
    }, ['rope_factor=0', 'above 0']),
    ({
        'task.chat_template': True
    }, ['task.chat_template=True', 'pretrained', 'model.tokenizer=']),
    ({
        'algorithm.name': 'grop'
    }, ["'grop'", "did you mean 'grpo'"]),
    ({
        'algorithm.loss': 'ppo'
    }, ["'ppo'", 'clipped']),
    ({
        'algorithm.reduction': 'mean'
    }, ["'mean'", 'token_mean']),
    ({
        'algorithm.name': 'rloo',
        'algorithm.clip_low': 0.1
    }, ['clip_low', 'remove it']),
    ({
        'algorithm.divergence': 'k1'
    }, ['kl_coefficient is 0', 'both']),
    ({
        'algorithm.clip_low': -0.5
    }, ['clip_low=-0.5', 'between 0 and 1']),
    ({
        'algorithm.kl_coefficient': float('nan')
    }, ['kl_coefficient=nan', '0']),
    ({
        'task.name': 'chain_sun'
    }, ["'chain_sun'", 'chain_sum']),
    ({
        'task.name': 'no_such_module:Task'
    }, ['no_such_module', 'PYTHONPATH']),
    ({
        'task.name': 'rlax_llm.testing:tiny_config'
    }, ['lacks', 'problem']),
    ({
        'task.epoch_prompts': 9
    }, ['epoch_prompts=9', '2', 'lower']),
]


def _changed(changes):
  config = testing.tiny_config()
  for path, value in changes.items():
    *sections, name = path.split('.')
    section = config
    for part in sections:
      section = getattr(section, part)
    setattr(section, name, value)
  return config


@pytest.mark.parametrize('changes, words', BAD, ids=lambda x: str(x)[:40])
def test_bad_configs_are_refused_in_one_line(changes, words):
  """Law: a ConfigError of one line names the value and the remedy, and
  nothing has been compiled.

  Mutant: any of the checks removed.
  """
  before = executables.compile_totals()
  with pytest.raises(ConfigError) as caught:
    make_run(_changed(changes))
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message
  assert executables.compile_totals() == before


def test_the_tiny_config_is_good():
  """Law: what the table changes is valid before the change.

  Mutant: a check that refuses everything passes the table.
  """
  assert make_run(testing.tiny_config()).algorithm.loss == 'clipped'


def test_validate_returns_a_frozen_hashable_copy():
  """Law: the copy is frozen through and through, equal configs have equal
  hashes, and the original stays as it was.

  Mutants: sections shared with the original; nested dicts left mutable.
  """
  config = testing.tiny_config()
  config.task.options = {'a': [1, {'b': 2}]}
  frozen = validation.validate(config)
  assert hash(frozen) == hash(validation.validate(config))
  assert frozen == validation.validate(config)
  for section in (frozen, frozen.learning, frozen.learning.precision):
    name = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match='frozen'):
      setattr(section, name, 1)
  with pytest.raises(TypeError):
    frozen.task.options['a'] = 2
  config.seed = 5
  config.learning.learning_rate = 1.0
  config.task.options['a'] = 7
  assert frozen.seed == 0 and frozen.learning.learning_rate == 3e-3
  assert frozen.task.options['a'] == (1, {'b': 2})
  assert hash(validation.validate(config)) != hash(frozen)


def test_round_trip_through_a_dict():
  """Law: from_dict(to_dict(c)) validates to the same value.

  Mutant: nested sections replaced by dicts.
  """
  config = testing.tiny_config()
  config.task.options = {'a': (1, 2)}
  config.algorithm.clip_high = 0.28
  again = config_lib.from_dict(config_lib.to_dict(config))
  assert validation.validate(again) == validation.validate(config)
  frozen = config_lib.to_dict(validation.validate(config))
  assert validation.validate(
      config_lib.from_dict(frozen)) == validation.validate(config)
  with pytest.raises(ConfigError, match='learning.momentum'):
    config_lib.from_dict({'learning': {'momentum': 1}})


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_validates(path, tmp_path):
  """Law: each file of configs/ makes a run, with nothing compiled.

  Published models stand in by their config.json. Mutant: a config that sets a
  removed field.
  """
  before = executables.compile_totals()
  config = published.stand_in(flags.load_config(str(path)), tmp_path)
  run = make_run(config)
  if not config.model.pretrained:
    assert dict(config_lib.to_dict(run.config)) == config_lib.to_dict(config)
  run.check_prompts([run.task.problem('train', i) for i in range(8)])
  if config.sft.steps:
    for i in range(32):
      run.demonstration(i)
  assert executables.compile_totals() == before


@pytest.mark.slow
@pytest.mark.parametrize('path', [p for p in CONFIGS if p.stem != 'quickstart'],
                         ids=lambda path: path.stem)
def test_the_shapes_of_a_config_compile(path, tmp_path):
  """Law: segment and update of the config compile from shapes alone, divided
  over 8 devices, and what a device holds shrinks with fsdp.

  Two layers stand for all: they are alike. Mutant: a leaf without axes.
  """
  config = published.stand_in(flags.load_config(str(path)), tmp_path)
  name = pathlib.Path(config.model.pretrained).name
  items = published.CONFIG_JSON[name] | {'num_hidden_layers': 2}
  (tmp_path / name / 'config.json').write_text(json.dumps(items))
  config.rollout.slots = 16
  config.task.prompts_per_step = 4
  config.learning.microbatch_rows = 8
  config.mesh.data = 1
  sizes = []
  for fsdp in (1, 8):
    config.mesh.fsdp = fsdp
    sizes.append(memory.measure(make_run(config)))
  assert sizes[1]['update'] < sizes[0]['update']
  assert sizes[1]['state'] < 0.2 * sizes[0]['state']


def test_there_are_configs():
  """Law: the test above has something to test. Mutant: a wrong glob."""
  assert 'quickstart' in [path.stem for path in CONFIGS]


def test_choices_name_what_is_implemented():
  """Law: the names in the config are those of the tables that implement them.

  Mutant: a drafter entered in one place only.
  """
  assert tuple(drafters.DRAFTERS) == config_lib.DRAFTERS
  assert Config().algorithm.name in algorithms.PRESETS
  fields = {f.name for f in dataclasses.fields(config_lib.AlgorithmConfig)}
  static = {f.name for f in dataclasses.fields(algorithms.Algorithm)}
  assert fields == static | {'name'}
  for preset in algorithms.PRESETS:
    config = config_lib.AlgorithmConfig(name=preset)
    assert algorithms.resolve(config) == algorithms.PRESETS[preset]


@pytest.mark.parametrize('arguments, words', [
    (['--config.learning.lerning_rate=1'], ['lerning_rate', 'learning_rate']),
    (['--config.num_steps=many'], ['num_steps=many', 'int']),
    (['--config.rollout.drafter=tree'], ["'tree'", 'prompt_lookup']),
])
def test_train_refuses_in_one_line(tmp_path, arguments, words):
  """Law: the command line ends with one line on stderr and exit code 2.

  Mutant: `flags.run` that lets ConfigError through as a traceback.
  """
  command = [
      sys.executable, '-m', 'rlax_llm.train',
      f'--config={ROOT / "configs" / "quickstart.py"}',
      f'--workdir={tmp_path / "run"}', *arguments
  ]
  done = subprocess.run(command,
                        cwd=ROOT,
                        capture_output=True,
                        text=True,
                        timeout=120,
                        check=False)
  assert done.returncode == 2
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  for word in words:
    assert word in lines[0]
  assert not (tmp_path / 'run').exists()
