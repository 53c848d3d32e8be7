"""Leaps along the direction in which a policy moves, taken if they hold."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlax_llm.learning import train_states
from rlax_llm.ops import distillation
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.types import Params
from rlax_llm.types import TrainState

States = dict[str, TrainState]


class Judged(Protocol):
  """Which samples are correct, and for which the verifier could say so."""

  @property
  def correct(self) -> np.ndarray:
    """bool[K, P]."""

  @property
  def known(self) -> np.ndarray:
    """bool[K, P]."""


# (states, problems) -> the samples of the policy that are correct.
Judge = Callable[[States, Sequence[Any]], Judged]
_EARLIER = 'earlier'  # the state whose parameters a leap comes from


def _accuracy(found: Judged, known: np.ndarray) -> float:
  """Returns the share of correct samples among those known; NaN of none."""
  return float(np.mean(found.correct[known])) if known.any() else math.nan


def _extrapolated(now: Params, earlier: Params, power: int) -> Params:
  return jax.tree.map(
    functools.partial(distillation.extrapolated, power=power), now, earlier
  )


def _placement(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


class Leaps:
  """EffOPD, "Learning to Foresee", https://arxiv.org/abs/2605.11739.

  Before steps 1, 2, 4, 8, ... it tries W + 2^k (W - W'), k = 1 ... `leaps`, W'
  being the parameters after the leap before (those of step 0 at first), on
  problems of the training split. The best is taken if it solves no fewer than
  W does; of equals the nearest. The optimizer's state stays. Two policies are
  compared on the samples that the verifier could judge for both; where there is
  none, no leap is taken.
  """

  def __init__(
    self,
    states: train_states.States,
    pool: ExecutablePool,
    leaps: int,
    judge: Judge,
    problems: Sequence[Any],
  ) -> None:
    """Prepares it; nothing is compiled yet.

    Args:
      states: gives the shapes of the policy's.
      pool: of compiled programs.
      leaps: extrapolations that are tried.
      judge: says which problems a policy solves.
      problems: of the training split.
    """
    self._states = states
    self._pool = pool
    self._leaps = leaps
    self._judge = judge
    self._problems = problems

  def abstract(self) -> dict[str, Any]:
    """Returns shapes of the states of its own."""
    return {_EARLIER: self._states.abstract_state().replace(opt_state=())}

  def init(self, states: States) -> States:
    """Returns the states of its own before the first step."""
    return self._remembered(states['policy'])

  def _remembered(self, state: TrainState) -> States:
    # A copy: the policy's own arrays are donated to its update.
    state = state.replace(opt_state=())
    return {
      _EARLIER: self._pool(
        ('copy', _EARLIER),
        functools.partial(jax.tree.map, jnp.copy),
        state,
        out_shardings=_placement(state),
      )
    }

  def before_step(
    self, step: int, states: States
  ) -> tuple[States, dict[str, float]]:
    """Returns (states, metrics) after a leap, if one is due and holds.

    Nothing is donated: a leap that is given up leaves the states as they were.

    Args:
      step: RL steps taken.
      states: by name, 'policy' among them.
    """
    if not step or step & (step - 1):
      return states, {}
    policy, earlier = states['policy'], states[_EARLIER]
    best, far = policy, 0
    score = self._judge(states, self._problems)
    for power in range(1, self._leaps + 1):
      tried = policy.replace(
        params=self._pool(
          ('leap', power),
          functools.partial(_extrapolated, power=power),
          policy.params,
          earlier.params,
          out_shardings=_placement(policy.params),
        )
      )
      found = self._judge(states | {'policy': tried}, self._problems)
      known = score.known & found.known
      new, old = _accuracy(found, known), _accuracy(score, known)
      if new > old or (new == old and not far):  # never so of NaN
        best, far, score = tried, 2**power, found
    values = {
      'learning/leap': float(far),
      'learning/leap_accuracy': _accuracy(score, score.known),
    }
    return states | {'policy': best} | self._remembered(best), values
