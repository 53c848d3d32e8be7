"""The compiled steps of a run: rollouts, evaluation, learning, drafting."""

from collections.abc import Sequence
from typing import NamedTuple

from rlax_llm.components import Run
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience import evaluation
from rlax_llm.experience.collector import Collector
from rlax_llm.experience.evaluation import Evaluator
from rlax_llm.learning import teacher
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.learning.extrapolation import Leaps
from rlax_llm.learning.learner import Learner
from rlax_llm.learning.train_states import drafter_params
from rlax_llm.learning.train_states import States
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.tasks.task import Problem
from rlax_llm.tasks.verifier.verifier import Judged
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.types import TrainState


class Steps(NamedTuple):
  """What a step of a run calls; compiled at its first call."""

  run: Run
  engine: RolloutEngine  # jitted: draft -> extend -> verify -> commit
  store: RolloutStore  # past rollouts, drafted from
  collector: Collector  # rollouts and rewards of a step
  learner: Learner  # jitted: scores, update
  evaluator: Evaluator
  drafter: DrafterTraining | None  # None: no network drafts
  leaps: Leaps | None  # None: the objective takes none


def make_steps(
  run: Run,
  verifier: Verifier,
  teacher_states: States | None = None,
  drafter: DrafterTraining | None = None,
) -> Steps:
  """Returns the steps of a run.

  Args:
    run: the run.
    verifier: gives rewards.
    teacher_states: from `teacher.find_teacher`, for objectives with one.
    drafter: trains the network that drafts, if one does; None: as the run's
      config says.
  """
  engine, store = run.engine(run.sampling), run.rollout_store()
  sampling = evaluation.evaluation_sampling(run)
  evaluator = Evaluator(
    run, engine if sampling == run.sampling else run.engine(sampling), verifier
  )
  learner = run.learner(
    teacher=teacher.load_teacher(run.algorithm.teacher, teacher_states)
  )
  collector = Collector(
    run,
    engine,
    verifier,
    store,
    learner.score_samples,
    reads_sampler=learner.reads_sampler,
  )
  if drafter is None and run.states.draft_model is not None:
    drafter = run.drafter_training()

  def judge(
    states: dict[str, TrainState], problems: Sequence[Problem]
  ) -> Judged:
    return evaluator.judge(
      states['policy'].params, problems, drafter_params=drafter_params(states)
    )[0]

  leaps = run.extrapolation(judge) if run.algorithm.leaps else None
  return Steps(
    run, engine, store, collector, learner, evaluator, drafter, leaps
  )
