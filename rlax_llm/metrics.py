# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""What a run writes: the vocabulary of metrics, their files, samples, summary.

Training values (functions of config, seed and step) go to metrics.jsonl, one
object per step, bit for bit the same in every repetition; speed values go to
timing.jsonl with the run's id. Both also go to TensorBoard.

Numbers in the files are exact: a float32 is written as the float64 that
equals it, in the shortest form that reads back to it. JSON has no NaN and no
infinity, so either is written as null; TensorBoard receives the value itself.
"""

import json
import math
import os
import pathlib
import re
import sys
from types import TracebackType
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import numpy as np

from rlax_llm import board
from rlax_llm import files


class Metric(NamedTuple):
  """One entry of the vocabulary."""
  unit: str  # '1' where it has none
  kind: str  # training | speed
  meaning: str


_T, _S = 'training', 'speed'
METRICS: dict[str, Metric] = {
    'reward/mean':
        Metric('1', _T, 'mean reward of the step'),
    'reward/correct':
        Metric('1', _T, "mean of the task's own reward, before its weight"),
    'reward/format':
        Metric('fraction', _T, 'completions with an answer in its place'),
    'reward/length':
        Metric('1', _T, 'mean punishment of length, before its weight'),
    'reward/std':
        Metric('1', _T, 'standard deviation of the reward'),
    'reward/unscorable':
        Metric('samples', _T, 'samples the verifier could not judge'),
    'reward/groups_with_signal':
        Metric('fraction', _T, 'groups whose rewards differ'),
    'reward/label_accuracy':
        Metric('fraction', _T, 'prompts whose majority answer is right'),
    'reward/label_agreement':
        Metric('fraction', _T, "pseudo-rewards that are the verifier's"),
    'learning/skipped':
        Metric('fraction', _T, 'optimizer steps skipped: not finite'),
    'rollout/tokens':
        Metric('tokens', _T, 'completion tokens of the step'),
    'rollout/sampled_tokens':
        Metric('tokens', _T, 'sampled in the step, up to the cut'),
    'rollout/trained_tokens':
        Metric('tokens', _T, 'trained on for the first time'),
    'rollout/buffered_tokens':
        Metric('tokens', _T, 'sampled, and kept for coming steps'),
    'rollout/dropped_tokens':
        Metric('tokens', _T, 'of groups that are never trained on'),
    'rollout/pending_groups':
        Metric('groups', _T, 'put off, to be continued in the next step'),
    'rollout/length_tau':
        Metric('1', _T, "Kendall's tau of predicted and mean group lengths"),
    'prune/head_loss':
        Metric('nats', _T, 'of the head that foretells rewards, as it prunes'),
    'prune/success':
        Metric('1', _T, 'mean reward in [0, 1], as if nobody had been pruned'),
    'prune/kept_success':
        Metric('1', _T, 'mean reward in [0, 1] of those that went on'),
    'prune/effective_share':
        Metric('fraction', _T, 'effective samples of the weighted ones'),
    'rollout/refills':
        Metric('1', _T, 'times that more groups were asked for'),
    'rollout/length_mean':
        Metric('tokens', _T, 'mean completion length'),
    'rollout/length_p50':
        Metric('tokens', _T, 'median completion length'),
    'rollout/length_p95':
        Metric('tokens', _T, '95th percentile of the completion length'),
    'rollout/length_max':
        Metric('tokens', _T, 'longest completion'),
    'rollout/truncated_fraction':
        Metric('fraction', _T, 'completions that did not emit EOS'),
    'policy/kl_reference':
        Metric('nats', _T, "KL from the reference, by the loss's estimator"),
    'policy/kl_reference_k3':
        Metric('nats', _T, 'KL from the reference by k3, in the loss or not'),
    'policy/entropy':
        Metric('nats', _T, 'entropy of the policy, per trained token'),
    'policy/clip_fraction':
        Metric('fraction', _T, 'trained tokens whose ratio was clipped'),
    'policy/ratio_max':
        Metric('1', _T, 'largest probability ratio, new to old policy'),
    'policy/ratio_mean':
        Metric('1', _T, 'mean probability ratio, new to old policy'),
    'policy/ratio_min':
        Metric('1', _T, 'smallest probability ratio, new to old policy'),
    'policy/effective_tokens':
        Metric('fraction', _T, 'tokens left by weights new / sampling policy'),
    'policy/rejected_fraction':
        Metric('fraction', _T, 'trained tokens dropped for a stale sampler'),
    'policy/behaviour_gap_max':
        Metric('nats', _S, 'largest |behaviour - recomputed| log-probability'),
    'policy/approximate_kl':
        Metric('nats', _T, 'mean of old - new log-probability, per token'),
    'policy/staleness_mean':
        Metric('steps', _T, 'age of the policy that sampled a token'),
    'policy/staleness_max':
        Metric('steps', _T, 'age of the oldest policy that sampled a token'),
    'learning/loss':
        Metric('1', _T, 'the loss'),
    'learning/grad_norm':
        Metric('1', _T, 'global norm of the gradient, before clipping'),
    'learning/learning_rate':
        Metric('1', _T, 'learning rate of the step'),
    'learning/step_scale':
        Metric('1', _T, "factor of the optimizer's step"),
    'learning/trained_fraction':
        Metric('fraction', _T, "samples that the objective's filter keeps"),
    'critic/loss':
        Metric('1', _T, 'value loss, mean over tokens'),
    'critic/grad_norm':
        Metric('1', _T, "norm of the critic's gradient, before clipping"),
    'critic/clip_fraction':
        Metric('fraction', _T, 'tokens whose value was clipped'),
    'critic/value_mean':
        Metric('1', _T, 'mean value before the update'),
    'critic/explained_variance':
        Metric('1', _T, '1 - Var(returns - values) / Var(returns)'),
    'learning/padding_fraction':
        Metric('fraction', _T, 'positions of the packed batch with no token'),
    'sft/loss':
        Metric('nats', _T, 'warm start: cross-entropy per token'),
    'evaluate/accuracy':
        Metric('fraction', _T, 'held-out problems solved, mean over samples'),
    'evaluate/tokens_mean':
        Metric('tokens', _T, 'of an answer, with early stopping'),
    'evaluate/probe_tokens_mean':
        Metric('tokens', _T, 'of the probes of an answer'),
    'evaluate/stopped_fraction':
        Metric('fraction', _T, 'answers that ended because probes agreed'),
    'rollout/tokens_per_second':
        Metric('tokens/s', _S, 'completion tokens per second of rollout'),
    'rollout/accept_length':
        Metric('tokens', _S, 'tokens committed per sequence and forward'),
    'rollout/drafted_fraction':
        Metric('fraction', _S, 'tokens that were accepted drafts'),
    'rollout/forwards':
        Metric('forwards', _S, 'forwards of the rollout'),
    'rollout/width_mean':
        Metric('nodes', _S, 'nodes verified in one forward, mean'),
    'rollout/ahead_tokens':
        Metric('tokens', _S, 'sampled for a coming step, as hints to drafts'),
    'rollout/discarded_tokens':
        Metric('tokens', _S, 'beyond the cut, as hints to drafts'),
    'rollout/cache_bytes':
        Metric('bytes', _S, 'host memory of the earlier rollouts'),
    'rollout/cached_prompts':
        Metric('prompts', _S, 'prompts with earlier rollouts'),
    'drafter/loss':
        Metric('1', _S, "the drafter's loss, mean over its updates"),
    'drafter/updates':
        Metric('updates', _S, 'of the drafter, in the step'),
    'time/drafter':
        Metric('s', _S, 'training the drafter'),
    'rollout/segments':
        Metric('segments', _S, 'segments, each with one read of the device'),
    'rollout/executables':
        Metric('1', _S, 'segments compiled so far, by rows, capacity and arm'),
    'rollout/occupancy':
        Metric('fraction', _S, 'slots that hold an unfinished sample'),
    'time/rollout':
        Metric('s', _S, 'sampling the completions'),
    'time/reshard':
        Metric('s', _S, "parameters to the rollout's places; in time/rollout"),
    'time/reward':
        Metric('s', _S, 'verifying the answers'),
    'time/score':
        Metric('s', _S, 'log-probabilities: old and reference policy'),
    'time/update':
        Metric('s', _S, 'optimizer step'),
    'time/step':
        Metric('s', _S, 'the whole step'),
    'time/evaluate':
        Metric('s', _S, 'evaluation, outside of time/step'),
    'time/checkpoint':
        Metric('s', _S, 'saving, outside of time/step'),
    'memory/update':
        Metric('bytes', _S, 'of one device, for the largest update'),
    'memory/segment':
        Metric('bytes', _S, 'of one device, for the largest segment'),
    'compile/count':
        Metric('1', _S, 'compilations in the step'),
    'compile/seconds':
        Metric('s', _S, 'time spent compiling in the step'),
    'memory/device_bytes':
        Metric('bytes', _S, 'peak device memory in use'),
}
_PASS_AT = re.compile(r'evaluate/pass_at_[1-9]\d*')
_OWN_REWARD = re.compile(r'reward/[\w.]+:\w+')

METRICS_FILE = 'metrics.jsonl'
TIMING_FILE = 'timing.jsonl'
SAMPLES_FILE = 'samples.jsonl'
SUMMARY_FILE = 'summary.json'
SAMPLES_PER_STEP = 8


def describe(name: str) -> Metric:
  """Returns the vocabulary's entry for a metric name.

  Args:
    name: a key of `METRICS`, evaluate/pass_at_K for a positive integer K, or
      reward/module:function for a reward of the user's own.

  Returns:
    Its unit, kind and meaning.

  Raises:
    ValueError: the vocabulary has no such name.
  """
  if name in METRICS:
    return METRICS[name]
  if _PASS_AT.fullmatch(name):
    count = name.rsplit('_', 1)[1]
    return Metric('fraction', _T, f'solved by at least one of {count} samples')
  if _OWN_REWARD.fullmatch(name):
    own = name.partition('/')[2]
    return Metric('1', _T, f'mean of the reward {own}, before its weight')
  raise ValueError(f'{name!r} is not in the vocabulary; add it to '
                   'rlax_llm.metrics.METRICS with its unit and kind')


def jsonable(value: Any) -> Any:
  """Returns a value as JSON can hold it exactly; NaN and infinity as None.

  Args:
    value: nested dicts and sequences of strings, booleans, Python, NumPy or
      JAX numbers and arrays.

  Returns:
    The same, of plain Python types.
  """
  if value is None or isinstance(value, (str, bool)):
    return value
  if isinstance(value, Mapping):
    return {str(k): jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v) for v in value]
  if isinstance(value, (int, float)):
    return value if math.isfinite(value) else None
  array = np.asarray(value)
  if array.dtype.kind not in 'biuf':  # bfloat16 and its kin
    array = array.astype(np.float32)
  return jsonable(array.tolist())


def write_summary(workdir: str | os.PathLike[str],
                  summary: Mapping[str, Any]) -> None:
  """Writes summary.json, atomically.

  Args:
    workdir: the run's folder.
    summary: what to write; numbers may be NumPy or JAX scalars.
  """
  files.write_atomic(
      pathlib.Path(workdir) / SUMMARY_FILE,
      json.dumps(jsonable(summary), indent=2) + '\n')


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the objects of a JSON-lines file.

  Args:
    path: the file; it may be missing.

  Returns:
    One dict per line, in order. Lines that are not JSON objects are left out:
    a killed run leaves a torn one.
  """
  if not os.path.isfile(path):
    return []
  rows = []
  with open(path, encoding='utf-8', errors='replace') as file:
    for line in file:
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(row, dict):
        rows.append(row)
  return rows


class MetricsWriter:
  """Writes a run's metrics and samples; flushed after every step."""

  def __init__(self,
               workdir: str | os.PathLike[str],
               *,
               resume_step: int | None,
               run_id: str,
               warn: Callable[[str], None] | None = None) -> None:
    """Opens the files, keeping what belongs before the restored step.

    Args:
      workdir: the run's folder; made if missing.
      resume_step: the restored step: metrics.jsonl and samples.jsonl keep
        the lines up to it, whole ones only. None: the run starts from nothing,
        and so do these two files. timing.jsonl is always kept.
      run_id: written into each line of timing.jsonl.
      warn: receives one line when TensorBoard's copy is lost; None: stderr
        does.

    Raises:
      WriteError: a file cannot be written; so do the methods.
    """
    root = pathlib.Path(workdir)
    with files.writing(root):
      root.mkdir(parents=True, exist_ok=True)
    self._run_id = run_id
    kept = _truncate(root / METRICS_FILE, resume_step)
    _truncate(root / SAMPLES_FILE, resume_step)
    self._last_step = kept[-1] if kept else None
    self._metrics = files.LineFile(root / METRICS_FILE)
    self._samples = files.LineFile(root / SAMPLES_FILE)
    self._timing = files.LineFile(root / TIMING_FILE)
    self._board = board.Board(
        root,
        # TensorBoard then hides what an interrupted run wrote beyond it.
        purge_step=None if resume_step is None else resume_step + 1,
        run_id=run_id,
        warn=warn or _to_stderr)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one step's metrics, each to the file of its kind.

    Args:
      step: the step they belong to; with training values among them, above
        every step written before. A warm start may count up to 0 from below.
      values: scalars by name; the names are those of `METRICS`.

    Raises:
      ValueError: an unknown name, or a step already written.
    """
    kinds: dict[str, dict[str, Any]] = {_T: {}, _S: {}}
    for name, value in values.items():
      kinds[describe(name).kind][name] = jsonable(value)
    if kinds[_T]:
      if self._last_step is not None and step <= self._last_step:
        raise ValueError(f'step {step} cannot be written to {METRICS_FILE}: it '
                         f'already holds step {self._last_step}; write the '
                         'training values of a step in one call')
      self._last_step = step
      self._metrics.write(_line({'step': step}, kinds[_T]))
    if kinds[_S]:
      self._timing.write(_line({'step': step, 'run': self._run_id}, kinds[_S]))
    self._board.write(step, values)

  def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the first `SAMPLES_PER_STEP` rows to samples.jsonl.

    Args:
      step: the step they belong to.
      rows: `prompt`, `completion`, `reward`, `advantage` and whatever else
        tells a reader about the sample.
    """
    for row, _ in zip(rows, range(SAMPLES_PER_STEP)):
      self._samples.write(_line({'step': step}, jsonable(row)))

  def close(self) -> None:
    """Closes every file."""
    for file in (self._metrics, self._samples, self._timing):
      file.close()
    self._board.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None,
               error: BaseException | None,
               trace: TracebackType | None) -> None:
    self.close()


class NoWriter(MetricsWriter):
  """Writes nothing: of several processes one writes."""

  def __init__(self, workdir: str | os.PathLike[str], *,
               resume_step: int | None, run_id: str,
               warn: Callable[[str], None]) -> None:
    """Takes what `MetricsWriter` takes."""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Does nothing."""

  def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def _line(head: Mapping[str, Any], values: Mapping[str, Any]) -> str:
  row = {**head, **{k: values[k] for k in sorted(values) if k not in head}}
  return json.dumps(row, allow_nan=False, ensure_ascii=False)


def _truncate(path: pathlib.Path, last: int | None) -> list[int]:
  """Keeps the whole lines of steps up to `last`; returns their steps."""
  if not path.exists():
    return []
  kept, steps = [], []
  with files.writing(path):
    lines = path.read_bytes().splitlines(keepends=True)
  for line in lines:
    try:
      step = json.loads(line.decode('utf-8'))['step']
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
    if (last is not None and isinstance(step, int) and step <= last and
        line.endswith(b'\n')):
      kept.append(line)
      steps.append(step)
  files.write_atomic(path, b''.join(kept))
  return steps


def _to_stderr(line: str) -> None:
  print(f'warning: {line}', file=sys.stderr, flush=True)
