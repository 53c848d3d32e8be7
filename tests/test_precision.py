"""float32 is meant in full: no product may be rounded on a GPU or a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
import rollout_helpers as helpers

from rlax_llm import testing
from rlax_llm.config import freeze
from rlax_llm.config import LoRAConfig
from rlax_llm.config import PrecisionConfig
from rlax_llm.drafting import hybrid as hybrids
from rlax_llm.drafting import model_drafter as models
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.tree_cache import TreeCacheConfig
from rlax_llm.learning import auxiliary
from rlax_llm.models import heads
from rlax_llm.models import rotary
from rlax_llm.models.draft_model import make_draft_model
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout import segment as segments
from rlax_llm.rollout import slots as slot_ops
from rlax_llm.types import DraftParams

CONFIG = testing.tiny_model_config(
  qk_norm=True, qkv_bias=True, lora=freeze(LoRAConfig(rank=2))
)
PRECISION = freeze(PrecisionConfig())
MODEL = make_transformer(CONFIG, PRECISION)
DRAFT_MODEL = make_draft_model(CONFIG, PRECISION, model=MODEL)
ROW = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def _hybrid():
  cache = TreeCacheConfig(CorpusShape(8, 32, 2, 2), branching=2)
  model = models.ModelDrafterConfig(MODEL, DRAFT_MODEL, Sampling(), 2, 2)
  return hybrids.hybrid(
    5, ('tree_cache', 'model'), hybrids.HybridConfig(cache, model, 4)
  )


def _params(init):
  return jax.eval_shape(init, jax.random.key(0))


def _segment():
  """A segment, and what makes a drafter's state before it."""
  drafter = _hybrid()

  def run(params, own, slots, limits):
    both = DraftParams(params, own)
    state = drafter.sync(both, drafter.init(both, slots), slots)
    return segments.segment(
      params,
      slots,
      state,
      limits,
      own,
      model=MODEL,
      drafter=drafter,
      config=segments.SegmentConfig(Sampling(), (6,)),
    )

  slots = jax.eval_shape(lambda: slot_ops.empty_slots(MODEL, 4, 32))
  limits = jax.eval_shape(
    lambda: segments.Limits(jnp.int32(1), jnp.int32(1), jnp.ones(4, bool))
  )
  return run, _params(MODEL.init), _params(DRAFT_MODEL.init), slots, limits


def _gradient(model):
  """The backward pass of everything that a packed row goes through."""

  def loss(params, *row):
    return jnp.sum(model.logits(params, model.hidden(params, *row)))

  return jax.grad(loss), _params(model.init), ROW, ROW, ROW


def _drafter_loss():
  learning = auxiliary.DraftLearning(MODEL, DRAFT_MODEL, None, 8, passes=2)

  def loss(own, policy, tokens, targets):
    window = auxiliary.DraftWindow(tokens, tokens, tokens, targets)
    hidden = MODEL.hidden(policy, tokens, tokens, tokens)
    return auxiliary.drafter_loss(own, policy, hidden, window, learning)

  targets = jax.ShapeDtypeStruct(ROW.shape, bool)
  return (
    jax.grad(loss),
    _params(DRAFT_MODEL.init),
    _params(MODEL.init),
    ROW,
    targets,
  )


PROGRAMS = {
  'segment': _segment,
  'policy': functools.partial(_gradient, MODEL),
  'critic': functools.partial(_gradient, heads.make_critic(MODEL)),
  'drafter': _drafter_loss,
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_float32_products_are_taken_in_full(name):
  """Law: every product of float32 factors asks for all their bits.

  Without being asked GPUs multiply float32 in TensorFloat-32 and TPUs in
  bfloat16, and tokens depend on the shapes of executables. This cannot be seen
  on a CPU but in the programs.

  Mutants: the precision left out of attention's scores, of a layer's matrices,
  of the head, of adapters, of the value head, of the drafter's `join`.
  """
  function, *shapes = PROGRAMS[name]()
  jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
  names = list(helpers.all_primitives(jaxpr))
  assert names.count('dot_general') > 10
  assert not helpers.rounded_products(jaxpr)


def test_the_search_for_rounded_products_finds_one():
  """The search above is not blind to what is nested.

  Mutant: `rounded_products` looks at the outermost equations only.
  """
  loop = lambda x: jax.lax.fori_loop(0, 2, lambda i, x: jnp.dot(x, x), x)
  found = helpers.rounded_products(jax.make_jaxpr(loop)(jnp.ones((2, 2))).jaxpr)
  assert len(found) == 1


def test_bfloat16_is_left_to_the_device():
  """Law: where the maths is bfloat16, nothing asks for more.

  Mutant: every product in full, whatever its factors.
  """
  model = make_transformer(
    CONFIG, freeze(PrecisionConfig(parameters='float32', compute='bfloat16'))
  )
  function, *shapes = _gradient(model)
  jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
  asked = [
    e
    for e in helpers.all_equations(jaxpr)
    if e.primitive.name == 'dot_general'
    and e.invars[0].aval.dtype == jnp.bfloat16
    and e.params['precision']
  ]
  assert not asked


def test_halves_are_swapped_alike_on_every_device():
  """Law: slices off the CPU give what the product on it gives, bit for bit.

  Mutant: the slices in their own order.
  """
  x = jax.random.normal(jax.random.key(0), (3, 5, 4, 16))
  swapped = rotary._swap_by_slices(x)
  assert (swapped[..., :8] == x[..., 8:]).all()
  assert (swapped == rotary._swap_by_product(x)).all()
