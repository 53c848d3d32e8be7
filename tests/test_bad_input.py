"""Whatever the user gets wrong: one line, exit code 2, before any work.

Every row is a whole command, run in this process: flags, config file, checks.
"""

import functools
import json
import math
import pathlib
import runpy
import sys

from absl import app
from absl import flags as absl_flags
import grain  # noqa: F401  pylint: disable=unused-import  # defines flags once
import numpy as np
import published
import pytest
import tokenizer_helpers

from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import to_dict
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.workdir import checkpoint
from rlax_llm.workdir import lock
from rlax_llm.workdir import manifest

ROOT = pathlib.Path(__file__).parent.parent

# Statements on the tiny config, then what the message names: the value, and
# the limit or the way out.
CONFIGS = [
  # Names.
  ("rollout.drafter = 'promt_lookup'", "did you mean 'prompt_lookup'"),
  ("learning.schedule = 'cosin'", "'cosin'", 'cosine'),
  ("learning.old_logprobs = 'both'", "'both'", 'recompute, scored, sampler'),
  ("learning.precision.compute = 'float16'", "'float16'", 'bfloat16'),
  ("task.prompt_format = 'long'", "'long'", 'question, short'),
  ("task.answer_format = 'tags'", "'tags'", "did you mean 'tag'"),
  ("task.match = 'fuzzy'", "'fuzzy'", 'numeric, exact'),
  ("algorithm.name = 'grop'", "'grop'", "did you mean 'grpo'"),
  ("algorithm.loss = 'ppo'", "'ppo'", 'clipped'),
  ("algorithm.reduction = 'mean'", "'mean'", 'token_mean'),
  # Ranges.
  ('seed = -1', 'seed=-1', 'at least 0'),
  ('seed = 2**31', 'seed=2147483648', 'at most 2147483647'),
  ('num_steps = -1', 'num_steps=-1', 'at least 0'),
  ('num_steps = 10**5000', 'num_steps=a number of thousands', 'at most'),
  ('rollout.width = -1', 'rollout.width=-1', 'at least 0'),
  ('rollout.width = 65', 'rollout.width', '65', 'at most 64'),
  ('rollout.width = 0; control.widths = (1, 400)', '400', 'at most 64'),
  ('rollout.width = 0; control.widths = ()', 'rollout.width=0', 'is empty'),
  ('control.widths = (0, 4)', 'control.widths=(0, 4)', 'numbers from 1'),
  ('rollout.history = 10**7', 'rollout.history=10000000', 'lower'),
  ('rollout.cache_megabytes = 0', 'cache_megabytes=0', 'at least 1'),
  ('rollout.branching = -1', 'branching=-1', 'at least 0'),
  # What chooses the width.
  ('rollout.branching = 0', 'branching=0', 'width=3', 'set the width to 0'),
  (
    'rollout.width = 0; rollout.branching = 0; control.branchings = ()',
    'branching=0',
    'control.branchings is empty',
  ),
  ('control.branchings = (1, 3)', 'branchings=(1, 3)', 'no effect'),
  ("control.strategy = 'costs'", "'costs'", 'cost_model'),
  ("control.strategy = 'table'", 'rollout.width=3', 'set the width to 0'),
  (
    "rollout.width = 0; control.strategy = 'table'; control.widths = (1, 8)",
    'control.widths=(1, 8)',
    'no effect',
  ),
  ('control.buckets = ((8, 4),)', '((8, 4),)', "'cost_model'"),
  (
    "rollout.width = 0; control.strategy = 'table'; control.bandit_window = 9",
    'bandit_window=9',
    'no effect',
  ),
  (
    "rollout.width = 0; control.strategy = 'bandit'",
    'two arms or more',
    '(1, 48)',
    'gives 1',
  ),
  (
    "rollout.width = 0; control.strategy = 'table'; "
    'control.buckets = ((8, 2, 4),)',
    'one width',
    '(8, 2, 4)',
    'gives 2',
  ),
  (
    "rollout.width = 0; control.strategy = 'table'; "
    'control.buckets = ((8, 4), (2, 8))',
    'control.buckets',
    'ascending',
  ),
  (
    "rollout.width = 0; control.strategy = 'table'; "
    'control.buckets = ((8, 4.5),)',
    'control.buckets',
    '4.5',
  ),
  (
    "rollout.width = 0; control.strategy = 'bandit'; "
    'control.buckets = ((8, 1, 65),)',
    'control.buckets',
    'at most 64',
  ),
  (
    "rollout.width = 0; control.strategy = 'bandit'; "
    'control.buckets = ((8, 1, 4),); control.bandit_epsilon = 1.5',
    'bandit_epsilon=1.5',
    'at most 1',
  ),
  ('rollout.draft_least = 1.5', 'draft_least=1.5', 'at most 1'),
  ('learning.microbatch_rows = 0', 'microbatch_rows=0', 'at least 1'),
  ('checkpoint.keep = 0', 'checkpoint.keep=0', 'at least 1'),
  ('evaluate.temperature = -1.0', 'evaluate.temperature=-1', 'at least 0'),
  ('learning.learning_rate = 0.0', 'learning_rate=0', 'above 0'),
  ('learning.b2 = 1.0', 'learning.b2=1.0', '[0, 1)'),
  ('control.refill_threshold = 1.5', 'refill_threshold=1.5', 'at most 1'),
  ('evaluate.top_p = 0.0', 'evaluate.top_p=0', '(0, 1]'),
  ('task.verifier_processes = 9999', 'verifier_processes=9999', '1024'),
  ('task.verifier_seconds = 1e9', 'verifier_seconds=1000000000', '3600'),
  ('algorithm.clip_low = -0.5', 'clip_low=-0.5', 'between 0 and 1'),
  ('model.rope_factor = 0.0', 'rope_factor=0', 'above 0'),
  # Numbers that float32 has not, or not as numbers.
  ('learning.learning_rate = nan', 'learning_rate=nan', 'finite'),
  ('learning.max_grad_norm = inf', 'max_grad_norm=inf', 'finite'),
  ('learning.weight_decay = inf', 'weight_decay=inf', 'finite'),
  ('rollout.temperature = nan', 'rollout.temperature=nan', 'finite'),
  ('learning.epsilon = 1e-60', 'epsilon=1e-60', 'from 1e-30'),
  ('algorithm.kl_coefficient = nan', 'kl_coefficient=nan', 'finite'),
  ("task.rewards = {'correct': nan}", "rewards['correct']=nan", 'finite'),
  ("task.rewards = {'correct': -inf}", "rewards['correct']=-inf", 'finite'),
  ("task.mixture = {'gcd': nan}", "task.mixture['gcd']=nan", 'finite'),
  ("task.options = {'a': [{'b': nan}]}", "options['a'][0]['b']=nan"),
  # Types.
  ("num_steps = '5'", "num_steps='5'", 'give it as int'),
  ('num_steps = True', 'num_steps=True', 'give it as int'),
  ('num_steps = 2.0', 'num_steps=2.0', 'give it as int'),
  ("learning.learning_rate = '1e-3'", "'1e-3'", 'give it as float'),
  ('learning.remat = 1', 'learning.remat=1', 'give it as bool'),
  ('task = None', 'task=None', 'TaskConfig'),
  ('learning = config.model', 'learning=', 'LearningConfig'),
  ('task.options = [1]', 'task.options=[1]', 'Mapping'),
  ("task.options = {'a': {1, 2}}", "options['a']={1, 2}", 'of type set'),
  ("task.options = {'a': print}", "options['a']=<built-in", 'give it as'),
  ('task.options = {1: 2}', 'a key of task.options=1', 'give it as str'),
  ("task.rewards = {'correct': '1'}", "['correct']='1'", 'float or int'),
  ("task.rewards = {'correct': True}", "['correct']=True", 'float or int'),
  ('task.rewards = {1: 1.0}', 'a key of task.rewards=1', 'str'),
  ("task.mixture = {'gcd': '1'}", "mixture['gcd']='1'", 'float or int'),
  ("model.lora.targets = ('q_proj', 3)", 'lora.targets[1]=3', 'as str'),
  ("model.lora.targets = 'q_proj'", "lora.targets='q_proj'", 'as tuple'),
  ("control.widths = (1, '4')", "control.widths[1]='4'", 'give it as int'),
  ('control.widths = (1, 2.5)', 'control.widths[1]=2.5', 'give it as int'),
  ('control.widths = [[1], 2]', 'control.widths[0]=[1]', 'give it as int'),
  ("algorithm.clip_low = '0.2'", "clip_low='0.2'", 'float or NoneType'),
  ("task.instruction = '\\ud800'", 'task.instruction=', 'write it in UTF-8'),
  ("task.options = {'\\ud800': 1}", 'a key of task.options', 'UTF-8'),
  # Facts that span fields.
  ("rollout.drafter = 'none'; rollout.width = 4", "'none'", 'width to 1'),
  (
    "rollout.drafter = 'prompt_lookup'; control.run_ahead_rows = 4",
    'run_ahead_rows=4',
    "'tree_cache'",
    'set it to 0',
  ),
  ('drafter.depth = 3', 'drafter.depth=3', 'no effect', "'model' or 'hybrid'"),
  (
    "rollout.drafter = 'model'; drafter.warmup_updates = 5",
    'drafter.warmup_updates=5',
    'sft.steps=0',
    'give steps',
  ),
  (
    "rollout.drafter = 'model'; drafter.share = 0.0",
    'drafter.share=0',
    'drafter.every=1',
    'every to 0',
  ),
  (
    "rollout.drafter = 'model'; drafter.share = 1.5",
    'drafter.share=1.5',
    'at most 1',
  ),
  (
    "rollout.drafter = 'hybrid'; drafter.sources = ('tree_cache', 'modle')",
    'modle',
    "did you mean 'model'",
  ),
  (
    "rollout.drafter = 'model'; drafter.sources = ('model',)",
    'drafter.sources',
    "'hybrid'",
    'leave it',
  ),
  ('learning.minibatches = 3', 'prompts_per_step=4', 'minibatches=3'),
  # Durations beyond the end of the run.
  (
    'num_steps = 3; learning.warmup_steps = 4',
    'learning.warmup_steps=4',
    '3 optimizer steps',
    'num_steps=3',
    'at most 3',
  ),
  (
    'num_steps = 3; learning.minibatches = 2; learning.warmup_steps = 7',
    'learning.warmup_steps=7',
    '6 optimizer steps',
    'minibatches=2',
  ),
  (
    "num_steps = 3; algorithm.name = 'ppo'; algorithm.critic_warmup = 2; "
    'learning.warmup_steps = 2',
    'learning.warmup_steps=2',
    '1 optimizer steps',
    'critic_warmup=2',
  ),
  (
    'sft.steps = 5; sft.warmup_steps = 6',
    'sft.warmup_steps=6',
    'sft.steps=5',
    'at most 5',
  ),
  (
    "num_steps = 3; rollout.drafter = 'model'; drafter.every = 4",
    'drafter.every=4',
    'num_steps=3',
    'or 0',
  ),
  ('learning.row_length = 10', 'row_length=10', 'at least 12'),
  ('model.kv_heads = 3', 'model.heads=4', 'model.kv_heads=3'),
  ('model.width = 18', 'model.width=18', 'model.heads=4', 'head_dim'),
  ('model.head_dim = 3', 'head dimension is 3', 'even'),
  ('model.max_positions = 14', '= 15', 'max_positions=14', 'shorten'),
  ("model.lora.targets = ('q_prj',)", "'q_prj'", "did you mean 'q_proj'"),
  ('rollout.temperature = 0.0', 'temperature=0', 'evaluate.temperature'),
  ('rollout.top_p = 0.9', 'rollout.top_p=0.9', 'use evaluate.top_p'),
  ('rollout.top_k = 5', 'top_k=5', 'training needs 1, 0, 0'),
  ('rollout.min_p = 0.1', 'min_p=0.1', 'training needs 1, 0, 0'),
  ("model.rope_scaling = 'yarn'", "'yarn'", 'linear, llama3'),
  ('model.rope_factor = 8.0', 'rope_factor=8.0', 'no effect', "'none'"),
  (
    "model.rope_scaling = 'linear'; model.rope_low = 2.0",
    'rope_low=2.0',
    'no effect',
    "'linear'",
  ),
  (
    "model.rope_scaling = 'llama3'; model.rope_low = 4.0",
    'rope_low=4.0',
    'below',
    'rope_high=4.0',
  ),
  (
    "algorithm.name = 'rloo'; algorithm.clip_low = 0.1",
    'clip_low',
    'remove it',
  ),
  ("algorithm.divergence = 'k1'", 'kl_coefficient is 0', 'both'),
  ("task.system_prompt = 'Be brief.'", 'set task.chat_template=True'),
  (
    "task.chat_variables = {'enable_thinking': False}",
    'task.chat_variables',
    'set task.chat_template=True',
  ),
  ("task.name = 'gcd'; task.path = 'x.jsonl'", 'task.path', "'jsonl'"),
  (
    "task.name = 'gcd'; task.mixture = {'lcm': 1.0}",
    'task.mixture',
    "task.name='mixture'",
  ),
  # The tokenizer, the devices, the weights.
  ('mesh.data = 16', 'mesh.data=16', '8 devices', 'mesh.data=0'),
  ('rollout.slots = 12', 'rollout.slots=12', '8 ways', 'multiple'),
  ('learning.microbatch_rows = 6', 'microbatch_rows=6', '8 ways'),
  ('model.vocabulary = 3', 'model.vocabulary=3', '7 ids', 'raise it'),
  ("model.tokenizer = 'abca'", "'a' twice", "'bytes'"),
  ("model.tokenizer = 'pretrained'", 'model.pretrained', "'bytes'"),
  (
    "model.pretrained = 'no/such/folder'",
    "'no/such/folder'",
    'config.json',
    'give the folder',
  ),
  ('task.chat_template = True', 'task.chat_template=True', 'pretrained'),
  # The task.
  ("task.name = 'chain_sun'", "'chain_sun'", "did you mean 'chain_sum'"),
  ("task.name = 'composite'", "'composite' is unknown", 'module:Class'),
  ("task.name = 'no_such_module:Task'", 'no_such_module', 'PYTHONPATH'),
  ("task.name = ':'", "':'", 'module:Class'),
  ("task.name = '__main__:Task'", '__main__', 'a module of its own'),
  ("task.name = 'rlax_llm.testing:tiny_config'", 'lacks', 'problem'),
  ("task.name = 'bad_own:Lacking'", 'lacks score', 'tasks.task.Task'),
  ("task.name = 'bad_own:Bare'", 'bad_own:Bare', 'Class(config, seed)'),
  ("task.name = 'bad_own:Wide'", "'extra'", 'Class(config, seed)'),
  ("task.name = 'bad_own:Narrow'", 'problem of task.name', 'takes other arg'),
  ("task.name = 'bad_own:Text'", "'train 0'", 'make_problem'),
  ("task.name = 'bad_own:Entry'", 'is no JSON', 'use JSON types'),
  ("task.name = 'bad_own:Raising'", 'no such service'),
  ('task.epoch_prompts = 9', 'epoch_prompts=9', '2', 'lower'),
  ('evaluate.problems = 9', '2 different held_out', 'evaluate.problems'),
  ('rollout.prompt_length = 1', '2 tokens', 'prompt_length=1: raise it'),
  ("task.name = 'gcd'", 'is not in the alphabet', "'bytes'"),
  (
    "task.name = 'gcd'; task.options = {'max_number': 3}",
    'max_number',
    "did you mean 'max_numbers'",
  ),
  ("task.name = 'gcd'; task.options = {'seed': 3}", "'seed'", 'no option'),
  ("task.name = 'gcd'; task.options = {'min_numbers': 0}", 'do not fit'),
  ("task.name = 'gcd'; task.options = {'min_numbers': 'a'}", 'do not fit'),
  ("task.name = 'maze'; task.prompt_format = 'short'", "use 'question'"),
  ("task.name = 'gcd'; task.trace_unfinished = 0.5", 'chain_sum', 'to 0'),
  ("task.name = 'mixture'", 'task.mixture is empty', '{task name: weight}'),
  ("task.name = 'mixture'; task.mixture = {'gcd': 0}", "['gcd']=0", 'positive'),
  (
    "task.name = 'mixture'; task.mixture = {'mixture': 1}",
    'holds a mixture',
    'list its tasks',
  ),
  ("task.name = 'mixture'; task.mixture = {'gdc': 1}", "did you mean 'gcd'"),
  (
    "task.name = 'mixture'; task.mixture = {'gcd': 1}; "
    "task.options = {'lcm': {}}",
    "'lcm'",
    'not in task.mixture',
  ),
  ("task.name = 'jsonl'", 'task.path is empty', 'set it'),
  (
    "task.name = 'jsonl'; task.path = '/nowhere/x'",
    "'/nowhere/x'",
    'set task.path',
  ),
  # The rewards.
  ('task.rewards = {}', 'task.rewards is empty', "{'correct': 1.0}"),
  ("task.rewards = {'corect': 1.0}", "'corect'", "did you mean 'correct'"),
  ("task.rewards = {'format': 1.0}", "'all'", 'tag, boxed, hashes'),
  ("task.rewards = {'length': 1.0}", 'length_limit=0', 'set both'),
  (
    "task.rewards = {'length': 1.0}; task.length_limit = 5; "
    'task.length_cache = 6',
    'length_cache=6',
    'length_limit=5',
  ),
  ('task.length_limit = 5', "for the reward 'length'", 'set both to 0'),
  (
    "task.rewards = {'bad_own:absent': 1.0}",
    'cannot be imported',
    'module:function',
  ),
  ("task.rewards = {'no_such_module:f': 1.0}", 'PYTHONPATH'),
  ("task.rewards = {'__main__:f': 1.0}", 'move it to a module of its own'),
  ("task.rewards = {'bad_own:narrow': 1.0}", 'narrow', 'tokens, finished)'),
  ("task.rewards = {'bad_own:number': 1.0}", 'number', 'does not take'),
]

OWN = """
from rlax_llm.tasks import task

def narrow(problem, completion):
  return 0.0

number = 3

class Lacking:
  problem = num_problems = lambda self, *args: None

class _Whole(Lacking):
  score = lambda self, entry, completion: 0.0

class Bare(_Whole):
  pass

class Wide(_Whole):
  def __init__(self, config, seed, extra):
    pass

class Narrow(_Whole):
  def __init__(self, config, seed):
    pass
  def problem(self, index):
    pass

class Text(_Whole):
  def __init__(self, config, seed):
    pass
  def problem(self, split, index):
    return f'{split} {index}'
  def num_problems(self, split):
    return 4

class Entry(Text):
  def problem(self, split, index):
    return task.make_problem('own', 'a', 'a', None, {'a': {1, 2}})

class Raising(_Whole):
  def __init__(self, config, seed):
    raise ValueError('no such\\nservice')
"""

# Arguments besides --config and --workdir.
FLAGS = [
  (['--config.learnig.learning_rat=1'], "did you mean 'learning.learning_ra"),
  (['--config.learning_rate=1'], "'learning_rate'; did you mean", 'sft.'),
  (['--config.remat=1'], "did you mean 'learning.remat'"),
  (['--config.task.options.a=3'], "did you mean 'task.options'"),
  (['--config.learning=3'], 'is a section; override one of its fields'),
  (['--config.num_steps=1.5'], 'num_steps=1.5', 'int; its default is 100'),
  (['--config.num_steps=many'], 'num_steps=many', 'not of type int'),
  (['--config.mesh.data=x'], 'not of type int; its default is 0'),
  (['--config.deterministic=maybe'], 'maybe', 'not of type bool'),
  (['--config.learning.learning_rate=fast'], 'fast', 'not of type float'),
  (['--config.learning.learning_rate=nan'], 'learning_rate=nan', 'finite'),
  (['--config.algorithm.clip_low=x'], 'not of type float | None'),
  (['--config.task.options={a}'], '{a}', 'not of type JSON object'),
  (['--config.task.options=' + '[' * 10**5], 'not of type JSON object'),
  (['--config.task.options={"a":' + '[' * 40 + ']' * 40 + '}'], 'brackets'),
  (['--config.task.rewards={"correct": "1"}'], "['correct']='1'", 'float'),
  (['--config.task.rewards={"correct": NaN}'], "['correct']=nan", 'finite'),
  (["--config.control.widths=(1,'4')"], "control.widths[1]='4'", 'int'),
  (['--config.seed=' + '9' * 5000], 'not of type int'),
  (['--config.seed'], 'Missing value for flag --config.seed'),
  (['--config.task.instruction=\udcff'], 'task.instruction=', 'UTF-8'),
  (['--config.rollout.drafter=tree'], "'tree'", 'prompt_lookup'),
  (['--profile_steps=3'], 'profile_steps', '3'),
  (['--profile_steps=5:2'], 'profile_steps', '5:2'),
  (['--wrkdir=x'], 'Did you mean: workdir'),
  (['x'], "unexpected argument 'x'", '--name=value'),
]

# Texts of config files.
FILES = [
  ('x = (', "SyntaxError: '(' was never closed (line 1)"),
  ('\nimport no_such_module', "No module named 'no_such_module' (line 2)"),
  ('x = 1', 'has no get_config()', 'define get_config()'),
  ('def get_config():\n  return {}', 'returned dict, not'),
  ('def get_config():\n  raise TypeError("a\\nb")', 'TypeError: a b (line 2)'),
  ('import sys\nsys.exit(7)', 'SystemExit: 7 (line 2)'),
  ('x = ' + '(' * 10**4, 'fails', 'line 1'),
  ('def get_config():\n  return get_config()', 'RecursionError', 'line 2'),
  ('x = "\xff"'.encode('latin-1'), 'fails', 'SyntaxError'),
  ('x = \0', 'fails', 'null bytes'),
  (
    'from rlax_llm.config import Config\ndef get_config():\n  c = Config()\n'
    '  c.learning.learning_rte = 1\n  return c',
    "'learning.learning_rate'",
  ),
  (
    'from rlax_llm import testing\nfrom rlax_llm.config import validation\n'
    'def get_config():\n'
    '  return validation.validate(testing.tiny_config())',
    'frozen',
  ),
]


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  """Holds a good config, and modules of the user's."""
  folder = tmp_path_factory.mktemp('bad_input')
  (folder / 'bad_own.py').write_text(OWN)
  _write_config(folder / 'good.py')
  (folder / 'default.py').write_text(
    'from rlax_llm.config import Config\nget_config = Config'
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(folder))
    yield folder


def _write_config(path, *statements):
  path.write_text(
    '\n  '.join(
      [
        'from math import inf, nan\nfrom rlax_llm import testing\n'
        'def get_config():',
        'config = testing.tiny_config()',
        *(f'config.{s}' for s in statements),
        'return config',
      ]
    )
  )
  return f'--config={path}'


@pytest.fixture(name='refusal')
def _refusal(monkeypatch, capsys):
  """Runs a command line that must be refused; returns the line."""

  def refusal(module, *arguments):
    app.define_help_flags()
    known = set(absl_flags.FLAGS)
    monkeypatch.setattr(sys, 'argv', [module, *arguments])
    capsys.readouterr()
    try:
      with pytest.raises(SystemExit) as ended:
        runpy.run_path(
          str(ROOT / 'rlax_llm' / f'{module}.py'), run_name='__main__'
        )
    finally:
      for name in set(absl_flags.FLAGS) - known:
        delattr(absl_flags.FLAGS, name)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, ''), err
    assert err.startswith('error: ') and err.endswith('\n')
    assert err.count('\n') == 1 and len(err) < 1000, err
    return err

  return refusal


def _check(message, words):
  for word in words:
    assert word in message, message


@pytest.mark.parametrize(
  'text, words',
  [(t, w) for t, *w in CONFIGS],
  ids=[row[0][:50] for row in CONFIGS],
)
def test_configs(folder, tmp_path, refusal, text, words):
  """Law: exit code 2 and one line that names the value and the remedy;
  nothing is compiled and no folder made.

  Mutants: elements of dicts and tuples unchecked; NaN let through; a task's
  constructor not looked at.
  """
  config = _write_config(tmp_path / 'config.py', *text.split('; '))
  workdir = tmp_path / 'run'
  before = executables.compile_totals()
  _check(refusal('train', config, f'--workdir={workdir}'), words)
  assert executables.compile_totals() == before
  assert not workdir.exists()


@pytest.mark.parametrize(
  'arguments, words',
  [(a, w) for a, *w in FLAGS],
  ids=[row[0][0][:50] for row in FLAGS],
)
def test_flags(folder, tmp_path, refusal, arguments, words):
  """Law: as above, for what stands on the command line.

  Mutant: RecursionError of the JSON reader passed on.
  """
  workdir = tmp_path / 'run'
  message = refusal(
    'train',
    f'--config={folder / "good.py"}',
    f'--workdir={workdir}',
    *arguments,
  )
  _check(message, words)
  assert not workdir.exists()


@pytest.mark.parametrize(
  'text, words',
  [(t, w) for t, *w in FILES],
  ids=[str(row[0])[:30] for row in FILES],
)
def test_config_files(tmp_path, refusal, text, words):
  """Law: as above, for files that are no config; the file is named.

  Mutants: dataclasses accept any attribute silently; sys.exit in the file
  ends the run with its own code.
  """
  path = tmp_path / 'bad.py'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  message = refusal('train', f'--config={path}', f'--workdir={tmp_path}/run')
  _check(message, [*words, repr(str(path))])


HOSTILE = (
  10**5000,
  10**30,
  -1,
  math.nan,
  math.inf,
  -math.inf,
  1e308,
  1e-320,
  '',
  'x',
  '\ud800',
  'x\ny',
  '\0',
  None,
  [],
  {},
  True,
  (1,),
  ['x'],
  {'a': 1},
  {'a': '1'},
  {'a': math.nan},
  {1: 1},
  ['q_proj', 3],
  [2**70],
  object(),
  np.float32(1),
  np.arange(3),
  Config(),
  {'a': [[[[{}]]]] * 9},
)


def test_any_value_of_any_field_is_taken_or_refused_in_one_line():
  """Law: no value of a config file ends in anything but a run or one line.

  Mutants: elements of dicts and tuples unchecked; numbers that Python cannot
  write in decimals; NaN let through to comparisons.
  """
  refused = 0
  for path, default in flags.field_paths(Config()).items():
    for value in HOSTILE:
      config = testing.tiny_config()
      *sections, name = path.split('.')
      setattr(functools.reduce(getattr, sections, config), name, value)
      try:
        make_run(config)
      except ConfigError as error:
        assert '\n' not in str(error), error
        assert len(str(error)) < 1000, error
        refused += 1
        continue
      if isinstance(default, float):
        assert abs(value) <= 1e30, path
  assert refused > 2000


# ---- Folders ---------------------------------------------------------------


def _manifest(folder, text=None, prompt_length=4, **changes):
  """Writes the manifest of a run of good.py, or a text in its place."""
  config = testing.tiny_config()
  config.rollout.prompt_length = prompt_length
  manifest.write_manifest(folder, to_dict(config), run_id='a')
  path = folder / manifest.MANIFEST_FILE
  items = json.loads(path.read_text())
  for name, value in changes.items():
    items[name] = {**items[name], **value} if name == 'config' else value
  path.write_text(json.dumps(items) if text is None else text)


def _checkpoints(folder, damage=lambda path: None, prompt_length=4):
  """Writes a run whose checkpoints hold something else than its model."""
  _manifest(folder, prompt_length=prompt_length)
  with checkpoint.Checkpoints(folder) as saved:
    saved.save(1, {'policy': {'w': np.zeros(3)}}, {})
  for path in (folder / 'checkpoints' / '1').rglob('*'):
    if path.is_file():
      damage(path)


def _nothing(folder):
  del folder


def _lines(folder, line):
  good = b'{"question": "a", "answer": "a"}'
  (folder / 'data.jsonl').write_bytes(good + b'\n' + line + b'\n')


def _occupied(folder):
  _manifest(folder)
  (folder / 'out').mkdir()
  (folder / 'out' / 'mine').write_text('')


def _chat(folder):
  config = published.CONFIG_JSON['Qwen2.5-0.5B-Instruct']
  tokenizer_helpers.write(folder, 'qwen', files={'config.json': config})


GOOD = '--config=GOOD'
JSONL = [
  GOOD,
  '--config.task.name=jsonl',
  '--config.task.match=exact',
  '--config.task.path=WORKDIR/data.jsonl',
]
CHAT = [
  '--config=DEFAULT',
  '--config.model.pretrained=WORKDIR',
  '--config.task.chat_template',
  '--config.task.chat_variables',
]
# Entrypoint, what makes the folder, further arguments, what the message names.
# GOOD, DEFAULT and WORKDIR stand for paths.
FOLDERS = [
  (
    'train',
    lambda f: _manifest(f, '{"config": {'),
    [GOOD],
    'is not a manifest',
    'another --workdir',
  ),
  ('train', lambda f: _manifest(f, '[' * 10**5), [GOOD], 'RecursionError'),
  ('train', lambda f: _manifest(f, '[]'), [GOOD], 'is not a manifest'),
  (
    'train',
    lambda f: _manifest(
      f, '\ud800'.encode('utf-8', 'surrogatepass').decode('latin-1')
    ),
    [GOOD],
    'not a manifest',
  ),
  ('train', lambda f: _manifest(f, runs='ab'), [GOOD], 'it lists no run'),
  (
    'train',
    lambda f: _manifest(f, '{"config": "ab", "runs": [{}]}'),
    [GOOD],
    'it holds no config',
  ),
  (
    'train',
    lambda f: (f / 'manifest.json').mkdir(),
    [GOOD],
    'is not a manifest',
    'IsADirectoryError',
  ),
  (
    'train',
    lambda f: (f / 'manifest.json.tmp').mkdir(),
    [GOOD],
    "--workdir='WORKDIR'",
    'cannot be written (Is a directory)',
  ),
  (
    'train',
    _manifest,
    [GOOD, '--config.seed=3'],
    'seed (0 there, 3 now)',
    'another --workdir',
  ),
  ('train', _checkpoints, [GOOD], 'of another model', 'absent there'),
  (
    'train',
    lambda f: _checkpoints(f, lambda p: p.write_bytes(b'')),
    [GOOD],
    'checkpoints/1 is unreadable',
    'another --workdir',
  ),
  (
    'train',
    lambda f: _checkpoints(f, lambda p: p.write_bytes(b'[' * 10**5)),
    [GOOD],
    'checkpoints/1 is unreadable',
    'another --workdir',
  ),
  (
    'train',
    lambda f: _lines(f, b'{"question": "b"}'),
    JSONL,
    'data.jsonl, line 2',
    "'answer'",
  ),
  ('train', lambda f: _lines(f, b'\xff'), JSONL, 'line 2', 'UTF-8'),
  ('train', lambda f: _lines(f, b'[' * 10**5), JSONL, 'nested too deeply'),
  (
    'train',
    _chat,
    [*CHAT, '{"enable_thinkng": false}'],
    "'enable_thinkng'",
    "did you mean 'enable_thinking'",
  ),
  (
    'train',
    _chat,
    [*CHAT, '{"messages": []}'],
    "'messages'",
    'those are enable_thinking',
  ),
  ('evaluate', _manifest, [GOOD], 'holds no checkpoint', 'rlax_llm.train'),
  ('evaluate', _checkpoints, [GOOD], 'of another model', 'absent there'),
  # Prompts are looked at before a checkpoint is.
  (
    'evaluate',
    lambda f: _checkpoints(f, prompt_length=1),
    [GOOD, '--config.rollout.prompt_length=1'],
    'has 2 tokens',
    'raise it',
  ),
  ('sample', _nothing, ['--prompt=a'], 'holds no run', 'rlax_llm.train'),
  ('sample', _checkpoints, [], '--prompt is missing'),
  (
    'sample',
    _checkpoints,
    ['--prompt=a', '--temperature=-1'],
    '--temperature=-1',
    'at least 0',
  ),
  ('sample', _checkpoints, ['--prompt=a', '--temperature=nan'], 'nan'),
  (
    'sample',
    _checkpoints,
    ['--prompt=a', '--top_p=2'],
    '--top_p=2.0',
    '(0, 1]',
  ),
  (
    'sample',
    _checkpoints,
    ['--prompt=a', '--samples=0'],
    'samples=0',
    'at least 1',
  ),
  (
    'sample',
    _checkpoints,
    ['--prompt=a', '--max_new_tokens=0'],
    'max_new_tokens=0',
    'at least 1',
  ),
  (
    'sample',
    _checkpoints,
    ['--prompt=a', '--max_new_tokens=999999'],
    '999999',
    'max_positions=256',
    'shorten',
  ),
  ('sample', _checkpoints, ['--prompt=abcdabcd'], 'has 9 tokens', 'shorten'),
  ('sample', _checkpoints, ['--prompt=xyz'], "'x'", 'alphabet'),
  ('sample', _checkpoints, ['--prompt=a'], 'of another model'),
  (
    'sample',
    lambda f: _manifest(f, config={'momentum': 1}),
    ['--prompt=a'],
    'momentum',
    'another version',
  ),
  (
    'sample',
    lambda f: _manifest(f, config={'__class__': 1}),
    ['--prompt=a'],
    '__class__',
    'another version',
  ),
  (
    'sample',
    lambda f: _manifest(f, config={'task': 7}),
    ['--prompt=a'],
    "'7'",
    'damaged',
  ),
  ('export', _nothing, ['--out=WORKDIR/out'], 'holds no run'),
  ('export', _occupied, ['--out=WORKDIR/out'], 'not an empty folder'),
  (
    'export',
    _manifest,
    ['--out=WORKDIR/out', '--adapter'],
    'model.lora.rank=0',
    'leave it out',
  ),
  (
    'export',
    _checkpoints,
    ['--out=WORKDIR/out', '--step=7'],
    'no checkpoint of step 7',
    'it has 1',
  ),
  ('report', _nothing, [], "'WORKDIR'", 'give the --workdir'),
]


@pytest.mark.parametrize(
  'module, make, arguments, words',
  [(m, f, a, w) for m, f, a, *w in FOLDERS],
  ids=[f'{row[0]}-{row[3][:40]}' for row in FOLDERS],
)
def test_folders(folder, tmp_path, refusal, module, make, arguments, words):
  """Law: as above, for what lies on the disk; what is there stays as it is.

  Mutants: variables of the template unchecked; evaluate and sample look at
  their prompts after the checkpoint; `hasattr` in place of the config's fields.
  """
  workdir = tmp_path / 'run'
  workdir.mkdir()
  make(workdir)

  def content():
    return {
      path: path.read_bytes()
      for path in workdir.rglob('*')
      if path.is_file() and path.name != lock.FILE
    }

  def filled(text):
    for name, path in (
      ('GOOD', folder / 'good.py'),
      ('DEFAULT', folder / 'default.py'),
      ('WORKDIR', workdir),
    ):
      text = text.replace(name, str(path))
    return text

  before = content()
  message = refusal(module, *map(filled, arguments), f'--workdir={workdir}')
  _check(message, map(filled, words))
  assert content() == before
