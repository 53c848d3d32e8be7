"""The strategy that a config names."""

from collections.abc import Sequence

from rlax_llm.config import ControlConfig
from rlax_llm.config import draft_configs
from rlax_llm.config import RolloutConfig
from rlax_llm.config import SOURCES
from rlax_llm.drafting.strategy import table
from rlax_llm.drafting.strategy.bandit import Bandit
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.drafting.strategy.cost_model import CostModel


def make_strategy(
  rollout: RolloutConfig,
  control: ControlConfig,
  *,
  seed: int,
  sources: Sequence[str] = SOURCES,
) -> Strategy:
  """Returns a strategy that knows nothing yet.

  Args:
    rollout: frozen section; a width above 0 is not chosen.
    control: frozen section.
    seed: of the run.
    sources: what the hybrid may draft from.
  """
  arms_of = lambda width: draft_configs.arms_of_width(
    rollout, control, width, sources
  )
  if rollout.width or rollout.drafter == 'none':
    width = 1 if rollout.drafter == 'none' else rollout.width
    return table.fixed(arms_of(width)[-1])
  if control.strategy == 'cost_model':
    return CostModel(draft_configs.list_arms(rollout, control, sources))
  rows = [
    (most, [arm for width in widths for arm in arms_of(width)])
    for most, *widths in control.buckets
  ]
  if control.strategy == 'table':
    return table.Table(
      table.make_buckets([(most, found[-1:]) for most, found in rows])
    )
  return Bandit(
    table.make_buckets(rows),
    epsilon=control.bandit_epsilon,
    window=control.bandit_window,
    seed=seed,
  )
