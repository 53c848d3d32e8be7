"""Training of the drafter beside RL: it learns, and changes nothing else."""

import dataclasses
import functools
import itertools
import json
import random

from config_helpers import tiny_config
import file_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
import test_train as runs

from rlax_llm import export
from rlax_llm.components import make_run
from rlax_llm.config import ConfigError
from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting.strategy.base import Choice
from rlax_llm.drafting.strategy.cost_model import CostModel
from rlax_llm.learning import auxiliary
from rlax_llm.learning import drafter_training
from rlax_llm.learning.batch import Sample
from rlax_llm.types import DraftParams

LONG = runs.LONG | dict(num_steps=40)


@pytest.fixture(name='plain', scope='module')
def _plain(tmp_path_factory):
  """40 steps without speculation."""
  folder = tmp_path_factory.mktemp('plain')
  return folder, *runs._train(
    folder, rollout__width=1, rollout__drafter='none', **LONG
  )


CHAIN = dict(rollout__drafter='model', rollout__width=4)
TREE = CHAIN | dict(rollout__width=6, rollout__branching=3, drafter__depth=3)
RANDOM = CHAIN | dict(rollout__width=0, control__widths=(1, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize('changes', [CHAIN, RANDOM], ids=['chain', 'random'])
def test_the_drafter_changes_nothing(plain, tmp_path, monkeypatch, changes):
  """Law: 40 steps, drafted by a network that is trained meanwhile, and in one
  case with a random clock, width and segment length at every boundary: tokens,
  parameters and metrics are bit-equal to plain sampling.
  """
  clock = None
  if changes['rollout__width'] == 0:
    rng = random.Random(0)
    arms = [PLAIN, *(Arm(w, 1, ('model',)) for w in (3, 4))]
    monkeypatch.setattr(
      CostModel,
      'choose',
      lambda self, occupancy, forwards: Choice(
        rng.choice(arms), rng.randint(1, 5), True
      ),
    )
    # It goes forward, or what is left for training is a matter of chance.
    ticks = itertools.accumulate(iter(rng.random, None))
    clock = lambda: next(ticks)
  summary, _ = runs._train(
    tmp_path, clock=clock, drafter__share=0.5, **(LONG | changes)
  )
  runs._assert_same_run(tmp_path, summary, plain)
  rows = [r for r in runs._rows(tmp_path, 'timing.jsonl') if 'time/step' in r]
  assert sum(r['drafter/updates'] for r in rows) > 20
  accept = [r['rollout/accept_length'] for r in rows]
  # It learns, from nothing but its own rollouts.
  assert np.mean(accept[-10:]) > np.mean(accept[:3]) + 0.2


@pytest.mark.slow
def test_the_hybrid_changes_nothing(plain, tmp_path):
  """Law: so do drafts from the network and from past rollouts, merged."""
  summary, _ = runs._train(
    tmp_path, **(LONG | TREE | dict(rollout__drafter='hybrid'))
  )
  runs._assert_same_run(tmp_path, summary, plain)
  rows = [r for r in runs._rows(tmp_path, 'timing.jsonl') if 'time/step' in r]
  assert max(r['rollout/accept_length'] for r in rows[1:]) > 1.5
  assert rows[-1]['rollout/cached_prompts'] == 2


@pytest.mark.slow
def test_a_continued_run_goes_on_with_its_drafter(tmp_path):
  """Law: the drafter and its optimizer are in the checkpoint; a run that takes
  up drafting begins with a fresh one; one that leaves it has the same tokens.
  """
  settings = CHAIN | dict(drafter__share=0.9, drafter__every=1)
  folder = tmp_path / 'run'
  runs._train(folder, num_steps=2, **settings)
  run = make_run(tiny_config(**settings))
  _, before = file_helpers.read_states(run.states, str(folder))
  taken = int(before['drafter'].step)
  assert taken > 0
  # Frozen, it stays as it was.
  frozen = settings | dict(drafter__every=0, drafter__share=0.05)
  first, _ = runs._train(folder, num_steps=3, **frozen)
  step, after = file_helpers.read_states(run.states, str(folder))
  assert step == 3
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(before['drafter']),
    jax.device_get(after['drafter']),
  )
  out = tmp_path / 'exported'
  assert export.export(str(folder), str(out), drafter=True) == 3
  tensors = load_file(out / 'model.safetensors')
  params = jax.device_get(after['drafter'].params)
  np.testing.assert_array_equal(
    tensors['fc.weight'], params['join']['kernel'].T
  )
  joint = params['layer']['query_key_value']['kernel']
  np.testing.assert_array_equal(
    tensors['layers.0.self_attn.k_proj.weight'],
    joint[:, :, -2].reshape(16, -1).T,
  )
  size = sum(x.size for x in jax.tree.leaves(params))
  assert sum(x.size for x in tensors.values()) == size
  assert json.loads((out / 'config.json').read_text())['num_hidden_layers'] == 1
  # Without, and with again.
  plain, other = dict(rollout__width=1, rollout__drafter='none'), tmp_path / 'b'
  runs._train(other, num_steps=2, **plain)
  with pytest.raises(ConfigError, match='this run has none'):
    export.export(str(other), str(tmp_path / 'none'), drafter=True)
  second, _ = runs._train(other, num_steps=3, **settings)
  for name in runs.VALUES:
    assert first[name] == second[name], name


# --- What is learned.


@functools.cache
def _run():
  config = tiny_config(**CHAIN)
  return make_run(config)


def _window(run, samples):
  batch = run.drafter_training()._pack(samples)
  return auxiliary.DraftWindow(
    *(
      jnp.asarray(getattr(batch, name)[0])
      for name in ('tokens', 'positions', 'segments', 'targets')
    )
  )


def _samples(seed, count=6):
  rng = np.random.default_rng(seed)
  return [
    Sample(
      rng.integers(0, 5, 3).astype(np.int32),
      rng.integers(0, 5, rng.integers(1, 8)).astype(np.int32),
    )
    for _ in range(count)
  ]


@pytest.mark.slow
def test_the_loss_is_its_definition():
  """By definition, position by position, in NumPy: 0.5 SmoothL1 + 0.5 CE on
  the positions before the tokens of responses; one pass.

  Mutants: the position of the token itself counts; the prompt counts; features
  cross into the next segment; the weights are 0.9 and 0.1.
  """
  run = _run()
  learning = dataclasses.replace(run.states.draft_learning, passes=1, chunk=5)
  params = run.states.init_params()
  own = run.states.init_drafter().params
  samples = _samples(0)
  window = _window(run, samples)
  hidden = run.model.hidden(
    params, window.tokens, window.positions, window.segments
  )
  got = auxiliary.drafter_loss(own, params, hidden, window, learning)
  values = []
  for sample in samples:
    tokens = np.r_[sample.prompt, sample.completion][None]
    order = np.arange(tokens.shape[1])[None]
    h = run.model.hidden(
      params, jnp.asarray(tokens), order, np.ones_like(order)
    )
    features = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    estimate = run.states.draft_model.hidden(
      DraftParams(params, own),
      jnp.asarray(tokens),
      features,
      order,
      np.ones_like(order),
    )
    law = lambda x: np.asarray(
      jax.nn.softmax(run.model.logits(params, x)[0]), np.float64
    )
    gap = np.abs(np.asarray(estimate - h, np.float64))[0]
    smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
    entropy = -(law(h) * np.log(law(estimate))).sum(-1)
    first = len(sample.prompt) - 1
    values += list((0.5 * smooth + 0.5 * entropy)[first:-1])
  np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)


def test_updates_lower_the_loss():
  """Law: on one window the loss falls towards its floor, half the entropy of
  the target's laws.

  Mutant: the sign of the update.
  """
  run = _run()
  training = run.drafter_training()
  state, params = run.states.init_drafter(), run.states.init_params()
  samples = _samples(1, 12)
  window = _window(run, samples)
  hidden = run.model.hidden(
    params, window.tokens, window.positions, window.segments
  )
  learning = run.states.draft_learning
  perfect = learning.draft_model._replace(hidden=lambda *args: hidden)
  floor = auxiliary.drafter_loss(
    state.params,
    params,
    hidden,
    window,
    dataclasses.replace(learning, draft_model=perfect),
  )
  losses = []
  for _ in range(60):
    state, loss = training._update(state, params, training._pack(samples), 0)
    losses.append(float(loss))
  assert losses[-1] - floor < 0.4 * (losses[0] - floor)
  assert int(state.step) == 60


def test_long_answers_stay_in_the_buffer():
  """By hand: of answers of 4, 9, 1 and 6 tokens the two longest fit.

  Mutant: the first ones stay.
  """
  make = lambda n: Sample(np.zeros(2, np.int32), np.zeros(n, np.int32))
  kept = drafter_training.keep_longest([make(n) for n in (4, 9, 1, 6)], 20)
  assert [len(s.completion) for s in kept] == [9, 6]


def _training(monkeypatch, costs):
  """Returns (training with a share of a tenth, [seconds that it took])."""
  spent = [0.0]

  def update(*args):
    del args
    spent[0] += next(costs)
    return None, jnp.zeros(())

  run = make_run(tiny_config(drafter__share=0.1, **CHAIN))
  run = dataclasses.replace(run, clock=lambda: spent[0])
  training = run.drafter_training()
  monkeypatch.setattr(training, '_update', update)
  return training, spent


def test_the_budget_is_kept(monkeypatch):
  """Law: over many steps training takes its share of the time, whatever an
  update costs.

  Steps of 2 s, a share of a tenth; every ninth update takes 1.9 s in place of
  0.3 s. Mutant: a debt is forgotten.
  """
  costs = itertools.cycle([0.3] * 8 + [1.9])
  training, spent = _training(monkeypatch, costs)
  rollouts = [_Rollout(sample) for sample in _samples(2, 20)]
  for step in range(200):
    training.after_step(None, None, step, rollouts, 2.0)
  assert spent[0] == pytest.approx(200 * 2.0 * 0.1, abs=2.0)


def test_time_that_is_left_over_is_not_saved_up(monkeypatch):
  """Law: behind a step that took long, steps give no more than their share.

  A step of 100 s earns 10 s, of which one pass takes little; 50 steps of 2 s
  follow. Mutant: what is left over is kept.
  """
  training, spent = _training(monkeypatch, itertools.repeat(0.3))
  rollouts = [_Rollout(sample) for sample in _samples(2, 20)]
  training.after_step(None, None, 0, rollouts, 100.0)
  before = spent[0]
  assert 0 < before < 5
  for step in range(1, 51):
    training.after_step(None, None, step, rollouts, 2.0)
  assert spent[0] - before == pytest.approx(50 * 2.0 * 0.1, abs=0.6)


class _Rollout:
  def __init__(self, sample):
    self.tokens, self.request = sample.completion, sample
