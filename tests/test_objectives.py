"""Every preset: its paper's formula, layouts, masks, stale samples, critics."""

import dataclasses
import functools
import types

from group_helpers import make_group
import jax
import jax.numpy as jnp
from learning_helpers import CAPTURE
from learning_helpers import distance
from learning_helpers import make_learner
from learning_helpers import make_state
from learning_helpers import pad_rows
from learning_helpers import plain_logprobs
from learning_helpers import poison
from learning_helpers import random_samples
from learning_helpers import rehearsed_samples
from learning_helpers import sharp_params
from learning_helpers import tiny_run
import numpy as np
import optax
import pytest

from rlax_llm import config as config_lib
from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.config import AlgorithmConfig
from rlax_llm.config import ConfigError
from rlax_llm.experience import advantages
from rlax_llm.learning import algorithms
from rlax_llm.learning import critic as critics
from rlax_llm.learning import estimators
from rlax_llm.learning import filters
from rlax_llm.learning import learner as learners
from rlax_llm.learning import objectives
from rlax_llm.learning import token_credit
from rlax_llm.learning import update as updates
from rlax_llm.learning.presets import PRESETS
from rlax_llm.models import heads

STALE = (
  'decoupled_ppo',
  'token_tis',
  'sequence_tis',
  'icepop',
  'geometric_mask',
  'stale_failure_mask',
)
# What the tokens of a sample are worth is in tests of their own.
BY_SAMPLE = [n for n, preset in PRESETS.items() if preset.credit == 'sample']


def _stale_samples(run, params, far, scored=2):
  """Samples whose old policy differs, and every `scored`-th one's sampler.

  `behaviour_logprobs` stands for old, to be moved there by `_own_old`.
  """
  samples = []
  for i, sample in enumerate(random_samples(12)):
    rng = np.random.default_rng(i)
    logprobs = plain_logprobs(run, params, sample)
    noise = lambda: rng.normal(0, far, len(logprobs)).astype(np.float32)
    old = logprobs - noise()
    samples.append(
      dataclasses.replace(
        sample,
        advantage=float(rng.normal()),
        group=i // 4,
        behaviour_logprobs=old,
        scored_logprobs=None if i % scored else old + 3 * noise(),
      )
    )
  return samples


def _own_old(learner, samples):
  batch = learner.put(learner.pack(samples, skip_without_signal=True))
  return batch.replace(old_logprobs=batch.behaviour_logprobs)


def _weights(name, old, behaviour, logprobs, advantage):
  """The weights of a sample's tokens, written from the paper."""
  gap = old - behaviour
  token = np.exp(gap)
  ones = np.ones(len(gap))
  return {
    'decoupled_ppo': np.where(token <= 5, token, 0),
    'token_tis': np.minimum(token, 2),
    'sequence_tis': np.minimum(np.exp(gap.sum()), 2) * ones,
    'icepop': np.where((token >= 0.5) & (token <= 5), token, 0),
    'geometric_mask': ones * (abs(gap.mean()) <= np.log(1.001)),
    'stale_failure_mask': ones
    * (advantage >= 0 or (behaviour - logprobs).mean() <= 0.1),
  }.get(name, ones)


def _by_paper(name, logprobs, old, advantage):
  """A preset's loss of one sample's tokens, written from the paper."""
  ratio = np.exp(logprobs - old)
  clip = lambda r, low, high: np.minimum(
    r * advantage, np.clip(r, 1 - low, 1 + high) * advantage
  )
  if name in ('gpg', 'opo', 'rloo'):
    return -ratio * advantage * logprobs
  if name == 'gspo':
    whole = np.exp(np.mean(logprobs - old))
    return np.full(len(ratio), -clip(whole, 3e-4, 4e-4))
  if name == 'cispo':
    return -np.minimum(ratio, 5.0) * advantage * logprobs
  if name == 'sapo':
    tau = 1.0 if advantage > 0 else 1.05
    return -4 / tau / (1 + np.exp(-tau * (ratio - 1))) * advantage
  if name == 'dco':
    whole = np.exp(logprobs.astype(np.float64).sum())
    value = -advantage * np.log(-np.expm1(4 * np.log1p(-whole)))
    return np.full(len(ratio), value / len(ratio))
  higher = ('dapo', 'confucius3', 'dph_forward_kl', 'dph_jensen_shannon')
  return -clip(ratio, 0.2, 0.28 if name in higher else 0.2)


def _reduced(algorithm, run, samples, losses):
  tokens = sum(map(len, losses))
  total = 0.0
  for loss in losses:
    total += (
      loss.sum()
      * {
        'token_mean': 1 / tokens,
        'sequence_mean': 1 / len(samples) / len(loss),
        'sequence_mean_token_sum': 1 / len(samples),
        'sequence_sum_token_mean_constant': 1
        / len(samples)
        / run.config.rollout.max_new_tokens,
      }[algorithm.reduction]
    )
  return total


def _entropy_term(run, params, samples):
  """Confucius3's |H - 0.55| / 1000, by a plain forward of each sample."""
  found = []
  for sample in samples:
    whole = np.concatenate([sample.prompt, sample.completion])[None]
    place = np.arange(whole.shape[1], dtype=np.int32)[None]
    hidden = run.model.hidden(params, whole, place, place * 0 + 1)
    law = np.asarray(jax.nn.log_softmax(run.model.logits(params, hidden)))[0]
    found.append(-(np.exp(law) * law).sum(-1)[len(sample.prompt) - 1 : -1])
  return 1e-3 * abs(np.concatenate(found).mean() - 0.55)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow) if name == 'confucius3' else name
    for name in BY_SAMPLE
  ],
)
def test_a_preset_is_its_paper(name):
  """Law: the update's loss is the paper's formula, reduced as its preset says,
  over packed samples of three policies: current, old, and for every other
  sample a third one that sampled it.

  Mutants: a sequence's ratio over the whole packed row; clip-higher ignored;
  the upper bound of CISPO's weight left out; SAPO's temperatures swapped;
  old - behaviour exchanged.
  """
  run, algorithm = tiny_run(minibatches=2), PRESETS[name]
  params = sharp_params(run)
  samples = _stale_samples(run, params, 2.5 if name == 'cispo' else 0.3)
  learner = make_learner(run, algorithm)
  batch = _own_old(learner, samples)
  if name == 'confucius3':
    batch = learner.shape(params, batch, None)
  _, values = learner.update(make_state(run), batch)
  losses = []
  for sample in samples:
    logprobs = plain_logprobs(run, params, sample)
    old = sample.behaviour_logprobs
    behaviour = (
      old if sample.scored_logprobs is None else (sample.scored_logprobs)
    )
    losses.append(
      _by_paper(name, logprobs, old, sample.advantage)
      * _weights(name, old, behaviour, logprobs, sample.advantage)
    )
  total = _reduced(algorithm, run, samples, losses)
  if name == 'confucius3':
    total += _entropy_term(run, params, samples)
  np.testing.assert_allclose(values['learning/loss'], total, rtol=2e-4)
  gaps = np.concatenate(
    [
      plain_logprobs(run, params, s)
      - (
        s.behaviour_logprobs if s.scored_logprobs is None else s.scored_logprobs
      )
      for s in samples
    ]
  )
  ratios = np.exp(gaps)
  np.testing.assert_allclose(
    values['policy/effective_tokens'],
    ratios.sum() ** 2 / len(ratios) / (ratios**2).sum(),
    rtol=1e-3,
  )
  assert values['policy/ratio_min'] <= values['policy/ratio_mean']
  assert values['policy/ratio_mean'] <= values['policy/ratio_max']


# ---- Samples of an earlier policy --------------------------------------------
@pytest.mark.parametrize('name', STALE)
def test_on_policy_corrections_are_exactly_one(name, monkeypatch):
  """Law: without scored log-probabilities the behaviour is the proximal
  policy: every correction weighs every token by 1, to the bit, so that its
  gradient is that of GRPO by token mean up to another program's rounding.

  Mutants: scored log-probabilities read where there are none; behaviour
  computed apart from old.
  """
  run = tiny_run()
  plain = _captured(
    run, dataclasses.replace(PRESETS[name], correction='none', rejection='none')
  )
  weights = []

  def token_loss(algorithm, tokens):
    corrected = objectives.token_loss(algorithm, tokens)
    jax.debug.callback(
      lambda *values: weights.append(values), corrected.weights, tokens.mask
    )
    return corrected

  monkeypatch.setattr(
    updates, 'objectives', types.SimpleNamespace(token_loss=token_loss)
  )
  found = _captured(run, PRESETS[name])
  jax.effects_barrier()
  assert sum(mask.sum() for _, mask in weights) > 0
  for weight, mask in weights:
    np.testing.assert_array_equal(weight, mask)
  assert distance(found, plain) < 1e-5


def test_scored_old_logprobs():
  """Law: with old_logprobs='scored' the ratio is to the policy that sampled;
  samples without a score are on-policy.

  Behaviour 0.5 below in half of the samples: ratios e^0.5 and 1. Mutant: the
  current policy's where a score is given.
  """
  run = tiny_run(old_logprobs='scored')
  params = sharp_params(run)
  samples = [
    dataclasses.replace(
      s,
      advantage=1.0,
      scored_logprobs=None
      if i % 2
      else plain_logprobs(run, params, s) - np.float32(0.5),
    )
    for i, s in enumerate(random_samples())
  ]
  learner = make_learner(run)
  prepared, _ = learner.prepare(params, samples, None)
  _, values = learner.learn(make_state(run), prepared)
  assert values['policy/ratio_max'] == pytest.approx(np.exp(0.5), rel=1e-4)
  assert values['policy/ratio_min'] == pytest.approx(1, rel=1e-5)
  stale = np.mean(
    np.concatenate(
      [[i % 2 == 0] * len(s.completion) for i, s in enumerate(samples)]
    )
  )
  assert values['policy/clip_fraction'] == pytest.approx(stale)


# ---- Layouts and masks -------------------------------------------------------
def _teacher(run):
  return learners.Teacher(run.model, run.states.init_params())


@functools.cache
def _critic_params(run):
  """A critic that does not say 0."""
  params = heads.with_value(run.states.critic_model, sharp_params(run))
  kernel = jnp.cos(jnp.arange(params['value']['kernel'].size, dtype=float))
  return params | {'value': {'kernel': kernel}}


def _updated(
  run, algorithm, samples=None, change=lambda batch: batch, params=sharp_params
):
  """Returns (flat gradient, metrics) of one update by way of `prepare`."""
  learner = make_learner(run, algorithm)
  learner._teacher = _teacher(run)  # pylint: disable=protected-access
  critic = _critic_params(run) if algorithm.has_critic else None
  rehearsed = []
  if algorithm.rehearsal != 'none':
    rehearsed = rehearsed_samples(run)
  prepared, _ = learner.prepare(
    params(run),
    samples or random_samples(),
    None,
    critic=critic,
    rehearsed=rehearsed,
  )
  batch = change(jax.device_get(prepared[0]))
  state, values = learner.update(
    make_state(run, params=params(run)), learner.put(batch)
  )
  leaves = jax.tree.leaves(jax.device_get(state.opt_state))
  return np.concatenate([x.ravel() for x in leaves]), jax.device_get(values)


def _captured(*args, **kwargs):
  """Returns the flat gradient of `_updated`."""
  return _updated(*args, **kwargs)[0]


def _mixed(run, params=sharp_params):
  """Samples in groups of 4, half of them scored under another policy."""
  params = params(run)
  return [
    dataclasses.replace(
      s,
      group=i // 4,
      extra={'progress': np.cos(s.completion)},
      scored_logprobs=None
      if i % 2
      else plain_logprobs(run, params, s)
      + np.random.default_rng(i)
      .normal(0, 0.2, len(s.completion))
      .astype(np.float32),
    )
    for i, s in enumerate(random_samples())
  ]


@pytest.mark.slow
@pytest.mark.parametrize('name', PRESETS)
def test_no_preset_depends_on_the_layout(name):
  """Law: rows of a microbatch, packing, empty rows and eight devices change
  the update by rounding only.

  Mutant: advantages whitened by microbatch.
  """
  base = tiny_run(microbatch_rows=4)
  # Of ordinary size: a weight has the absolute error of its log-probability,
  # and that grows with the logits.
  params = lambda run: run.states.init_params()
  samples = _mixed(base, params)
  capture = functools.partial(_captured, params=params)
  expected = capture(base, PRESETS[name], samples)
  assert np.linalg.norm(expected) > 1e-6
  for layout in (
    dict(microbatch_rows=1),
    dict(microbatch_rows=2, row_length=12),
  ):
    found = capture(tiny_run(**layout), PRESETS[name], samples)
    assert distance(found, expected) < 1e-5, layout
  found = capture(tiny_run(data=8), PRESETS[name], samples, change=pad_rows)
  assert distance(found, expected) < 1e-5


@pytest.mark.parametrize(
  'name',
  [
    'decoupled_ppo',
    'ppo',
    'vcpo',
    'echo',
    'on_policy_distillation',
    'dph_forward_kl',
    'mrt',
  ],
)
def test_nan_outside_the_mask_of_a_preset(name):
  """Law: values where no token is trained on are not read: NaN there changes
  no bit of the gradient and of the metrics.

  Mutant: the sampler's log-probabilities unmasked. (XLA turns a product with
  the masked weights into a select, which hides others.)
  """
  run = tiny_run(minibatches=1)
  samples = _mixed(run)
  clean, values = _updated(run, PRESETS[name], samples)
  poisoned, after = _updated(run, PRESETS[name], samples, change=poison)
  np.testing.assert_array_equal(poisoned, clean)
  assert all(
    np.array_equal(values[name], after[name]) and np.isfinite(after[name])
    for name in values
  )


# ---- A critic ----------------------------------------------------------------
def _segments(batch):
  """Returns {tokens of a sample: its arrays at its targets, by name}."""
  batch, found = jax.device_get(batch), {}
  for m, r in np.ndindex(*batch.tokens.shape[:2]):
    for number in range(1, int(batch.segments[m, r].max()) + 1):
      where = batch.segments[m, r] == number
      mine = where & batch.targets[m, r]
      arrays = {
        'advantages': batch.advantages,
        'groups': batch.groups,
        **batch.extra,
      }
      found[tuple(batch.tokens[m, r][where])] = {
        name: np.asarray(x)[m, r][mine]
        for name, x in arrays.items()
        if np.ndim(x)
      }
  return found


def _key(sample):
  return (*sample.prompt, *sample.completion)


def _plain_values(run, critic, sample):
  """Values of the states before a completion's tokens, unpacked."""
  whole = np.zeros((1, 16), np.int32)
  whole[0, : len(_key(sample))] = _key(sample)
  place = np.arange(16, dtype=np.int32)[None]
  hidden = run.model.hidden(critic['trunk'], whole, place, place * 0 + 1)[0]
  first = len(sample.prompt)
  states = np.asarray(hidden)[first - 1 : first - 1 + len(sample.completion)]
  return states @ np.asarray(critic['value']['kernel'])


def test_a_critics_advantages_are_those_of_its_paper():
  """Law: returns and whitened generalised advantages of packed samples, from
  the values of the states before the tokens, outcome at the last token; and
  the loss and the explained variance of the critic's update.

  Mutant: the outcome at every token.
  """
  run = tiny_run()
  algorithm = dataclasses.replace(PRESETS['ppo'], discount=0.9, trace=0.8)
  critic, samples = _critic_params(run), random_samples()
  learner = make_learner(run, algorithm)
  (batch,), _ = learner.prepare(sharp_params(run), samples, None, critic=critic)
  found = _segments(batch)
  assert len(found) == len(samples)
  raw, returns, errors = [], [], []
  for sample in samples:
    values = _plain_values(run, critic, sample)
    advantage, later, mine = 0.0, 0.0, []
    for t in reversed(range(len(values))):
      reward = sample.advantage if t + 1 == len(values) else 0.0
      delta = reward + 0.9 * later - values[t]
      advantage, later = delta + 0.9 * 0.8 * advantage, values[t]
      mine.append(advantage)
    raw.append(np.array(mine[::-1]))
    returns.append(raw[-1] + values)
    errors.append(raw[-1])
    np.testing.assert_allclose(
      found[_key(sample)]['returns'], returns[-1], rtol=1e-4, atol=1e-5
    )
  tokens = np.concatenate(raw)
  for sample, mine in zip(samples, raw):
    np.testing.assert_allclose(
      found[_key(sample)]['advantages'],
      (mine - tokens.mean()) / tokens.std(ddof=1),
      rtol=1e-3,
      atol=1e-4,
    )
  model = run.states.critic_model
  optimizer = optax.sgd(0.0)
  state = updates.init_state(critic, model=model, optimizer=optimizer)
  _, values = critics.update(
    state, batch, model=model, optimizer=optimizer, algorithm=algorithm
  )
  np.testing.assert_allclose(
    values['critic/loss'], (tokens**2).mean() / 2, rtol=1e-4
  )
  np.testing.assert_allclose(
    values['critic/explained_variance'],
    1 - tokens.var() / np.concatenate(returns).var(),
    rtol=1e-3,
  )


def test_a_value_does_not_see_its_token():
  """Law: another last token leaves every value of its sample as it was.

  Mutant: values not shifted by one.
  """
  run = tiny_run()
  model, critic = run.states.critic_model, _critic_params(run)
  tokens = np.array([[2, 3, 4, 5]], np.int32)
  place = np.arange(4, dtype=np.int32)[None]
  get = lambda tokens: heads.token_values(
    critic, tokens, place, place * 0 + 1, model=model
  )
  other = tokens.copy()
  other[0, -1] = 6
  np.testing.assert_array_equal(get(tokens), get(other))
  other[0, -2] = 6
  assert get(tokens)[0, -1] != get(other)[0, -1]
  assert get(tokens)[0, 0] == 0


# ---- VCPO --------------------------------------------------------------------
@functools.partial(jax.jit, static_argnums=0)
def _score_gradient(model, params, tokens, mask):
  """The gradient of the sum of a sample's log-probabilities, flat."""

  def logprob(params):
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = model.hidden(params, tokens, place, place * 0 + 1)
    law = jax.nn.log_softmax(model.logits(params, hidden))[0]
    chosen = jnp.take_along_axis(law[:-1], tokens[0, 1:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(mask[1:], chosen, 0.0))

  leaves = jax.tree.leaves(jax.grad(logprob)(params))
  return jnp.concatenate([x.ravel() for x in leaves])


def _plain_gradient(run, params, sample):
  tokens = np.zeros((1, 16), np.int32)
  tokens[0, : len(_key(sample))] = _key(sample)
  place = np.arange(16)
  mask = (place >= len(sample.prompt)) & (place < len(_key(sample)))
  return np.asarray(
    _score_gradient(run.model, params, tokens, mask), np.float64
  )


def test_vcpo_is_its_two_buffers():
  """Law: the update's gradient is S1 - b S0 of the paper's loop over samples,
  S1 = sum (R / sd) w grad, S0 = sum (1 / sd) w grad, b the baseline of minimum
  variance; the step is scaled by the root of the effective share.

  Mutants: norms not squared; weights of the baseline not squared.
  """
  run, algorithm = tiny_run(), PRESETS['vcpo']
  params = sharp_params(run)
  rng = np.random.default_rng(5)
  samples, rewards = _mixed(run)[:12], rng.normal(size=(3, 4))
  shifted = np.asarray(
    estimators.ESTIMATORS['group_population'](
      jnp.float32(rewards), None, None, None
    )
  )
  samples = [
    dataclasses.replace(s, advantage=float(a))
    for s, a in zip(samples, shifted.ravel())
  ]
  total, gaps = 0.0, []
  for group in range(3):
    mine = samples[4 * group : 4 * group + 4]
    gradients = [_plain_gradient(run, params, s) for s in mine]
    gap = np.array(
      [
        0.0
        if s.scored_logprobs is None
        else (plain_logprobs(run, params, s) - s.scored_logprobs).sum()
        for s in mine
      ]
    )
    gaps += list(gap)
    reward = rewards[group]
    shares = np.exp(gap) ** 2 * [g @ g for g in gradients]
    baseline = (shares * reward).sum() / shares.sum()
    held = np.minimum(np.exp(gap), 8) / reward.std()
    scale = [1 / len(samples) / len(s.completion) for s in mine]
    first = sum(
      r * w * c * g for r, w, c, g in zip(reward, held, scale, gradients)
    )
    second = sum(w * c * g for w, c, g in zip(held, scale, gradients))
    total = total - (first - baseline * second)
  learner = make_learner(run, algorithm)
  (batch,), _ = learner.prepare(params, samples, None)
  found = _segments(batch)
  for sample in samples:
    gradient = _plain_gradient(run, params, sample)
    np.testing.assert_allclose(
      found[_key(sample)]['squared_norms'], gradient @ gradient, rtol=1e-3
    )
  state, values = learner.update(make_state(run), batch)
  leaves = jax.tree.leaves(jax.device_get(state.opt_state))
  assert distance(np.concatenate([x.ravel() for x in leaves]), total) < 1e-3
  weights = np.exp(gaps)
  effective = weights.sum() ** 2 / len(weights) / (weights**2).sum()
  assert effective < 0.9
  np.testing.assert_allclose(
    values['learning/step_scale'], np.sqrt(effective), rtol=1e-4
  )


def test_the_step_scale_leaves_adams_moments_alone():
  """Law: with scale 1/4 the parameters move a quarter as far and the
  optimizer's state is the same.

  Mutant: the scale ignored.
  """
  run, optimizer = tiny_run(), optax.adam(1e-2)
  learner = make_learner(run, PRESETS['grpo'], optimizer)
  batch = learner.put(learner.pack(random_samples()))
  begin = jax.device_get(make_state(run, optimizer).params)
  plain, _ = learner.update(make_state(run, optimizer), batch)
  # Another static algorithm, so that another executable is made.
  scaled = dataclasses.replace(PRESETS['grpo'], keep_reference=True)
  learner = make_learner(run, scaled, optimizer)
  quarter, _ = learner.update(
    make_state(run, optimizer),
    batch.replace(extra={'step_scale': jnp.float32(0.25)}),
  )
  jax.tree.map(
    np.testing.assert_array_equal, plain.opt_state, quarter.opt_state
  )
  moved = lambda state: np.concatenate(
    [
      np.ravel(a - b)
      for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(begin))
    ]
  )
  assert distance(moved(quarter), moved(plain) / 4) < 1e-3


# ---- Credit by token ---------------------------------------------------------
def _plain_laws(run, params, sample):
  """Laws of a completion's tokens, float32[c, V], unpacked."""
  whole = np.zeros((1, 16), np.int32)
  whole[0, : len(_key(sample))] = _key(sample)
  place = np.arange(16, dtype=np.int32)[None]
  hidden = run.model.hidden(params, whole, place, place * 0 + 1)
  law = jax.nn.softmax(run.model.logits(params, hidden))
  first = len(sample.prompt)
  return np.asarray(law)[0, first - 1 : first - 1 + len(sample.completion)]


def test_distillation_credits_each_token_with_its_own_log_ratio():
  """Law: A_t = log pi_teacher - log pi_behaviour at each token, none of them
  the sample's own advantage.

  Mutant: the sign.
  """
  run = tiny_run()
  # Sharp laws magnify rounding, on some processors beyond the tolerance.
  params = run.states.init_params()
  samples = _mixed(run, lambda run: params)
  samples = [dataclasses.replace(s, advantage=0.0) for s in samples]
  teacher = learners.Teacher(run.model, jax.tree.map(lambda x: x * 0.7, params))
  learner = run.learner(
    algorithm=PRESETS['on_policy_distillation'],
    sampling=run.sampling,
    optimizer=CAPTURE,
    name='distilled',
    learning=run.config.learning,
    teacher=teacher,
  )
  (batch,), _ = learner.prepare(params, samples, None)
  found = _segments(batch)
  for sample in samples:
    behaviour = sample.scored_logprobs
    if behaviour is None:
      behaviour = plain_logprobs(run, params, sample)
    want = plain_logprobs(run, teacher.params, sample) - behaviour
    np.testing.assert_allclose(
      found[_key(sample)]['advantages'], want, rtol=1e-4, atol=1e-5
    )


def test_echos_advantages_and_clip_ranges():
  """Law: A (1 + 0.1 clip(z(H) + z(1 - C), +-2)) with z over all tokens of the
  batch, and a clip range by the confidence of the last 16 tokens.

  Mutant: confidences in the place of entropies.
  """
  run = tiny_run()
  # Sharp laws leave confidences of five tokens among seven hardly any spread.
  params, samples = run.states.init_params(), random_samples()
  (batch,), _ = make_learner(run, PRESETS['echo']).prepare(
    params, samples, None
  )
  found = _segments(batch)
  laws = [_plain_laws(run, params, s) for s in samples]
  entropy = [-(law * np.log(law)).sum(-1) for law in laws]
  sure = [np.sort(law, axis=-1)[:, -5:].mean(-1) for law in laws]

  def z(of):
    tokens = np.concatenate(of)
    return [
      (x - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8) for x in of
    ]

  for sample, a, b, c in zip(
    samples, z(entropy), z([1 - x for x in sure]), sure
  ):
    mine = found[_key(sample)]
    np.testing.assert_allclose(
      mine['advantages'],
      sample.advantage * (1 + 0.1 * np.clip(a + b, -2, 2)),
      rtol=1e-3,
      atol=1e-5,
    )
    clip = 0.05 + 0.15 / (1 + np.exp(-4 * (1 - c.mean())))
    np.testing.assert_allclose(mine['clip'], clip, rtol=1e-4)


# ---- Which samples, and whose rewards ----------------------------------------
def test_filters_by_hand():
  """Law: which samples are kept. Mutants: `signal` by sample, not by group; a
  missing value taken as 0.
  """
  outcomes = filters.Outcomes(
    np.array([[1, 0], [0, 1]], np.float32),
    np.array([[True, False], [True, True]]),
    np.array([[True, True], [True, False]]),
    np.array([[True, True], [False, False]]),
  )
  get = lambda name: filters.FILTERS[name](outcomes).tolist()
  assert get('none') == [[True, True], [True, True]]
  assert get('signal') == [[False, False], [True, True]]
  assert get('finished') == [[True, True], [True, False]]
  assert get('unrehearsed') == [[False, False], [True, True]]


def test_what_a_filter_drops_is_as_if_never_sampled():
  """Law: denominators and gradient are those of the samples that are kept;
  the weight of a sample multiplies its loss and no denominator.

  Mutants: dropped samples counted in the denominators; `weight` ignored.
  """
  run, algorithm = tiny_run(), PRESETS['dapo']
  samples = random_samples()
  kept = [s for i, s in enumerate(samples) if i % 3]
  marked = [
    dataclasses.replace(s, trained=i % 3 > 0) for i, s in enumerate(samples)
  ]
  assert (
    distance(_captured(run, algorithm, marked), _captured(run, algorithm, kept))
    < 1e-6
  )
  doubled = [dataclasses.replace(s, weight=2.0) for s in kept]
  assert (
    distance(
      _captured(run, algorithm, doubled), 2 * _captured(run, algorithm, kept)
    )
    < 1e-6
  )


def _groups(run, texts, rewards, lost=()):
  """Groups with the labels that the run learns from."""
  groups = []
  for i, (t, r) in enumerate(zip(texts, rewards)):
    r, unscorable = np.array(r, np.float32), np.zeros(len(r), bool)
    unscorable[[j for at, j in lost if at == i]] = True
    parts = {'correct': r, 'length': np.array([-1, 0, 0, 0], np.float32)}
    labels = advantages.judge(run, t, r, unscorable, parts)
    groups.append(
      make_group(
        **labels._asdict(), texts=t, unscorable=unscorable, parts=parts
      )
    )
  return groups


def test_majority_labels():
  """Law: the reward is agreement with the answer most samples give, in a
  canonical form; the verifier's is only measured.

  Mutant: the verifier's rewards.
  """
  run = dataclasses.replace(tiny_run(), algorithm=PRESETS['ttrl'])
  said = (
    [['1,000', '1000.0', ' 1000', '7'], ['a', 'B', 'b', '']],
    [[0, 0, 0, 1], [0, 1, 1, 0]],
  )
  groups = _groups(run, *said)
  assert [g.rewards.tolist() for g in groups] == [[1, 1, 1, 0], [0, 1, 1, 0]]
  values = advantages.label_metrics(run, groups)
  assert values['reward/label_accuracy'] == 0.5
  assert values['reward/label_agreement'] == 0.5
  plain = dataclasses.replace(run, algorithm=PRESETS['grpo'])
  groups = _groups(plain, *said)
  assert groups[0].rewards.tolist() == [0, 0, 0, 1]
  assert advantages.label_metrics(plain, groups) == {}


def test_rewards_are_normalised_one_by_one():
  """Law: GDPO's advantages: each reward over its group, weighted, summed, then
  over the batch.

  Mutant: weights ignored.
  """
  run = tiny_run()
  task = config_lib.freeze(
    dataclasses.replace(
      run.config.task, rewards={'correct': 1.0, 'length': 0.5}
    )
  )
  config = config_lib.freeze(dataclasses.replace(run.config, task=task))
  run = dataclasses.replace(run, algorithm=PRESETS['gdpo'], config=config)
  correct = [[1, 0, 0, 1], [0, 0, 0, 1]]
  found = advantages.advantages(run, _groups(run, [['a'] * 4] * 2, correct))
  z = lambda x, epsilon: (x - x.mean()) / (x.std(ddof=1) + epsilon)
  length = np.array([-1.0, 0, 0, 0])
  summed = np.stack(
    [z(np.array(c, float), 1e-4) + 0.5 * z(length, 1e-4) for c in correct]
  )
  np.testing.assert_allclose(found, z(summed, 1e-4), rtol=1e-4)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(weight_high=3.0), ['weight_high', "'none'", 'algorithm.correction']),
    (dict(name='token_tis', weight_low=0.1), ['weight_low', "'token'"]),
    (dict(name='decoupled_ppo', reject_high=2.0), ['reject_high', 'rejection']),
    (dict(trace=0.9), ['trace', "'sample'", "'gae'"]),
    (dict(entropy_target=0.5), ['entropy_target', 'entropy_coefficient']),
    (dict(name='echo', clip_low=0.1), ['clip_low', "'uncertainty'"]),
    (dict(name='ppo', teacher='x'), ['teacher', "'gae'"]),
    (dict(correction='tokens'), ["'tokens'", 'sequence_mask']),
    (dict(name='token_tis', weight_high=0.5), ['weight_high=0.5', '1']),
  ],
  ids=str,
)
def test_a_field_of_another_objective_is_refused(changes, words):
  """One line that names the field, and who reads it."""
  with pytest.raises(ConfigError) as error:
    algorithms.resolve(AlgorithmConfig(**changes))
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      dict(algorithm__name='token_tis', learning__old_logprobs='sampler'),
      ['correction', "old_logprobs='sampler'"],
    ),
    (
      dict(algorithm__name='ppo', algorithm__critic_warmup=4),
      ['critic_warmup=4', 'num_steps=4'],
    ),
    (
      dict(algorithm__name='vcpo', rollout__samples_per_prompt=1),
      ['samples_per_prompt=1'],
    ),
    (
      dict(algorithm__name='on_policy_distillation'),
      ['algorithm.teacher', 'workdir'],
    ),
    (
      dict(algorithm__name='gdpo', task__permute_rewards=True),
      ['permute_rewards'],
    ),
  ],
  ids=str,
)
def test_an_objective_that_does_not_fit_is_refused(changes, words):
  """One line that names the fields that disagree."""
  config = testing.tiny_config()
  for path, value in changes.items():
    section, name = path.split('__')
    setattr(getattr(config, section), name, value)
  with pytest.raises(ConfigError) as error:
    make_run(config)
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.slow
def test_no_preset_slows_the_update_down():
  """Law: the flops of every preset's update are within 5 % of GRPO's.

  Other passes are apart: values and the critic's update (ppo), norms of single
  samples (vcpo), the teacher (on_policy_distillation), entropies (confucius3,
  echo). Of a model wide enough to matter, lowered and not compiled.
  Mutant: a second forward in the update of presets with a correction.
  """
  config = testing.tiny_config()
  config.mesh.data = 1
  config.model.width, config.model.mlp_width = 128, 512
  config.model.tokenizer = 'abcdefghijklmnop'
  run = make_run(config)
  flops = {}
  for name, algorithm in PRESETS.items():
    learner = make_learner(run, algorithm)
    batch = learner.pack(random_samples())
    state = jax.eval_shape(
      lambda p: updates.init_state(p, model=run.model, optimizer=CAPTURE),
      run.states.abstract_params(),
    )
    extra = {
      k: batch.weights
      for k in token_credit.reads(algorithm) | {'returns', 'clip'}
    }
    for k in ('step_scale', 'entropy_slope'):
      extra[k] = np.float32(1)
    if algorithm.step_scale == 'none':
      del extra['step_scale']
    step = functools.partial(
      updates.update,
      model=run.model,
      optimizer=CAPTURE,
      config=updates.UpdateConfig(algorithm, run.sampling, 2048, True),
    )
    lowered = jax.jit(step).lower(
      state, batch.replace(extra=batch.extra | extra)
    )
    flops[name] = lowered.cost_analysis()['flops']
  for name, count in flops.items():
    assert count < 1.05 * flops['grpo'], (name, count / flops['grpo'])
