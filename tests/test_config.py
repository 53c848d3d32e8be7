"""Configs: what is refused and how, freezing, round trips, the files."""

import dataclasses
import itertools
import json
import pathlib

from config_helpers import tiny_config
import published
import pytest

from experiments.benchmarks import memory
from rlax_llm import config as config_lib
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import validation
from rlax_llm.drafting import drafters
from rlax_llm.learning import algorithms
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / 'configs').glob('[!_]*.py'))


def test_the_tiny_config_is_good():
  """Law: what the table of test_bad_input.py changes is valid before.

  Mutant: a check that refuses everything passes that table.
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
    config_lib.from_dict(frozen)
  ) == validation.validate(config)
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
    left_out = []
    assert len(list(itertools.islice(run.demonstrations(left_out), 32))) == 32
    assert not left_out
  assert executables.compile_totals() == before


@pytest.mark.slow
@pytest.mark.parametrize(
  'path',
  [p for p in CONFIGS if p.stem != 'quickstart'],
  ids=lambda path: path.stem,
)
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
  assert ('none', *drafters.DRAFTERS) == config_lib.DRAFTERS
  assert Config().algorithm.name in algorithms.PRESETS
  fields = {f.name for f in dataclasses.fields(config_lib.AlgorithmConfig)}
  static = {f.name for f in dataclasses.fields(algorithms.Algorithm)}
  assert fields == static | {'name'}
  for preset in algorithms.PRESETS:
    config = config_lib.AlgorithmConfig(name=preset)
    assert algorithms.resolve(config) == algorithms.PRESETS[preset]


@pytest.mark.parametrize(
  'changes',
  [
    dict(num_steps=0, learning__warmup_steps=9),
    dict(num_steps=3, learning__warmup_steps=3),
    dict(num_steps=3, learning__minibatches=2, learning__warmup_steps=6),
    dict(sft__steps=0, sft__warmup_steps=9),
    dict(sft__steps=9, sft__warmup_steps=9),
    dict(num_steps=3, drafter__every=3, rollout__drafter='model'),
    dict(
      num_steps=3,
      checkpoint__every=9,
      checkpoint__keep_every=9,
      evaluate__every=9,
      control__staleness=9,
    ),
  ],
)
def test_durations_up_to_the_end_are_taken(changes):
  """Law: a duration may be all of what it is a part of, and one that nothing
  reads may be anything. Mutants: `>=` for `>`; no regard to sft.steps=0.
  """
  config = validation.validate(tiny_config(**changes))
  validation.check_durations(config, 0)
