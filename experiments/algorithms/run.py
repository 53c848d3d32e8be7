"""Every preset on one task, from one warm start, with one budget.

  python -m experiments.algorithms.run

For each seed a policy imitates an impatient teacher (configs/quickstart.py);
from there every preset takes the same RL steps on the same problems. Writes
into --out: curve.csv (held-out accuracy against samples), final.csv (pass@1 and
pass@8 at the end, by seed), table.csv (means and deviations over seeds) and
algorithms.png. A preset that learns from a teacher is run if --teacher names
one.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any, Sequence

from absl import app
from absl import flags
import jax
import matplotlib
import numpy as np

from configs import quickstart
from experiments import common
from rlax_llm import evaluate as evaluation
from rlax_llm import executables
from rlax_llm import learner as learners
from rlax_llm import teacher as teachers
from rlax_llm.config import Config
from rlax_llm.config import freeze
from rlax_llm.experience import Collector
from rlax_llm.learning.presets import PRESETS
from rlax_llm.progression import Progression
from rlax_llm.run import make_run
from rlax_llm.run import Run
from rlax_llm.step import Loop
from rlax_llm.step import train_step
from rlax_llm.tasks.verifier import Verifier
from rlax_llm.types import Params
from rlax_llm.warm_start import warm_start

matplotlib.use('Agg')
from matplotlib import \
    pyplot  # noqa: E402  pylint: disable=wrong-import-position

_SIZE = flags.DEFINE_enum('size', 'quickstart', ['tiny', 'quickstart'],
                          'quickstart: its model and steps; tiny: a check.')
_PRESETS = flags.DEFINE_list('presets', [], 'Which; none given: all.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds.')
_STEPS = flags.DEFINE_integer('steps', 100, 'RL steps of every run.')
_TEACHER = flags.DEFINE_string('teacher', '', 'Of on-policy distillation.')
_STALENESS = flags.DEFINE_integer(
    'staleness', 0, 'Steps from sampling to training, of every run.')
_OUT = flags.DEFINE_string('out', 'experiments/algorithms', 'Where results go.')
_POINTS = 10  # evaluations of a curve
_SAMPLES = 8  # of a problem at the end: pass@8


def make_config(preset: str, seed: int) -> Config:
  """Returns the config of one run; runs of a seed differ in the preset."""
  config = quickstart.get_config()
  config.seed = seed
  config.num_steps = _STEPS.value
  config.control.staleness = _STALENESS.value
  config.algorithm.name = preset
  # The same tie to the reference for all would be a part of each objective.
  config.algorithm.kl_coefficient = None
  config.algorithm.divergence = None
  if PRESETS[preset].credit == 'distillation':
    config.algorithm.teacher = _TEACHER.value
  config.evaluate.problems = 256
  if _SIZE.value == 'tiny':
    config.model.layers, config.model.width = 1, 32
    config.model.mlp_width = 64
    config.sft.steps, config.sft.sequences_per_step = 4, 8
    config.task.prompts_per_step, config.task.epoch_prompts = 4, 8
    config.evaluate.problems = 16
    config.rollout.samples_per_prompt, config.rollout.slots = 4, 16
    config.rollout.drafter, config.rollout.width = 'none', 1
  return config


def train(run: Run, warm: Params) -> tuple[list[dict], dict[str, float]]:
  """Trains from a warm start.

  Args:
    run: the run.
    warm: parameters; copied.

  Returns:
    (points of the curve, metrics at the end).
  """
  config = run.config
  states = run.states.init_all(
      jax.device_put(jax.tree.map(np.array, warm),
                     run.states.params_placement()))
  every = max(1, config.num_steps // _POINTS)
  held_out = evaluation.held_out_problems(run)
  judge = run.engine(evaluation.evaluation_sampling(run))
  more = dataclasses.replace(config.evaluate, samples=_SAMPLES)
  final = dataclasses.replace(run,
                              config=freeze(
                                  dataclasses.replace(config, evaluate=more)))
  curve: list[dict] = []
  samples = 0
  teacher = teachers.load_teacher(run, teachers.find_teacher(run))
  learner = learners.make_learner(run, teacher)
  with Verifier(config.task, config.seed) as verifier:
    collector = Collector(run, run.engine(run.sampling), verifier,
                          run.rollout_store(), learner.score_samples)
    reference = run.states.reference(tempfile.mkdtemp(),
                                     states['policy'].params, 0)
    loop = Loop(run, collector, learner, reference, Progression())
    for step in range(config.num_steps + 1):
      if step % every == 0 or step == config.num_steps:
        values = evaluation.evaluate(run, judge, states['policy'].params,
                                     verifier, held_out)
        curve.append({
            'step': step,
            'samples': samples,
            'accuracy': round(values['evaluate/accuracy'], 4)
        })
      if step < config.num_steps:
        states, _, _ = train_step(loop, step, states)
        samples += (config.task.prompts_per_step *
                    config.rollout.samples_per_prompt)
    values = evaluation.evaluate(final, judge, states['policy'].params,
                                 verifier, held_out)
  return curve, values


def summarize(final: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each preset: means and deviations over its seeds."""
  rows = []
  for preset in dict.fromkeys(r['preset'] for r in final):
    mine = [r for r in final if r['preset'] == preset]
    row: dict[str, Any] = {'preset': preset, 'seeds': len(mine)}
    for name in ('accuracy_before', 'pass_at_1', f'pass_at_{_SAMPLES}'):
      values = [r[name] for r in mine]
      row[name] = round(statistics.mean(values), 4)
      row[f'{name}_sd'] = round(statistics.stdev(values),
                                4) if len(values) > 1 else ''
    row['seconds'] = round(statistics.mean(r['seconds'] for r in mine), 1)
    rows.append(row)
  return rows


def draw(curve: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]],
         path: pathlib.Path) -> None:
  """Draws accuracy against samples, and pass@1 and pass@8 at the end."""
  figure, (left, right) = pyplot.subplots(1,
                                          2,
                                          figsize=(13, 7),
                                          layout='constrained')
  colours = pyplot.get_cmap('tab20')
  for i, row in enumerate(table):
    mine = [c for c in curve if c['preset'] == row['preset']]
    steps = sorted({c['samples'] for c in mine})
    means = [
        statistics.mean(c['accuracy']
                        for c in mine
                        if c['samples'] == s)
        for s in steps
    ]
    left.plot(steps,
              means,
              color=colours(i % 20),
              linestyle='-' if i < 20 else '--',
              label=row['preset'])
  left.set_xlabel('samples')
  left.set_ylabel('held-out accuracy, mean over seeds')
  left.legend(frameon=False, fontsize=7, ncols=2)
  places = np.arange(len(table))
  for shift, name in ((-0.2, 'pass_at_1'), (0.2, f'pass_at_{_SAMPLES}')):
    right.barh(places + shift, [r[name] for r in table],
               height=0.38,
               xerr=[r[f'{name}_sd'] or 0 for r in table],
               label=name)
  right.set_yticks(places, [r['preset'] for r in table], fontsize=8)
  right.invert_yaxis()
  right.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  """Trains every preset over all seeds."""
  del argv
  device = common.use_device()
  executables.enable_compilation_cache()
  presets = _PRESETS.value or [
      name for name, preset in PRESETS.items()
      if preset.credit != 'distillation' or _TEACHER.value
  ]
  out = pathlib.Path(_OUT.value)
  curve: list[dict[str, Any]] = []
  final: list[dict[str, Any]] = []
  for seed in map(int, _SEEDS.value):
    first = make_run(make_config('grpo', seed))
    warm = warm_start(first, first.states.init_params(),
                      lambda done, loss: None)
    for preset in presets:
      tags = {'device': device, 'preset': preset, 'seed': seed}
      start = time.perf_counter()
      points, values = train(make_run(make_config(preset, seed)), warm)
      curve += [tags | point for point in points]
      final.append(
          tags | {
              'accuracy_before':
                  points[0]['accuracy'],
              'pass_at_1':
                  round(values['evaluate/accuracy'], 4),
              f'pass_at_{_SAMPLES}':
                  round(values[f'evaluate/pass_at_{_SAMPLES}'], 4),
              'seconds':
                  round(time.perf_counter() - start, 1)
          })
      print(final[-1], flush=True)
      # After every run: one that is stopped leaves what it has.
      table = summarize(final)
      common.write_csv(out / 'curve.csv', curve)
      common.write_csv(out / 'final.csv', final)
      common.write_csv(out / 'table.csv', table)
      draw(curve, table, out / 'algorithms.png')


if __name__ == '__main__':
  app.run(main)
