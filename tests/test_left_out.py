"""Problems that cannot be used are left out, counted and named."""

import dataclasses
import io
import json

from config_helpers import tiny_config
from config_helpers import train_quietly
import pytest

from rlax_llm import components
from rlax_llm.config import ConfigError
from rlax_llm.experience import sampler
from rlax_llm.workdir.checkpoint import Checkpoints
from rlax_llm.workdir.progress import Progress


def _train(folder, **changes):
  shown = io.StringIO()
  summary = train_quietly(
    tiny_config(**changes), folder, display=Progress(shown)
  )
  return summary, shown.getvalue()


def _left_out(folder):
  return [
    json.loads(line)['rollout/left_out_prompts']
    for line in (folder / 'metrics.jsonl').read_text().splitlines()
  ]


def test_prompts_that_do_not_fit_are_left_out(tmp_path):
  """Law: the next problem of the stream takes the place of one that is too
  long or not encodable; a run in two parts equals the whole one.

  Mutants: the cursor moved by the number of requests; the run ended at the
  first such prompt; left-out prompts not counted.
  """
  changes = dict(task__name='long_prompts:SomeLong', num_steps=3)
  whole, shown = _train(tmp_path / 'whole', **changes)
  # The second step takes 4, 5, 8, 10 and the third 11, 13, 16, 17.
  assert _left_out(tmp_path / 'whole') == [0, 3, 3]
  assert "warning: 3 prompts are left out; for example, the prompt 'aaaaaaaaa' "
  assert 'has 10 tokens; rollout.prompt_length=4: raise it' in shown
  _train(tmp_path / 'parts', **(changes | {'num_steps': 2}))
  parts, _ = _train(tmp_path / 'parts', **changes)
  assert parts['tokens_sha256'] == whole['tokens_sha256']
  assert parts['parameters_sha256'] == whole['parameters_sha256']
  assert _left_out(tmp_path / 'parts') == [0, 3, 3]


def test_a_prompt_of_the_first_step_is_left_out_too(tmp_path):
  """Law: which step a generated prompt falls in makes no difference.

  Mutant: the first step's prompts refused.
  """
  _, shown = _train(
    tmp_path, task__name='long_prompts:LongFromTheStart', num_steps=1
  )
  assert _left_out(tmp_path) == [1]
  assert 'warning: 1 prompts are left out' in shown


def test_only_what_a_prompt_is_leaves_it_out():
  """Law: a template that cannot be rendered is an error, not a reason to leave
  a prompt out: whether its process is alive must not decide what is learned.

  Mutant: every ConfigError of the tokenizer leaves a prompt out.
  """

  class Broken:
    def encode_prompt(self, text):
      raise (ConfigError if text == 'a' else ValueError)(f'no {text}')

  made = dataclasses.replace(
    components.make_run(tiny_config()), tokenizer=Broken()
  )
  problem = lambda text: made.task.problem('train', 'ab'.index(text))
  assert made.prompt_tokens(problem('b'))[1] == 'no b'
  with pytest.raises(ConfigError, match='no a'):
    made.prompt_tokens(problem('a'))


def test_a_task_that_runs_out_of_prompts_loses_nothing(tmp_path, monkeypatch):
  """Law: where no prompt fits any more, the run ends with one error, its state
  saved.

  Mutants: an endless search; a step's ConfigError that saves nothing.
  """
  monkeypatch.setattr(sampler, 'MAX_LEFT_OUT', 20)
  with pytest.raises(ConfigError, match='20 prompts in a row cannot be used: '):
    _train(tmp_path, task__name='long_prompts:AllLong', checkpoint__every=0)
  with Checkpoints(tmp_path) as saved:
    assert saved.steps()[-1] == 1


def test_demonstrations_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
  """Law: the warm start takes the next demonstration; where none fits, the run
  is refused before any work.

  Mutants: the warm start ended by the first one; left out without a word.
  """
  changes = dict(
    sft__steps=2, sft__warmup_steps=1, sft__sequences_per_step=4, num_steps=0
  )
  _, shown = _train(
    tmp_path / 'some', task__name='long_prompts:SomeLongTraces', **changes
  )
  assert 'demonstrations are left out; for example, a prompt of 2' in shown
  monkeypatch.setattr(components, 'MAX_LEFT_OUT', 20)
  with pytest.raises(ConfigError, match='20 demonstrations in a row do not'):
    _train(tmp_path / 'all', task__name='long_prompts:AllLongTraces', **changes)
  assert not (tmp_path / 'all').exists()
