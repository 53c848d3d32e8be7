"""Rewards of complete groups."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlax_llm.components import Run
from rlax_llm.experience import advantages
from rlax_llm.experience.groups import Group
from rlax_llm.experience.groups import PartialGroup
from rlax_llm.runtime import processes
from rlax_llm.tasks.task import Problem
from rlax_llm.tasks.verifier.verifier import Verifier


def reward_groups(
  run: Run,
  verifier: Verifier,
  complete: Sequence[PartialGroup],
  problem: Callable[[int], Problem],
) -> list[Group]:
  """Returns groups with their rewards, without the samples that were pruned.

  Args:
    run: decodes tokens, names the labels.
    verifier: scores texts; with several processes each scores its share.
    complete: groups whose samples are all at their end.
    problem: returns a problem by its number.
  """
  if not complete:
    return []
  decode = run.tokenizer.decode
  problems = [problem(group.number) for group in complete]
  sizes = [len(group.survivors) for group in complete]
  rollouts = [r for group in complete for r in group.survivors]
  texts = [decode(rollout.tokens) for rollout in rollouts]
  by_sample = [p for p, size in zip(problems, sizes) for _ in range(size)]
  names: tuple[str, ...] = ()

  def score(mine: Sequence[int]) -> list[list[Any]]:
    nonlocal names
    scores = verifier.reward(
      [by_sample[i] for i in mine],
      [texts[i] for i in mine],
      tokens=[rollouts[i].length for i in mine],
      finished=[rollouts[i].finished for i in mine],
    )
    names = tuple(scores.parts)
    columns = scores.rewards, scores.unscorable, *scores.parts.values()
    rows = np.stack(columns, axis=1).tolist()
    return [
      [row, sorted(own.items())]  # pairs, as JSON has them
      for row, own in zip(rows, scores.metrics)
    ]

  found = processes.share(score, range(len(rollouts)))
  rewards, unscorable, *values = np.asarray(
    [row for row, _ in found], np.float32
  ).T
  metrics = tuple(dict(own) for _, own in found)
  groups = []
  for group, own_problem, end in zip(complete, problems, np.cumsum(sizes)):
    mine = slice(end - len(group.survivors), end)
    failed = unscorable[mine].astype(bool)
    parts = {name: value[mine] for name, value in zip(names, values)}
    labels = advantages.judge(run, texts[mine], rewards[mine], failed, parts)
    groups.append(
      Group(
        problem=own_problem,
        rollouts=group.survivors,
        texts=tuple(texts[mine]),
        **labels._asdict(),
        unscorable=failed,
        parts=parts,
        number=group.number,
        metrics=metrics[mine] if any(metrics) else (),
      )
    )
  return groups
