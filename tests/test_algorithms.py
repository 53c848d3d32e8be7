"""Objectives that take more than a batch: rehearsal, progress, leaps."""

import dataclasses
import types

from config_helpers import tiny_config
from config_helpers import train_quietly
from group_helpers import Collecting
import jax
import jax.numpy as jnp
from learning_helpers import distance
from learning_helpers import gradient_of
from learning_helpers import make_learner
from learning_helpers import make_state
from learning_helpers import plain_logprobs
from learning_helpers import random_samples
from learning_helpers import rehearsed_samples
from learning_helpers import sharp_params
from learning_helpers import tiny_run
import numpy as np
import pytest

from rlax_llm.components import make_run
from rlax_llm.config import AlgorithmConfig
from rlax_llm.config import ConfigError
from rlax_llm.experience import progress_rewards
from rlax_llm.experience import rehearsal
from rlax_llm.experience.groups import Group
from rlax_llm.learning import algorithms
from rlax_llm.learning.presets import PRESETS
from rlax_llm.tasks import extract
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import FORCE
from rlax_llm.types import REHEARSE
from rlax_llm.types import Request
from rlax_llm.types import Rollout


# ---- DPH-RL ------------------------------------------------------------------
@pytest.mark.parametrize('name', ['dph_forward_kl', 'dph_jensen_shannon'])
def test_rehearsal_is_its_paper(name):
  """Law: the loss is GRPO's over the step's tokens, plus the coefficient times
  the mean of f(u) over the rehearsed ones, u = pi / pi_initial; every metric of
  the policy is of the step's tokens alone.

  Mutants: u turned over; rehearsed tokens counted in the step's denominator;
  samples without advantage left out with those of the step.
  """
  run, algorithm = tiny_run(), PRESETS[name]
  params, samples = sharp_params(run), random_samples()
  rehearsed = rehearsed_samples(run)
  learner = make_learner(run, algorithm)
  prepared, _ = learner.prepare(params, samples, None, rehearsed=rehearsed)
  _, values = learner.learn(make_state(run), prepared)
  gap = np.concatenate(
    [plain_logprobs(run, params, s) - s.scored_logprobs for s in rehearsed]
  ).astype(np.float64)
  u = np.exp(gap)
  terms = {
    'dph_forward_kl': u - 1 - gap,
    'dph_jensen_shannon': u * gap - (u + 1) * np.log((u + 1) / 2),
  }[name]
  assert terms.mean() > 0.01
  np.testing.assert_allclose(
    values['policy/rehearsal_divergence'], terms.mean(), rtol=1e-3
  )
  tokens = sum(len(s.completion) for s in samples)
  own = -sum(s.advantage * len(s.completion) for s in samples) / tokens
  coefficient = algorithm.rehearsal_coefficient
  np.testing.assert_allclose(
    values['learning/loss'], own + coefficient * terms.mean(), rtol=1e-4
  )
  plain = dataclasses.replace(algorithm, rehearsal='none', filter='none')
  prepared, _ = make_learner(run, plain).prepare(params, samples, None)
  _, alone = make_learner(run, plain).learn(make_state(run), prepared)
  for metric in (
    'policy/entropy',
    'policy/ratio_mean',
    'policy/approximate_kl',
    'policy/effective_tokens',
  ):
    np.testing.assert_allclose(values[metric], alone[metric], rtol=1e-5)


def test_rehearsal_pulls_back_to_the_initial_policy():
  """Law: at the initial policy the term has no gradient; elsewhere the gradient
  of the forward KL is the mean of (u - 1) grad log pi.

  Mutant: the stored log-probabilities taken for the policy's.
  """
  run = tiny_run()
  algorithm = dataclasses.replace(
    PRESETS['dph_forward_kl'], rehearsal_coefficient=1.0
  )
  params = sharp_params(run)
  samples = [
    dataclasses.replace(s, scored_logprobs=plain_logprobs(run, params, s))
    for s in rehearsed_samples(run)
  ]
  still, _ = gradient_of(run, samples, algorithm=algorithm)
  moved = rehearsed_samples(run)
  gradient, _ = gradient_of(run, moved, algorithm=algorithm)
  # REINFORCE with advantages 1 - u has the same.
  weights = [
    1 - np.exp(plain_logprobs(run, params, s) - s.scored_logprobs)
    for s in moved
  ]

  def by_token(batch):
    places = np.zeros(batch.tokens.shape, np.float32)
    whole = {(*s.prompt, *s.completion): w for s, w in zip(moved, weights)}
    for m, r in np.ndindex(*batch.tokens.shape[:2]):
      for number in range(1, int(batch.segments[m, r].max()) + 1):
        where = batch.segments[m, r] == number
        places[m, r, where & batch.targets[m, r]] = whole[
          tuple(batch.tokens[m, r][where])
        ]
    return batch.replace(advantages=places)

  plain = dataclasses.replace(PRESETS['dapo'], loss='reinforce')
  want, _ = gradient_of(
    run,
    [
      dataclasses.replace(s, extra={}, scored_logprobs=None, advantage=1.0)
      for s in moved
    ],
    algorithm=plain,
    change=by_token,
  )
  assert np.linalg.norm(want) > 1e-2
  assert distance(gradient, want) < 1e-5
  assert np.linalg.norm(still) < 1e-3 * np.linalg.norm(want)


def _collector(run, verifier, seen):
  learner = make_learner(run)

  def score(params, samples):
    seen.append(samples)
    return learner.score_samples(params, samples)

  return Collecting(run, verifier, score)


def test_what_is_rehearsed():
  """Law: right samples of the problems that the initial policy solves, with its
  log-probabilities; those of a step are drawn anew, as many as its share, and
  are the same after a restore; groups of those problems are known.

  Mutants: wrong samples kept; the draw without the step; not in the checkpoint.
  """
  run = make_run(
    tiny_config(
      algorithm__name='dph_forward_kl',
      algorithm__rehearsal_least=0.15,
      algorithm__rehearsal_prompts=4,
      algorithm__rehearsal_share=0.1,
    )
  )
  params = run.states.init_params()
  seen = []
  with Verifier(run.config.task, run.config.seed) as verifier:
    collector = _collector(run, verifier, seen)
    groups = collector.collect(params, 0)
    collector.commit()
  (scored,) = seen
  kept = {(*s.prompt, *s.completion) for s in scored}
  decode = run.tokenizer.decode
  assert kept and all(
    set(decode(s.completion)) == set(decode(s.prompt)) for s in scored
  )
  drawn = [rehearsal.samples(run, collector.buffer, step) for step in range(6)]
  want = {
    (*s.prompt, *s.completion): plain_logprobs(run, params, s) for s in scored
  }
  for samples in drawn:
    assert len(samples) == min(2, len(scored))  # 0.1 of 16, rounded up
    for s in samples:
      assert s.rehearsed and s.advantage == 0
      np.testing.assert_allclose(
        s.scored_logprobs, want[(*s.prompt, *s.completion)], atol=1e-5
      )
  names = [[s.completion.tolist() for s in samples] for samples in drawn]
  assert any(x != names[0] for x in names)
  solved = {decode(s.prompt) for s in scored}
  assert rehearsal.is_solved(collector.buffer, groups).tolist() == [
    g.problem.prompt in solved for g in groups
  ]
  again = _collector(run, None, seen)
  again.restore(collector.dump())
  for step, samples in enumerate(drawn):
    for a, b in zip(
      rehearsal.samples(run, again.buffer, step), samples, strict=True
    ):
      np.testing.assert_array_equal(a.completion, b.completion)
      np.testing.assert_array_equal(a.scored_logprobs, b.scored_logprobs)
  # No noise key of a training sample is one of theirs.
  assert all(g.request.domain != REHEARSE for g in groups)


# ---- MRT ---------------------------------------------------------------------
@pytest.mark.parametrize(
  'text, marker, episodes, ends',
  [
    ('12345678', '', 4, [2, 4, 6]),
    ('12', '', 4, [1]),
    ('1', '', 4, []),
    ('a=b=c', '=', 4, [2, 4]),
    ('a=b=', '=', 4, [2]),
    ('abc', '=', 4, []),
    ('a=b=c=d=e=f', '=', 3, [4, 8]),
  ],
)
def test_where_episodes_end(text, marker, episodes, ends):
  """Law: by hand, a token a character; the sample's own end is none.

  Mutant: the end before the marker.
  """
  tokens = np.array([ord(c) for c in text], np.int32)
  decode = lambda ids: ''.join(map(chr, ids))
  assert (
    progress_rewards.episode_ends(
      tokens, decode, marker=marker, episodes=episodes
    )
    == ends
  )


def _sample(prompt, text, run):
  tokens = np.array(run.encode(text, prompt=False), np.int32)
  return Rollout(
    tokens=tokens,
    length=len(tokens),
    finished=True,
    token_version=np.zeros(len(tokens), np.int32),
    behaviour_logprobs=np.zeros(len(tokens), np.float32),
    drafted=np.zeros(len(tokens), bool),
    forwards=0,
    request=Request(np.array(run.encode(prompt, prompt=True)), 1, 0, 3, 0),
    index=0,
  )


def test_progress_by_hand():
  """Law: the tokens of episode j get J_j - J_(j-1), J the mean score of
  progress_samples answers behind the opening; episode 0 and unscorable samples
  get 0; the last J is the sample's own score; ends without room are passed by.

  Two tokens an episode, 'x' answered with one more token: behind 'ab' answers
  are 'aba' and 'abb' (J 2/3, 1/3: mean 1/2); own score 5/6. Mutants: the bonus
  at the episode before; the mean over answers of different ends; the opening
  left out.
  """
  run = make_run(
    tiny_config(
      algorithm__name='mrt',
      algorithm__progress_tokens=2,
      algorithm__progress_samples=2,
      algorithm__progress_episodes=3,
      task__answer_format='after_equals',
      model__tokenizer='abcd=.',
    )
  )
  asked = []

  def generate(params, requests, state, *, limit, drafter_params):
    del params, drafter_params
    assert limit == 2
    out = []
    for request in requests:
      assert request.domain == FORCE and request.step == 3
      for index in range(request.samples):
        begun = state.earlier[
          (request.domain, request.step, request.request, index)
        ]
        assert begun.suspended and not begun.finished
        text = run.tokenizer.decode(begun.tokens)
        asked.append(text)
        out.append(
          dataclasses.replace(
            begun, tokens=np.array(run.encode(text + 'ab'[index], prompt=False))
          )
        )
    return out, state

  def score(problems, texts):
    letters = [(p.prompt, t.replace('=', '')) for p, t in zip(problems, texts)]
    return types.SimpleNamespace(
      rewards=np.array([t.count(p) / len(t) for p, t in letters]),
      unscorable=np.zeros(len(texts), bool),
    )

  forced = progress_rewards.ForcedAnswers(
    run,
    types.SimpleNamespace(generate=generate),
    types.SimpleNamespace(score=score),
  )
  problem = types.SimpleNamespace(prompt='a')
  texts = ('abaaaa', 'bb', 'aaaaaa')
  group = Group(
    problem=problem,
    rollouts=tuple(_sample('a', t, run) for t in texts),
    texts=texts,
    rewards=np.zeros(3),
    correctness=np.zeros(3),
    known=np.array([True, True, False]),
    unscorable=np.array([False, False, True]),
    parts={'correct': np.array([5 / 6, 0, 0], np.float32)},
  )
  found, values = forced.progress((), [group], 3)
  assert asked == ['ab='] * 2 + ['abaa='] * 2 + ['b='] * 2
  np.testing.assert_allclose(
    found[0], [0, 0, *[0.7 - 0.5] * 2, *[5 / 6 - 0.7] * 2], rtol=1e-5
  )
  np.testing.assert_allclose(found[1], [0, 0 - 0.25], rtol=1e-5)
  assert found[2].tolist() == [0] * 6
  np.testing.assert_allclose(
    values['reward/forced'], (0.5 + 0.7 + 0.25) / 3, rtol=1e-5
  )


def test_progress_is_added_to_the_advantages():
  """Law: A_t = A + coefficient * progress_t.

  Mutant: the coefficient ignored.
  """
  run = tiny_run()
  samples = [
    dataclasses.replace(s, extra={'progress': np.sin(s.completion)})
    for s in random_samples()
  ]
  algorithm = dataclasses.replace(PRESETS['mrt'], progress_coefficient=0.3)
  (batch,), _ = make_learner(run, algorithm).prepare(
    sharp_params(run), samples, None
  )
  batch = jax.device_get(batch)
  plain = make_learner(run, algorithm).pack(samples)
  want = np.where(
    batch.targets, plain.advantages + 0.3 * np.sin(batch.tokens), 0
  )
  np.testing.assert_allclose(batch.advantages, want, atol=1e-6)


def test_openings_stand_before_an_answer():
  """Law: what stands behind a format's opening is read as the answer.

  Mutant: the opening of another format.
  """
  for place in extract.FORMATS:
    closing = {'tag': '</answer>', 'boxed': '}'}.get(place, '')
    text = f'worked{extract.opening(place)}17{closing}'
    got = extract.extract_answer(text, place)
    assert got == ('worked17' if place == 'all' else '17')


# ---- EffOPD ------------------------------------------------------------------
def _leaps(run, scores):
  """Leaps whose judge goes by the first parameter, and what it was shown."""
  shown = []

  def judge(states, problems):
    assert len(problems) == 2  # as many as the task has
    value = float(jax.tree.leaves(states['policy'].params)[0].ravel()[0])
    shown.append(value)
    found = scores(value)
    return (
      found
      if isinstance(found, Judged)
      else Judged(np.arange(10)[None] < found, np.ones((1, 10), bool))
    )

  return run.extrapolation(judge), shown


def _state(run, value):
  state = make_state(run)
  return state.replace(
    params=jax.tree.map(lambda x: jnp.full_like(x, value), state.params)
  )


def test_leaps_by_hand():
  """Law: W + 2^k (W - W'), k = 1 ... 3, from the same W; the best that is not
  worse is taken, the nearest of equals; W' is what the leap led to. Leaps come
  before steps 1, 2, 4, 8 only.

  W' = 0, W = 1: 3, 5 and 9 are tried. Mutants: candidates from one another;
  W' kept; a worse one taken.
  """
  run = dataclasses.replace(
    tiny_run(), algorithm=dataclasses.replace(PRESETS['effopd'], leaps=3)
  )
  first = lambda states: float(
    jax.tree.leaves(states['policy'].params)[0].ravel()[0]
  )
  found, shown = _leaps(run, lambda value: 10 - abs(value - 5))
  states = {'policy': _state(run, 0.0)}
  states |= found.init(states)
  states['policy'] = _state(run, 1.0)
  for step in (0, 3, 5, 6, 7):
    assert found.before_step(step, states) == (states, {})
  leaped, values = found.before_step(2, states)
  assert shown == [1, 3, 5, 9] and first(leaped) == 5
  assert values == {'learning/leap': 4.0, 'learning/leap_accuracy': 1}
  assert leaped['policy'].opt_state is states['policy'].opt_state
  # W = 6 since: worse whichever way it goes on, and it stays.
  leaped['policy'] = _state(run, 6.0)
  shown.clear()
  stayed, values = found.before_step(4, leaped)
  assert shown == [6, 8, 10, 14] and first(stayed) == 6
  assert values['learning/leap'] == 0
  equal, _ = _leaps(run, lambda value: 3)
  leaped, values = equal.before_step(1, states)
  assert first(leaped) == 3 and values['learning/leap'] == 2


@pytest.mark.slow
def test_such_a_run_continues(tmp_path):
  """Law: what is rehearsed and where leaps come from are in the checkpoint: a
  stopped run ends with the bits of the whole one.

  Mutants: `earlier` or `rehearsal` not restored.
  """
  both = dict(
    algorithm__name='dph_forward_kl',
    algorithm__rehearsal_least=0.0,
    algorithm__filter='none',
    algorithm__leaps=2,
  )
  go = lambda name, **more: train_quietly(
    tiny_config(**both, **more), tmp_path / name
  )
  whole = go('whole')
  go('parts', num_steps=1)  # leaps are due before steps 1 and 2
  parts = go('parts')
  assert parts['parameters_sha256'] == whole['parameters_sha256']
  assert parts['tokens_sha256'] == whole['tokens_sha256']


# ---- Mistakes ----------------------------------------------------------------
@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(rehearsal_share=0.5), ['rehearsal_share', 'algorithm.rehearsal']),
    (dict(progress_marker='='), ['progress_marker', "'progress'"]),
    (dict(leap_problems=10), ['leap_problems', 'algorithm.leaps']),
    (dict(filter='unrehearsed'), ['unrehearsed', 'algorithm.rehearsal']),
    (dict(name='ppo', rehearsal='forward_kl'), ['rehearsal', "'gae'"]),
    (dict(rehearsal='reverse'), ["'reverse'", 'jensen_shannon']),
    (dict(name='mrt', progress_episodes=1), ['progress_episodes=1', '2']),
  ],
  ids=str,
)
def test_a_field_without_its_objective_is_refused(changes, words):
  """One line that names the field, and who reads it."""
  with pytest.raises(ConfigError) as error:
    algorithms.resolve(AlgorithmConfig(**changes))
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      dict(algorithm__name='mrt', task__permute_rewards=True),
      ["credit='progress'", 'permute_rewards'],
    ),
    (
      dict(algorithm__name='dph_forward_kl', algorithm__labels='majority'),
      ['rehearsal', 'labels'],
    ),
    (dict(algorithm__leaps=3, model__lora__rank=2), ['leaps=3', 'rank=2']),
  ],
  ids=str,
)
def test_such_an_objective_that_does_not_fit_is_refused(changes, words):
  """One line that names the fields that disagree."""
  with pytest.raises(ConfigError) as error:
    make_run(tiny_config(**changes))
  assert all(word in str(error.value) for word in words), error.value


def test_what_cannot_be_rehearsed_or_forced_is_refused():
  """One line that names the limit and the remedy."""
  run = make_run(tiny_config(algorithm__name='mrt'))
  with pytest.raises(ConfigError, match='progress_tokens=8 .*max_new_tokens=8'):
    progress_rewards.ForcedAnswers(run, None, None)
  run = make_run(
    tiny_config(
      algorithm__name='dph_forward_kl',
      algorithm__rehearsal_least=1.0,
      algorithm__rehearsal_prompts=2,
    )
  )
  with Verifier(run.config.task, run.config.seed) as verifier:
    collector = _collector(run, verifier, [])
    with pytest.raises(ConfigError, match='lower algorithm.rehearsal_least'):
      collector.collect(None, 0)
