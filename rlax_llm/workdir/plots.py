# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""The curves of a run: what a workdir holds, and the plots of the report."""

from collections.abc import Callable
import json
import os
import pathlib
from typing import Any
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from rlax_llm.config import ConfigError
from rlax_llm.runtime import files
from rlax_llm.workdir.metrics import EVALUATIONS_FILE
from rlax_llm.workdir.metrics import METRICS_FILE
from rlax_llm.workdir.metrics import read_jsonl
from rlax_llm.workdir.metrics import SAMPLES_FILE
from rlax_llm.workdir.metrics import SUMMARY_FILE
from rlax_llm.workdir.metrics import TIMING_FILE

FILES = (
  METRICS_FILE,
  EVALUATIONS_FILE,
  TIMING_FILE,
  SAMPLES_FILE,
  SUMMARY_FILE,
  'manifest.json',
)

# Okabe and Ito's palette, told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
PURPLE, SKY, GREY = '#CC79A7', '#56B4E9', '#8a8f98'
_STYLE: Any = {
  'font.family': 'DejaVu Sans',
  'font.size': 9,
  'axes.titlesize': 10.5,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#b5bac2',
  'axes.labelcolor': '#4b5160',
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#eceef1',
  'text.color': '#20242c',
  'xtick.color': '#4b5160',
  'ytick.color': '#4b5160',
  'legend.frameon': False,
  'legend.fontsize': 8.5,
  'lines.linewidth': 1.7,
}
_SMOOTHED_FROM = 40  # points from which a noisy curve is drawn as its mean


class Run(NamedTuple):
  """What a workdir holds."""

  name: str
  steps: dict[int, dict[str, Any]]  # step -> metrics, of both kinds
  samples: list[dict[str, Any]]
  summary: dict[str, Any]
  manifest: dict[str, Any]
  missing: list[str]


def read_run(workdir: str | os.PathLike[str]) -> Run:
  """Reads a workdir.

  Args:
    workdir: the run's folder.

  Returns:
    Its content; what is missing or torn is empty.

  Raises:
    ConfigError: the folder holds neither metrics nor a summary.
  """
  root = pathlib.Path(workdir)
  steps: dict[int, dict[str, Any]] = {}
  for file in (METRICS_FILE, EVALUATIONS_FILE, TIMING_FILE):
    for row in read_jsonl(root / file):
      if isinstance(row.get('step'), int):
        # A resumed run repeats steps in timing.jsonl: the last one counts.
        steps.setdefault(row['step'], {}).update(row)
  summary = _read_json(root / SUMMARY_FILE)
  if not steps and not summary:
    raise ConfigError(
      f'workdir {os.fspath(workdir)!r} holds no run: neither '
      f'{METRICS_FILE} nor {SUMMARY_FILE}; give the --workdir '
      'of a training run'
    )
  return Run(
    name=root.resolve().name,
    steps=dict(sorted(steps.items())),
    samples=read_jsonl(root / SAMPLES_FILE),
    summary=summary,
    manifest=_read_json(root / 'manifest.json'),
    missing=[f for f in FILES if not (root / f).is_file()],
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


# Each plot draws on its axes and says whether there was anything to draw.


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (steps, values) of a metric, where it is present and finite."""
  points = [
    (step, row[name])
    for step, row in run.steps.items()
    if isinstance(row.get(name), (int, float))
  ]
  array = np.array(points, float).reshape(-1, 2)
  return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
  """Returns the centred moving mean over a twentieth of the curve."""
  width = max(len(values) // 20, 2)
  kernel = np.ones(2 * width + 1)
  return np.convolve(values, kernel, 'same') / np.convolve(
    np.ones_like(values), kernel, 'same'
  )


def _curve(
  axes: Axes,
  run: Run,
  name: str,
  label: str,
  colour: str,
  *,
  marker: bool = False,
  faded: bool = False,
) -> bool:
  """Draws one metric; a long noisy one as its moving mean over the points."""
  steps, values = series(run, name)
  if not len(steps):
    return False
  style: dict[str, Any] = {'color': colour, 'zorder': 2 if faded else 3}
  if faded:
    style |= {'linestyle': (0, (4, 1.5)), 'linewidth': 1.4}
  if marker or len(steps) == 1:
    style |= {'marker': 'o', 'markersize': 4.5}
  elif len(steps) >= _SMOOTHED_FROM:
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, zorder=1)
    values = _smooth(values)
  axes.plot(steps, values, label=label, **style)
  return True


def _both(
  axes: Axes, run: Run, other: Run | None, name: str, label: str, colour: str
) -> bool:
  drawn = _curve(axes, run, name, label, colour)
  if drawn and other:
    _curve(axes, other, name, other.name, GREY, faded=True)
  return drawn


def _reward(figure: Figure, run: Run, other: Run | None) -> bool:
  axes = figure.subplots()
  drawn = _curve(axes, run, 'reward/mean', 'training reward', BLUE)
  drawn |= _curve(
    axes, run, 'evaluate/accuracy', 'held-out accuracy', RED, marker=True
  )
  if other:
    _curve(
      axes, other, 'reward/mean', f'reward, {other.name}', GREY, faded=True
    )
    _curve(
      axes,
      other,
      'evaluate/accuracy',
      f'accuracy, {other.name}',
      '#4b5160',
      marker=True,
      faded=True,
    )
  axes.set(
    title='Reward and held-out accuracy', ylabel='reward · accuracy (fraction)'
  )
  return drawn


def _lengths(figure: Figure, run: Run, other: Run | None) -> bool:
  axes = figure.subplots()
  low, high = (series(run, f'rollout/length_{p}') for p in ('p50', 'p95'))
  if len(low[0]) and np.array_equal(low[0], high[0]):
    if len(low[1]) >= _SMOOTHED_FROM:
      low, high = (low[0], _smooth(low[1])), (high[0], _smooth(high[1]))
    axes.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.12, lw=0)
  drawn = False
  for part, label, colour in (
    ('p50', 'median', BLUE),
    ('p95', '95th percentile', SKY),
    ('max', 'longest', PURPLE),
  ):
    drawn |= _curve(axes, run, f'rollout/length_{part}', label, colour)
  if other:
    _curve(
      axes,
      other,
      'rollout/length_p50',
      f'median, {other.name}',
      GREY,
      faded=True,
    )
  axes.set(title='Completion length', ylabel='length (tokens)')
  axes.set_ylim(bottom=0)
  return drawn


def _times(figure: Figure, run: Run, other: Run | None) -> bool:
  del other  # Two stacks in one plot cannot be read; the header compares.
  parts = ('rollout', 'reward', 'score', 'update')
  steps, total = series(run, 'time/step')
  if not len(steps):
    return False
  rows = [run.steps[int(step)] for step in steps]
  columns = [[row.get(f'time/{p}') or 0.0 for p in parts] for row in rows]
  stack = np.array(columns).T
  stack = np.vstack([stack, np.maximum(total - stack.sum(0), 0.0)])
  axes = figure.subplots()
  colours = (BLUE, GREEN, ORANGE, RED, '#c9cdd3')
  labels = (*parts, 'other')
  if len(steps) == 1:
    bottoms = np.cumsum(stack[:, 0]) - stack[:, 0]
    for value, bottom, label, colour in zip(
      stack[:, 0], bottoms, labels, colours
    ):
      axes.bar(steps, value, 0.4, bottom, label=label, color=colour)
  else:
    axes.stackplot(steps, stack, labels=labels, colors=colours, linewidth=0)
  # Steps that compile would flatten all others.
  top = stack.sum(0).max()
  limit = 2.0 * float(np.median(stack.sum(0)))
  axes.set_ylim(0, min(1.05 * top, limit) or 1)
  cut = int((stack.sum(0) > limit).sum())
  plural = 's' if cut > 1 else ''
  note = f'  ({cut} slow step{plural} cut, up to {top:.3g} s)' if cut else ''
  axes.set(title=f"Where a step's time goes{note}", ylabel='time (s)')
  return True


def _accept(figure: Figure, run: Run, other: Run | None) -> bool:
  axes = figure.subplots()
  axes.set(title='Accept length', ylabel='tokens per sequence and forward')
  drawn = _both(
    axes, run, other, 'rollout/accept_length', 'accept length', GREEN
  )
  if drawn:
    axes.axhline(1.0, color='#4b5160', lw=1, ls=':', label='no speculation')
  return drawn


def _throughput(figure: Figure, run: Run, other: Run | None) -> bool:
  axes = figure.subplots()
  axes.set(title='Rollout throughput', ylabel='tokens per second')
  axes.yaxis.set_major_formatter(ticker.EngFormatter())
  drawn = _both(axes, run, other, 'rollout/tokens_per_second', 'rollout', BLUE)
  axes.set_ylim(bottom=0)
  return drawn


_DIAGNOSTICS = (
  ('policy/entropy', 'Entropy', 'nats per token', BLUE),
  ('policy/kl_reference', 'KL from the reference', 'nats per token', GREEN),
  ('learning/grad_norm', 'Gradient norm', 'norm', PURPLE),
  ('policy/clip_fraction', 'Clipped ratios', 'fraction of tokens', ORANGE),
  (
    'policy/behaviour_gap_max',
    'Behaviour gap (log scale)',
    'nats, largest',
    RED,
  ),
  ('rollout/truncated_fraction', 'Truncated', 'fraction of samples', SKY),
)


def _diagnostics(figure: Figure, run: Run, other: Run | None) -> bool:
  drawn = False
  for axes, (name, title, unit, colour) in zip(
    figure.subplots(2, 3).flat, _DIAGNOSTICS
  ):
    axes.set(title=title, ylabel=unit)
    if not _both(axes, run, other, name, 'this run', colour):
      axes.text(
        0.5,
        0.5,
        'not recorded',
        color=GREY,
        ha='center',
        transform=axes.transAxes,
      )
      axes.set(xticks=[], yticks=[], ylabel='')
      continue
    drawn = True
    if 'gap' in name and (series(run, name)[1] > 0).any():
      axes.set_yscale('log', nonpositive='mask')
  return drawn


_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)


def _user(figure: Figure, run: Run, other: Run | None) -> bool:
  """Draws the first few of the user's own metrics, by name."""
  names = sorted(
    {
      name
      for row in run.steps.values()
      for name in row
      if name.startswith('user/')
    }
  )
  axes = figure.subplots()
  axes.set(title='Metrics of your own', ylabel='mean over samples')
  drawn = False
  for name, colour in zip(names, _COLOURS):
    label = name.removeprefix('user/')
    drawn |= _curve(axes, run, name, label, colour)
    if other:
      _curve(axes, other, name, f'{label}, {other.name}', colour, faded=True)
  return drawn


def _warm_start(figure: Figure, run: Run, other: Run | None) -> bool:
  axes = figure.subplots()
  axes.set(title='Warm start', ylabel='cross-entropy (nats per token)')
  return _both(axes, run, other, 'sft/loss', 'loss', PURPLE)


Draw = Callable[[Figure, Run, Run | None], bool]
PLOTS: dict[str, tuple[str, Draw]] = {
  'reward': ('What is learned.', _reward),
  'lengths': ('How long the answers are.', _lengths),
  'step_time': ('Rollout, verification, scoring, update.', _times),
  'throughput': ('Completion tokens per second of rollout.', _throughput),
  'accept_length': ('What speculation saves: tokens per forward.', _accept),
  'user': ('What your rewards report beside their number.', _user),
  'warm_start': ('Supervised loss before RL.', _warm_start),
  'diagnostics': ('Signs of an unhealthy policy.', _diagnostics),
}
WIDE = ('diagnostics',)


def render(name: str, path: pathlib.Path, run: Run, other: Run | None) -> bool:
  """Draws one plot.

  Args:
    name: a key of `PLOTS`.
    path: the PNG file to write.
    run: the run.
    other: a second run, drawn in the background; None: there is none.

  Returns:
    Whether the run has anything to draw; if not, no file is written.
  """
  draw = PLOTS[name][1]
  wide = name in WIDE
  with rc_context(_STYLE):
    figure = Figure(
      figsize=(12.4, 5.2) if wide else (6.1, 3.3), dpi=130, layout='constrained'
    )
    FigureCanvasAgg(figure)
    if not draw(figure, run, other):
      return False
    for i, axes in enumerate(figure.axes):
      if axes.lines or axes.collections or axes.patches:
        axes.set_xlabel('step')
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(
          ticker.MaxNLocator(nbins=6, integer=True, min_n_ticks=1)
        )
      handles, labels = axes.get_legend_handles_labels()
      if len(labels) > 1 and (not wide or i == 0):
        axes.legend(
          handles,
          labels,
          ncols=min(len(labels), 5) if len(labels) > 3 else 1,
          columnspacing=1.0,
          handlelength=1.6,
        )
    with files.writing(path):
      figure.savefig(path)
  return True
