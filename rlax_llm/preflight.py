"""Checks of a run before any device work."""

from typing import Any
from typing import NamedTuple

from rlax_llm.components import Run
from rlax_llm.config import ConfigError
from rlax_llm.config import field_classes
from rlax_llm.config import to_dict
from rlax_llm.config import validation
from rlax_llm.experience import progress_rewards
from rlax_llm.experience import stop_policies
from rlax_llm.experience.evaluation import held_out_problems
from rlax_llm.learning import teacher
from rlax_llm.learning.train_states import States
from rlax_llm.tasks.task import Problem
from rlax_llm.workdir import manifest
from rlax_llm.workdir.checkpoint import Checkpoints


class Checked(NamedTuple):
  """What the checks of a run found."""

  held_out: list[Problem]
  teacher: States | None  # of its parameters; see `teacher.find_teacher`
  warnings: list[str]
  facts: dict[str, Any]  # of the published weights, for the manifest


def check(run: Run, workdir: str) -> Checked:
  """Checks a run against its task, its folder and the files that it names.

  Args:
    run: the run.
    workdir: its folder.

  Raises:
    ConfigError: whatever the user got wrong.
  """
  config = run.config
  if config.evaluate.early_stop:
    raise ConfigError(
      f'evaluate.early_stop={config.evaluate.early_stop} stops samples by '
      'their content: their distribution is not the policy, and their '
      'log-probabilities are not known; train with 0, and give it to '
      'rlax_llm.evaluate'
    )
  stop_policies.find(config.control)
  progress_rewards.check(run)
  allowed = field_classes.MAY_DIFFER
  if run.algorithm.leaps:  # They are judged as held-out answers are.
    allowed -= {field_classes.EVALUATION}
  warnings = [
    *run.tokenizer.warnings,
    *manifest.check_workdir(workdir, to_dict(config), allow=allowed),
  ]
  held_out = held_out_problems(run)
  run.check_prompts(held_out)
  run.check_training_prompts()
  if config.sft.steps:
    next(run.demonstrations())
  found = teacher.find_teacher(
    config,
    run.algorithm,
    vocabulary=run.model.vocabulary,
    tokens=run.tokenizer.vocab_size,
    mesh=run.mesh,
    clock=run.clock,
  )
  with Checkpoints(workdir) as saved:
    begins = not saved.steps()
  facts = {}
  if begins:  # Later the weights may be gone, and the run may end early.
    validation.check_durations(config, run.algorithm.critic_warmup)
    facts = run.states.check_pretrained()
  return Checked(held_out, found, warnings, facts)
