"""What every entrypoint needs, made from one config: nothing is compiled."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import os
import time
from typing import Any

from jax.sharding import Mesh
import numpy as np
import optax

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import FROM_ROLLOUTS
from rlax_llm.config import LEARNED
from rlax_llm.config import LearningConfig
from rlax_llm.config import list_widths
from rlax_llm.config.validation import validate
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.learning import algorithms
from rlax_llm.learning import presets
from rlax_llm.learning import sft
from rlax_llm.learning import supervised
from rlax_llm.learning import update
from rlax_llm.learning.batch import Sample
from rlax_llm.learning.drafter_training import DrafterTraining
from rlax_llm.learning.extrapolation import Judge
from rlax_llm.learning.extrapolation import Leaps
from rlax_llm.learning.learner import BatchShape
from rlax_llm.learning.learner import Critic
from rlax_llm.learning.learner import Learner
from rlax_llm.learning.learner import Teacher
from rlax_llm.learning.train_states import States
from rlax_llm.models.draft_model import DraftModel
from rlax_llm.models.draft_model import make_draft_model
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.models.pretrained import loading
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import Networks
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.runtime import processes
from rlax_llm.runtime import sharding
from rlax_llm.runtime.executables import ExecutablePool
from rlax_llm.tasks import registry
from rlax_llm.tasks import rewards
from rlax_llm.tasks import task as tasks
from rlax_llm.tokenizers import tokenizer as tokenizers
from rlax_llm.types import Params
from rlax_llm.types import Request

MAX_LEFT_OUT = 1000  # problems in a row that cannot be used


class Unusable(ConfigError):
  """A problem cannot be used: it is too long, or has unknown characters."""


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run."""

  config: Config  # frozen
  algorithm: algorithms.Algorithm
  mesh: Mesh
  tokenizer: tokenizers.TextTokenizer
  task: tasks.Task
  model: LanguageModel
  pool: ExecutablePool
  clock: Callable[[], float]
  states: States
  on_boundary: Callable[[], None]
  networks: Callable[[Mesh], Networks]  # for rollouts on a part of the mesh

  @property
  def sampling(self) -> Sampling:
    """The law that the policy is trained under."""
    r = self.config.rollout
    return Sampling(r.temperature, r.top_k, r.top_p, r.min_p)

  @property
  def row_length(self) -> int:
    """L, tokens of a packed row: two of the longest samples, at least 128."""
    rollout = self.config.rollout
    longest = rollout.prompt_length + rollout.max_new_tokens
    return self.config.learning.row_length or max(2 * longest, 128)

  def engine(
    self, sampling: Sampling, *, eos_ids: tuple[int, ...] | None = None
  ) -> RolloutEngine:
    """Returns an engine for a sampling law; EOS is the tokenizer's."""
    return RolloutEngine(
      self.model,
      rollout=self.config.rollout,
      control=self.config.control,
      sampling=sampling,
      eos_ids=eos_ids or self.tokenizer.eos_ids,
      seed=self.config.seed,
      mesh=self.mesh,
      clock=self.clock,
      learned=self.states.learned(),
      on_boundary=self.on_boundary,
      params_placement=self.states.rollout_placement(),
      pool=self.pool,
      replicas=self.config.mesh.replicas,
      on_mesh=self.networks,
    )

  def learner(
    self,
    algorithm: algorithms.Algorithm | None = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    sampling: Sampling | None = None,
    learning: LearningConfig | None = None,
    name: str = 'policy',
    teacher: Teacher | None = None,
  ) -> Learner:
    """Returns a learner; what is None is that of the run's RL objective.

    Args:
      algorithm: the objective.
      optimizer: of the policy.
      sampling: the law under which tokens are scored.
      learning: frozen section.
      name: tells its executables apart.
      teacher: for objectives that have one.
    """
    rollout, control = self.config.rollout, self.config.control
    algorithm = algorithm or self.algorithm
    critic = None
    if algorithm.has_critic:
      critic = Critic(self.states.critic_model, self.states.critic_optimizer)
    return Learner(
      self.model,
      algorithm,
      optimizer or self.states.optimizer,
      self.mesh,
      self.pool,
      sampling=sampling or self.sampling,
      learning=learning or self.config.learning,
      shape=BatchShape(
        self.row_length, rollout.prompt_length, rollout.max_new_tokens
      ),
      name=name,
      seed=self.config.seed,
      is_off_policy=bool(
        control.staleness or control.replay or control.over_provision > 1
      ),
      critic=critic,
      teacher=teacher,
    )

  def warm_start(
    self,
    params: Params,
    show: Callable[[int, float], None],
    left_out: list[str] | None = None,
  ) -> Params:
    """Returns parameters after imitation of the task's demonstrations.

    Args:
      params: donated.
      show: see `supervised.fine_tune`.
      left_out: see `demonstrations`.

    Raises:
      ConfigError: see `demonstrations`.
    """
    config = self.config.sft
    learning = sft.learning_config(config)
    optimizer = update.make_optimizer(learning, config.steps)
    settings = dataclasses.replace(
      self.config.learning, minibatches=1, old_logprobs='recompute'
    )
    learner = self.learner(
      presets.SUPERVISED,
      optimizer,
      sampling=Sampling(),
      learning=freeze(settings),
      name='sft',
    )
    return supervised.fine_tune(
      self.states.init_state(params, optimizer, 'sft'),
      learner=learner,
      demonstrations=self.demonstrations(left_out),
      config=config,
      show=show,
    ).params

  def drafter_training(self) -> DrafterTraining:
    """Returns the training of the network that drafts, beside RL."""
    return DrafterTraining(
      self.config,
      self.states,
      self.mesh,
      self.pool,
      networks=self.networks,
      demonstrations=self.demonstrations,
      row_length=self.row_length,
      clock=self.clock,
    )

  def extrapolation(self, judge: Judge) -> Leaps:
    """Returns the extrapolation of parameters between steps.

    Args:
      judge: says which problems a policy solves.

    Raises:
      ConfigError: the task has too few problems.
    """
    known = self.task.num_problems('train')
    wanted = self.algorithm.leap_problems
    try:
      problems = tasks.distinct_problems(
        self.task, 'train', wanted if known is None else min(wanted, known)
      )
    except ValueError as error:
      raise ConfigError(f'algorithm.leap_problems={wanted}: {error}') from error
    self.check_prompts(problems)
    return Leaps(self.states, self.pool, self.algorithm.leaps, judge, problems)

  def rollout_store(self) -> RolloutStore:
    """Returns an empty store of past rollouts, this process's part."""
    rollout = self.config.rollout
    widest = max(list_widths(rollout, self.config.control))
    # Where nobody drafts from it, it keeps nothing.
    used = rollout.drafter in FROM_ROLLOUTS and widest > 1
    kept = rollout.history if used else 0
    return RolloutStore(
      history=kept,
      megabytes=rollout.cache_megabytes,
      tokenizer=self._tokenizer_name,
      part=(processes.index(), processes.count()),
    )

  @property
  def _tokenizer_name(self) -> str:
    """Tells the token ids of one tokenizer from those of another."""
    name = self.config.model.tokenizer
    if name != loading.TOKENIZER:
      return name
    # Imported here: it needs packages that other runs do without.
    from rlax_llm.tokenizers import files

    return f'{name} {files.digest(self.config.model.pretrained)}'

  def problems(self, step: int) -> list[tasks.Problem]:
    """Returns the B problems of a training step.

    Raises:
      ConfigError: if the task has too few.
    """

    def make(indices: Sequence[int]) -> list[dict[str, Any]]:
      try:
        return [vars(self.task.problem('train', i)) for i in indices]
      except ValueError as error:
        raise ConfigError(str(error)) from error

    share = lambda indices: [
      tasks.Problem(**fields) for fields in processes.share(make, indices)
    ]
    try:
      return tasks.problems_for_step(
        self.task, self.config.task, self.config.seed, step, share
      )
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def demonstrations(
    self, left_out: list[str] | None = None
  ) -> Iterator[Sample]:
    """Yields the samples of the warm start, without those that do not fit.

    Args:
      left_out: receives one line for each sample that is left out; None:
        nothing does.

    Raises:
      ConfigError: while iterating: the task has no traces, or none of
        `MAX_LEFT_OUT` samples in a row fits.
    """
    task = tasks.demonstrations(self.task)
    # The problems of the warm start lie beyond those of any RL step.
    index, in_a_row = 1 << 44, 0
    while True:
      problem = task.problem('train', index)
      index += 1
      try:
        sample = self._supervised(problem)
      except Unusable as error:
        if left_out is not None:
          left_out.append(str(error))
        in_a_row += 1
        if in_a_row == MAX_LEFT_OUT:
          raise ConfigError(
            f'{in_a_row} demonstrations in a row do not fit: {error}'
          ) from error
        continue
      in_a_row = 0
      yield sample

  def check_prompts(self, problems: Sequence[tasks.Problem]) -> None:
    """Raises ConfigError if a problem's prompt is too long or not encodable."""

    def find_faults(mine: Sequence[tasks.Problem]) -> list[str]:
      return [self.prompt_tokens(problem)[1] for problem in mine]

    for fault in processes.share(find_faults, problems):
      if fault:
        raise ConfigError(fault)

  def prompt_tokens(self, problem: tasks.Problem) -> tuple[np.ndarray, str]:
    """Returns (int32[prompt length], why it cannot be sampled from, or '')."""
    longest = self.config.rollout.prompt_length
    try:
      tokens = np.asarray(self.encode(problem.prompt, prompt=True), np.int32)
    except Unusable as error:
      return np.zeros(0, np.int32), str(error)
    if len(tokens) > longest:
      return tokens, (
        f'the prompt {problem.prompt[:60]!r} has {len(tokens)} '
        f'tokens; rollout.prompt_length={longest}: raise it'
      )
    return tokens, ''

  def check_training_prompts(self) -> None:
    """Refuses a data set with a prompt that cannot be sampled from.

    Where problems are generated, one that does not fit is left out when its
    turn comes; then those of step 0 are refused only if none of them fits.

    Raises:
      ConfigError: naming a prompt; or the task has too few problems.
    """
    problems = self.problems(0)
    count = self.task.num_problems('train')
    if count is None:
      if all(self.prompt_tokens(problem)[1] for problem in problems):
        self.check_prompts(problems)
      return
    try:
      self.check_prompts(
        [self.task.problem('train', i) for i in range(min(count, _CHECKED))]
      )
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def encode(self, text: str, *, prompt: bool) -> list[int]:
    """Returns token ids; BOS first in a prompt.

    Raises:
      Unusable: the text has unknown characters.
      ConfigError: the chat template cannot be rendered.
    """
    try:
      return (
        self.tokenizer.encode_prompt(text)
        if prompt
        else self.tokenizer.encode(text)
      )
    except ConfigError:
      raise
    except ValueError as error:
      raise Unusable(str(error)) from error

  def _supervised(self, problem: tasks.Problem) -> Sample:
    """Returns a problem and its trace as a sample of the warm start.

    Raises:
      Unusable: the sample does not fit.
      ConfigError: there is no trace.
    """
    if problem.trace is None:
      raise ConfigError(
        f'task {problem.source!r} has no written-step traces '
        'to warm-start from; set sft.steps=0'
      )
    rollout = self.config.rollout
    prompt = self.encode(problem.prompt, prompt=True)
    trace = self.encode(problem.trace, prompt=False)
    try:
      return sft.make_sample(
        prompt,
        trace,
        self.tokenizer.eos_ids[0],
        rollout.prompt_length + rollout.max_new_tokens,
      )
    except ConfigError as error:
      raise Unusable(str(error)) from error

  def requests(
    self,
    problems: Sequence[tasks.Problem],
    *,
    samples: int,
    domain: int,
    step: int,
    first: int = 0,
  ) -> list[Request]:
    """Returns one request for each problem, its prompt tokenized.

    Args:
      problems: of one step.
      samples: of each.
      domain: TRAIN or EVALUATE.
      step: in which they are requested.
      first: number of the first within the step.
    """
    return [
      Request(
        prompt=np.asarray(self.encode(problem.prompt, prompt=True), np.int32),
        samples=samples,
        domain=domain,
        step=step,
        request=i,
      )
      for i, problem in enumerate(problems, first)
    ]


_CHECKED = 100_000  # training prompts that are looked at before a run

# Reproducible bits on GPU: no atomics, no choice of kernels by timing.
_DETERMINISTIC = (
  '--xla_gpu_deterministic_ops=true',
  '--xla_gpu_autotune_level=0',
)


def make_deterministic() -> None:
  """Sets XLA's flags; takes effect if no device was used before."""
  given = os.environ.get('XLA_FLAGS', '')
  missing = [f for f in _DETERMINISTIC if f.split('=')[0] not in given]
  os.environ['XLA_FLAGS'] = ' '.join([given, *missing]).strip()


def _make_tokenizer(config: Config) -> tokenizers.TextTokenizer:
  """Returns the tokenizer that the config or the pretrained folder names.

  Raises:
    ValueError: as its maker does.
  """
  task, name = config.task, config.model.tokenizer
  if name == loading.TOKENIZER:
    # Imported here: it needs packages that other runs do without.
    from rlax_llm.tokenizers.pretrained import load_tokenizer

    return load_tokenizer(
      config.model.pretrained,
      chat=task.chat_template,
      system=task.system_prompt,
      variables=task.chat_variables,
    )
  if task.chat_template:
    raise ConfigError(
      'task.chat_template=True needs the tokenizer of a '
      f'pretrained model; model.tokenizer={name!r} has no '
      'chat template'
    )
  return tokenizers.make_tokenizer(name)


def make_run(
  config: Config,
  *,
  clock: Callable[[], float] = time.perf_counter,
  on_boundary: Callable[[], None] = lambda: None,
) -> Run:
  """Checks a config against itself and the machine, and makes its parts.

  Args:
    config: as a config file returned it, or frozen.
    clock: seconds; read for statistics only.
    on_boundary: called where the work at hand may be given up, by raising.

  Raises:
    ConfigError: whatever can be wrong before a device works.
  """
  config = validate(loading.resolve(config))
  if config.deterministic:
    make_deterministic()
  algorithm = algorithms.resolve(config.algorithm)
  algorithms.check(algorithm, config)
  try:
    tokenizer = _make_tokenizer(config)
    task = registry.make_task(config.task, config.seed)
    # Workers make their own; a mistake ends the run here.
    rewards.make_rewards(config.task, task)
    if ':' in config.task.name:
      tasks.problem_json(task.problem('train', 0))
  except ValueError as error:
    raise ConfigError(str(error)) from error
  mesh = sharding.make_mesh(config.mesh)
  if config.mesh.replicas > 1 and processes.count() > 1:
    raise ConfigError(
      f'mesh.replicas={config.mesh.replicas} divides the devices of one '
      f'process, and there are {processes.count()}; set it to 1'
    )
  sharding.split(mesh, config.mesh.replicas)
  vocabulary = config.model.vocabulary or tokenizer.vocab_size
  tokenizers.check_vocabulary(tokenizer, vocabulary)
  ways = sharding.ways(mesh)
  learned = config.rollout.drafter in LEARNED
  for path, value in (
    ('rollout.slots', config.rollout.slots),
    ('learning.microbatch_rows', config.learning.microbatch_rows),
    ('drafter.microbatch_rows', config.drafter.microbatch_rows),
  ):
    if path == 'drafter.microbatch_rows' and not learned:
      continue
    if value % ways:
      raise ConfigError(
        f'{path}={value} is not divisible by {ways} ways; '
        'make it a multiple or lower mesh.data or fsdp'
      )
  model_config = dataclasses.replace(config.model, vocabulary=vocabulary)
  sharding.check_model(model_config, mesh)
  precision = config.learning.precision

  def make_networks(mesh: Mesh) -> tuple[LanguageModel, DraftModel | None]:
    constrain = functools.partial(sharding.constrain, mesh=mesh)
    model = make_transformer(
      model_config, precision, remat=config.learning.remat, constrain=constrain
    )
    if not learned:
      return model, None
    return model, make_draft_model(
      model_config, precision, model=model, constrain=constrain
    )

  @functools.cache
  def on_mesh(part: Mesh) -> Networks:
    model, draft_model = make_networks(part)
    own = states.learned()
    if own is None or draft_model is None:
      return Networks(model)
    return Networks(model, own._replace(draft_model=draft_model))

  model, draft_model = make_networks(mesh)
  pool = ExecutablePool(clock)
  states = States(config, algorithm, mesh, model, pool, draft_model)
  return Run(
    config,
    algorithm,
    mesh,
    tokenizer,
    task,
    model,
    pool,
    clock,
    states,
    on_boundary,
    on_mesh,
  )
