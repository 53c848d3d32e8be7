"""Models, shapes of drafts and temperatures of the verification experiment."""

from collections.abc import Mapping
from typing import Any

from configs import quickstart
from experiments.verification import rules
from experiments.verification.decode import Pair
from experiments.verification.draft_trees import Branching
from rlax_llm.config import Config

TEMPERATURES = (0.2, 0.6, 1.0, 1.2)

# Sections of the two configs, and the sizes of the measurement.
SIZES: Mapping[str, dict[str, Any]] = {
  'small': dict(
    target=dict(layers=4, width=128, mlp_width=384),
    draft=dict(layers=2, width=48, heads=2, kv_heads=1, mlp_width=96),
    sft_steps=300,
    problems=128,
    law_samples=5000,
  ),
  # Of the tests: nothing is learned.
  'smoke': dict(
    target=dict(layers=2, width=16, mlp_width=32, init_scale=9.0),
    draft=dict(layers=1, width=16, heads=2, kv_heads=1, mlp_width=32),
    sft_steps=1,
    problems=8,
    law_samples=4096,
  ),
}


def make_configs(size: str, seed: int) -> Pair:
  """Returns the configs of the target's and the drafter's warm start."""

  def make(part: str) -> Config:
    config = quickstart.get_config()
    config.seed = seed
    config.sft.steps = SIZES[size]['sft_steps']
    config.sft.warmup_steps = min(config.sft.warmup_steps, config.sft.steps)
    for name, value in SIZES[size][part].items():
      setattr(config.model, name, value)
    return config

  return Pair(make('target'), make('draft'))


def shapes(nodes: int) -> dict[str, Branching]:
  """Returns drafts of equal size: a chain, paths, and a late branch.

  Args:
    nodes: drafted tokens, the root not counted; 4, 8, 16, ...
  """
  paths = lambda count, length: (count,) + (1,) * (length - 1)
  result = {'chain': (1,) * nodes, '2 paths': paths(2, nodes // 2)}
  if nodes > 4:
    result['4 paths'] = paths(4, nodes // 4)
  result['delayed'] = (1,) * (nodes // 2) + paths(2, nodes // 4)
  return result


def cells(nodes: int) -> list[tuple[str, Branching, str]]:
  """Returns (shape, branching, rule) of everything that is compared.

  On a chain multi-round is chain rejection, and traversal is block: they are
  measured once.
  """
  return [
    (shape, branching, name)
    for shape, branching in shapes(nodes).items()
    for name, rule in rules.RULES.items()
    if rule.works_on == 'any'
    or rule.works_on == ('chain' if shape == 'chain' else 'tree')
  ]
