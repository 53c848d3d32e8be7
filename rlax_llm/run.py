"""What every entrypoint needs, made from one config: nothing is compiled."""

import dataclasses
import functools
import os
import time
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from rlax_llm import checkpoint
from rlax_llm import pretrained
from rlax_llm import sharding
from rlax_llm import tokenizer as tokenizers
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import list_widths
from rlax_llm.config import ModelConfig
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.executables import ExecutablePool
from rlax_llm.learning import algorithms
from rlax_llm.learning import sft
from rlax_llm.learning import update
from rlax_llm.learning.batch import Sample
from rlax_llm.models import lora
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.models.transformer import make_transformer
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.tasks import rewards
from rlax_llm.tasks import task as tasks
from rlax_llm.types import Array
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.types import TrainState
from rlax_llm.validation import validate


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

  def engine(self,
             sampling: Sampling,
             *,
             eos_ids: tuple[int, ...] | None = None) -> RolloutEngine:
    """Returns an engine for a sampling law; EOS is the tokenizer's."""
    return RolloutEngine(self.model,
                         rollout=self.config.rollout,
                         control=self.config.control,
                         sampling=sampling,
                         eos_ids=eos_ids or self.tokenizer.eos_ids,
                         seed=self.config.seed,
                         mesh=self.mesh,
                         clock=self.clock,
                         params_placement=self._rollout_placement(),
                         pool=self.pool)

  def _rollout_placement(self) -> Params | None:
    """Returns where rollouts read parameters; None: as they are."""
    abstract = self.abstract_params()
    rounded = jax.eval_shape(self.model.rounded, abstract)
    same = jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype, abstract, rounded))
    gather = (self.mesh.shape['fsdp'] > 1 and
              self.config.mesh.gather_for_rollout)
    if same and not gather:
      return None
    return self.params_placement(
        sharding.ROLLOUT_TABLE if gather else sharding.TABLE)

  def rollout_store(self) -> RolloutStore:
    """Returns an empty store of past rollouts."""
    rollout = self.config.rollout
    widest = max(list_widths(rollout, self.config.control))
    # Where nobody drafts from it, it keeps nothing.
    used = rollout.drafter == 'tree_cache' and widest > 1
    kept = rollout.history if used else 0
    return RolloutStore(history=kept,
                        megabytes=rollout.cache_megabytes,
                        tokenizer=self._tokenizer_name)

  @property
  def _tokenizer_name(self) -> str:
    """Tells the token ids of one tokenizer from those of another."""
    name = self.config.model.tokenizer
    if name != pretrained.TOKENIZER:
      return name
    folder = self.config.model.pretrained
    return f'{name} {pretrained.tokenizer_digest(folder)}'

  @property
  def model_config(self) -> ModelConfig:
    """The model's section, with its vocabulary."""
    return dataclasses.replace(self.config.model,
                               vocabulary=self.model.vocabulary)

  def check_pretrained(self) -> dict[str, Any]:
    """Checks the weights that `init_params` will read; reads headers only.

    Returns:
      What the manifest records of them; {} without `model.pretrained`.

    Raises:
      ConfigError: they do not fit the model.
    """
    folder = self.config.model.pretrained
    if not folder:
      return {}
    pretrained.find_tensors(folder, self.model_config)
    return {'pretrained': pretrained.fingerprint(folder)}

  def init_params(self) -> Params:
    """Returns the parameters a run begins with, on the mesh.

    They are those of `model.pretrained`, or fresh ones.

    Raises:
      ConfigError: the weights do not fit the model.
    """
    folder = self.config.model.pretrained
    abstract = self.abstract_state().params
    if not folder:
      return self._fresh(abstract)
    if not self.config.model.lora.rank:
      return pretrained.load_params(folder, self.model_config, abstract)
    adapters, base = lora.split(abstract, self.model.trainable(abstract))
    return lora.join(self._fresh(adapters),
                     pretrained.load_params(folder, self.model_config, base))

  def _fresh(self, abstract: Params) -> Params:
    """Returns fresh parameters, those that are not gaps."""

    def init(key: Array) -> Params:
      params = self.model.init(key)
      if len(jax.tree.leaves(abstract)) == len(jax.tree.leaves(params)):
        return params
      return lora.split(params, self.model.trainable(params))[0]

    return self.pool(('init',),
                     init,
                     jax.random.key(self.config.seed),
                     out_shardings=jax.tree.map(lambda x: x.sharding, abstract))

  def abstract_params(self) -> Params:
    """Returns shapes and dtypes of the parameters."""
    return jax.eval_shape(self.model.init, jax.random.key(0))

  def params_placement(self, table: sharding.Table = sharding.TABLE) -> Params:
    """Returns a sharding for every parameter."""
    abstract = self.abstract_params()
    return sharding.place_tree(abstract, self.model.axes(abstract), self.mesh,
                               table)

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """The policy's optimizer."""
    learning = self.config.learning
    return update.make_optimizer(learning,
                                 self.config.num_steps * learning.minibatches)

  def init_state(self,
                 params: Params,
                 optimizer: optax.GradientTransformation | None = None,
                 name: str = 'policy') -> TrainState:
    """Returns the state before the first step; donates the parameters.

    Args:
      params: on the mesh.
      optimizer: None: the policy's.
      name: of the objective, tells executables apart.
    """
    optimizer = optimizer or self.optimizer
    placement = jax.tree.map(lambda x: x.sharding,
                             self.abstract_state(optimizer))
    return self.pool(('init_state', name),
                     functools.partial(update.init_state,
                                       model=self.model,
                                       optimizer=optimizer),
                     params,
                     donate_argnums=(0,),
                     out_shardings=placement)

  def abstract_state(
      self,
      optimizer: optax.GradientTransformation | None = None) -> TrainState:
    """Returns shapes, dtypes and shardings of the state.

    Args:
      optimizer: None: the policy's. What it keeps for a parameter lies where
        the parameter lies.
    """
    optimizer = optimizer or self.optimizer
    params = self.abstract_params()
    make = functools.partial(update.init_state,
                             model=self.model,
                             optimizer=optimizer)
    state = jax.eval_shape(make, params)
    place = lambda x, where: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=where)
    placement = self.params_placement()
    trained, _ = lora.split(placement, self.model.trainable(params))
    anywhere = sharding.replicated(self.mesh)
    return TrainState(
        step=place(state.step, anywhere),  # type: ignore
        params=jax.tree.map(place, state.params, placement),
        opt_state=optax.tree_map_params(
            optimizer,
            place,
            state.opt_state,
            trained,
            transform_non_params=lambda x: place(x, anywhere)))

  def restore(self,
              workdir: str,
              *,
              step: int | None = None) -> tuple[int, TrainState, dict]:
    """Returns (step, state, host state) of a checkpoint.

    Args:
      workdir: the run's folder.
      step: which; None: the newest readable one.

    Raises:
      ConfigError: if there is none, or it is another model's.
    """
    with checkpoint.Checkpoints(workdir,
                                keep=self.config.checkpoint.keep) as saved:
      found = saved.restore(self.abstract_state(), step=step)
    if found is None:
      raise ConfigError(f'{workdir!r} holds no checkpoint; run '
                        'rlax_llm.train with this --workdir first')
    return found

  def learning_rate(self, step: int) -> float:
    """Returns the learning rate at the end of an RL step."""
    learning = self.config.learning
    schedule = update.make_schedule(
        learning, self.config.num_steps * learning.minibatches)
    last = (step + 1) * learning.minibatches - 1
    return float(schedule(jnp.asarray(last)))

  def reference(self, workdir: str, params: Params, step: int) -> Params | None:
    """Returns the reference policy: the parameters before RL; or None.

    What is trained is saved apart, once, because no checkpoint of a later step
    holds it. What is frozen is the policy's own and has a gap here: with LoRA
    the reference is adapters, and takes no memory to speak of.

    Args:
      workdir: the run's folder.
      params: the policy's, copied if step is 0.
      step: RL steps taken so far.
    """
    if not self.algorithm.kl_coefficient:
      return None
    abstract = self.abstract_state().params
    trained = self.model.trainable(abstract)
    abstract, _ = lora.split(abstract, trained)
    with checkpoint.Checkpoints(f'{workdir}/reference', keep=1) as saved:
      if step == 0:
        copy = self.pool(('copy',),
                         lambda p: jax.tree.map(jnp.copy, p),
                         lora.split(params, trained)[0],
                         out_shardings=jax.tree.map(lambda x: x.sharding,
                                                    abstract))
        if not saved.steps():
          saved.save(0, copy, {})
        return copy
      found = saved.restore(abstract)
    if found is None:
      raise ConfigError(f'{workdir}/reference is missing; the KL term of a '
                        'continued run needs it: restore it or start again')
    return found[1]

  def problems(self, step: int) -> list[tasks.Problem]:
    """Returns the B problems of a training step.

    Raises:
      ConfigError: if the task has too few.
    """
    try:
      return tasks.problems_for_step(self.task, self.config.task,
                                     self.config.seed, step)
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def demonstration(self, index: int) -> Sample:
    """Returns a sample of the warm start."""
    task = tasks.demonstrations(self.task)
    # The problems of the warm start lie beyond those of any RL step.
    return self._supervised(task.problem('train', (1 << 44) + index))

  def check_prompts(self, problems: Sequence[tasks.Problem]) -> None:
    """Raises ConfigError if a problem's prompt is too long or not encodable."""
    longest = self.config.rollout.prompt_length
    for problem in problems:
      length = len(self.encode(problem.prompt, prompt=True))
      if length > longest:
        raise ConfigError(
            f'the prompt {problem.prompt[:60]!r} has {length} tokens; '
            f'rollout.prompt_length={longest}: raise it')

  def known_problems(self) -> list[tasks.Problem]:
    """Returns every training problem, or step 0's where they are generated.

    Raises:
      ConfigError: if the task has too few.
    """
    first = self.problems(0)
    count = self.task.num_problems('train')
    if count is None:
      return first
    try:
      return [
          self.task.problem('train', i) for i in range(min(count, _CHECKED))
      ]
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def encode(self, text: str, *, prompt: bool) -> list[int]:
    """Returns token ids; BOS first in a prompt."""
    try:
      return (self.tokenizer.encode_prompt(text)
              if prompt else self.tokenizer.encode(text))
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def _supervised(self, problem: tasks.Problem) -> Sample:
    """Returns a problem and its trace as a sample of the warm start."""
    if problem.trace is None:
      raise ConfigError(f'task {problem.source!r} has no written-step traces '
                        'to warm-start from; set sft.steps=0')
    rollout = self.config.rollout
    return sft.make_sample(self.encode(problem.prompt, prompt=True),
                           self.encode(problem.trace,
                                       prompt=False), self.tokenizer.eos_ids[0],
                           rollout.prompt_length + rollout.max_new_tokens)

  def requests(self, problems: Sequence[tasks.Problem], *, samples: int,
               domain: int, step: int) -> list[Request]:
    """Returns one request for each problem, its prompt tokenized."""
    return [
        Request(prompt=np.asarray(self.encode(problem.prompt, prompt=True),
                                  np.int32),
                samples=samples,
                domain=domain,
                step=step,
                request=i) for i, problem in enumerate(problems)
    ]


_CHECKED = 100_000  # training prompts that are looked at before a run

# Reproducible bits on GPU: no atomics, no choice of kernels by timing.
_DETERMINISTIC = ('--xla_gpu_deterministic_ops=true',
                  '--xla_gpu_autotune_level=0')


def _make_deterministic() -> None:
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
  if name == pretrained.TOKENIZER:
    # Imported here: it needs packages that other runs do without.
    from rlax_llm.pretrained_tokenizer import load_tokenizer
    return load_tokenizer(config.model.pretrained,
                          chat=task.chat_template,
                          system=task.system_prompt,
                          variables=task.chat_variables)
  if task.chat_template:
    raise ConfigError('task.chat_template=True needs the tokenizer of a '
                      f'pretrained model; model.tokenizer={name!r} has no '
                      'chat template')
  return tokenizers.make_tokenizer(name)


def _check_groups(algorithm: algorithms.Algorithm, config: Config) -> None:
  """Refuses groups too small for the algorithm's advantage."""
  group = config.rollout.samples_per_prompt
  batch = group * config.task.prompts_per_step
  if (algorithm.advantage == 'best_minus_second' and group < 2 or
      algorithm.advantage == 'batch_scaled' and batch < 2):
    raise ConfigError(
        f'rollout.samples_per_prompt={group} leaves nothing to compare for '
        f'algorithm.advantage={algorithm.advantage!r}; use at least 2')


def make_run(config: Config,
             *,
             clock: Callable[[], float] = time.perf_counter) -> Run:
  """Checks a config against itself and the machine, and makes its parts.

  Args:
    config: as a config file returned it, or frozen.
    clock: seconds; read for statistics only.

  Raises:
    ConfigError: whatever can be wrong before a device works.
  """
  config = validate(pretrained.resolve(config))
  if config.deterministic:
    _make_deterministic()
  algorithm = algorithms.resolve(config.algorithm)
  _check_groups(algorithm, config)
  try:
    tokenizer = _make_tokenizer(config)
    task = tasks.make_task(config.task, config.seed)
    # Workers make their own; a mistake ends the run here.
    rewards.make_rewards(config.task, task)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  mesh = sharding.make_mesh(config.mesh)
  vocabulary = config.model.vocabulary or tokenizer.vocab_size
  tokenizers.check_vocabulary(tokenizer, vocabulary)
  ways = sharding.ways(mesh)
  for path, value in (('rollout.slots', config.rollout.slots),
                      ('learning.microbatch_rows',
                       config.learning.microbatch_rows)):
    if value % ways:
      raise ConfigError(f'{path}={value} is not divisible by {ways} ways; '
                        'make it a multiple or lower mesh.data or fsdp')
  model_config = dataclasses.replace(config.model, vocabulary=vocabulary)
  sharding.check_model(model_config, mesh)
  model = make_transformer(model_config,
                           config.learning.precision,
                           remat=config.learning.remat,
                           constrain=functools.partial(sharding.constrain,
                                                       mesh=mesh))
  return Run(config, algorithm, mesh, tokenizer, task, model,
             ExecutablePool(clock), clock)
