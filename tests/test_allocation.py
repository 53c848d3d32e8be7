"""Extra samples for hard prompts, and groups of different sizes."""

import contextlib
import dataclasses
import json

from group_helpers import Collecting
from group_helpers import make_group
import numpy as np
import pytest

from rlax_llm import components as runs
from rlax_llm import testing
from rlax_llm.config import ConfigError
from rlax_llm.experience import advantages
from rlax_llm.learning import learner as learners
from rlax_llm.learning.allocation import SuccessHistory
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.length_ranker import LengthHistory
from rlax_llm.learning.length_ranker import prompt_key
from rlax_llm.learning.presets import PRESETS
from rlax_llm.ops import rewards as reward_ops
from rlax_llm.tasks.verifier.verifier import Verifier


def _run(**changes):
  """A run of the tiny config, with changes to `control` or to what is named."""
  config = testing.tiny_config()
  config.mesh.data = 1
  config.rollout.drafter = 'none'
  config.rollout.width = 1
  for path, value in changes.items():
    section, _, name = path.rpartition('__')
    setattr(getattr(config, section or 'control'), name, value)
  return runs.make_run(config)


@pytest.fixture(name='collect_with')
def _collect_with():
  """Makes the collector of a run; closes its verifiers."""
  with contextlib.ExitStack() as stack:

    def make(run):
      verifier = stack.enter_context(Verifier(run.config.task, run.config.seed))
      return Collecting(run, verifier)

    yield make


def _collected(run, collector, steps):
  """Yields the groups of each step, of a policy that does not change."""
  params = run.states.init_params()
  for step in range(steps):
    found = collector.collect(params, step)
    collector.commit()
    yield found


def _spied(collector):
  """Returns a list that fills with all groups that are sampled, in order."""
  seen = []
  real = collector.collector.reward  # pylint: disable=protected-access

  def reward(batch):
    real(batch)
    seen.extend(collector.collector._rewarded)

  collector.collector.reward = reward
  return seen


def _check_extra(request, count, known):
  """Asserts that a request got what DARS's schedule says; returns it.

  Args:
    request: of some step.
    count: its rollouts.
    known: accuracies before each step, by prompt.
  """
  accuracy = known[request.step].get(request.prompt.tobytes())
  extra = (
    0
    if accuracy is None
    else reward_ops.extra_rollouts(
      accuracy, samples=4, most=10, hardness_weighted=True, scaled=True
    )
  )
  assert count == request.samples == 4 + extra
  return extra


@pytest.mark.parametrize(
  'changes',
  [
    dict(),
    pytest.param(
      dict(dynamic_sampling=2, over_provision=1.5, rollout__max_new_tokens=1),
      marks=pytest.mark.slow,
    ),
  ],
  ids=['alone', 'composed'],
)
def test_hard_prompts_get_more_by_what_earlier_steps_saw(collect_with, changes):
  """Law: nobody gets more before it was sampled; then as many as DARS's
  schedule gives for the accuracy of the prompt's newest group of an earlier
  step, groups that were dropped included. The first G samples of a group are
  those of the run without extra samples. The state comes back from JSON as it
  was.

  Mutants: accuracies noted within the step; those of dropped groups not noted;
  no cap.
  """
  run = _run(extra_samples=6, extra_by_hardness=True, **changes)
  plain = _run(**changes)
  collector = collect_with(run)
  seen, known, sizes = _spied(collector), [{}], []
  for found, base in zip(
    _collected(run, collector, 3), _collected(plain, collect_with(plain), 3)
  ):
    sizes.append(
      [
        _check_extra(group.request, len(group.rollouts), known)
        for group in seen
      ]
    )
    if not changes:
      assert collector.metrics()['rollout/extra_samples'] == sum(sizes[-1])
      assert [[r.tokens.tolist() for r in g.rollouts[:4]] for g in found] == [
        [r.tokens.tolist() for r in g.rollouts] for g in base
      ]
    known.append(
      known[-1]
      | {g.request.prompt.tobytes(): g.correctness.mean() for g in seen}
    )
    seen.clear()
    record = collector.dump()
    assert sorted(record['successes']['accuracies'].values()) == pytest.approx(
      sorted(known[-1].values())
    )
    again = collect_with(run)
    again.restore(record)
    assert again.dump() == record
  assert not any(sizes[0]) and max(map(max, sizes)) == 6


def test_groups_of_different_sizes_are_judged_one_by_one():
  """Law: each group's advantages are those that it has alone; permuted rewards
  keep the sizes; a filter looks at each group.

  Mutants: advantages in the order of sizes; the empty groups counted.
  """
  run = _run()
  groups = [
    make_group([1, 0, 0, 1]),
    make_group([0, 0, 1, 0, 0, 0]),
    make_group([0, 0, 0, 0]),
    make_group([1, 1, 0, 1, 0]),
  ]
  for name in ('grpo', 'dr_grpo', 'rloo', 'opo'):
    run = dataclasses.replace(run, algorithm=PRESETS[name])
    found = advantages.advantages(run, groups)
    alone = [advantages.advantages(run, [g])[0] for g in groups]
    for mine, want in zip(found, alone):
      np.testing.assert_allclose(mine, want, rtol=1e-6)
    assert all(np.ptp(x) > 0 for x in found[:2]) and not found[2].any()
  signal = dataclasses.replace(run, algorithm=PRESETS['confucius3'])
  assert [
    x.all()
    for x in advantages.trained_samples(
      signal, groups, np.zeros(len(groups), bool)
    )
  ] == [True, True, False, True]
  shuffled = advantages.permuted(groups, 0, 0)
  assert [len(g.rewards) for g in shuffled] == [4, 6, 4, 5]
  assert sum(g.rewards.sum() for g in shuffled) == sum(
    g.rewards.sum() for g in groups
  )


def test_optimizer_steps_take_whole_groups():
  """Law: as many groups each, however many samples they have.

  Mutant: as many samples each.
  """
  one = np.ones(1, np.int32)
  samples = [Sample(one, one, group=g) for g in (0, 0, 0, 1, 2, 3)]
  parts = learners._split(samples, 2)  # pylint: disable=protected-access
  assert [[s.group for s in part] for part in parts] == [[0, 0, 0, 1], [2, 3]]
  with pytest.raises(ValueError, match='4 groups cannot be divided .*=3'):
    learners._split(samples, 3)  # pylint: disable=protected-access


def test_impossible_allocations_are_refused():
  """Law: one line that names the value, the limit and the remedy.

  Mutant: estimators that compare groups admitted.
  """
  for changes, message in [
    (
      dict(extra_by_hardness=True),
      'extra_by_hardness=True has no effect with control.extra_samples=0',
    ),
    (dict(extra_samples=-1), 'extra_samples=-1 must be at least 0'),
    (
      dict(extra_samples=4, algorithm__name='reinforce_plus_plus'),
      'extra_samples=4 makes groups of different sizes.*group_centred',
    ),
  ]:
    with pytest.raises(ConfigError, match=message):
      _run(**changes)


def test_a_key_is_a_literal():
  """A literal: keys are compared with those of earlier processes.

  Mutant: Python's own hash, which differs in every process.
  """
  prompt = np.array([1, 2, 300])
  assert prompt_key(prompt) == '4y8hyzdzeX8Y8bbbNvNZ3w'
  assert prompt_key(prompt.astype(np.int16)) == prompt_key(prompt)
  assert prompt_key(prompt[::-1]) != prompt_key(prompt)


def _histories(prompts):
  """Returns (name of the field by prompt, history) of both kinds."""
  lengths = LengthHistory().observe(
    prompts, [np.array([3, 5 + i]) for i in range(4)], keep=0.7
  )
  successes = SuccessHistory().observe(prompts, [0.0, 0.25, 0.5, 1.0])
  return [('prompts', lengths), ('accuracies', successes)]


@pytest.mark.parametrize('kind', [0, 1], ids=['lengths', 'successes'])
def test_what_is_kept_of_a_prompt_does_not_grow_with_it(kind):
  """Law: the record of a prompt is as long for 4000 tokens as for 4; prompts
  that differ in one token are told apart.

  Mutants: tokens as keys; a digest of the first tokens.
  """
  sizes = []
  for length in (4, 4000):
    prompts = [np.full(length, 7, np.int32) for _ in range(4)]
    for i, prompt in enumerate(prompts):
      prompt[-1] = i
    name, history = _histories(prompts)[kind]
    record = history.dump()[name]
    assert len(record) == 4
    sizes.append(sum(map(len, record)))
  assert sizes[0] == sizes[1] < 200


@pytest.mark.parametrize('kind', [0, 1], ids=['lengths', 'successes'])
def test_histories_of_earlier_versions_are_taken_over(kind):
  """Law: a record whose keys are the tokens in hexadecimal becomes the history
  that it would be today, in the same order; so does one of both kinds of keys.

  Mutants: old keys kept, so that no prompt is known; the order lost.
  """
  rng = np.random.default_rng(0)
  # Of 11 tokens, a key of old has four times the length of one of today.
  prompts = [rng.integers(0, 9, n).astype(np.int32) for n in (1, 3, 11, 22)]
  name, history = _histories(prompts)[kind]
  record = json.loads(json.dumps(history.dump()))
  old = dict(record)
  old[name] = {
    prompt.astype('<i4').tobytes().hex() if i != 2 else key: value
    for i, (prompt, (key, value)) in enumerate(
      zip(prompts, record[name].items())
    )
  }
  again = type(history).restore(old)
  assert again == history
  assert list(getattr(again, name)) == list(record[name])


def test_own_metrics_stay_with_their_samples(collect_with):
  """Law: what a sample's score reports is in the group, in those of its samples
  that are picked, and in groups that wait in a checkpoint.

  Mutants: metrics of the first group for all; left out of the record, or of
  `only`.
  """
  run = _run(replay=1, task__name='process_task:Reporting')
  collector = collect_with(run)
  for found in _collected(run, collector, 1):
    for group in found:
      wanted = tuple({'letters': float(len(text))} for text in group.texts)
      assert group.metrics == wanted
      last = np.array([False] * 3 + [True])
      assert group.only(last).metrics == wanted[3:]
  record = collector.dump()
  again = collect_with(run)
  again.restore(record)
  assert again.dump() == record
  assert [item['metrics'] for item in record['past']] == [
    list(group.metrics) for group in found
  ]
