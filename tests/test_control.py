"""Boundary policies: logical time, suspended samples, who is trained on."""

import functools
import random

import numpy as np
import pytest
import rollout_helpers
from rollout_helpers import assert_same_tokens
from rollout_helpers import by_sample
from rollout_helpers import make_requests

from rlax_llm.drafting.store import RolloutStore
from rlax_llm.drafting.strategy import WidthPolicy
from rlax_llm.rollout import control
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.table import sample_key
from rlax_llm.types import Request

strict_precision = rollout_helpers.strict_precision


# ---- Logical time ------------------------------------------------------------
def _ticks(numbers, lengths, slots):
  """Returns (begin, end) of every sample, one tick after the other."""
  begin, end = {}, {}
  waiting = list(range(len(numbers)))
  running = []
  tick = 0
  while waiting or running:
    while waiting and len(running) < slots:
      begin[waiting[0]] = tick
      running.append(waiting.pop(0))
    tick += 1
    for sample in list(running):
      if tick - begin[sample] == lengths[sample]:
        end[sample] = tick
        running.remove(sample)
  return begin, end


def _request(i, step=0):
  return Request(np.zeros(1, np.int32), 1, 0, step, i)


@pytest.mark.parametrize('seed', range(20))
def test_logical_time_is_one_token_a_tick(seed):
  """Law: whatever the device has sampled first, the ticks are those of a loop
  that gives one token a tick to each of the slots, in order; a view comes when
  groups are complete, once, with all that are complete at its tick.

  Mutants: a horizon of the rows that ended only; slots taken in the order in
  which the device filled them.
  """
  rng = np.random.default_rng(seed)
  numbers = np.repeat(np.arange(6), rng.integers(0, 5, 6)).tolist()
  lengths = rng.integers(1, 12, len(numbers))
  slots = int(rng.integers(1, 5))
  time = control.LogicalTime([_request(i) for i in range(6)], numbers, slots)
  begin, end = _ticks(numbers, lengths, slots)
  known = np.zeros(len(numbers), int)
  seen = []
  while (known < lengths).any():
    known = np.minimum(known + rng.integers(0, 7, len(numbers)), lengths)
    for view in time.advance(known, known == lengths):
      done = {
          n for n in set(numbers)
          if all(end[s] <= view.tick for s, m in enumerate(numbers) if m == n)
      }
      assert {n for n in view.complete if n in numbers} == done
      seen.append(view.tick)
      for s, length in enumerate(lengths):
        now = time.tokens_at_tick(s)
        if end[s] <= view.tick:
          assert now is None
        else:
          assert now == min(max(view.tick - begin[s], 0), length)
          # What the cut needs has been sampled.
          assert now <= known[s]
  assert time.end == end
  last = {
      n: max(end[s] for s, m in enumerate(numbers) if m == n)
      for n in set(numbers)
  }
  assert seen == sorted(set(last.values()))


def test_old_groups_are_waited_for():
  """Law: the target alone does not stop while a group of an earlier step than
  `oldest` is not complete.

  Mutant: `all` turned into `any`.
  """
  requests = (_request(0, step=1), _request(1, step=2), _request(2, step=5))
  view = lambda *done: control.SampleView(3, requests, dict.fromkeys(done, 3))
  stop = control.stop_at_groups(1, 3)
  assert [stop(view(2)),
          stop(view(0)),
          stop(view(0, 2)),
          stop(view(0, 1))] == [False, False, False, True]
  assert not control.stop_at_groups(3, 3)(view(0, 1))


# ---- Suspended and continued -------------------------------------------------
@functools.cache
def _world():
  return rollout_helpers.World(vocabulary=6)


@functools.cache
def _undisturbed():
  return _world().generate(make_requests())[0]


def _drafters():
  return {
      'none': None,
      'tree cache': rollout_helpers.tree_cache(4, places=40),
  }


@pytest.mark.parametrize('name', _drafters())
def test_boundary_decisions_change_no_sample(name, monkeypatch):
  """Law: stopped at random ticks or at a random number of tokens, continued in
  another order of requests, some left out for good, with random widths and
  segment lengths: what comes to its end has the tokens, log-probabilities and
  versions of a run that nobody disturbed.

  Mutants: noise by place in the continued part; the key of the step in which
  a sample is continued; the prompt's length that of the prefilled text; the
  limit not lowered by what a sample has.
  """
  rng = random.Random(len(name))
  monkeypatch.setattr(
      WidthPolicy, 'choose', lambda self, rows, s, forwards:
      (rng.choice([1, 4]), rng.randint(1, 5)))
  drafter = _drafters()[name]
  store = RolloutStore(history=2, megabytes=1, tokenizer='')
  engine = _world().engine(drafter=drafter, slots=8, control=dict(min_slots=2))
  earlier, versions = {}, {}
  requests = make_requests()
  dropped = set()
  want = by_sample(_undisturbed())
  for version in range(200):
    rng.shuffle(requests)
    chance = rng.random()
    state = RolloutState(version, store, earlier)
    rollouts, _ = engine.generate(_world().params,
                                  requests,
                                  state,
                                  policies=[lambda view: rng.random() < chance],
                                  limit=rng.choice([None, 3, 7]))
    keys = [(r.request.request, r.index) for r in rollouts]
    assert keys == [(r.request, i) for r in requests for i in range(r.samples)]
    for rollout in rollouts:
      key = sample_key(rollout.request, rollout.index)
      before = earlier.get(key)
      old = before.token_version.tolist() if before else []
      new = rollout.token_version[len(old):]
      assert rollout.token_version[:len(old)].tolist() == old
      assert (new == version).all()
      versions[key] = len({*rollout.token_version.tolist()})
      earlier[key] = rollout
    # One of the requests is given up half way.
    if version == 2 and any(r.suspended for r in rollouts):
      gone = rng.choice([r.request for r in rollouts if r.suspended])
      dropped.add(gone.request)
      requests = [r for r in requests if r is not gone]
    if not any(r.suspended for r in rollouts):
      break
  got = [r for r in earlier.values() if r.request.request not in dropped]
  assert not any(r.suspended for r in got) and max(versions.values()) > 2
  kept = [r for k, r in want.items() if k[0] not in dropped]
  assert_same_tokens(_world(), kept, got)
  for rollout in got:
    np.testing.assert_allclose(rollout.behaviour_logprobs,
                               want[rollout.request.request,
                                    rollout.index].behaviour_logprobs,
                               atol=2e-5)


# ---- APRIL -------------------------------------------------------------------
def _expected_cut(requests, rollouts, slots, target):
  """Returns {sample: tokens} and what is complete, from whole rollouts."""
  numbers = [
      n for n, request in enumerate(requests) for _ in range(request.samples)
  ]
  begin, end = _ticks(numbers, [r.length for r in rollouts], slots)
  last = {
      n: max(end[s] for s, m in enumerate(numbers) if m == n)
      for n in set(numbers)
  }
  cut = sorted(last.values())[target - 1]
  tokens = {
      s: min(r.length, max(cut - begin[s], 0)) for s, r in enumerate(rollouts)
  }
  return tokens, {n for n, tick in last.items() if tick <= cut}


@pytest.mark.parametrize('options', [
    dict(),
    dict(slots=4,
         segment_forwards=1,
         control=dict(min_slots=2, logical_slots=16)),
    dict(slots=32,
         control=dict(logical_slots=16),
         width=4,
         drafter='prompt_lookup'),
    dict(width=4, drafter='tree_cache', segment_forwards=3),
],
                         ids=['plain', 'few slots', 'many slots', 'tree cache'])
def test_the_cut_is_made_in_logical_time(options):
  """Law: the step stops at the tick of the second complete group, whatever W,
  N and the segments are: who is complete, who is suspended and with how many
  tokens is what a loop of one token a tick says.

  Mutants: the cut at the boundary; tokens beyond the cut kept; rows in slots
  taken for those that run in logical time.
  """
  drafter = {
      'tree_cache': rollout_helpers.tree_cache(4),
      'prompt_lookup': rollout_helpers.drafting.prompt_lookup(4)
  }.get(options.pop('drafter', None))
  options.pop('width', None)
  requests = make_requests((4, 4, 4, 4, 4, 4, 4), seed=1)
  whole = _world().generate(requests)[0]
  engine = _world().engine(drafter=drafter, **options)
  rollouts, _ = engine.generate(_world().params,
                                requests,
                                RolloutState(),
                                policies=[control.stop_at_groups(2, 0)])
  tokens, complete = _expected_cut(requests, whole, 16, 2)
  assert 2 <= len(complete) < 7
  for sample, (rollout, full) in enumerate(zip(rollouts, whole)):
    assert rollout.tokens.tolist() == full.tokens[:tokens[sample]].tolist()
    assert rollout.suspended == (tokens[sample] < full.length)
    assert rollout.length == len(rollout.behaviour_logprobs) == len(
        rollout.token_version) == len(rollout.drafted)
    if rollout.request.request in complete:
      assert not rollout.suspended
  sampled = sum(r.length for r in rollouts)
  assert engine.stats.tokens == sampled + engine.stats.discarded_tokens
