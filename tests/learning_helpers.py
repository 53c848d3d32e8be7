"""Runs, samples and updates of the tests of learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlax_llm import testing
from rlax_llm.components import make_run
from rlax_llm.learning import update as updates
from rlax_llm.learning.batch import Sample

# Keeps the parameters and stores the gradient, so that two updates can be
# compared without an optimizer's amplification of rounding.
CAPTURE = optax.GradientTransformation(
  init=lambda params: jax.tree.map(jnp.zeros_like, params),
  update=lambda g, state, params=None: (jax.tree.map(jnp.zeros_like, g), g),
)


@functools.cache  # With its executables: most tests share them.
def tiny_run(**learning):
  config = testing.tiny_config()
  config.model.layers = 1
  config.mesh.data = learning.pop('data', 1)
  config.learning.row_length = 24
  for name, value in learning.items():
    setattr(config.learning, name, value)
  return make_run(config)


def make_learner(run, algorithm=None, optimizer=CAPTURE):
  algorithm = algorithm or run.algorithm
  return run.learner(
    algorithm=algorithm,
    sampling=run.sampling,
    optimizer=optimizer,
    name=f'{algorithm} {id(optimizer)}',
    learning=run.config.learning,
  )


def random_samples(count=24, seed=0):
  """Random samples of 7 to 12 tokens, a third of them without signal."""
  rng = np.random.default_rng(seed)
  samples = []
  for i in range(count):
    prompt, completion = rng.integers(1, 4), rng.integers(6, 9)
    samples.append(
      Sample(
        prompt=rng.integers(2, 7, prompt).astype(np.int32),
        completion=rng.integers(0, 7, completion).astype(np.int32),
        advantage=float(rng.normal()) * (i % 3 > 0),
        behaviour_logprobs=rng.normal(size=completion).astype(np.float32),
      )
    )
  return samples


def sharp_params(run):
  """Parameters with larger logits, so that gradients are not tiny."""
  return jax.tree.map(lambda x: x * 2, run.states.init_params())


def make_state(run, optimizer=CAPTURE, params=None):
  return run.pool(
    ('state', id(optimizer)),
    lambda p: updates.init_state(p, model=run.model, optimizer=optimizer),
    sharp_params(run) if params is None else params,
  )


def gradient_of(
  run, samples, *, skip=False, change=lambda batch: batch, algorithm=None
):
  """Returns (flat gradient, metrics) of one update."""
  learner = make_learner(run, algorithm)
  batch = change(learner.pack(samples, skip_without_signal=skip))
  state, values = learner.update(make_state(run), learner.put(batch))
  leaves = jax.tree.leaves(jax.device_get(state.opt_state))
  return np.concatenate([x.ravel() for x in leaves]), values


def distance(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def pad_rows(batch):
  """Appends a microbatch of rows that hold nothing, and computes it."""
  count = int(batch.count)
  pad = lambda x: (
    np.concatenate([x[:count], np.zeros_like(x[:1])]) if np.ndim(x) else x
  )
  return jax.tree.map(pad, batch).replace(count=np.int32(count + 1))


def poison(batch):
  """NaN wherever no token is trained on; garbage tokens where there is none."""
  bad = lambda x: np.where(batch.targets, x, np.nan).astype(np.float32)
  return batch.replace(
    tokens=np.where(batch.segments > 0, batch.tokens, 6),
    **{
      name: bad(getattr(batch, name))
      for name in (
        'weights',
        'advantages',
        'old_logprobs',
        'behaviour_logprobs',
        'reference_logprobs',
        'scored_logprobs',
      )
    },
    extra={k: bad(v) if np.ndim(v) else v for k, v in batch.extra.items()},
  )


@functools.partial(jax.jit, static_argnums=0)
def _plain_law(model, params, tokens):
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  hidden = model.hidden(params, tokens, positions, positions * 0 + 1)
  return jax.nn.log_softmax(model.logits(params, hidden))[0]


def plain_law(run, params, sample):
  """Log-probabilities of all tokens at a completion's positions, unpacked and
  without our scorer."""
  tokens = np.zeros((1, 16), np.int32)
  first, count = len(sample.prompt), len(sample.completion)
  tokens[0, :first] = sample.prompt
  tokens[0, first : first + count] = sample.completion
  law = np.asarray(_plain_law(run.model, params, tokens))
  return law[np.arange(first, first + count) - 1]


def plain_logprobs(run, params, sample):
  """Log-probabilities of a completion, unpacked and without our scorer."""
  law = plain_law(run, params, sample)
  return law[np.arange(len(sample.completion)), sample.completion]


def rehearsed_samples(run, count=6):
  """Samples of another policy, the initial one, with its log-probabilities."""
  initial = jax.tree.map(lambda x: x * 0.7, sharp_params(run))
  return [
    dataclasses.replace(
      s,
      advantage=0.0,
      scored_logprobs=plain_logprobs(run, initial, s),
      extra={'rehearsed': 1.0},
    )
    for s in random_samples(count, seed=7)
  ]


SGD = optax.sgd(0.5)
