"""Completions of a trained policy; accepted drafts are shown in colour.

python -m rlax_llm.sample --workdir=DIR --prompt="4+3=" [--samples=4]
    [--temperature=0] [--top_p=0.9] [--max_new_tokens=64] [--json]
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import sys
from typing import IO

from absl import flags as absl_flags
import numpy as np
import rich.console
import rich.text

from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.config import check_positions
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import freeze
from rlax_llm.config import from_dict
from rlax_llm.config import list_widths
from rlax_llm.config import MeshConfig
from rlax_llm.config import to_dict
from rlax_llm.ops.sampling import Sampling
from rlax_llm.rollout.state import NOT_FINITE
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables
from rlax_llm.runtime import flags
from rlax_llm.runtime import sharding
from rlax_llm.tasks.task import with_instruction
from rlax_llm.tokenizers.tokenizer import TextTokenizer
from rlax_llm.types import EVALUATE
from rlax_llm.types import Params
from rlax_llm.types import Request
from rlax_llm.workdir import manifest

_DRAFTED_STYLE = 'bold green'


@dataclasses.dataclass(frozen=True)
class Completion:
  """One completion, as text and token by token."""

  prompt: str
  completion: str
  finished: bool  # emitted EOS (False: truncated)
  logprob: float  # of all its tokens under the law sampled from, nats
  drafted: list[bool]  # by token, EOS included: was an accepted draft
  accept_length: float  # tokens committed by one forward
  pieces: list[tuple[str, bool]]  # the text, cut where `drafted` changes


def split_pieces(
  tokenizer: TextTokenizer, tokens: Sequence[int], drafted: Sequence[bool]
) -> list[tuple[str, bool]]:
  """Cuts a completion's text where tokens begin or cease to be drafts.

  Args:
    tokenizer: decodes.
    tokens: of the completion.
    drafted: by token.

  Returns:
    (text, drafted) pairs whose texts join to the whole. A character of several
    tokens is not cut: it counts with its first one.
  """
  whole = tokenizer.decode(tokens)
  pieces: list[tuple[str, bool]] = []
  shown, first = '', 0
  for end in range(1, len(tokens) + 1):
    if end < len(tokens) and drafted[end] == drafted[first]:
      continue
    text = tokenizer.decode(tokens[:end])
    if not whole.startswith(text):
      continue
    if text != shown:
      pieces.append((text[len(shown) :], bool(drafted[first])))
    shown, first = text, end
  return pieces


def sample_texts(
  run: Run,
  params: Params,
  prompts: Sequence[str],
  *,
  samples: int = 1,
  sampling: Sampling | None = None,
  max_new_tokens: int | None = None,
  drafter_params: Params = (),
) -> list[Completion]:
  """Samples completions of texts.

  Their noise is that of the run's seed, so a call can be repeated; drafting
  changes no token.

  Args:
    run: the run.
    params: the policy's, on the run's mesh.
    prompts: texts, put to the model as they are.
    samples: completions of each prompt.
    sampling: the law to sample from; None: the run's own.
    max_new_tokens: T; None: the run's own.
    drafter_params: see `RolloutEngine.generate`.

  Returns:
    `samples` completions of each prompt, in order.

  Raises:
    ConfigError: no prompt, one that is too long or not encodable, or counts
      that are out of range.
  """
  requests = _make_requests(run, prompts, samples)
  run = _resized(run, samples * len(prompts), max_new_tokens)
  engine = run.engine(run.sampling if sampling is None else sampling)
  rollouts, _ = engine.generate(
    params, requests, RolloutState(), drafter_params=drafter_params
  )
  return [
    Completion(
      prompt=prompts[r.request.request],
      completion=run.tokenizer.decode(r.tokens),
      finished=r.finished,
      logprob=float(np.sum(r.behaviour_logprobs, dtype=np.float64)),
      drafted=[bool(d) for d in r.drafted],
      accept_length=r.length / max(r.forwards, 1),
      pieces=split_pieces(run.tokenizer, r.tokens.tolist(), r.drafted.tolist()),
    )
    for r in rollouts
  ]


def _make_requests(
  run: Run, prompts: Sequence[str], samples: int
) -> list[Request]:
  """Returns a request for each prompt; raises ConfigError."""
  if not prompts:
    raise ConfigError('there is no prompt; give at least one')
  if samples < 1:
    raise ConfigError(f'samples={samples} must be at least 1')
  requests = []
  for i, prompt in enumerate(prompts):
    tokens = run.encode(prompt, prompt=True)
    longest = run.config.rollout.prompt_length
    if len(tokens) > longest:
      raise ConfigError(
        f'the prompt {prompt[:60]!r} has {len(tokens)} tokens; the run was '
        f'made for rollout.prompt_length={longest}: shorten it'
      )
    requests.append(
      Request(
        prompt=np.asarray(tokens, np.int32),
        samples=samples,
        domain=EVALUATE,
        step=0,
        request=i,
      )
    )
  return requests


def _resized(run: Run, rows: int, max_new_tokens: int | None) -> Run:
  """Returns the run with no more slots than rows, and another T."""
  ways = sharding.ways(run.mesh)
  rollout = run.config.rollout
  if max_new_tokens is None:
    max_new_tokens = rollout.max_new_tokens
  if max_new_tokens < 1:
    raise ConfigError(f'max_new_tokens={max_new_tokens} must be at least 1')
  check_positions(
    dataclasses.replace(rollout, max_new_tokens=max_new_tokens),
    max(list_widths(rollout, run.config.control)),
    run.config.model.max_positions,
  )
  rollout = dataclasses.replace(
    rollout,
    slots=min(rollout.slots, -(-rows // ways) * ways),
    max_new_tokens=max_new_tokens,
    history=0,
  )  # there is no store
  config = freeze(dataclasses.replace(run.config, rollout=rollout))
  return dataclasses.replace(run, config=config)


def write_json(completions: Sequence[Completion], stream: IO[str]) -> None:
  """Writes one JSON object per line.

  Args:
    completions: from `sample_texts`.
    stream: where to.
  """
  for completion in completions:
    fields = dataclasses.asdict(completion)
    del fields['pieces']
    stream.write(json.dumps(fields) + '\n')


def write_text(completions: Sequence[Completion], stream: IO[str]) -> None:
  """Writes completions for reading, in colour where the stream is a terminal.

  Args:
    completions: from `sample_texts`.
    stream: where to.
  """
  console = rich.console.Console(file=stream, highlight=False)
  if console.is_terminal:
    legend = rich.text.Text()
    legend.append('tokens from ', style='dim')
    legend.append('accepted drafts', style=_DRAFTED_STYLE)
    console.print(legend)
  for completion in completions:
    line = rich.text.Text()
    line.append(completion.prompt, style='dim')
    for text, drafted in completion.pieces:
      line.append(text, style=_DRAFTED_STYLE if drafted else '')
    if not completion.finished:
      line.append(' [truncated]', style='dim')
    # Completions may be longer than the terminal is wide; a line break that
    # the model did not write would mislead.
    console.print(line, soft_wrap=True)
  tokens = sum(len(c.drafted) for c in completions)
  share = sum(sum(c.drafted) for c in completions) / max(tokens, 1)
  console.print(
    f'{tokens} tokens, {share:.0%} from accepted drafts', style='dim'
  )


def load_config(workdir: str, base: str | None = None) -> Config:
  """Returns the config that a run was made with, for one device.

  Args:
    workdir: the run's folder.
    base: where the weights that the run began with lie now; None: where they
      lay then.

  Raises:
    ConfigError: the folder holds no run, or the base is another one.
  """
  recorded = manifest.read_manifest(workdir)
  if recorded is None:
    raise ConfigError(
      f'{workdir!r} holds no run ({manifest.MANIFEST_FILE} is '
      'missing); run rlax_llm.train with this --workdir first'
    )
  config = from_dict(recorded['config'])
  if base is not None:
    config.model.pretrained = base
    manifest.check_workdir(workdir, to_dict(config), allow=())
  folder = config.model.pretrained
  if folder and not os.path.isdir(folder):
    raise ConfigError(
      f'the run began with model.pretrained={folder!r}, which '
      'is not there; say with --base where it lies now'
    )
  # A few rows do not need the devices that the run was trained on.
  config.mesh = MeshConfig(data=1)
  return config


def main(argv: list[str]) -> None:
  """Samples from the newest checkpoint as the command line says."""
  del argv
  temperature, top_p = _TEMPERATURE.value, _TOP_P.value
  if not _PROMPT.value:
    raise ConfigError(
      '--prompt is missing: the text to complete; it may be repeated'
    )
  if temperature is not None and not 0 <= temperature < float('inf'):
    raise ConfigError(f'--temperature={temperature} must be at least 0')
  if not 0 < top_p <= 1:
    raise ConfigError(f'--top_p={top_p} must be in (0, 1]')
  run = make_run(load_config(_WORKDIR.value, _BASE.value))
  for line in run.tokenizer.warnings:
    print(f'warning: {line}', file=sys.stderr)
  sampling = run.sampling._replace(top_p=top_p)
  if temperature is not None:
    sampling = sampling._replace(temperature=temperature)
  # As the run's own prompts are put.
  prompts = [with_instruction(text, run.config.task) for text in _PROMPT.value]
  # A mistake ends the program before the weights are read.
  _make_requests(run, prompts, _SAMPLES.value)
  _resized(run, 1, _MAX_NEW_TOKENS.value)
  executables.enable_compilation_cache()
  _, params, drafts = run.states.restore_params(_WORKDIR.value, drafter=True)
  completions = sample_texts(
    run,
    params,
    prompts,
    samples=_SAMPLES.value,
    sampling=sampling,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    drafter_params=drafts,
  )
  if not all(np.isfinite(c.logprob) for c in completions):
    print(f'warning: {NOT_FINITE}', file=sys.stderr)
  write = write_json if _JSON.value else write_text
  write(completions, sys.stdout)


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_workdir()
  _BASE = flags.DEFINE_base()
  _PROMPT = absl_flags.DEFINE_multi_string(
    'prompt',
    None,
    "text to complete; may be repeated; the task's instruction is added",
  )
  _SAMPLES = absl_flags.DEFINE_integer('samples', 1, 'completions per prompt')
  _TEMPERATURE = absl_flags.DEFINE_float(
    'temperature', None, "0 is greedy; the run's own when absent"
  )
  _TOP_P = absl_flags.DEFINE_float('top_p', 1.0, 'nucleus; 1 is off')
  _MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
    'max_new_tokens', None, "most new tokens; the run's own when absent"
  )
  _JSON = absl_flags.DEFINE_bool('json', False, 'one JSON object per line')
  flags.run(main)
