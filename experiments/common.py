"""What experiments share: tables, devices, bounds of ratios."""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import math
import pathlib
import statistics
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from scipy import stats

from rlax_llm.components import make_deterministic
from rlax_llm.drafting import drafter as drafting
from rlax_llm.drafting.drafter import Drafter
from rlax_llm.types import DraftTree
from rlax_llm.types import Slots

DEVICE = flags.DEFINE_enum(
  'device', 'cpu', ['cpu', 'gpu', 'tpu'], 'Where to run.'
)


def use_device(*, exact: bool = False) -> str:
  """Chooses the platform; call before anything touches a device.

  Args:
    exact: equal programs are to give equal bits on a GPU, too.
  """
  if exact:
    make_deterministic()
  platform = {'gpu': 'cuda'}.get(DEVICE.value, DEVICE.value)
  jax.config.update('jax_platforms', platform)
  return jax.devices()[0].device_kind


def constant_drafter(width: int) -> Drafter:
  """Returns a drafter that costs nothing and is hardly ever right."""

  def propose(slots: Slots) -> DraftTree:
    root = drafting.last_tokens(slots)[:, None]
    wrong = jnp.full((root.shape[0], width - 1), 1, jnp.int32)
    return DraftTree(
      jnp.concatenate([root, wrong], axis=1), drafting.chain_parents(width)
    )

  return drafting.stateless(propose, width)


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows with the columns of the first."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', encoding='utf-8', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def ratio_bounds(
  above: Sequence[float], below: Sequence[float]
) -> tuple[float, float, float]:
  """Returns (low, middle, high) of the ratio of paired times.

  The geometric mean of above / below and its two-sided 90 % bounds by
  Student's t: the upper one is a one-sided 95 % bound.

  Args:
    above: seconds, n >= 2.
    below: seconds, measured in turn with them.
  """
  logs = [math.log(a / b) for a, b in zip(above, below)]
  middle = statistics.mean(logs)
  error = statistics.stdev(logs) / math.sqrt(len(logs))
  reach = float(stats.t.ppf(0.95, len(logs) - 1)) * error
  return math.exp(middle - reach), math.exp(middle), math.exp(middle + reach)


def lower_bound(values: Sequence[float]) -> tuple[float, float]:
  """Returns (low, middle): the mean and its one-sided 95 % lower bound.

  By Student's t; low is the mean itself where there is one value or no spread.

  Args:
    values: differences, one for each seed.
  """
  middle = statistics.mean(values)
  if len(values) < 2:
    return middle, middle
  error = statistics.stdev(values) / math.sqrt(len(values))
  return middle - float(stats.t.ppf(0.95, len(values) - 1)) * error, middle
