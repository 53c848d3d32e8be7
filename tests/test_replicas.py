"""Replicas: parts of the mesh that decode independently from one queue."""

import functools
import json

from config_helpers import train_quietly
import jax
import numpy as np
import pytest
import rollout_helpers as helpers
from rollout_helpers import World

from rlax_llm import testing
from rlax_llm.config import MeshConfig
from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.drafting.strategy.cost_model import CostModel
from rlax_llm.rollout.control import stop_at_groups
from rlax_llm.rollout.replica import Replica
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import sharding


@functools.cache
def _world(ways):
  return World(ways=ways)


@pytest.fixture
def moves(monkeypatch):
  """Counts samples that a replica gave up, by whether they had begun."""
  counts = {'give_waiting': 0, 'give_decoding': 0, 'begun': 0}

  def spy(name, real):

    def given(replica):
      samples = real(replica)
      counts[name] += len(samples)
      counts['begun'] += sum(s.base > s.begin for s in samples)
      return samples

    return given

  # Replicas end in turn: what is given up then is the same in every run.
  monkeypatch.setattr(Replica, 'landed', False)
  for name in ('give_waiting', 'give_decoding'):
    monkeypatch.setattr(Replica, name, spy(name, getattr(Replica, name)))
  return counts


def _generate(
  world,
  replicas,
  requests=None,
  *,
  policies=(),
  earlier=None,
  idle=lambda mesh: None,
  store=None,
  widths=(1,),
  **options,
):
  engine = world.engine(
    replicas=replicas,
    control=dict(min_slots=1, widths=widths),
    segment_forwards=3,
    **options,
  )
  state = RolloutState(earlier=earlier or {}, store=store)
  rollouts, _ = engine.generate(
    world.params,
    requests or helpers.make_requests(),
    state,
    policies=policies,
    idle=idle,
  )
  return rollouts, engine


def _assert_equal(want, got):
  assert len(want) == len(got)
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.token_version, b.token_version)
    np.testing.assert_allclose(
      a.behaviour_logprobs, b.behaviour_logprobs, atol=1e-5
    )
    assert (a.finished, a.suspended, a.index) == (
      b.finished,
      b.suspended,
      b.index,
    )


@pytest.mark.slow
def test_two_replicas_change_no_token(moves):
  """Law: tokens, ends and log-probabilities are those of one replica, also of
  samples that are handed over in the middle; each is sampled once.

  Mutants: a sample handed over is begun anew; its noise or its limit begins
  again; what it had before is lost.
  """
  world = _world(2)
  # Few and unequal: one replica runs dry while the other decodes several.
  for requests in (
    helpers.make_requests(),
    helpers.make_requests((7, 2), seed=3),
  ):
    want, plain = _generate(world, 1, requests, slots=16)
    got, engine = _generate(world, 2, requests, slots=16)
    _assert_equal(want, got)
    assert plain.stats.tokens == engine.stats.tokens
  assert moves['begun'] >= 2 and moves['give_waiting']


def test_a_stop_in_logical_time_is_that_of_one_replica(moves):
  """Law: when a policy stops, every sample is cut at the token at which one
  replica cuts it, and what is continued comes to the undisturbed end.

  Mutant: cut as if a sample had begun where it was handed over.
  """
  world, requests = _world(2), helpers.make_requests((1, 8, 3))
  stop = (stop_at_groups(2, 0),)
  want, _ = _generate(world, 1, requests, slots=16, policies=stop)
  got, _ = _generate(world, 2, requests, slots=16, policies=stop)
  assert moves['begun'] and any(r.suspended for r in want)
  _assert_equal(want, got)
  earlier = {
    (r.request.domain, r.request.step, r.request.request, r.index): r
    for r in got
  }
  whole, _ = _generate(world, 2, requests, slots=16, earlier=earlier)
  plain, _ = _generate(world, 1, requests, slots=16)
  for a, b in zip(plain, whole):
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_idle_replicas_are_named():
  """Law: while the last sample decodes, the other replica is idle, and its
  devices are the ones named.

  Mutant: the devices of the fullest are given.
  """
  world, idle = _world(2), []
  _generate(world, 2, helpers.make_requests((1,)), slots=16, idle=idle.append)
  parts = sharding.split(world.mesh, 2)
  assert idle and set(idle) <= {parts[1]}


def test_a_part_of_the_mesh_holds_the_same_numbers():
  """Law: arrays on a part are the shards that lie there, no copies.

  Mutant: the shards of another part.
  """
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
  x = jax.device_put(
    np.arange(8.0).reshape(2, 4),
    jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'tensor')),
  )
  for part in sharding.split(mesh, 2):
    own = sharding.on_part({'x': x}, part)['x']
    np.testing.assert_array_equal(own, x)
    assert own.sharding.device_set == set(part.devices.flat)
    pointers = {s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    assert {
      s.data.unsafe_buffer_pointer() for s in own.addressable_shards
    } <= pointers


@pytest.mark.slow
@pytest.mark.parametrize('replicas', [2, 8])
def test_drafts_and_any_arm_change_no_token(
  replicas, moves, monkeypatch, request
):
  """Law: with the tree cache, run-ahead, and arms and lengths of segments drawn
  at every boundary, tokens are those of plain sampling by one replica.
  """
  if replicas == 8 and not request.config.getoption('--full'):
    pytest.skip('eight times the programs; --full runs it')
  world = _world(8)
  want, _ = _generate(world, 1, slots=16)
  arms = [PLAIN, *(Arm(w, 1, ('tree_cache',)) for w in (3, 4))]
  rng = np.random.default_rng(2)
  monkeypatch.setattr(CostModel, 'choose', helpers.random_choices(rng, arms))
  monkeypatch.setattr(
    Replica, 'landed', property(lambda self: self.flying and rng.integers(2))
  )
  store = RolloutStore(history=2, megabytes=1, tokenizer='')
  for _ in range(2):  # the second time with rollouts to draft from
    got, _ = _generate(
      world,
      replicas,
      slots=16,
      store=store,
      drafts_by='tree_cache',
      width=0,
      widths=(1, 3, 4),
      history=2,
    )
    _assert_equal(want, got)
  assert moves['give_waiting'] + moves['give_decoding']


def _train(folder, **changes):
  config = testing.tiny_config()
  config.num_steps = 40
  config.task.epoch_prompts = 2
  for name, value in changes.items():
    section, name = name.split('__')
    setattr(getattr(config, section), name, value)
  return train_quietly(config, folder)


@pytest.mark.slow
@pytest.mark.parametrize('replicas, drafter', [(2, 'hybrid'), (8, 'none')])
def test_a_run_with_replicas_is_the_run_without(tmp_path, replicas, drafter):
  """Law: 40 steps with replicas, and with hybrid drafts by a drafter that is
  trained where they idle, have the tokens and parameters of W = 1 on one
  replica, bit for bit.
  """
  plain = {
    'rollout__drafter': 'none',
    'rollout__width': 1,
    'mesh__data': replicas,
  }
  changes = plain | {'mesh__replicas': replicas, 'control__min_slots': 1}
  if drafter != 'none':
    changes |= {
      'rollout__drafter': drafter,
      'rollout__width': 4,
      'drafter__every': 2,
    }
  want = _train(tmp_path / 'plain', **plain)
  got = _train(tmp_path / 'parts', **changes)
  for key in ('tokens_sampled', 'tokens_sha256', 'parameters_sha256'):
    assert got[key] == want[key], key
  read = lambda part: (tmp_path / part / 'samples.jsonl').read_text()
  assert read('plain') == read('parts')
  if drafter != 'none':
    rows = [
      json.loads(row)
      for row in (tmp_path / 'parts' / 'timing.jsonl').read_text().splitlines()
    ]
    idle = [row['drafter/idle_updates'] for row in rows if 'time/step' in row]
    assert sum(idle) > 10 and idle[0] == 0  # nothing to learn from at first


@pytest.mark.slow
def test_drafter_is_that_of_the_parts():
  """Law: a drafter of one's own works in every replica."""
  world = _world(2)
  want, _ = _generate(world, 1, slots=16)
  got, _ = _generate(
    world, 2, slots=16, drafter=drafting.prompt_lookup(4), width=4
  )
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a.tokens, b.tokens)
