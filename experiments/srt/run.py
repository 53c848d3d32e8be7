"""SRT at small scale: what each source of drafts saves.

  python -m experiments.srt.run --size=tiny

Trains a policy without speculation. In every step each arm generates the same
rollouts again, from the same parameters, with drafts from its own source; its
tokens are compared with those of the run, and its forwards and seconds are
noted. The paper: "SRT", https://arxiv.org/abs/2601.09083. Writes steps.csv,
arms.csv and arms.png into --out.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app
from absl import flags
import jax
import matplotlib
import numpy as np

from experiments import common
from experiments.srt import settings
from rlax_llm.components import make_run
from rlax_llm.components import Run
from rlax_llm.config import Config
from rlax_llm.config import freeze
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.experience import training_state
from rlax_llm.experience.steps import make_steps
from rlax_llm.rollout.engine import RolloutEngine
from rlax_llm.rollout.state import RolloutState
from rlax_llm.runtime import executables
from rlax_llm.tasks.verifier.verifier import Verifier
from rlax_llm.train import train_step
from rlax_llm.types import Params
from rlax_llm.types import Rollout
from rlax_llm.types import TRAIN

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402  pylint: disable=wrong-import-position

_SIZE = flags.DEFINE_enum(
  'size', 'tiny', list(settings.SIZES), 'Of the model and the batch.'
)
_SAMPLES = flags.DEFINE_list('samples', ['5', '10'], 'Samples per prompt.')
_OBJECTIVES = flags.DEFINE_list(
  'objectives', list(settings.OBJECTIVES), 'Objectives to train with.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the runs.')
_OUT = flags.DEFINE_string('out', 'experiments/srt', 'Where results go.')


class ArmRunner:
  """An engine with an arm's drafter, and the arm's own store."""

  def __init__(self, name: str, run: Run, width: int) -> None:
    self.name, self._arm = name, settings.ARMS[name]
    rollout = run.config.rollout
    control = dataclasses.replace(
      run.config.control, run_ahead_rows=rollout.slots
    )
    self._engine = RolloutEngine(
      run.model,
      rollout=rollout,
      control=freeze(control) if self._arm.ahead else run.config.control,
      sampling=run.sampling,
      eos_ids=run.tokenizer.eos_ids,
      seed=run.config.seed,
      mesh=run.mesh,
      drafter=settings.make_drafter(self._arm, run.config, width),
      pool=run.pool,
    )
    self._store = RolloutStore(
      history=self._arm.history,
      megabytes=256,
      tokenizer=run.config.model.tokenizer,
      shared=self._arm.shared,
    )

  def generate(
    self,
    params: Params,
    step: int,
    requests: Sequence[Any],
    ahead: Sequence[Any],
  ) -> tuple[list[Rollout], dict[str, Any]]:
    """Returns the rollouts of a step and what they took."""
    state = RolloutState(version=step, store=self._store)
    compiled, start = self._engine.pool.seconds, time.perf_counter()
    rollouts, _ = self._engine.generate(
      params, requests, state, ahead=ahead if self._arm.ahead else ()
    )
    seconds = time.perf_counter() - start
    seconds -= self._engine.pool.seconds - compiled
    self._store.drop_hints(step)
    stats = self._engine.stats
    return rollouts, {
      'seconds': round(seconds, 4),
      'forwards': stats.forwards,
      'accept_length': round(stats.tokens / stats.row_forwards, 3),
      'tokens': stats.tokens,
      'ahead_tokens': stats.ahead_tokens,
    }


def train_and_compare(
  config: Config, width: int, params: Params | None, tags: dict[str, Any]
) -> tuple[list[dict], Params]:
  """Trains one run; returns a row for each (step, arm), and the warm start.

  Args:
    config: of the run.
    width: W of every arm that drafts.
    params: after the warm start; None: it is run.
    tags: columns that name the run.

  Raises:
    RuntimeError: an arm's tokens differ from the run's.
  """
  run = make_run(config)
  config = run.config
  if params is None:
    params = run.warm_start(run.states.init_params(), lambda done, loss: None)
  warm = jax.tree.map(np.array, params)  # a copy: `init_state` donates
  states = run.states.init_all(params)
  arms = [ArmRunner(name, run, width) for name in settings.ARMS]
  rows = []
  with Verifier(config.task, config.seed) as verifier:
    steps = make_steps(run, verifier)
    reference = run.states.reference(
      tempfile.mkdtemp(), states['policy'].params, 0
    )
    state = training_state.first(steps, states)
    for step in range(config.num_steps):
      make = lambda s: run.requests(
        run.problems(s),
        samples=config.rollout.samples_per_prompt,
        domain=TRAIN,
        step=s,
      )
      requests, ahead = make(step), make(step + 1)
      want, lengths = None, None
      # Arms take turns at being first: none is always next to a cold cache.
      for arm in arms[step % len(arms) :] + arms[: step % len(arms)]:
        rollouts, numbers = arm.generate(
          states['policy'].params, step, requests, ahead
        )
        tokens = [r.tokens.tolist() for r in rollouts]
        want = want or tokens
        lengths = [len(t) for t in tokens]
        rows.append(
          tags
          | {
            'step': step,
            'epoch': step * len(requests) // config.task.epoch_prompts,
            'arm': arm.name,
            **numbers,
            'length_max_over_mean': round(
              max(lengths) / statistics.mean(lengths), 2
            ),
            'differing_samples': sum(a != b for a, b in zip(tokens, want)),
          }
        )
      state, values, _ = train_step(step, state, steps, reference)
      states = state.train_states
      print(
        f'{tags} step {step}: reward {values["reward/mean"]:.3f}', flush=True
      )
  return rows, warm


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each run and arm: from the second epoch on."""
  summary = []
  groups = sorted({(r['objective'], r['samples']) for r in rows})
  for objective, samples in groups:
    later = [
      r
      for r in rows
      if (r['objective'], r['samples']) == (objective, samples)
      and r['epoch'] > 0
    ]
    plain = [r for r in later if r['arm'] == 'none']
    for arm in settings.ARMS:
      mine = [r for r in later if r['arm'] == arm]
      mine.sort(key=lambda r: r['step'])
      ratios = [p['seconds'] / m['seconds'] for p, m in zip(plain, mine)]
      total = lambda name, of: sum(r[name] for r in of)
      first = [
        r['accept_length']
        for r in rows
        if (r['objective'], r['samples'], r['arm'], r['epoch'])
        == (objective, samples, arm, 0)
      ]
      summary.append(
        {
          'objective': objective,
          'samples': samples,
          'arm': arm,
          'accept_length_first_epoch': round(statistics.mean(first), 2),
          'accept_length': round(
            statistics.mean(m['accept_length'] for m in mine), 2
          ),
          'forwards_saved': round(
            1 - total('forwards', mine) / total('forwards', plain), 3
          ),
          'speedup_median': round(statistics.median(ratios), 3),
          'differing_samples': total('differing_samples', mine),
        }
      )
  return summary


def draw(summary: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws accept length and speed-up by arm."""
  figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained')
  runs = sorted({(s['objective'], s['samples']) for s in summary})
  for axis, name, title in zip(
    axes,
    ('accept_length', 'speedup_median'),
    ('tokens per row and forward', 'generation speed over W = 1'),
  ):
    for i, key in enumerate(runs):
      mine = [s for s in summary if (s['objective'], s['samples']) == key]
      places = np.arange(len(mine)) + (i - len(runs) / 2) * 0.12
      axis.barh(
        places,
        [s[name] for s in mine],
        height=0.11,
        label=f'{key[0]}, n = {key[1]}',
      )
    axis.set_yticks(np.arange(len(settings.ARMS)), list(settings.ARMS))
    axis.invert_yaxis()
    axis.set_title(title)
    axis.axvline(1, color='grey', linewidth=0.8)
  axes[1].legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  """Runs every objective and group size."""
  del argv
  device = common.use_device()
  executables.enable_compilation_cache()
  rows: list[dict[str, Any]] = []
  warm = None
  for samples in map(int, _SAMPLES.value):
    for objective in _OBJECTIVES.value:
      config = settings.make_config(
        _SIZE.value, objective, samples, _SEED.value
      )
      more, warm = train_and_compare(
        config,
        settings.SIZES[_SIZE.value]['width'],
        None if warm is None else jax.tree.map(jax.numpy.asarray, warm),
        {'device': device, 'objective': objective, 'samples': samples},
      )
      rows += more
      # After every run: one that is stopped leaves what it has.
      out = pathlib.Path(_OUT.value)
      summary = summarize(rows)
      common.write_csv(out / 'steps.csv', rows)
      common.write_csv(out / 'arms.csv', summary)
      draw(summary, out / 'arms.png')


if __name__ == '__main__':
  app.run(main)
