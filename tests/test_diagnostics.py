"""Metrics of the policy come from a random subset of all samples."""

import dataclasses
import json

from config_helpers import tiny_config
from config_helpers import train_quietly
import jax
import jax.numpy as jnp
from learning_helpers import make_learner
from learning_helpers import plain_law
from learning_helpers import plain_logprobs
from learning_helpers import random_samples
from learning_helpers import sharp_params
from learning_helpers import tiny_run
import numpy as np
import pytest

from rlax_llm.components import make_run
from rlax_llm.learning import diagnostics
from rlax_llm.learning.presets import PRESETS
from rlax_llm.ops import sampling
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.state import RolloutState
from rlax_llm.types import EVALUATE


def _samples(run, params, **changes):
  """Samples with exact behaviour log-probabilities."""
  return [
    dataclasses.replace(
      s, behaviour_logprobs=plain_logprobs(run, params, s), **changes
    )
    for s in random_samples()
  ]


def _fresh(samples, fresh=True):
  return [np.full(len(s.completion), fresh) for s in samples]


def _chosen(run, samples, step):
  """The samples that a step looks at: two to each of eight rows."""
  chosen = diagnostics.choose(len(samples), 16, seed=run.config.seed, step=step)
  return [samples[i] for i in chosen]


def test_the_subset_is_random_in_every_step():
  """Law: every sample is as likely as any other, in every step anew.

  Mutants: the first samples; one subset for all steps.
  """
  counts = np.zeros(24)
  for step in range(600):
    found = diagnostics.choose(24, 16, seed=0, step=step)
    assert len(set(found)) == 16
    counts[found] += 1
  np.testing.assert_allclose(counts / 600, 16 / 24, atol=0.08)
  assert diagnostics.choose(3, 16, seed=0, step=0).tolist() == [0, 1, 2]


@pytest.mark.parametrize('signal', [True, False])
def test_entropy_is_that_of_all_samples(signal):
  """Law: the entropy is the mean over the tokens of the subset, with or
  without advantages; filtered samples count.

  Mutants: samples without an advantage left out (0 without signal); filtered
  samples left out.
  """
  run, step = tiny_run(), 3
  params = sharp_params(run)
  samples = _samples(run, params)
  if not signal:
    samples = [
      dataclasses.replace(s, advantage=0.0, trained=i % 2 == 0)
      for i, s in enumerate(samples)
    ]
  found = make_learner(run).diagnose(params, samples, _fresh(samples), step)
  entropies = np.concatenate(
    [
      sampling.entropy(plain_law(run, params, s))
      for s in _chosen(run, samples, step)
    ]
  )
  np.testing.assert_allclose(
    found.values['policy/entropy'], entropies.mean(), rtol=1e-5
  )
  assert found.values['policy/behaviour_gap_max'] < 1e-3


def test_the_gap_is_that_of_fresh_tokens():
  """Law: tokens of an earlier policy have no gap; a NaN is one; without fresh
  tokens there is no metric.

  Mutants: stale tokens counted (a false alarm); NaN lost in the maximum.
  """
  run = tiny_run()
  params = sharp_params(run)
  samples = _samples(run, params)
  learner = make_learner(run)
  stale = [
    dataclasses.replace(
      s,
      behaviour_logprobs=np.where(
        np.arange(len(s.completion)) < 3,
        s.behaviour_logprobs - 2,
        s.behaviour_logprobs,
      ),
    )
    for s in samples
  ]
  fresh = [np.arange(len(s.completion)) >= 3 for s in samples]
  gap = lambda *args: learner.diagnose(params, *args, 0).values[
    'policy/behaviour_gap_max'
  ]
  assert gap(stale, fresh) < 1e-3
  assert gap(stale, _fresh(stale)) == pytest.approx(2, abs=1e-4)
  lost = [
    dataclasses.replace(s, behaviour_logprobs=s.behaviour_logprobs * np.nan)
    for s in samples
  ]
  assert np.isnan(gap(lost, fresh))
  none = learner.diagnose(params, samples, _fresh(samples, False), 0)
  assert 'policy/behaviour_gap_max' not in none.values


def test_ratios_are_those_of_the_update():
  """Law: ratios compare the policies after and before the update; tokens
  outside of the clip range are clipped where their advantage says so.

  Mutants: old and new exchanged; the first policy scored twice.
  """
  run, step = tiny_run(), 1
  before = sharp_params(run)
  after = jax.tree.map(lambda x: x * 1.3, before)
  samples = _samples(run, before, advantage=1.0)
  learner = make_learner(run)
  diagnosis = learner.diagnose(before, samples, _fresh(samples), step)
  still = learner.diagnose_update(before, diagnosis, None)
  assert still['policy/ratio_max'] == still['policy/ratio_min'] == 1
  assert still['policy/approximate_kl'] == still['policy/clip_fraction'] == 0
  moved = learner.diagnose_update(after, diagnosis, before)
  gaps = np.concatenate(
    [
      plain_logprobs(run, after, s) - plain_logprobs(run, before, s)
      for s in _chosen(run, samples, step)
    ]
  )
  close = lambda name, want: np.testing.assert_allclose(
    moved[f'policy/{name}'], want, rtol=1e-4, atol=1e-6
  )
  close('ratio_max', np.exp(gaps).max())
  close('ratio_mean', np.exp(gaps).mean())
  close('ratio_min', np.exp(gaps).min())
  close('approximate_kl', -gaps.mean())
  close('clip_fraction', np.mean(np.exp(gaps) > 1.2))
  close(
    'effective_tokens',
    np.exp(gaps).sum() ** 2 / (len(gaps) * np.exp(2 * gaps).sum()),
  )
  close('kl_reference_k3', 0)


@pytest.mark.parametrize('name', ['ppo', 'echo', 'grpo'])
def test_what_depends_on_advantages_is_measured_where_they_are_known(name):
  """Law: where a credit shapes advantages, the diagnosis of a few samples says
  nothing of clipping; the update, which then leaves no sample out, does.

  Mutant: clip fractions of rewards in place of shaped advantages.
  """
  run, algorithm = tiny_run(), PRESETS[name]
  params = sharp_params(run)
  samples = _samples(run, params, advantage=0.0)
  learner = make_learner(run, algorithm)
  found = learner.diagnose_update(
    params, learner.diagnose(params, samples, _fresh(samples), 0), None
  )
  shaped = name != 'grpo'
  assert ('policy/clip_fraction' in found) != shaped
  assert set(found) <= diagnostics.names(algorithm)
  batch = learner.pack(samples, skip_without_signal=True)
  assert (batch.targets.sum() > 0) == shaped


def _rows(folder, name='metrics.jsonl'):
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_stale_run_samples_and_scores_what_is_read(tmp_path, monkeypatch):
  """Law: with an objective that does not read by which policy a token was
  sampled nothing is scored for it; the last steps sample nothing, and the gap
  of what is sampled stays small, with old log-probabilities of any kind.

  Mutants: every stale batch scored; batches sampled for steps beyond the last;
  the gap of stale tokens measured under today's policy.
  """
  from rlax_llm.learning import learner as learners

  scored = []
  score = learners.Learner.score_samples
  monkeypatch.setattr(
    learners.Learner,
    'score_samples',
    lambda *args: scored.append(1) or score(*args),
  )
  for source, reads in (('sampler', False), ('scored', True)):
    folder = tmp_path / source
    scored.clear()
    train_quietly(
      tiny_config(
        num_steps=4,
        control__staleness=2,
        learning__learning_rate=0.05,
        learning__old_logprobs=source,
      ),
      folder,
    )
    assert bool(scored) == reads
    rows = _rows(folder)
    assert [row['rollout/sampled_tokens'] > 0 for row in rows] == [
      True,
      True,
      False,
      False,
    ]
    assert [('policy/effective_tokens' in row) for row in rows] == [reads] * 4
    gaps = [
      row['policy/behaviour_gap_max']
      for row in _rows(folder, 'timing.jsonl')
      if 'policy/behaviour_gap_max' in row
    ]
    # The first two steps sample; the third learns from the first's samples.
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_which_objectives_read_the_sampler():
  """Law: a credit, a step scale, a correction or a rejection reads it, and so
  do old log-probabilities that are the sampler's scores.

  Mutants: each of them forgotten; all objectives.
  """
  read = lambda run, **changes: (
    make_learner(
      run, dataclasses.replace(PRESETS['grpo'], **changes)
    ).reads_sampler
  )
  for changes in (
    dict(credit='minimum_variance'),
    dict(credit='distillation'),
    dict(step_scale='effective_samples'),
    dict(correction='token'),
    dict(rejection='stale_failures'),
  ):
    assert read(tiny_run(), **changes), changes
  assert read(tiny_run(old_logprobs='scored'))
  for name in ('grpo', 'dapo', 'ppo', 'rloo', 'gspo'):
    assert not make_learner(tiny_run(), PRESETS[name]).reads_sampler, name


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named(temperature, bad):
  """Law: a sample from such logits has no finite log-probability, also when
  greedy, and the engine counts it.

  Mutants: a greedy token's log-probability 0 whatever the logits; only NaN
  counted.
  """
  logits = jnp.array([[0.0, 1.0, 2.0], [0.0, bad, 1.0]])
  law = sampling.log_law(logits, Sampling(temperature=temperature))
  assert np.isfinite(law[0].max()) and np.isnan(law[1].max())
  run = make_run(tiny_config())
  engine = run.engine(Sampling(temperature=temperature))
  params = run.states.init_params()
  requests = run.requests(run.problems(0), samples=2, domain=EVALUATE, step=0)
  engine.generate(params, requests, RolloutState())
  assert not engine.stats.warning()
  engine.generate(
    jax.tree.map(lambda x: x * bad, params), requests, RolloutState()
  )
  assert engine.stats.nonfinite_samples == 8
  assert engine.stats.warning().startswith('8 samples: tokens were drawn from')
