"""Boundary policies: logical time, suspended samples, who is trained on."""

import contextlib
import functools
import json
import pathlib
import random
import re

from config_helpers import tiny_config
from config_helpers import train_quietly
from group_helpers import Collecting
import numpy as np
import pytest
import rollout_helpers
from rollout_helpers import assert_same_tokens
from rollout_helpers import by_sample
from rollout_helpers import make_requests

from rlax_llm import components as runs
from rlax_llm import train as training
from rlax_llm.config import ConfigError
from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.config.validation import validate
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.drafting.strategy.cost_model import CostModel
from rlax_llm.experience import advantages
from rlax_llm.experience import early_stop
from rlax_llm.experience import evaluation
from rlax_llm.experience import groups
from rlax_llm.learning import length_ranker
from rlax_llm.learning import quality_head
from rlax_llm.ops import pruning
from rlax_llm.rollout import control
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.table import sample_key
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import EVALUATE
from rlax_llm.types import Request
from rlax_llm.types import TRAIN


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

  Mutants: no horizon, so that ticks pass whose tokens are not known; a slot
  that is freed twice.
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
        n
        for n in set(numbers)
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
  assert [stop(view(2)), stop(view(0)), stop(view(0, 2)), stop(view(0, 1))] == [
    False,
    False,
    False,
    True,
  ]
  assert not control.stop_at_groups(3, 3)(view(0, 1))


# ---- Suspended and continued -------------------------------------------------
@functools.cache
def _world():
  return rollout_helpers.World(vocabulary=6)


@functools.cache
def _undisturbed():
  return _world().generate(make_requests())[0]


def _drafters():
  return {'none': None, 'tree cache': rollout_helpers.tree_cache(4, places=40)}


@pytest.mark.parametrize('name', _drafters())
def test_boundary_decisions_change_no_sample(name, monkeypatch):
  """Law: stopped at random ticks or at a random number of tokens, continued in
  another order of requests, some left out for good, with random widths and
  segment lengths: what comes to its end has the tokens, log-probabilities and
  versions of a run that nobody disturbed.

  Mutants: the prompt's length that of the prefilled text, so that noise begins
  anew; the limit not lowered by what a sample has.
  """
  rng = random.Random(len(name))
  drafter = _drafters()[name]
  store = RolloutStore(history=2, megabytes=1, tokenizer='')
  engine = _world().engine(drafter=drafter, slots=8, control=dict(min_slots=2))
  arms = list(engine._parts[0].drafters)  # pylint: disable=protected-access
  monkeypatch.setattr(
    type(engine.strategy),
    'choose',
    rollout_helpers.random_choices(np.random.default_rng(1), arms),
  )
  earlier, versions = {}, {}
  requests = make_requests()
  dropped = set()
  want = by_sample(_undisturbed())
  for version in range(200):
    rng.shuffle(requests)
    chance = rng.random()
    state = RolloutState(version, store, earlier)
    rollouts, _ = engine.generate(
      _world().params,
      requests,
      state,
      policies=[lambda view: rng.random() < chance],
      limit=rng.choice([None, 3, 7]),
    )
    keys = [(r.request.request, r.index) for r in rollouts]
    assert keys == [(r.request, i) for r in requests for i in range(r.samples)]
    for rollout in rollouts:
      key = sample_key(rollout.request, rollout.index)
      before = earlier.get(key)
      old = before.token_version.tolist() if before else []
      new = rollout.token_version[len(old) :]
      assert rollout.token_version[: len(old)].tolist() == old
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
    np.testing.assert_allclose(
      rollout.behaviour_logprobs,
      want[rollout.request.request, rollout.index].behaviour_logprobs,
      atol=2e-5,
    )


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


@pytest.mark.parametrize(
  'options',
  [
    dict(),
    dict(
      slots=4, segment_forwards=1, control=dict(min_slots=2, logical_slots=16)
    ),
    dict(
      slots=32, control=dict(logical_slots=16), width=4, drafter='prompt_lookup'
    ),
    dict(width=4, drafter='tree_cache', segment_forwards=3),
  ],
  ids=['plain', 'few slots', 'many slots', 'tree cache'],
)
def test_the_cut_is_made_in_logical_time(options):
  """Law: the step stops at the tick of the second complete group, whatever W,
  N and the segments are: who is complete, who is suspended and with how many
  tokens is what a loop of one token a tick says.

  Mutant: tokens beyond the cut kept.
  """
  drafter = {
    'tree_cache': rollout_helpers.tree_cache(4),
    'prompt_lookup': rollout_helpers.drafting.prompt_lookup(4),
  }.get(options.pop('drafter', None))
  options.pop('width', None)
  requests = make_requests((4, 4, 4, 4, 4, 4, 4), seed=1)
  whole = _world().generate(requests)[0]
  engine = _world().engine(drafter=drafter, **options)
  rollouts, _ = engine.generate(
    _world().params,
    requests,
    RolloutState(),
    policies=[control.stop_at_groups(2, 0)],
  )
  tokens, complete = _expected_cut(requests, whole, 16, 2)
  assert 2 <= len(complete) < 7
  for sample, (rollout, full) in enumerate(zip(rollouts, whole)):
    assert rollout.tokens.tolist() == full.tokens[: tokens[sample]].tolist()
    assert rollout.suspended == (tokens[sample] < full.length)
    assert (
      rollout.length
      == len(rollout.behaviour_logprobs)
      == len(rollout.token_version)
      == len(rollout.drafted)
    )
    if rollout.request.request in complete:
      assert not rollout.suspended
  sampled = sum(r.length for r in rollouts)
  assert engine.stats.tokens == sampled + engine.stats.discarded_tokens


# ---- The weights that undo it ------------------------------------------------
_LONGEST, _EOS = 4, 0
_POLICIES = np.random.default_rng(5).normal(size=(2, _LONGEST, 3, 3))


def _log_law(policy):
  """float64[place, last token, token], nats, of a tabular policy."""
  return policy - np.log(np.exp(policy).sum(-1, keepdims=True))


def _score(law, tokens):
  """Returns the log-probability of each token."""
  before = [_EOS, *tokens]
  return np.array([law[t, before[t], y] for t, y in enumerate(tokens)])


def _gradient(law, tokens):
  """Returns d log p(tokens) / d logits, as `law` is shaped."""
  out = np.zeros_like(law)
  before = [_EOS, *tokens]
  for t, token in enumerate(tokens):
    out[t, before[t]] -= np.exp(law[t, before[t]])
    out[t, before[t], token] += 1
  return out


def _reward(tokens):
  return float(tokens.count(1)) - 0.5 * len(tokens)


def _go_on(law, tokens, rng):
  """Returns the tokens continued to their end."""
  tokens = list(tokens)
  while len(tokens) < _LONGEST and tokens[-1:] != [_EOS]:
    p = np.exp(law[len(tokens), tokens[-1] if tokens else _EOS])
    tokens.append(int(rng.choice(3, p=p)))
  return tokens


def _all_sequences(prefix=()):
  for token in range(3):
    tokens = [*prefix, token]
    if token == _EOS or len(tokens) == _LONGEST:
      yield tokens
    else:
      yield from _all_sequences(tokens)


def _exact_gradient(law):
  return sum(
    np.exp(_score(law, y).sum()) * _reward(y) * _gradient(law, y)
    for y in _all_sequences()
  )


def _deviation(estimates, exact):
  """Returns the largest |z| of the means, over the entries that vary."""
  mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
  return np.max(np.abs(mean - exact)[error > 0] / error[error > 0])


def test_sequence_weights_undo_partial_rollouts():
  """Law: samples that were cut when the first group was complete and continued
  by another policy, weighted by the product over their tokens of new to
  behaviour probability, give the new policy's exact gradient within three
  standard errors. Without weights, and with each token's own ratio, they do
  not. Measured bias, relative to the gradient's norm: 0.49 without (42
  standard errors), 0.54 with the tokens' own; 0.03 (1.8) with the product.
  """
  old, new = map(_log_law, _POLICIES)
  exact = _exact_gradient(new)
  rng = np.random.default_rng(0)
  found = {'sequence': [], 'none': [], 'token': []}
  requests = [_request(i) for i in range(3)]
  stop = control.stop_at_groups(1, 0)
  for _ in range(4000):
    whole = [_go_on(old, [], rng) for _ in range(6)]
    lengths = [len(y) for y in whole]
    time = control.LogicalTime(requests, [0, 0, 1, 1, 2, 2], 4)
    for view in time.advance(lengths, [True] * 6):
      if stop(view):
        break
    sums = {name: 0.0 for name in found}
    for sample, tokens in enumerate(whole):
      known = time.tokens_at_tick(sample)
      known = len(tokens) if known is None else known
      full = _go_on(new, tokens[:known], rng)
      behaviour = np.r_[_score(old, full)[:known], _score(new, full)[known:]]
      ratio = np.exp(_score(new, full) - behaviour)
      gradient = _reward(full) * _gradient(new, full) / 6
      sums['sequence'] += gradient * np.prod(ratio)
      sums['none'] += gradient
      places = np.ones(_LONGEST)
      places[: len(full)] = ratio
      sums['token'] += gradient * places[:, None, None]
    for name, total in sums.items():
      found[name].append(total)
  found = {name: np.stack(x) for name, x in found.items()}
  bias = {
    name: np.linalg.norm(x.mean(0) - exact) / np.linalg.norm(exact)
    for name, x in found.items()
  }
  assert _deviation(found['sequence'], exact) < 3
  assert _deviation(found['none'], exact) > 3
  assert _deviation(found['token'], exact) > 3
  assert bias['none'] > 0.3 and bias['token'] > 0.3


# ---- The collector -----------------------------------------------------------
def _config(**changes):
  """Plain sampling of up to 12 tokens, with dotted changes."""
  return tiny_config(
    **dict(
      rollout__max_new_tokens=12, rollout__drafter='none', rollout__width=1
    )
    | changes
  )


@pytest.fixture(name='collect_with')
def _collect_with():
  """Makes (run, collector) of a config; closes its verifiers."""
  with contextlib.ExitStack() as stack:

    def make(config, score=None):
      run = runs.make_run(config)
      verifier = stack.enter_context(Verifier(run.config.task, run.config.seed))
      return run, Collecting(run, verifier, score)

    yield make


def _equal(a, b):
  """Whether nested dicts, sequences, dataclasses and arrays are the same."""
  if isinstance(a, np.ndarray):
    return a.dtype == b.dtype and np.array_equal(a, b)
  if hasattr(a, '__dataclass_fields__'):
    return type(a) is type(b) and all(
      _equal(getattr(a, n), getattr(b, n)) for n in a.__dataclass_fields__
    )
  if isinstance(a, (list, tuple)):
    return len(a) == len(b) and all(map(_equal, a, b))
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
  return a == b


def test_without_policies_a_step_is_the_engines_own(collect_with):
  """Law: with everything off a step's groups are what the engine makes of the
  step's problems, bit for bit, in their order, and nothing is kept.

  Mutant: requests numbered through all steps.
  """
  run, collector = collect_with(_config(control__over_provision=1.0))
  params = run.states.init_params()
  for step in range(2):
    found = collector.collect(params, step)
    collector.commit()
    requests = run.requests(
      run.problems(step), samples=4, domain=TRAIN, step=step
    )
    want, _ = run.engine(run.sampling).generate(
      params, requests, RolloutState(version=step)
    )
    assert _equal([r for group in found for r in group.rollouts], want)
    assert [g.problem.prompt for g in found] == [
      p.prompt for p in run.problems(step)
    ]
  state = collector.dump()
  assert state['cursor'] == 8
  assert not any(state[k] for k in ('pending', 'surplus', 'queue', 'past'))


@pytest.mark.parametrize(
  'changes',
  [
    dict(over_provision=1.75, logical_slots=6),
    pytest.param(
      dict(
        over_provision=1.5,
        dynamic_sampling=2,
        replay=1,
        staleness=1,
        prune_at=3,
        prune_steps=2,
      ),
      marks=pytest.mark.slow,
    ),
  ],
  ids=['april', 'all'],
)
def test_every_token_is_booked_and_every_problem_comes_once(
  collect_with, changes
):
  """Law: tokens sampled = trained + buffered + dropped, after every step; no
  group is trained on twice but by replay, none is skipped but without signal,
  none is older than its bound; what is kept or stale has been scored, each
  token under its own version. A step that is given up changes nothing; the
  state comes back from JSON as it was.

  Mutants: surplus forgotten; continued tokens counted again; a suspended
  sample not scored; the state moved by a step that was given up.
  """
  version = 0

  def score(unused_params, samples):
    del unused_params
    return [np.full(len(s.completion), -version, np.float32) for s in samples]

  run, collector = collect_with(
    _config(**{f'control__{k}': v for k, v in changes.items()}), score
  )
  params = run.states.init_params()
  trained = []
  bound = run.config.control.max_staleness + run.config.control.staleness
  put_off = 0
  for version in range(6):
    before = collector.dump()
    collector.collect(params, version)
    assert collector.dump() == before
    found = collector.collect(params, version)
    collector.commit()
    record = collector.dump()
    _, other = collect_with(_config())
    other.restore(record)
    assert other.dump() == record
    state = groups.restore(
      record,
      lambda n: run.problems(n // 4)[n % 4],
      lambda p: run.encode(p, prompt=True),
      run.tokenizer.decode,
      functools.partial(advantages.judge, run),
      TRAIN,
    )
    assert state.sampled_tokens == (
      state.trained_tokens + state.buffered_tokens + state.dropped_tokens
    )
    values = collector.metrics()
    assert values['rollout/buffered_tokens'] == state.buffered_tokens
    put_off += len(state.pending)
    assert len(found) == 4
    trained += [g.number for g in found if not g.replayed]
    kept = [*state.pending, *state.surplus, *state.past]
    kept += [g for batch in state.queue for g in batch]
    for group in kept:
      for r in group.rollouts:
        assert (
          r.length == 0
          or r.survival == 0
          or (-r.token_version == r.scored_logprobs).all()
        )
    for group in found:
      assert version - group.request.step <= max(bound, 4)
      assert len(group.rollouts) == (2 if 'prune_at' in changes else 4)
      for r in group.rollouts:
        assert not r.suspended
        if (r.token_version < version).any():
          assert (-r.token_version == r.scored_logprobs).all()
  assert put_off > 0
  assert len(set(trained)) == len(trained)
  waiting = {g.number for g in (*state.pending, *state.surplus)}
  waiting |= {g.number for batch in state.queue for g in batch}
  if not changes.get('dynamic_sampling'):
    assert set(trained) | waiting == set(range(state.cursor))


def test_impossible_controls_are_refused():
  """Law: one line that names the value, the limit and the remedy.

  Mutant: the bound on over_provision without the replayed groups.
  """
  for changes, message in [
    (dict(control__over_provision=0.5), 'over_provision=0.5 must be at least'),
    (dict(control__over_provision=2.5), 'over_provision=2.5 .* at most 2'),
    (dict(control__over_provision=1.8, control__replay=1), 'at most 1.75'),
    (dict(control__replay=4), 'replay=4 leaves no new group'),
    (dict(control__prune_keep=0.25), 'prune_keep=0.25 has no effect'),
    (dict(control__prune_at=12), 'prune_at=12 is behind the last'),
    (
      dict(
        control__dynamic_sampling=1,
        control__run_ahead_rows=4,
        rollout__drafter='tree_cache',
        rollout__width=3,
      ),
      'run_ahead_rows=4 cannot foretell',
    ),
  ]:
    with pytest.raises(ConfigError, match=message):
      validate(_config(**changes))


# ---- Whole runs --------------------------------------------------------------
COMBINATIONS = {
  'april': dict(
    control__over_provision=1.75,
    control__logical_slots=8,
    control__order='longest_first',
  ),
  'staleness': dict(control__staleness=2, learning__old_logprobs='scored'),
  'dynamic': dict(control__dynamic_sampling=2),
  'replay': dict(control__replay=2, control__order='shortest_first'),
  'prune': dict(control__prune_at=4, control__prune_steps=1),
  'extra': dict(control__extra_samples=5, learning__minibatches=2),
  'all': dict(
    control__over_provision=1.5,
    control__logical_slots=8,
    control__prune_at=4,
    control__prune_steps=1,
    control__dynamic_sampling=2,
    control__staleness=1,
    control__replay=1,
    control__extra_samples=3,
    control__extra_by_hardness=True,
    learning__old_logprobs='scored',
  ),
}


def _train(folder, clock=None, **changes):
  clocks = {'clock': clock} if clock else {}
  return train_quietly(_config(**changes), folder, **clocks)


@pytest.mark.slow
@pytest.mark.parametrize('name', COMBINATIONS)
def test_policies_are_exact(name, tmp_path, monkeypatch):
  """Law: with any combination of policies, a run with the tree cache, fewer
  slots, and a random clock, width and segment length at every boundary, killed
  in step 4 and continued, has the tokens, parameters and metrics of the plain
  run, bit for bit.
  """
  changes = COMBINATIONS[name] | dict(num_steps=5, checkpoint__every=2)
  want = _train(tmp_path / 'plain', **changes)
  rng = random.Random(0)
  arms = [PLAIN, *(Arm(w, 1, ('tree_cache',)) for w in (3, 4))]
  monkeypatch.setattr(
    CostModel,
    'choose',
    rollout_helpers.random_choices(np.random.default_rng(1), arms),
  )
  real = training.train_step

  def dies(step, *args):
    if step == 3:
      raise RuntimeError('killed')
    return real(step, *args)

  changes |= dict(
    rollout__drafter='tree_cache',
    rollout__width=0,
    rollout__slots=4,
    control__min_slots=2,
    control__widths=(1, 3, 4),
  )
  with monkeypatch.context() as patched:
    patched.setattr(training, 'train_step', dies)
    with pytest.raises(RuntimeError, match='killed'):
      _train(tmp_path / 'parts', rng.random, **changes)
  got = _train(tmp_path / 'parts', rng.random, **changes)
  for key in ('tokens_sampled', 'tokens_sha256', 'parameters_sha256'):
    assert got[key] == want[key], key
  for file in ('metrics.jsonl', 'evaluations.jsonl', 'samples.jsonl'):
    assert (tmp_path / 'plain' / file).read_text() == (
      tmp_path / 'parts' / file
    ).read_text(), file


def test_a_stop_policy_of_the_docs(collect_with, tmp_path, monkeypatch):
  """Law: the policy of docs/howto/boundary_policy.md, plugged in by its import
  path, defers each group once: its groups are those of max_staleness=1, and not
  those of april.

  Mutant: the named policy found and not passed on.
  """
  root = pathlib.Path(__file__).parent.parent
  page = root / 'docs' / 'howto' / 'boundary_policy.md'
  (code,) = re.findall(
    r'```python\n# my_policies.py\n(.*?)```', page.read_text(), re.S
  )
  (tmp_path / 'my_policies.py').write_text(code)
  monkeypatch.syspath_prepend(tmp_path)

  def sampled(**changes):
    _, collector = collect_with(
      _config(
        control__over_provision=1.75,
        control__logical_slots=28,
        rollout__max_new_tokens=40,
        **changes,
      )
    )
    found = []
    for step in range(5):
      found += [
        (step, r.request.step, r.tokens.tolist())
        for group in collector.collect(None, step)
        for r in group.rollouts
      ]
      collector.commit()
    return found

  once = sampled(control__stop_policy='my_policies:defer_once')
  assert once == sampled(control__max_staleness=1)
  assert once != sampled()


@pytest.mark.parametrize(
  'policy, words',
  [
    ('my_policies:missing', 'cannot be imported'),
    ('apirl', 'april or module:function'),
    ('math:pi', 'is no function'),
  ],
)
def test_a_wrong_stop_policy_is_refused(policy, words, tmp_path):
  """Law: one line, before the run has a folder; without `over_provision` the
  field is unread, and refused as such.

  Mutants: found when sampling begins; no check that it is a function.
  """
  folder = tmp_path / 'run'
  late = dict(control__stop_policy=policy)
  with pytest.raises(ConfigError, match=words):
    _train(folder, control__over_provision=1.5, **late)
  with pytest.raises(ConfigError, match='stop_policy.*has no effect'):
    _train(folder, control__over_provision=1.0, **late)
  assert not folder.exists()


def test_only_what_was_planned_and_published_is_dispatched(collect_with):
  """Law: groups are sampled for the batch that `plan` yielded, by the version
  that was published, and by nothing else.

  Mutants: either check left out.
  """
  run, collecting = collect_with(_config())
  collector = collecting.collector
  collector.publish(0, run.states.init_params())
  for batch, planned in collector.plan(collecting.buffer, 0):
    with pytest.raises(ValueError, match='batch 1 is not the one'):
      collector.dispatch(batch + 1, 0, planned)
    with pytest.raises(ValueError, match='version 1 is not published; 0 is'):
      collector.dispatch(batch, 1, planned)
    collector.dispatch(batch, 0, planned)
    with pytest.raises(ValueError, match='batch 1 is not the one'):
      collector.reward(batch + 1)
    collector.reward(batch)
  assert len(collector.take(0)[0]) == 4


# ---- Order -------------------------------------------------------------------
def test_list_mle_by_hand():
  """Law: for scores (2, 0, 1) of the first, second and third item the loss is
  [log(e^2 + 1 + e) - 2 + log(1 + e) - 0 + 0] / 3, and its gradient that of
  finite differences.

  Mutant: tails summed from the front.
  """
  scores = np.array([2.0, 0.0, 1.0])
  loss, gradient = length_ranker.list_mle(scores)
  e = np.e
  assert loss == pytest.approx((np.log(e**2 + 1 + e) - 2 + np.log(1 + e)) / 3)
  for i in range(3):
    more, less = scores.copy(), scores.copy()
    more[i] += 1e-5
    less[i] -= 1e-5
    slope = (
      length_ranker.list_mle(more)[0] - length_ranker.list_mle(less)[0]
    ) / 2e-5
    assert gradient[i] == pytest.approx(slope, abs=1e-6)


def test_tau_by_hand():
  """Law: of the pairs of (1, 2, 3, 3) and (1, 3, 2, 4), four agree, one does
  not and one is tied in the first: tau-b = (4 - 1) / sqrt(5 * 6).

  Mutant: ties counted among the pairs.
  """
  tau = length_ranker.kendall_tau(
    np.array([1, 2, 3, 3]), np.array([1, 3, 2, 4])
  )
  assert tau == pytest.approx(3 / 30**0.5)
  assert length_ranker.kendall_tau(np.ones(3), np.arange(3)) == 0


def test_lengths_are_predicted_from_history_and_from_the_prompt():
  """Law: prompts whose first token decides the length are put in order: seen
  ones by their history, unseen ones by the ranker; the history comes back from
  JSON as it was.

  Mutants: the ranker never trained; the sum of logs not divided by the count.
  """
  rng = np.random.default_rng(0)
  prompt = lambda kind: np.r_[kind, rng.integers(10, 20, 5)].astype(np.int32)
  lengths = lambda kind: rng.lognormal(kind, 0.3, 8).astype(int) + 1
  history = length_ranker.LengthHistory()
  seen = []
  for _ in range(60):
    kinds = rng.integers(1, 5, 16)
    seen = [prompt(k) for k in kinds]
    history = history.observe(seen, [lengths(k) for k in kinds], keep=0.7)
  tau = length_ranker.kendall_tau(history.predict(seen), kinds)
  assert tau > 0.8
  kinds = rng.integers(1, 5, 64)
  unseen = [prompt(k) for k in kinds]
  assert length_ranker.kendall_tau(history.predict(unseen), kinds) > 0.6
  again = length_ranker.LengthHistory.restore(
    json.loads(json.dumps(history.dump()))
  )
  assert again == history
  # One rollout of e^3 tokens, shrunken by two of the line's log length.
  first = length_ranker.LengthHistory(line=(1.0, 0.0, 1.0, 0.0, 0.0))
  after = first.observe([seen[0]], [np.array([20])], keep=1.0)
  line = (0.9 * 1 + np.log(20)) / 1.9
  assert after.predict([seen[0]])[0] == pytest.approx(
    (np.log(20) + 2 * line) / 3
  )


def test_the_order_is_a_speed_value_where_all_are_taken(collect_with):
  """Law: longest first gives the groups of arrival, in the same order, and
  begins with those that were long before.

  Mutant: results in the order of sampling.
  """
  found = {}
  for order in ('arrival', 'longest_first'):
    run, collector = collect_with(_config(control__order=order))
    params = run.states.init_params()
    found[order] = [
      r
      for step in range(3)
      for g in collector.collect(params, step)
      for r in g.rollouts
      if collector.commit() is None
    ]
    tau = collector.metrics().get('rollout/length_tau')
    assert (tau is None) == (order == 'arrival')
  for a, b in zip(*found.values()):
    assert (a.request.step, a.request.request, a.index) == (
      b.request.step,
      b.request.request,
      b.index,
    )
    assert a.tokens.tolist() == b.tokens.tolist()


# ---- Early stopping ----------------------------------------------------------
def _evaluation(**changes):
  """Returns (texts, Stopped or None) of an untrained model's sums."""
  config = _config(
    task__name='chain_sum',
    task__prompt_format='short',
    task__answer_format='after_equals',
    task__options=dict(min_terms=2, max_terms=2),
    model__tokenizer='0123456789+-*/=() ',
    rollout__prompt_length=12,
    rollout__max_new_tokens=32,
    evaluate__problems=6,
    **changes,
  )
  run = runs.make_run(config)
  engine = run.engine(run.sampling)
  params = run.states.init_params()
  requests = run.requests(
    evaluation.held_out_problems(run), samples=2, domain=EVALUATE, step=0
  )
  if config.evaluate.early_stop:
    stopped = early_stop.sample(run, engine, params, requests)
    return stopped.texts, stopped
  rollouts, _ = engine.generate(params, requests, RolloutState())
  return [run.tokenizer.decode(r.tokens) for r in rollouts], None


@pytest.mark.slow
def test_probes_leave_no_trace_and_equal_answers_end_a_sample(tmp_path):
  """Law: probes that never agree change no sample; where one answer is enough,
  every sample that is probed ends with the probe and its answer, behind the
  text that it had; the tokens are fewer.

  Mutant: the probe kept in the text.
  """
  plain, _ = _evaluation()
  probes = dict(
    evaluate__probe='=', evaluate__probe_every=5, evaluate__probe_tokens=3
  )
  texts, never = _evaluation(evaluate__early_stop=99, **probes)
  assert texts == plain and never.stopped == 0 and never.probe_tokens > 0
  texts, once = _evaluation(evaluate__early_stop=1, **probes)
  assert once.stopped > 0 and once.tokens < never.tokens
  differ = [(a, b) for a, b in zip(texts, plain) if a != b]
  assert 0 < len(differ) <= once.stopped
  for text, whole in differ:
    begin = len(text.rpartition('=')[0])
    assert text[:begin] == whole[:begin]
  with pytest.raises(ConfigError, match='stops samples by their content'):
    _train(tmp_path, evaluate__early_stop=2, evaluate__probe='a')
  with pytest.raises(ConfigError, match='needs evaluate.probe'):
    validate(_config(evaluate__early_stop=2))


# ---- Pruning -----------------------------------------------------------------
def test_survival_by_hand():
  """Law: 16 samples of five chances, half of them to go on and half of those
  to succeed: the line through (0.05, 0.218), (0.2, 0.385), (0.5, 0.718), cut at
  1. Without a difference all are alike; where successes are too rare, the
  rarest is kept and the rest are alike.

  Mutants: the slope's sign; no least probability.
  """
  solve = functools.partial(
    pruning.survival_probabilities, keep=0.5, share=0.5, least=0.05
  )
  chances = np.repeat([0.05, 0.2, 0.5, 0.8, 0.95], [6, 4, 3, 2, 1])
  found = solve(chances)
  np.testing.assert_allclose(
    found[[0, 6, 10, 13, 15]], [0.218, 0.385, 0.718, 1, 1], atol=6e-4
  )
  assert found.sum() == pytest.approx(8)
  assert found @ chances == pytest.approx(4)
  np.testing.assert_allclose(solve(np.full(8, 0.3)), 0.5)
  np.testing.assert_allclose(
    solve(np.array([0.01] * 7 + [0.02])), [3 / 7] * 7 + [1]
  )
  # So few successes cannot be had: the least likely are all kept, and the most
  # likely with the least probability.
  found = solve(np.linspace(0, 1, 8), share=0.2)
  np.testing.assert_allclose(found[[0, -1]], [1, 0.05], atol=1e-6)
  assert found.sum() == pytest.approx(4)
  found = solve(np.array([1.0] * 7 + [0.0]))
  assert found[-1] == 1


def test_survivors_are_drawn_with_their_probabilities():
  """Law: always as many as the probabilities' sum, each as often as its own.

  Mutant: a fresh number for each sample.
  """
  rng = np.random.default_rng(1)
  chances = pruning.survival_probabilities(
    rng.random(10), keep=0.5, share=0.5, least=0.05
  )
  drawn = np.array(
    [pruning.draw_survivors(chances, rng.random()) for _ in range(20000)]
  )
  assert (drawn.sum(axis=1) == 5).all()
  error = np.sqrt(chances * (1 - chances) / len(drawn))
  assert (np.abs(drawn.mean(axis=0) - chances) <= 4 * error + 1e-12).all()


def test_inverse_survival_weights_undo_pruning():
  """Law: survivors of pruning by the first two tokens, weighted by K / pi, give
  the exact gradient within three standard errors (with a fixed baseline and
  no division by a deviation): 1.9. Unweighted they do not: 33.
  """
  law = _log_law(_POLICIES[0])
  exact = _exact_gradient(law)
  rng = np.random.default_rng(0)
  found = {'weighted': [], 'none': []}
  solve = functools.cache(
    lambda success: pruning.survival_probabilities(
      np.array(success), keep=0.5, share=0.5, least=0.05
    )
  )
  for _ in range(4000):
    whole = [_go_on(law, [], rng) for _ in range(6)]
    # Any function of the beginning: here it is half right.
    chances = solve(tuple(0.1 + 0.4 * y[:2].count(1) for y in whole))
    going = pruning.draw_survivors(chances, rng.random())
    sums = {name: 0.0 for name in found}
    for tokens, goes, chance in zip(whole, going, chances):
      if goes:
        gradient = (_reward(tokens) + 0.7) * _gradient(law, tokens) / 3
        sums['weighted'] += gradient * 0.5 / chance
        sums['none'] += gradient
    for name, total in sums.items():
      found[name].append(total)
  z = {name: _deviation(np.stack(x), exact) for name, x in found.items()}
  print(z)
  assert z['weighted'] < 3 < z['none']


def test_the_head_learns_what_decides_the_reward():
  """Law: on inputs of which one decides, the loss falls below half of log 2,
  the calibrated chances follow, and a weight counts as so many samples.

  Mutants: the gradient's sign; calibration without the weights.
  """
  rng = np.random.default_rng(0)
  head = quality_head.QualityHead()
  for _ in range(40):
    inputs = rng.normal(size=(64, 6))
    labels = (inputs[:, 0] > 0).astype(float)
    head = head.learn(inputs, labels, np.ones(64), seed=0)
  inputs = rng.normal(size=(64, 6))
  labels = (inputs[:, 0] > 0).astype(float)
  assert head.loss(inputs, labels) < 0.35
  chances = head.success(inputs)
  assert chances[labels == 1].mean() > 0.7 > 0.3 > chances[labels == 0].mean()
  one = quality_head.QualityHead().learn(
    inputs[:2], np.array([0.0, 1.0]), np.array([1.0, 3.0]), seed=0
  )
  assert one.counts.sum(axis=1).tolist() == [11.0, 13.0]


def test_features_are_of_the_first_tokens_alone():
  """Law: features are the mean of the policy's hidden states over the last 16
  completion tokens of the beginning, the same whoever stands beside them.

  Mutant: the span from the row's start.
  """
  model, params = _world().model, _world().params
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 6, n).astype(np.int32) for n in (1, 4, 6)]
  more = [rng.integers(0, 6, n).astype(np.int32) for n in (20, 1, 7)]
  tokens, spans = quality_head.pack_beginnings(prompts, more, length=26, rows=2)
  assert tokens.shape == (2, 2, 26)
  found = np.asarray(quality_head.features(params, tokens, spans, model=model))
  for row, (prompt, rest) in enumerate(zip(prompts, more)):
    text = np.r_[prompt, rest][None]
    order = np.arange(text.shape[1], dtype=np.int32)[None]
    hidden = np.asarray(model.hidden(params, text, order, np.ones_like(order)))[
      0
    ]
    want = hidden[max(len(prompt), text.shape[1] - 16) :].mean(axis=0)
    np.testing.assert_allclose(found.reshape(4, -1)[row], want, atol=1e-5)
