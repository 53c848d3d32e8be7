"""The drafters that a config can name; to add one, enter it here."""

from typing import Callable

from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting import tree_cache as trees
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.drafter import Drafter

DRAFTERS: dict[str, Callable[[RolloutConfig, int, CorpusShape], Drafter]] = {
    'none':
        lambda config, width, shape: drafting.no_drafter(),
    'prompt_lookup':
        lambda config, width, shape: drafting.prompt_lookup(width),
    'tree_cache':
        lambda config, width, shape: trees.tree_cache(
            width,
            trees.TreeCacheConfig(
                shape, config.branching, min_probability=config.draft_least)),
}


def by_width(drafter: Drafter) -> dict[int, Drafter]:
  """Returns a drafter, and none for W = 1, by width."""
  return {1: drafting.no_drafter(), drafter.width: drafter}


def widest(rollout: RolloutConfig, control: ControlConfig) -> int:
  """Returns the largest W that a config can lead to."""
  if rollout.drafter == 'none':
    return 1
  return rollout.width or max(control.widths)


def make_drafters(rollout: RolloutConfig, control: ControlConfig, *,
                  places: int, capacity: int) -> dict[int, Drafter]:
  """Returns the config's drafter by width; 1 is always among the widths.

  Args:
    rollout: names the drafter; its width, or 0 for those of `control`.
    control: frozen section.
    places: prompts that may be sampled at one time.
    capacity: tokens of a prompt, a completion and a draft.
  """
  width = widest(rollout, control)
  if width == 1:
    return {1: drafting.no_drafter()}
  group = rollout.samples_per_prompt
  # What ran ahead, or beyond a cut, foretells the samples of a later step.
  hinted = control.run_ahead_rows or control.over_provision > 1
  shape = CorpusShape(prompts=places,
                      capacity=capacity,
                      history=rollout.history,
                      group=group,
                      hints=group if hinted else 0)
  make = DRAFTERS[rollout.drafter]
  made: dict[int, Drafter] = {}
  for w in (rollout.width,) if rollout.width else control.widths:
    if w > 1:
      made[w] = make(rollout, w, shape)
  return {1: drafting.no_drafter()} | made
