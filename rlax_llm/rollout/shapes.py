"""Which values of N and S segments can have."""

from rlax_llm.config import ControlConfig
from rlax_llm.config import RolloutConfig


def list_capacities(config: RolloutConfig, width: int) -> list[int]:
  """Returns the values of S: doubling, the last one just large enough."""
  # Multiples of 8 keep the inner loops of attention whole.
  round_up = lambda n: -(-n // 8) * 8
  total = round_up(config.prompt_length + config.max_new_tokens + width)
  capacity = round_up(max(config.min_capacity, config.prompt_length + width))
  capacities = []
  # A capacity just below the last would cost an executable and save little.
  while capacity * 5 / 4 < total:
    capacities.append(capacity)
    capacity *= 2
  return capacities + [total]


def list_row_counts(slots: int, control: ControlConfig, ways: int) -> list[int]:
  """Returns the values of N that compaction can reach, largest first.

  Args:
    slots: N at first.
    control: whether N is halved, and down to what.
    ways: parts that rows are divided into.
  """
  counts = [slots]
  least = max(control.min_slots, ways)
  while (
    control.compact
    and counts[-1] // 2 >= least
    and counts[-1] % (2 * ways) == 0
  ):
    counts.append(counts[-1] // 2)
  return counts
