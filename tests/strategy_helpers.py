"""A simulated machine for tests of strategies: costs, drafts, drift."""

import numpy as np

from rlax_llm.config.draft_configs import Arm
from rlax_llm.config.draft_configs import PLAIN
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent

SOURCES = ('tree_cache',)


def chain(width):
  """Returns the arm of a chain; W = 1: no draft."""
  return Arm(width, 1, SOURCES) if width > 1 else PLAIN


def chains(*widths):
  return [chain(width) for width in widths]


class Machine:
  """Segments of N rows whose forwards and drafts are known.

  Attributes:
    cost: (N, arm) -> seconds of a forward.
    reach: (segment, N) -> probabilities of the nodes behind the root.
    spent: seconds so far, those of strategies.
    best: seconds that the best arm of every segment had taken for the tokens,
      the same noise included.
    plain: seconds that W = 1 had taken for the tokens.
    used: (N, arm, forwards, timed) of every segment.
    cold: seconds that the first segment behind another arm takes besides.
  """

  def __init__(self, cost, reach, *, noise=0.0, cold=0.0, seed=0):
    self.cost = cost
    self.reach = reach
    self.noise = noise
    self.cold = cold
    self.rng = np.random.default_rng(seed)
    self.warm = set()
    self.latest = {}
    self.spent = self.best = self.plain = 0.0
    self.used = []

  def rate(self, rows, arm):
    """Returns the true tokens per row and second of the coming segment."""
    nodes = self.reach(len(self.used), rows)[: arm.width - 1]
    return (1 + sum(nodes)) / self.cost(rows, arm)

  def run(
    self, strategy, rows, arms, *, running=None, capacity=64, forwards=32
  ):
    """Runs one segment; returns the tokens of a row."""
    n = running or rows
    occupancy = Occupancy(n, rows, capacity)
    arm, most, timed = strategy.choose(occupancy, forwards)
    best = max(self.rate(rows, a) for a in arms)
    plain = self.rate(rows, PLAIN)
    nodes = self.reach(len(self.used), rows)[: arm.width - 1]
    self.used.append((rows, arm, most, timed))
    # A deeper node is reached only if the one before it was.
    draw = np.sort(self.rng.random(most * n))
    accepted = [most * n, *np.searchsorted(draw, nodes)]
    seconds = most * self.cost(rows, arm)
    seconds *= 1 + self.noise * self.rng.exponential()
    if self.latest.get((rows, capacity), arm) != arm:
      seconds += self.cold
    self.latest[rows, capacity] = arm
    strategy.observe(
      occupancy,
      arm,
      Spent(
        seconds=seconds if (rows, arm) in self.warm and timed else None,
        preparation=0.0,
        forwards=most,
        row_forwards=most * n,
        accepted=[int(x) for x in accepted],
      ),
    )
    self.warm.add((rows, arm))
    tokens = sum(accepted) / n
    self.spent += seconds
    self.best += tokens / best * (1 + self.noise)
    self.plain += tokens / plain * (1 + self.noise)
    return tokens
