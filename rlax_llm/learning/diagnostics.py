"""What a policy does on a random subset of a step's samples.

An update leaves out samples that add nothing to its gradient, so its own sums
are those of a biased subset. These metrics come from scoring passes of a fixed
shape over samples drawn without regard to their rewards: one pass before the
update and one after it.
"""

import jax.numpy as jnp
import numpy as np

from rlax_llm.config.algorithm import Algorithm
from rlax_llm.learning import objectives
from rlax_llm.learning import token_credit
from rlax_llm.learning.update import UpdateConfig
from rlax_llm.ops import divergences
from rlax_llm.ops import losses
from rlax_llm.ops.masking import masked_mean
from rlax_llm.ops.masking import select_masked
from rlax_llm.types import Array
from rlax_llm.types import Batch
from rlax_llm.types import DIAGNOSE
from rlax_llm.types import Metrics

_NAMES = frozenset(
  {
    'policy/entropy',
    'policy/behaviour_gap_max',
    'policy/ratio_mean',
    'policy/ratio_max',
    'policy/ratio_min',
    'policy/effective_tokens',
    'policy/approximate_kl',
    'policy/kl_reference_k3',
  }
)
# They depend on a token's advantage. A credit that shapes advantages reads the
# whole batch, and then the update leaves out no sample.
_OF_ADVANTAGES = frozenset({'policy/clip_fraction', 'policy/rejected_fraction'})
FRESH = 'fresh'  # of `Batch.extra`: 1 where the policy at hand sampled


def names(algorithm: Algorithm) -> frozenset[str]:
  """Returns what these passes measure in place of the update's own sums.

  Args:
    algorithm: static.
  """
  shaped = token_credit.is_shaped(algorithm)
  return _NAMES if shaped else _NAMES | _OF_ADVANTAGES


def choose(count: int, size: int, *, seed: int, step: int) -> np.ndarray:
  """Returns which samples of a step are looked at, ascending.

  Args:
    count: samples of the step.
    size: how many to draw at most.
    seed: the run's seed.
    step: from 0.

  Returns:
    int[min(count, size)], different indices below `count`.
  """
  rng = np.random.default_rng([seed, DIAGNOSE, step])
  return np.sort(rng.permutation(count)[:size])


def before_update(batch: Batch, logprobs: Array, entropy: Array) -> Metrics:
  """Returns the metrics of the policy before the update.

  Args:
    batch: [1, R, L], with FRESH in `extra`.
    logprobs: float32[1, R, L], nats, of the policy before the update.
    entropy: float32[1, R, L], nats, likewise.
  """
  fresh = batch.targets & (batch.extra[FRESH] > 0)
  gap = jnp.abs(batch.behaviour_logprobs - logprobs)
  return {
    'policy/entropy': masked_mean(batch.targets, entropy),
    'policy/behaviour_gap_max': jnp.max(select_masked(fresh, gap)),
  }


def after_update(
  batch: Batch,
  before: Array,
  after: Array,
  reference: Array | None,
  *,
  config: UpdateConfig,
) -> Metrics:
  """Returns how far the update moved the policy.

  Ratios are those of the objective, pi / pi_old, with pi the policy after the
  update. With `old_logprobs='recompute'` pi_old is the policy before it.

  Args:
    batch: [1, R, L].
    before: float32[1, R, L], nats, of the policy before the update.
    after: float32[1, R, L], nats, of the policy after it.
    reference: float32[1, R, L], nats, of the reference policy; None: there is
      none.
    config: static.
  """
  mask, algorithm = batch.targets, config.algorithm
  behaviour = token_credit.behaviour_logprobs(batch, before)
  old = {
    'recompute': before,
    'scored': behaviour,
    'sampler': batch.behaviour_logprobs,
  }[config.old_logprobs]
  now, old, behaviour = (
    select_masked(mask, x) for x in (after, old, behaviour)
  )
  corrected = objectives.token_loss(
    algorithm,
    objectives.Tokens(
      now,
      old,
      behaviour,
      select_masked(mask, batch.advantages),
      mask,
      batch.segments,
      {},
    ),
  )
  ratio, weight = corrected.token.ratio, losses.importance_ratio(now, behaviour)
  mean = lambda x: masked_mean(mask, x.astype(jnp.float32))
  weights = jnp.sum(select_masked(mask, weight))
  squares = jnp.sum(select_masked(mask, jnp.square(weight)))
  metrics = {
    'policy/clip_fraction': mean(corrected.token.clipped),
    'policy/ratio_mean': mean(ratio),
    'policy/ratio_max': jnp.max(select_masked(mask, ratio)),
    'policy/ratio_min': jnp.min(select_masked(mask, ratio, jnp.inf)),
    'policy/effective_tokens': jnp.square(weights) / (jnp.sum(mask) * squares),
    'policy/approximate_kl': mean(old - now),
  }
  if (algorithm.correction, algorithm.rejection) != ('none', 'none'):
    metrics['policy/rejected_fraction'] = mean(corrected.rejected)
  metrics = {
    name: value for name, value in metrics.items() if name in names(algorithm)
  }
  if reference is not None:
    k3 = divergences.k3(
      select_masked(mask, before), select_masked(mask, reference)
    )
    metrics['policy/kl_reference_k3'] = mean(k3)
  return metrics
