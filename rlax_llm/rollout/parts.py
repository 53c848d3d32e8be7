"""What a replica is made of, once for all that it generates."""

from collections.abc import Callable
import dataclasses

from jax.sharding import Mesh

from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig
from rlax_llm.config.draft_configs import Arm
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.drafting.strategy.base import Strategy
from rlax_llm.rollout.executor import Executor
from rlax_llm.types import Request


@dataclasses.dataclass(frozen=True)
class Parts:
  """What all generations of one replica share."""

  rollout: RolloutConfig
  control: ControlConfig
  mesh: Mesh  # the replica's devices
  executor: Executor
  drafters: dict[Arm, Drafter]
  strategy: Strategy
  capacities: list[int]  # values of S, ascending
  row_counts: list[int]  # values of N, descending
  block_rows: int  # prompts prefilled together
  clock: Callable[[], float]
  # The (N, S, arm) whose executable has run.
  warm: set[tuple[int, int, Arm]] = dataclasses.field(default_factory=set)

  @property
  def widest(self) -> Drafter:
    """The drafter whose state all arms share."""
    return self.drafters[max(self.drafters)]

  def arms(self, rows: int) -> list[Arm]:
    """Returns the arms that segments of N rows can have."""
    # A batch that would fit a smaller N is compacted.
    fewer = [n for n in self.row_counts if self.ahead_rows <= n < rows]
    return sorted(set(self.strategy.reachable(max(fewer, default=0) + 1, rows)))

  @property
  def runs_ahead(self) -> bool:
    """Whether `generate` makes use of the requests of a coming step."""
    corpus = self.widest.corpus
    return bool(self.control.run_ahead_rows and corpus and corpus.hints)

  @property
  def ahead_rows(self) -> int:
    """The N at and below which free slots run ahead."""
    if not self.runs_ahead:
      return 0
    wanted = self.control.run_ahead_rows
    # Never below the least N that compaction can reach.
    return max(
      [n for n in self.row_counts if n <= wanted], default=self.row_counts[-1]
    )

  def fits(self, request: Request) -> bool:
    """Whether the request's prompt is one that slots can hold."""
    return 0 < len(request.prompt) <= self.rollout.prompt_length
