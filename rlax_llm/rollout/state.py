"""What outlives a `generate`: the state of rollouts, and its speed values."""

from collections.abc import Mapping
import dataclasses

from rlax_llm.drafting.store import RolloutStore
from rlax_llm.types import Rollout

NOT_FINITE = (
  'tokens were drawn from logits that are not finite: parameters '
  'are NaN or infinite, or the forward pass overflows in '
  'learning.precision.compute'
)


@dataclasses.dataclass(frozen=True)
class RolloutState:
  """What rollouts of later steps may depend on; host side, checkpointed."""

  version: int = 0  # policy version: the step whose parameters sample
  # Past rollouts to draft from; `generate` adds those it makes. None: nothing
  # is remembered.
  store: RolloutStore | None = None
  # What samples of the requests have come to before, by `table.sample_key`:
  # those that are suspended are continued, the others left as they are.
  earlier: Mapping[tuple, Rollout] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RolloutStats:
  """Speed values of one `generate`."""

  tokens: int = 0
  forwards: int = 0
  row_forwards: int = 0  # sum over forwards of the rows that decoded
  slot_forwards: int = 0  # sum over forwards of N
  node_forwards: int = 0  # sum over forwards of W
  ahead_tokens: int = 0  # for samples of coming steps
  discarded_tokens: int = 0  # beyond a cut in logical time
  segments: int = 0
  reads: int = 0  # of the device by the host
  executables: int = 0  # of segments that the pool holds
  nonfinite_samples: int = 0  # a token's log-probability is not finite
  seconds: float = 0.0
  segment_seconds: float = 0.0  # of them, in segments
  reshard_seconds: float = 0.0  # of them, bringing parameters in place
  compile_seconds: float = 0.0

  def __add__(self, other: 'RolloutStats') -> 'RolloutStats':
    """Returns the speed values of both."""
    both = {
      field.name: getattr(self, field.name) + getattr(other, field.name)
      for field in dataclasses.fields(self)
    }
    return RolloutStats(**both | {'executables': other.executables})

  def warning(self) -> str:
    """Returns one line if logits were not finite, else an empty one."""
    if not self.nonfinite_samples:
      return ''
    return f'{self.nonfinite_samples} samples: {NOT_FINITE}'

  def metrics(self) -> dict[str, float]:
    """Returns the metrics under their fixed names."""
    decoding = max(self.seconds - self.compile_seconds, 1e-9)
    return {
      'rollout/tokens_per_second': self.tokens / decoding,
      'rollout/accept_length': self.tokens / max(self.row_forwards, 1),
      'rollout/forwards': self.forwards,
      'rollout/occupancy': self.row_forwards / max(self.slot_forwards, 1),
      'rollout/width_mean': self.node_forwards / max(self.forwards, 1),
      'rollout/ahead_tokens': self.ahead_tokens,
      'rollout/discarded_tokens': self.discarded_tokens,
      'rollout/segments': self.segments,
      'rollout/executables': self.executables,
      'rollout/nonfinite_samples': self.nonfinite_samples,
      'time/reshard': self.reshard_seconds,
    }
