"""sample.py: tokens, flags, colours, and its one-line errors."""

import io
import json
import re
import shutil
import types

from config_helpers import train_quietly
import numpy as np
import pytest

from rlax_llm import sample
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.ops.sampling import Sampling
from rlax_llm.tokenizers import tokenizer as tokenizers


@pytest.fixture(name='workdir', scope='module')
def _workdir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('sample'))
  config = testing.tiny_config()
  config.num_steps = 1
  train_quietly(config, folder)
  return folder


@pytest.fixture(name='trained', scope='module')
def _trained(workdir):
  run = make_run(sample.load_config(workdir))
  return run, run.states.restore_params(workdir)[1]


def _main(monkeypatch, capsys, workdir, **flags):
  values = (
    dict(
      prompt=['a'],
      samples=1,
      temperature=None,
      top_p=1.0,
      max_new_tokens=None,
      json=False,
      base=None,
    )
    | flags
  )
  for name, value in (values | {'workdir': workdir}).items():
    monkeypatch.setattr(
      sample,
      f'_{name.upper()}',
      types.SimpleNamespace(value=value),
      raising=False,
    )
  sample.main([])
  return capsys.readouterr().out


def test_json_lines(monkeypatch, capsys, workdir):
  """Law: one object per completion, in order of prompts, fields consistent.

  The run was made on 8 devices and is sampled on one. Mutant: `drafted`
  cut to the tokens that show.
  """
  out = _main(
    monkeypatch, capsys, workdir, prompt=['a', 'bb'], samples=3, json=True
  )
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row['prompt'] for row in rows] == ['a'] * 3 + ['bb'] * 3
  for row in rows:
    assert set(row) == {
      'prompt',
      'completion',
      'finished',
      'logprob',
      'drafted',
      'accept_length',
    }
    # A sampled BOS is a token without text.
    assert len(row['completion']) + row['finished'] <= len(row['drafted']) <= 8
    assert row['logprob'] < 0
    assert 1 <= row['accept_length'] <= 3
  assert len({row['completion'] for row in rows}) > 1
  again = _main(
    monkeypatch, capsys, workdir, prompt=['a', 'bb'], samples=3, json=True
  )
  assert again == out


def test_greedy_and_lengths(monkeypatch, capsys, workdir):
  """Law: temperature 0 gives every sample the same completion; T is obeyed.

  Mutants: `--temperature=0` read as absent; the run's T kept.
  """
  out = _main(
    monkeypatch,
    capsys,
    workdir,
    samples=4,
    temperature=0.0,
    max_new_tokens=12,
    json=True,
  )
  rows = [json.loads(line) for line in out.splitlines()]
  assert len({row['completion'] for row in rows}) == 1
  assert all(row['logprob'] == 0 for row in rows)
  out = _main(
    monkeypatch, capsys, workdir, samples=4, max_new_tokens=2, json=True
  )
  assert all(len(json.loads(x)['drafted']) <= 2 for x in out.splitlines())


def test_text_is_plain_without_a_terminal(monkeypatch, capsys, workdir):
  """Law: no escape codes, and the prompt stands before its completion.

  Mutant: a console that forces colour.
  """
  out = _main(monkeypatch, capsys, workdir, prompt=['abc'], samples=2)
  assert '\x1b' not in out
  lines = out.splitlines()
  assert len(lines) == 3 and all(x.startswith('abc') for x in lines[:2])
  assert re.fullmatch(r'\d+ tokens, \d+% from accepted drafts', lines[2])


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_text_is_coloured_on_a_terminal(monkeypatch):
  """Law: exactly the accepted drafts are coloured, and a legend says so.

  Brackets of a completion are text, not markup. Mutant: the flag negated.
  """
  monkeypatch.setenv('TERM', 'xterm-256color')
  monkeypatch.delenv('NO_COLOR', raising=False)
  stream = _Terminal()
  sample.write_text(
    [
      sample.Completion(
        'p',
        'x[b]y',
        False,
        -1.0,
        [False, True, False],
        1.5,
        [('x', False), ('[b]', True), ('y', False)],
      )
    ],
    stream,
  )
  out = stream.getvalue()
  assert 'accepted drafts' in out.splitlines()[0]
  assert re.search(r'x\x1b\[1;32m\[b\]\x1b\[0my', out), repr(out)
  assert 'truncated' in out and '3 tokens, 33%' in out


def test_pieces_join_to_the_text():
  """Law: pieces are cut where the flag changes, never inside a character.

  The byte tokenizer spells é with two tokens. Mutant: each run of tokens
  decoded by itself, which shows U+FFFD twice.
  """
  tokenizer = tokenizers.Tokenizer()
  tokens = tokenizer.encode('aéb') + [tokenizers.EOS]
  pieces = sample.split_pieces(
    tokenizer, tokens, [False, False, True, True, False]
  )
  assert pieces == [('aé', False), ('b', True)]
  assert sample.split_pieces(tokenizer, [], []) == []
  rng = np.random.default_rng(0)
  for _ in range(200):
    tokens = rng.integers(0, 258, 12).tolist()
    flags = (rng.random(12) < 0.5).tolist()
    pieces = sample.split_pieces(tokenizer, tokens, flags)
    assert ''.join(text for text, _ in pieces) == tokenizer.decode(tokens)


def test_drafting_changes_no_token(trained):
  """Law: `sample_texts` is the engine: a call alone equals a call in company.

  Mutant: the request's index not taken from its place.
  """
  run, params = trained
  both = sample.sample_texts(run, params, ['a', 'b'], samples=2)
  alone = sample.sample_texts(run, params, ['a'], samples=2)
  assert [c.completion for c in alone] == [c.completion for c in both[:2]]
  greedy = sample.sample_texts(
    run, params, ['a', 'a'], sampling=Sampling(temperature=0)
  )
  assert greedy[0].completion == greedy[1].completion


def test_the_instruction_is_added(monkeypatch, capsys, workdir):
  """Law: a prompt is put as the task puts its own, the instruction below it.

  The tokenizer of this run has no line break. Mutant: the text as it is.
  """
  config = sample.load_config(workdir)
  config.task.instruction = 'b'
  monkeypatch.setattr(sample, 'load_config', lambda *_: config)
  with pytest.raises(ConfigError, match=r"'\\n' is not in the alphabet"):
    _main(monkeypatch, capsys, workdir)


def test_errors(monkeypatch, capsys, workdir, trained, tmp_path):
  """Law: each mistake is one ConfigError that names it and the way out.

  Mutant: a missing folder that ends in FileNotFoundError.
  """
  empty = tmp_path / 'empty'
  with pytest.raises(ConfigError, match='holds no run .*rlax_llm.train'):
    _main(monkeypatch, capsys, str(empty))
  assert not empty.exists()
  empty.mkdir()
  shutil.copy(f'{workdir}/manifest.json', empty)
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    _main(monkeypatch, capsys, str(empty))
  for flags, words in [
    (dict(prompt=['abcd']), "'abcd' has 5 tokens.*prompt_length=4.*shorten"),
    (dict(prompt=['ax']), "'x' is not in the alphabet"),
    (dict(prompt=[]), '--prompt is missing'),
    (dict(samples=0), 'samples=0 must be at least 1'),
    (dict(temperature=-1.0), 'temperature=-1.0'),
    (dict(top_p=0.0), r'top_p=0.0 must be in \(0, 1\]'),
    (dict(max_new_tokens=0), 'max_new_tokens=0 must be at least 1'),
    (dict(max_new_tokens=999), 'exceed model.max_positions=256'),
  ]:
    with pytest.raises(ConfigError, match=words) as caught:
      _main(monkeypatch, capsys, workdir, **flags)
    assert '\n' not in str(caught.value)
  with pytest.raises(ConfigError, match='there is no prompt'):
    sample.sample_texts(*trained, [])
