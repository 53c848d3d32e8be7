"""Training of the drafter beside RL: it learns, and changes nothing else."""

import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train as runs

from rlax_llm import drafter_training
from rlax_llm import sample
from rlax_llm import testing
from rlax_llm.config import ConfigError
from rlax_llm.drafting.strategy import WidthPolicy
from rlax_llm.learning import auxiliary
from rlax_llm.learning.batch import Sample
from rlax_llm.run import make_run
from rlax_llm.types import DraftParams
from rlax_llm.validation import validate

LONG = runs.LONG | dict(num_steps=40)


@pytest.fixture(name='plain', scope='module')
def _plain(tmp_path_factory):
  """40 steps without speculation."""
  folder = tmp_path_factory.mktemp('plain')
  return folder, *runs._train(
      folder, rollout__width=1, rollout__drafter='none', **LONG)


CHAIN = dict(rollout__drafter='model', rollout__width=4)
TREE = CHAIN | dict(rollout__width=6, rollout__branching=3, drafter__depth=3)
RANDOM = CHAIN | dict(rollout__width=0, control__widths=(1, 3, 4))


@pytest.mark.parametrize('changes', [
    pytest.param(CHAIN, id='chain'),
    pytest.param(TREE, marks=pytest.mark.slow, id='tree'),
    pytest.param(RANDOM, id='random'),
])
def test_the_drafter_changes_nothing(plain, tmp_path, monkeypatch, changes):
  """Law: 40 steps, drafted by a network that is trained meanwhile, and in one
  case with a random clock, width and segment length at every boundary: tokens,
  parameters and metrics are bit-equal to plain sampling.

  Mutants: the drafter's update moves the policy's embedding; the drafter is
  trained on what the learner then skips.
  """
  clock = None
  if changes['rollout__width'] == 0:
    rng = random.Random(0)
    monkeypatch.setattr(
        WidthPolicy, 'choose', lambda self, rows, capacity, forwards:
        (rng.choice([1, 3, 4]), rng.randint(1, 5)))
    clock = rng.random
  summary, _ = runs._train(tmp_path,
                           clock=clock,
                           drafter__share=0.5,
                           **(LONG | changes))
  runs._assert_same_run(tmp_path, summary, plain)
  rows = [r for r in runs._rows(tmp_path, 'timing.jsonl') if 'time/step' in r]
  assert sum(r['drafter/updates'] for r in rows) > 20
  accept = [r['rollout/accept_length'] for r in rows]
  # It learns, from nothing but its own rollouts.
  assert np.mean(accept[-10:]) > np.mean(accept[:3]) + 0.2
