"""Whether two commits compute the same runs, bit for bit.

  python -m experiments.benchmarks.same_bits --base=COMMIT [--cases=grpo,tree]

Each case trains 12 steps of the quickstart, with 80 steps of warm start, once
in a worktree of the base commit and once in this checkout, on one machine. Two
runs are the same if the digests of tokens and parameters and every line of
metrics.jsonl are equal.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags

ROOT = pathlib.Path(__file__).parent.parent.parent

_BASE = flags.DEFINE_string('base', None, 'The commit to compare with.')
_CASES = flags.DEFINE_list('cases', [], 'Some of the cases; none: all.')
_OUT = flags.DEFINE_string(
  'out',
  None,
  'Keep what was recorded in a folder; '
  'a case that is there already is not run again.',
)

_SIZE = {
  'num_steps': 12,
  'sft.steps': 80,
  'evaluate.problems': 64,
  'checkpoint.every': 0,
}
_DEVICES = '--xla_force_host_platform_device_count=8'
# Case -> (overrides in the names of this checkout, XLA flags).
CASES: dict[str, tuple[dict[str, Any], str]] = {
  'grpo': ({'rollout.drafter': 'none'}, ''),
  'chain': ({'rollout.width': 4}, ''),
  'tree': ({'rollout.width': 8, 'rollout.branching': 2}, ''),
  'hybrid': ({'rollout.drafter': 'hybrid', 'rollout.width': 4}, ''),
  'ppo': ({'algorithm.name': 'ppo', 'algorithm.kl_coefficient': 0.1}, ''),
  'vcpo': (
    {
      'algorithm.name': 'vcpo',
      'algorithm.kl_coefficient': 0.1,
      'control.staleness': 2,
    },
    '',
  ),
  'april': (
    {'control.over_provision': 1.5, 'control.replay': 4, 'rollout.slots': 64},
    '',
  ),
  'lora': ({'model.lora.rank': 4}, ''),
  'devices': (
    {'mesh.data': 4, 'mesh.fsdp': 2, 'learning.microbatch_rows': 8},
    _DEVICES,
  ),
}


def record(tree: pathlib.Path, case: str) -> dict[str, Any]:
  """Runs a case in a checkout; returns its digests and its metrics."""
  overrides, xla_flags = CASES[case]
  with tempfile.TemporaryDirectory() as workdir:
    env = os.environ | {'PYTHONPATH': str(tree), 'JAX_PLATFORMS': 'cpu'}
    env['XLA_FLAGS'] = f'{env.get("XLA_FLAGS", "")} {xla_flags}'.strip()
    command = [
      sys.executable,
      '-m',
      'rlax_llm.train',
      '--config=configs/quickstart.py',
      f'--workdir={workdir}',
      *(
        f'--config.{name}={value}'
        for name, value in (_SIZE | overrides).items()
      ),
    ]
    done = subprocess.run(
      command, cwd=tree, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
      raise RuntimeError(f'{" ".join(command)}\n{done.stdout}{done.stderr}')
    files = pathlib.Path(workdir)
    summary = json.loads((files / 'summary.json').read_text())
    lines = (files / 'metrics.jsonl').read_text().splitlines()
  return {
    'tokens_sha256': summary['tokens_sha256'],
    'parameters_sha256': summary['parameters_sha256'],
    'metrics': [json.loads(line) for line in lines],
  }


def main(argv: list[str]) -> None:
  """Compares the cases; exits with 1 if one differs."""
  del argv
  cases = _CASES.value or list(CASES)
  with tempfile.TemporaryDirectory() as scratch:
    out = pathlib.Path(_OUT.value or scratch)
    out.mkdir(parents=True, exist_ok=True)
    base = pathlib.Path(scratch) / 'base'
    git = lambda *words: subprocess.run(
      ['git', '-C', str(ROOT), *words],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()
    commit = git('rev-parse', '--short', _BASE.value)
    git('worktree', 'add', '--detach', str(base), commit)
    try:
      differing = []
      for case in cases:
        path = out / f'{commit}_{case}.json'
        if not path.exists():
          path.write_text(json.dumps(record(base, case)))
        before, after = json.loads(path.read_text()), record(ROOT, case)
        same = {name: before[name] == after[name] for name in before}
        print(
          case,
          before['tokens_sha256'][:12],
          before['parameters_sha256'][:12],
          ' '.join(
            f'{name}: {"equal" if ok else "DIFFER"}'
            for name, ok in same.items()
          ),
          flush=True,
        )
        if not all(same.values()):
          differing.append(case)
    finally:
      git('worktree', 'remove', '--force', str(base))
  if differing:
    sys.exit(f'these cases differ: {", ".join(differing)}')


if __name__ == '__main__':
  flags.mark_flag_as_required('base')
  app.run(main)
