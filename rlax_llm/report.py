# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""Turns a workdir into report.html and PNG plots.

    python -m rlax_llm.report --workdir=DIR [--against=DIR2]

The page needs nothing beside it: the plots are inside. It reads what the run
wrote (metrics.jsonl, evaluations.jsonl, timing.jsonl, samples.jsonl,
summary.json, manifest.json)
and says which of these are missing. No device is touched.
"""

import base64
from collections.abc import Sequence
import html
import json
import os
import pathlib
from typing import Any

from absl import flags as absl_flags

from rlax_llm.runtime import flags
from rlax_llm.runtime.files import write_atomic
from rlax_llm.workdir import plots
from rlax_llm.workdir.plots import Run

_LONGEST_TEXT = 1200  # characters of a sample that are shown
_TABLE_STEPS = 3  # steps of the sample table at either end of the run


def build_report(
  workdir: str | os.PathLike[str], against: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Writes report.html and report/*.png into a workdir.

  Args:
    workdir: the run's folder.
    against: a second run, drawn in grey under the first.

  Returns:
    The path of report.html.

  Raises:
    ConfigError: a folder holds no run.
  """
  run = plots.read_run(workdir)
  other = plots.read_run(against) if against is not None else None
  folder = pathlib.Path(workdir) / 'report'
  folder.mkdir(exist_ok=True)
  images = []
  for name, (caption, _) in plots.PLOTS.items():
    png = folder / f'{name}.png'
    if plots.render(name, png, run, other):
      images.append((name, caption, png.read_bytes()))
    else:
      png.unlink(missing_ok=True)
  path = pathlib.Path(workdir) / 'report.html'
  write_atomic(path, _page(run, other, images))
  return path


def _number(value: Any, digits: int = 3) -> str:
  """Returns a number for people: 0.8125 -> 0.812, 1234567 -> 1,234,567."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return '–' if value is None else str(value)
  if float(value).is_integer() and abs(value) >= 10:
    return f'{value:,.0f}'
  return f'{value:.{digits}f}' if abs(value) < 1000 else f'{value:,.0f}'


def _percent(value: Any) -> str:
  return f'{100 * value:.1f} %' if isinstance(value, (int, float)) else '–'


def _seconds(value: Any) -> str:
  if not isinstance(value, (int, float)):
    return '–'
  if value < 120:
    return f'{value:.1f} s'
  hours, rest = divmod(round(value), 3600)
  minutes, seconds = divmod(rest, 60)
  if hours:
    return f'{hours} h {minutes:02} min'
  return f'{minutes} min {seconds} s'


def _mean(run: Run, name: str) -> float | None:
  values = plots.series(run, name)[1]
  return float(values.mean()) if len(values) else None


def _facts(run: Run) -> list[tuple[str, str]]:
  """Returns the (label, value) pairs of the header."""
  s = run.summary
  record = (run.manifest.get('runs') or [{}])[-1]
  devices = record.get('devices') or []
  versions = record.get('versions') or {}
  rewards = plots.series(run, 'reward/mean')[1]
  first, last = (rewards[0], rewards[-1]) if len(rewards) else (None, None)
  return [
    (
      'Held-out accuracy',
      f'{_percent(s.get("accuracy_before"))} → '
      f'{_percent(s.get("accuracy_after"))}',
    ),
    (
      'Training reward',
      f'{_number(s.get("reward_first", first))} → '
      f'{_number(s.get("reward_last", last))}',
    ),
    ('Steps', _number(s.get('steps', max(run.steps, default=None)))),
    ('Wall time', _seconds(s.get('wall_seconds'))),
    ('Tokens sampled', _number(s.get('tokens_sampled'))),
    (
      'Rollout speed',
      f'{_number(_mean(run, "rollout/tokens_per_second"))} tokens/s',
    ),
    ('Accept length', _number(_mean(run, 'rollout/accept_length'), 2)),
    ('Device', f'{len(devices)} × {devices[0]}' if devices else '–'),
    ('Commit', str(record.get('commit') or '–')[:12]),
    ('jax', str(versions.get('jax', '–'))),
  ]


def _header(run: Run, other: Run | None) -> str:
  tiles = []
  others = dict(_facts(other)) if other else {}
  for label, value in _facts(run):
    against = f'<small>{html.escape(others[label])}</small>' if other else ''
    tiles.append(
      f'<div class="tile"><span>{html.escape(label)}</span>'
      f'<b>{html.escape(value)}</b>{against}</div>'
    )
  return f'<div class="tiles">{"".join(tiles)}</div>'


def _chosen_samples(run: Run) -> list[tuple[str, dict[str, Any]]]:
  """Returns the best and the worst sample of some first and last steps."""
  by_step: dict[int, list[dict[str, Any]]] = {}
  for row in run.samples:
    # A sample that the verifier could not judge is neither right nor wrong.
    if isinstance(row.get('step'), int) and _is_number(row.get('reward')):
      by_step.setdefault(row['step'], []).append(row)
  steps = sorted(by_step)
  chosen = steps[:_TABLE_STEPS] + steps[_TABLE_STEPS:][-_TABLE_STEPS:]
  top = max(
    (_reward_of(row) for row in run.samples if _is_number(row.get('reward'))),
    default=0.0,
  )
  rows = []
  for step in chosen:
    ranked = sorted(by_step[step], key=_reward_of)
    for row in ranked[:0:-1][:1] + ranked[:1]:
      rows.append(('right' if _reward_of(row) >= top > 0 else 'wrong', row))
  return rows


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float))


def _reward_of(row: dict[str, Any]) -> float:
  return float(row['reward'])


def _text(value: Any) -> str:
  text = str(value if value is not None else '')
  if len(text) > _LONGEST_TEXT:
    text = f'{text[:_LONGEST_TEXT]} … ({len(text):,} characters)'
  # A lone surrogate cannot be encoded in the page.
  return html.escape(text.encode('utf-8', 'replace').decode('utf-8'))


def _sample_table(run: Run) -> str:
  rows = _chosen_samples(run)
  if not rows:
    return '<p class="note">No samples were recorded.</p>'
  body = ''.join(
    f'<tr class="{kind}"><td>{row["step"]}</td>'
    f'<td><pre>{_text(row.get("prompt"))}</pre></td>'
    f'<td><pre>{_text(row.get("completion"))}</pre></td>'
    f'<td class="n"><i>{"✓" if kind == "right" else "✗"}</i> '
    f'{_number(row.get("reward"), 2)}</td>'
    f'<td class="n">{_number(row.get("advantage"), 2)}</td></tr>'
    for kind, row in rows
  )
  return (
    '<table><thead><tr><th>Step</th><th>Prompt</th><th>Completion</th>'
    '<th>Reward</th><th>Advantage</th></tr></thead><tbody>'
    f'{body}</tbody></table><p class="note">The best and the worst '
    'recorded sample of the first and the last steps; ✓ marks the '
    'highest reward of the run.</p>'
  )


def _details(title: str, value: Any) -> str:
  if not value:
    return ''
  text = html.escape(json.dumps(value, indent=2, ensure_ascii=False))
  return (
    f'<details><summary>{html.escape(title)}</summary>'
    f'<pre>{text}</pre></details>'
  )


def _page(
  run: Run, other: Run | None, images: Sequence[tuple[str, str, bytes]]
) -> str:
  notes = []
  for each in (run, other):
    if each and each.missing:
      notes.append(
        f'{each.name} has no {", ".join(each.missing)}: what these '
        'would show is left out.'
      )
  if other:
    notes.append(f'Small grey figures and dashed grey curves: {other.name}.')
  figures = ''.join(
    f'<figure{" class=wide" if name in plots.WIDE else ""}>'
    f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,'
    f'{base64.b64encode(png).decode()}"><figcaption>{html.escape(caption)}'
    '</figcaption></figure>'
    for name, caption, png in images
  )
  config = run.manifest.get('config') or {}
  task = (config.get('task') or {}).get('name')
  algorithm = (config.get('algorithm') or {}).get('name')
  subtitle = ' · '.join(str(x) for x in (task, algorithm) if x)
  title = html.escape(run.name + (f' against {other.name}' if other else ''))
  return _TEMPLATE.format(
    title=title,
    style=_STYLE,
    subtitle=html.escape(subtitle),
    tiles=_header(run, other),
    notes=''.join(f'<p class="note">{html.escape(n)}</p>' for n in notes),
    figures=figures or '<p class="note">Nothing to plot.</p>',
    samples=_sample_table(run),
    details=_details('Summary', run.summary)
    + _details('Config', config)
    + _details('Runs: machine, versions, command', run.manifest.get('runs')),
  )


_TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<header><h1>{title}</h1><p>{subtitle}</p></header>
{tiles}
{notes}
<section class="plots">{figures}</section>
<h2>Samples</h2>
{samples}
<h2>Record</h2>
{details}
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #20242c;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 12px; }
header p { color: #5b6270; margin: 2px 0 20px; }
.tiles { display: grid; gap: 10px; margin-bottom: 14px;
  grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); }
.tile, figure, table, details { background: #fff; border: 1px solid #e3e6ea;
  border-radius: 8px; }
.tile { padding: 10px 14px; }
.tile span, .tile small { display: block; color: #5b6270; font-size: 12.5px; }
.tile b { font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
.note { color: #5b6270; font-size: 13.5px; margin: 6px 0; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 14px;
  margin-top: 18px; }
figure { margin: 0; padding: 12px; } .wide { grid-column: 1 / -1; }
img { display: block; width: 100%; height: auto; }
figcaption { color: #5b6270; font-size: 13px; padding: 4px 4px 0; }
table { width: 100%; border-collapse: separate; border-spacing: 0; }
th { text-align: left; font-size: 13px; color: #5b6270; }
th, td { padding: 8px 12px; vertical-align: top;
  border-bottom: 1px solid #eceef1; } tr:last-child td { border-bottom: 0; }
td pre { margin: 0; max-height: 16em; overflow: auto; }
pre { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; }
.n i { font-style: normal; font-weight: 700; }
.right i { color: #00795a; } .wrong i { color: #b84f00; }
details { padding: 10px 14px; margin: 8px 0; } summary { cursor: pointer; }
@media (max-width: 800px) { .plots { grid-template-columns: 1fr; } }
"""


def main(argv: list[str]) -> None:
  """Builds the report that the command line asks for."""
  del argv
  print(build_report(_WORKDIR.value, _AGAINST.value))


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_workdir()
  _AGAINST = absl_flags.DEFINE_string(
    'against', None, 'a second run, to compare with'
  )
  flags.run(main)
