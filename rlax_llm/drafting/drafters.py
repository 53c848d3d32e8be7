"""The drafters that a config can name; to add one, enter it here."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from rlax_llm.config import ControlConfig
from rlax_llm.config import draft_configs
from rlax_llm.config import largest_group
from rlax_llm.config import RolloutConfig
from rlax_llm.config import SOURCES
from rlax_llm.config.draft_configs import Arm
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting import hybrid as hybrids
from rlax_llm.drafting import model_drafter as models
from rlax_llm.drafting import tree_cache as trees
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.models.draft_model import DraftModel
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.sampling import Sampling


class Target(NamedTuple):
  """What is drafted for."""

  model: LanguageModel
  sampling: Sampling


class Learned(NamedTuple):
  """The network that is drafted with, and the settings of its drafts.

  Attributes:
    draft_model: the network.
    depth: tokens of its longest line; 0: W - 1.
    sources: what the hybrid drafts from.
    chunk: tokens of a row taken up in one forward; see `ModelDrafterConfig`.
    placement: a sharding for each of its parameters, to which they are brought
      for rollouts; None: they are used as they are.
  """

  draft_model: DraftModel
  depth: int = 0
  sources: tuple[str, ...] = SOURCES
  chunk: int = 32
  placement: Any = None


class Setting(NamedTuple):
  """What a drafter is made for."""

  rollout: RolloutConfig
  arm: Arm
  widest: int  # W of all arms
  shape: CorpusShape
  target: Target
  learned: Learned | None


def _cache_config(setting: Setting) -> trees.TreeCacheConfig:
  return trees.TreeCacheConfig(
    setting.shape,
    setting.arm.branching,
    min_probability=setting.rollout.draft_least,
  )


def _model_config(setting: Setting) -> models.ModelDrafterConfig:
  learned = setting.learned
  if learned is None:
    raise ValueError(
      f'rollout.drafter={setting.rollout.drafter!r} needs a '
      'network: give `learned`'
    )
  return models.ModelDrafterConfig(
    setting.target.model,
    learned.draft_model,
    setting.target.sampling,
    setting.arm.branching,
    learned.depth,
    learned.chunk,
  )


def enabled_sources(learned: Learned | None) -> tuple[str, ...]:
  """Returns the sources of the hybrid that are on."""
  return learned.sources if learned else SOURCES


def _hybrid(setting: Setting) -> Drafter:
  sources = enabled_sources(setting.learned)
  return hybrids.hybrid(
    setting.arm.width,
    setting.arm.sources,
    hybrids.HybridConfig(
      cache=_cache_config(setting) if 'tree_cache' in sources else None,
      model=_model_config(setting) if 'model' in sources else None,
      deepest=setting.widest - 1,
    ),
  )


# By `rollout.drafter`, but for none. All arms of one share their state.
DRAFTERS: dict[str, Callable[[Setting], Drafter]] = {
  'prompt_lookup': lambda setting: drafting.prompt_lookup(setting.arm.width),
  'tree_cache': lambda setting: trees.tree_cache(
    setting.arm.width, _cache_config(setting)
  ),
  'model': lambda setting: models.model_drafter(
    setting.arm.width, _model_config(setting)
  ),
  'hybrid': _hybrid,
}


def given(drafter: Drafter) -> dict[Arm, Drafter]:
  """Returns a drafter of the user's own by arm, and none for W = 1."""
  made = {Arm(drafter.width, 1, ('given',)): drafter}
  return {draft_configs.PLAIN: drafting.no_drafter()} | (
    made if drafter.width > 1 else {}
  )


def make_drafters(
  rollout: RolloutConfig,
  control: ControlConfig,
  *,
  places: int,
  capacity: int,
  target: Target,
  learned: Learned | None = None,
) -> dict[Arm, Drafter]:
  """Returns the config's drafters by arm; W = 1 is always among them.

  Args:
    rollout: names the drafter; its width, or 0 for those of `control`.
    control: frozen section.
    places: prompts that may be sampled at one time.
    capacity: tokens of a prompt, a completion and a draft.
    target: what is drafted for.
    learned: the network, if the drafter has one.
  """
  group = largest_group(rollout, control)
  # What ran ahead, or beyond a cut, foretells the samples of a later step.
  hinted = control.run_ahead_rows or control.over_provision > 1
  shape = CorpusShape(
    prompts=places,
    capacity=capacity,
    history=rollout.history,
    group=group,
    hints=group if hinted else 0,
  )
  made = {draft_configs.PLAIN: drafting.no_drafter()}
  listed = draft_configs.list_arms(rollout, control, enabled_sources(learned))
  widest = max(arm.width for arm in listed)
  for arm in listed:
    if arm != draft_configs.PLAIN:
      made[arm] = DRAFTERS[rollout.drafter](
        Setting(rollout, arm, widest, shape, target, learned)
      )
  return made
