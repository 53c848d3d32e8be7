"""One tree of W nodes from several drafters, by probability of acceptance.

Past rollouts (tree_cache.py) know what is said word for word, the network
(model_drafter.py) what is said anew. Each proposes nodes with its estimate of
the probability that verification takes a node where it took the parent. The
estimates are on no common scale, so acceptances are counted by source and
depth, and each is multiplied by

  accepted(source, depth) / expected(source, depth)

The nodes are merged, a node of both has the larger estimate, and the W - 1 most
probable paths are drafted. A segment may leave a source out: then its drafts
cost nothing, and it still learns from the sampled tokens.
"""

import functools
from typing import Any
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rlax_llm.drafting import corpus as corpora
from rlax_llm.drafting import model_drafter as models
from rlax_llm.drafting import tree_cache as caches
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.drafter import last_tokens
from rlax_llm.drafting.drafter import RowOperations
from rlax_llm.ops import trees
from rlax_llm.types import Array
from rlax_llm.types import DraftParams
from rlax_llm.types import DraftTree
from rlax_llm.types import Path
from rlax_llm.types import Slots
from rlax_llm.types import UNUSED

# Expected acceptances that a new estimate counts for, and how much of the
# counts remains after a forward: the policy sharpens during a step.
_PRIOR, _MEMORY = 16.0, 0.98


class HybridConfig(NamedTuple):
  """The static facts of the hybrid; None: the source is off."""

  cache: caches.TreeCacheConfig | None
  model: models.ModelDrafterConfig | None
  deepest: int  # tokens of the longest line over all widths

  @property
  def sources(self) -> tuple[str, ...]:
    """Returns the names of those that are on, in the order of the counts."""
    on = dict(tree_cache=self.cache, model=self.model)
    return tuple(name for name, config in on.items() if config is not None)


class Calibration(flax.struct.PyTreeNode):
  """What came of estimates, by source and depth; older forwards count less."""

  accepted: Array  # float32[Q, deepest]
  expected: Array  # float32[Q, deepest]: sums of estimates

  def ratio(self, depth: Array) -> Array:
    """Returns float32[Q, ...]: the factor for estimates at a depth from 1."""
    factor = (self.accepted + _PRIOR) / (self.expected + _PRIOR)
    return factor[:, jnp.clip(depth - 1, 0, factor.shape[1] - 1)]


class HybridState(flax.struct.PyTreeNode):
  """The sources' states; () where one is off."""

  corpus: Any
  draft: Any
  calibration: Calibration


class Proposed(flax.struct.PyTreeNode):
  """What was drafted, remembered until it is verified.

  Q are the sources that are on; one that did not draft has estimates of 0.
  """

  parents: Array  # int32[N, W - 1]
  depth: Array  # int32[N, W - 1]
  conditional: Array  # float32[N, Q, W - 1], not calibrated


def draft(
  params: DraftParams,
  state: HybridState,
  slots: Slots,
  config: HybridConfig,
  width: int,
  sources: tuple[str, ...],
) -> tuple[Array, Proposed]:
  """Returns (tokens int32[N, W - 1], what is to be remembered).

  Args:
    params: the policy's and the drafter's.
    state: up to date.
    slots: N rows.
    config: static.
    width: W; static.
    sources: that draft, of those that are on; static.
  """
  found: list[models.Nodes] = []
  if 'tree_cache' in sources:
    assert config.cache
    grow = functools.partial(
      caches.draft_tree, nodes=width - 1, branching=config.cache.branching
    )
    tokens, parents, probability = caches.draft_rows(
      state.corpus, slots, config.cache, width - 1, grow
    )
    found.append(models.Nodes(tokens, parents, jnp.log(probability)))
  if 'model' in sources:
    assert config.model
    depth = min(config.model.depth or width - 1, width - 1)
    found.append(
      models.draft_nodes(params, state.draft, slots, config.model, depth)
    )

  def one(*found: models.Nodes) -> tuple[Array, Proposed]:
    counts = [nodes.tokens.shape[0] for nodes in found]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    tokens = jnp.concatenate([nodes.tokens for nodes in found])
    parents = jnp.concatenate(
      [
        jnp.where(nodes.parents > 0, nodes.parents + start, nodes.parents)
        for nodes, start in zip(found, starts)
      ]
    )
    silent = jnp.zeros(len(tokens))
    rows = dict.fromkeys(config.sources, silent)
    for name, nodes, start, count in zip(sources, found, starts, counts):
      above = nodes.logprobs[jnp.maximum(nodes.parents - 1, 0)]
      above = jnp.where(nodes.parents > 0, above, 0.0)
      real = (nodes.logprobs > -jnp.inf) & (nodes.parents != UNUSED)
      given = jnp.where(real, jnp.exp(nodes.logprobs - above), 0.0)
      rows[name] = jnp.pad(given, (start, sum(counts) - start - count))
    merged = trees.merge(
      tokens, parents, jnp.stack([*rows.values()]), width - 1
    )
    calibrated = merged.conditional * state.calibration.ratio(merged.depth)
    own = jnp.log(jnp.minimum(jnp.max(calibrated, axis=0), 1.0))
    logprobs = trees.fold(
      lambda above: above + own, merged.parents, jnp.zeros(()), width - 1
    )
    kept, parents, chosen = trees.select(
      tokens, merged.parents, logprobs, width - 1
    )
    conditional = jnp.where(
      parents == UNUSED, 0.0, merged.conditional[:, chosen]
    )
    return kept, Proposed(parents, merged.depth[chosen], conditional)

  return jax.vmap(one)(*found)


def learn(
  calibration: Calibration,
  proposed: Proposed,
  slots: Slots,
  path: Path,
  memory: Array | float = _MEMORY,
) -> Calibration:
  """Counts which nodes of a draft were accepted.

  A node was tried if its parent was taken. Rows that ended within the path say
  nothing about the nodes after their end.

  Args:
    calibration: so far.
    proposed: the draft.
    slots: N rows, after the commit.
    path: what was committed.
    memory: float32[Q, 1] or one for all: what remains of the counts so far.
  """
  node = jnp.arange(proposed.parents.shape[1] + 1)[None, None]
  order = jnp.arange(path.nodes.shape[1])
  kept = order[None] < path.length[:, None]
  taken = jnp.any((path.nodes[..., None] == node) & kept[..., None], axis=1)
  above = jnp.take_along_axis(taken, jnp.maximum(proposed.parents, 0), axis=1)
  tried = above & (proposed.parents != UNUSED) & ~slots.done[:, None]
  estimate = jnp.where(tried[:, None], proposed.conditional, 0.0)
  hit = (estimate > 0) & taken[:, None, 1:]
  deepest = calibration.expected.shape[1]
  level = jnp.arange(1, deepest + 1)[None, None]
  at = jnp.minimum(proposed.depth, deepest)[..., None] == level
  count = lambda x: jnp.einsum(
    'nqi,nid->qd',
    x,
    at.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return Calibration(
    accepted=memory * calibration.accepted + count(hit.astype(jnp.float32)),
    expected=memory * calibration.expected + count(estimate),
  )


def _init(
  params: DraftParams, slots: Slots, config: HybridConfig
) -> HybridState:
  del params
  zeros = jnp.zeros((len(config.sources), config.deepest), jnp.float32)
  return HybridState(
    corpus=corpora.empty_corpus(config.cache.shape) if config.cache else (),
    draft=models.init_state(slots, config.model.draft_model)
    if config.model
    else (),
    calibration=Calibration(zeros, zeros),
  )


def _observe(
  params: DraftParams,
  state: tuple[HybridState, Proposed],
  slots: Slots,
  path: Path,
  hidden: Array,
  config: HybridConfig,
  sources: tuple[str, ...],
) -> HybridState:
  before, proposed = state
  corpus, drafted = before.corpus, before.draft
  if config.cache:
    corpus = corpora.extend(corpus, slots, path, config.cache.shape)
  if config.model:
    drafted = models.observe(
      params, drafted, slots, path, hidden, config.model.draft_model
    )
  # Nothing is forgotten of a source while it is left out.
  memory = jnp.asarray(
    [[_MEMORY if name in sources else 1.0] for name in config.sources]
  )
  return HybridState(
    corpus, drafted, learn(before.calibration, proposed, slots, path, memory)
  )


def _sync(
  params: DraftParams, state: HybridState, slots: Slots, config: HybridConfig
) -> HybridState:
  if config.cache:
    state = state.replace(
      corpus=corpora.copy_rows(state.corpus, slots, config.cache.shape)
    )
  if config.model:
    state = state.replace(
      draft=models.sync(params, state.draft, slots, config.model)
    )
  return state


@functools.cache
def hybrid(
  width: int, sources: tuple[str, ...], config: HybridConfig
) -> Drafter:
  """Returns the drafter of merged sources; its state is a HybridState.

  Args:
    width: W >= 2.
    sources: that draft, of those that are on, in their order.
    config: static; the same for every width and all sources.
  """

  def propose(
    params: DraftParams, state: HybridState, slots: Slots
  ) -> tuple[DraftTree, Any]:
    tokens, proposed = draft(params, state, slots, config, width, sources)
    root = last_tokens(slots)[:, None]
    tree = DraftTree(
      jnp.concatenate([root, tokens], axis=1),
      jnp.concatenate([jnp.full_like(root, UNUSED), proposed.parents], axis=1),
    )
    return tree, (state, proposed)

  def load(
    params: DraftParams,
    state: HybridState,
    places: Array,
    texts: Array,
    length: Array,
  ) -> HybridState:
    del params
    return state.replace(
      corpus=corpora.load(state.corpus, places, texts, length)
    )

  def axes(state: HybridState) -> Any:
    none = jax.tree.map(lambda x: (), state)
    return (
      none.replace(draft=models.axes(state.draft)) if config.model else none
    )

  of_model = (
    models.row_operations(config.model.draft_model) if config.model else None
  )
  rows = None
  if of_model:
    put = lambda state, draft: state.replace(draft=draft)
    rows = RowOperations(
      admit=lambda params, state, *args: put(
        state, of_model.admit(params, state.draft, *args)
      ),
      gather=lambda state, order: put(
        state, of_model.gather(state.draft, order)
      ),
      grow=lambda state, capacity: put(
        state, of_model.grow(state.draft, capacity=capacity)
      ),
    )
  return Drafter(
    init=functools.partial(_init, config=config),
    load=load,
    propose=propose,
    observe=functools.partial(_observe, config=config, sources=sources),
    sync=functools.partial(_sync, config=config),
    width=width,
    corpus=config.cache.shape if config.cache else None,
    rows=rows,
    axes=axes,
  )
