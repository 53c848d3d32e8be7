"""The drafters that a config can name; to add one, enter it here."""

from typing import Callable

from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.drafting import arms
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting import tree_cache as trees
from rlax_llm.drafting.arms import Arm
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.drafter import Drafter

# By what an arm drafts from.
DRAFTERS: dict[tuple[str, ...], Callable[
    [RolloutConfig, Arm, CorpusShape], Drafter]] = {
        ('prompt_lookup',):
            lambda config, arm, shape: drafting.prompt_lookup(arm.width),
        ('tree_cache',):
            lambda config, arm, shape: trees.tree_cache(
                arm.width,
                trees.TreeCacheConfig(
                    shape, arm.branching, min_probability=config.draft_least)),
    }


def given(drafter: Drafter) -> dict[Arm, Drafter]:
  """Returns a drafter of the user's own by arm, and none for W = 1."""
  made = {Arm(drafter.width, 1, ('given',)): drafter}
  return {
      arms.PLAIN: drafting.no_drafter()
  } | (made if drafter.width > 1 else {})


def make_drafters(rollout: RolloutConfig, control: ControlConfig, *,
                  places: int, capacity: int) -> dict[Arm, Drafter]:
  """Returns the config's drafters by arm; W = 1 is always among them.

  Args:
    rollout: names the drafter; its width, or 0 for those of `control`.
    control: frozen section.
    places: prompts that may be sampled at one time.
    capacity: tokens of a prompt, a completion and a draft.
  """
  group = rollout.samples_per_prompt
  # What ran ahead, or beyond a cut, foretells the samples of a later step.
  hinted = control.run_ahead_rows or control.over_provision > 1
  shape = CorpusShape(prompts=places,
                      capacity=capacity,
                      history=rollout.history,
                      group=group,
                      hints=group if hinted else 0)
  made = {arms.PLAIN: drafting.no_drafter()}
  for arm in arms.list_arms(rollout, control):
    if arm != arms.PLAIN:
      made[arm] = DRAFTERS[arm.sources](rollout, arm, shape)
  return made
