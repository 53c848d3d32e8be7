"""What samples would earn if they had to answer earlier. MRT's progress."""

import bisect
from collections.abc import Callable
from collections.abc import Sequence
import math
import re

import jax
import numpy as np

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.experience.groups import Group
from rlax_llm.ops import rewards
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.rollout.table import sample_key
from rlax_llm.runtime import processes
from rlax_llm.tasks import extract
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import FORCE
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import Rollout


def episode_ends(
  tokens: np.ndarray,
  decode: Callable[[np.ndarray], str],
  *,
  marker: str,
  episodes: int,
) -> list[int]:
  """Returns the tokens after which episodes end, the sample's end left out.

  Args:
    tokens: int32[length], of a completion.
    decode: returns the text of tokens.
    marker: the text that ends an episode; '': they are equally long.
    episodes: at most so many; of more ends, those that are spread evenly.
  """
  length = len(tokens)
  if marker:
    places = [
      found.end() for found in re.finditer(re.escape(marker), decode(tokens))
    ]
    size = lambda count: len(decode(tokens[:count]))
    ends = sorted(
      {bisect.bisect_left(range(length), place, key=size) for place in places}
      - {length}
    )
    if len(ends) >= episodes:
      chosen = np.linspace(0, len(ends) - 1, episodes + 1)[1:-1]
      ends = [ends[i] for i in sorted({round(float(x)) for x in chosen})]
    return ends
  return sorted(
    {round(length * i / episodes) for i in range(1, episodes)} - {0, length}
  )


def check(run: Run) -> tuple[np.ndarray, int]:
  """Returns (int32 tokens that open an answer, room for a sample before them).

  Args:
    run: its algorithm says how long forced answers may be.

  Raises:
    ConfigError: a forced answer is as long as the longest sample.
  """
  algorithm, longest = run.algorithm, run.config.rollout.max_new_tokens
  if algorithm.credit != 'progress':
    return np.zeros(0, np.int32), longest
  text = extract.opening(run.config.task.answer_format)
  opening = np.asarray(run.encode(text, prompt=False), np.int32)
  room = longest - len(opening) - algorithm.progress_tokens
  if room < 1:
    raise ConfigError(
      f'algorithm.progress_tokens={algorithm.progress_tokens} and the '
      f'{len(opening)} tokens of {text!r} leave no room in '
      f'rollout.max_new_tokens={longest}; lower the one or raise the other'
    )
  return opening, room


class ForcedAnswers:
  """Asks for answers in the middle of samples, and has them judged.

  "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning",
  https://arxiv.org/abs/2503.07572. Where an episode ends the sample's tokens
  are followed by what opens an answer, and the policy writes the rest. Those
  answers are scored and thrown away: nothing is trained on them.
  """

  def __init__(
    self, run: Run, engine: RolloutEngine, verifier: Verifier
  ) -> None:
    """Makes it.

    Args:
      run: its algorithm says where episodes end.
      engine: of the distribution that the policy is trained under.
      verifier: scores answers.

    Raises:
      ConfigError: see `check`.
    """
    self._run = run
    self._engine = engine
    self._verifier = verifier
    self._opening, self._room = check(run)

  def progress(
    self,
    params: Params,
    groups: Sequence[Group],
    step: int,
    *,
    drafter_params: Params = (),
  ) -> tuple[list[np.ndarray], dict[str, float]]:
    """Returns J_j - J_(j-1) at each token of the j-th episode, by sample.

    J_j is the mean score of answers forced behind episode j, and that of the
    sample itself behind its last one. Episode 0 has nothing to be compared
    with, nor has a sample that the verifier could not judge: 0. If none of an
    episode's forced answers could be judged, the episode is merged with the
    next one.

    Args:
      params: the policy's.
      groups: of the step.
      step: from 0.
      drafter_params: see `RolloutEngine.generate`.

    Returns:
      (float32[length] by sample, metrics).
    """
    algorithm = self._run.algorithm
    samples = [
      (group, rollout, i)
      for group in groups
      for i, rollout in enumerate(group.rollouts)
    ]
    ends = [
      [
        end
        for end in episode_ends(
          rollout.tokens,
          self._run.tokenizer.decode,
          marker=algorithm.progress_marker,
          episodes=algorithm.progress_episodes,
        )
        if end <= self._room and not group.unscorable[i]
      ]
      for group, rollout, i in samples
    ]
    cuts = [
      (group, rollout, end)
      for (group, rollout, _), mine in zip(samples, ends)
      for end in mine
    ]
    forced = self._scores(params, cuts, step, drafter_params)
    judged = ~np.isnan(forced)
    left = iter(judged)
    ends = [[end for end in mine if next(left)] for mine in ends]
    forced = forced[judged]
    # What a sample lacks of episodes counts as its end: without progress.
    success = np.array(
      [
        [group.parts['correct'][i]] * algorithm.progress_episodes
        for group, _, i in samples
      ],
      np.float32,
    )
    left = iter(forced)
    for row, mine in enumerate(ends):
      success[row, : len(mine)] = [next(left) for _ in mine]
    bonus = jax.device_get(
      self._run.pool(
        ('progress', success.shape), rewards.progress_bonus, success
      )
    )
    found = []
    for (_, rollout, _), mine, gains in zip(samples, ends, bonus):
      lengths = np.diff([0, *mine, rollout.length])
      found.append(
        np.repeat(np.append(np.float32(0), gains[: len(mine)]), lengths)
      )
    if not cuts:
      return found, {}
    mean = float(np.mean(forced)) if len(forced) else math.nan
    return found, {'reward/forced': mean}

  def _scores(
    self,
    params: Params,
    cuts: Sequence[tuple[Group, Rollout, int]],
    step: int,
    drafter_params: Params,
  ) -> np.ndarray:
    """Returns float64[len(cuts)]: mean scores of answers forced there.

    Answers that the verifier could not judge are left out; the mean of none is
    NaN.
    """
    if not cuts:
      return np.zeros(0)
    count = self._run.algorithm.progress_samples
    earlier, requests = {}, []
    for number, (_, rollout, end) in enumerate(cuts):
      request = Request(rollout.request.prompt, count, FORCE, step, number)
      requests.append(request)
      tokens = np.concatenate([rollout.tokens[:end], self._opening])
      for index in range(count):
        earlier[sample_key(request, index)] = Rollout(
          tokens=tokens,
          length=len(tokens),
          finished=False,
          token_version=np.zeros(len(tokens), np.int32),
          behaviour_logprobs=np.zeros(len(tokens), np.float32),
          drafted=np.zeros(len(tokens), bool),
          forwards=0,
          request=request,
          index=index,
          suspended=True,
        )
    rollouts, _ = self._engine.generate(
      params,
      requests,
      RolloutState(earlier=earlier),
      limit=self._run.algorithm.progress_tokens,
      drafter_params=drafter_params,
    )
    texts = [self._run.tokenizer.decode(r.tokens) for r in rollouts]

    def score(mine: Sequence[int]) -> list[float]:
      problems = [cuts[i // count][0].problem for i in mine]
      scores = self._verifier.score(problems, [texts[i] for i in mine])
      return np.where(scores.unscorable, math.nan, scores.rewards).tolist()

    scores = processes.share(score, range(len(texts)))
    known = [row[~np.isnan(row)] for row in np.reshape(scores, (-1, count))]
    return np.array([row.mean() if len(row) else math.nan for row in known])
