"""The report: whole, self-contained, honest about what is missing."""

import base64
import html.parser
import io
import math
import re
import subprocess
import sys

import matplotlib.image
import pytest

from rlax_llm import report
from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import to_dict
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metrics
from rlax_llm.workdir import plots

EVIL = '<script>alert("x")</script>'


def _make(folder, steps):
  manifest.write_manifest(folder, to_dict(Config()), run_id='a')
  with metrics.MetricsWriter(folder, resume_step=None, run_id='a') as writer:
    writer.write(-1, {'sft/loss': 1.0})
    writer.write(0, {'evaluate/accuracy': 0.125})
    for step in range(1, steps + 1):
      writer.write(
        step,
        {
          'reward/mean': step / steps,
          'evaluate/accuracy': step / steps,
          'rollout/length_p50': 8.0,
          'rollout/length_p95': 12.0,
          'rollout/length_max': 16,
          'user/words': 2.0 * step,
          'policy/entropy': math.nan if step == 2 else 1 / step,
          'policy/behaviour_gap_max': 1e-6,
          'rollout/accept_length': 2.0,
          'rollout/tokens_per_second': 1234.0,
          'time/rollout': 0.5,
          'time/update': 0.25,
          'time/step': 1.0,
        },
      )
      writer.write_samples(
        step,
        [
          {
            'prompt': f'step {step}',
            'completion': EVIL + '\udc80',
            'reward': reward,
            'advantage': reward - 0.5,
          }
          for reward in (0.0, 1.0)
        ],
      )
  metrics.write_summary(
    folder,
    {
      'steps': steps,
      'accuracy_before': 0.125,
      'accuracy_after': 0.875,
      'wall_seconds': 300.0,
      'tokens_sampled': 123456,
    },
  )


class _Page(html.parser.HTMLParser):
  """Collects tags and text; checks that tags nest."""

  VOID = ('meta', 'img', 'br', 'link')

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.text = [], [], ''
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def _read(path):
  text = path.read_text(encoding='utf-8')
  return text, _Page(text)


def test_whole_report(tmp_path):
  """Mutants: a sample not escaped; a plot saved before it is drawn."""
  _make(tmp_path, 12)
  path = report.build_report(tmp_path)
  text, page = _read(path)
  assert path == tmp_path / 'report.html'
  for fact in ('12.5 % → 87.5 %', '5 min 0 s', '123,456', 'chain_sum · grpo'):
    assert fact in page.text, fact
  images = [a['src'] for tag, a in page.tags if tag == 'img']
  assert len(images) == len(plots.PLOTS)
  assert {p.stem for p in (tmp_path / 'report').iterdir()} == set(plots.PLOTS)
  for source in images:
    kind, data = source.split(',')
    assert kind == 'data:image/png;base64'
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
    assert pixels.std() > 0.02, 'blank'
  assert 'script' not in [tag for tag, _ in page.tags]
  assert EVIL in page.text
  assert not re.search(r'(src|href)=(?!"data:)|url\(|@import', text)
  assert 'is left out' not in page.text
  cells = re.findall(r'<tr class="(\w+)"><td>(\d+)</td>', text)
  assert cells == [
    (kind, str(step))
    for step in (1, 2, 3, 10, 11, 12)
    for kind in ('right', 'wrong')
  ]


def test_against(tmp_path):
  _make(tmp_path / 'one', 5)
  _make(tmp_path / 'two', 3)
  alone = report.build_report(tmp_path / 'one')
  before = (tmp_path / 'one' / 'report' / 'reward.png').read_bytes()
  _, page = _read(report.build_report(tmp_path / 'one', tmp_path / 'two'))
  assert 'one against two' in page.text
  assert (tmp_path / 'one' / 'report' / 'reward.png').read_bytes() != before
  assert alone.exists() and not (tmp_path / 'two' / 'report.html').exists()


@pytest.mark.parametrize('missing', plots.FILES)
def test_missing_file_is_named(tmp_path, missing):
  _make(tmp_path, 1)
  (tmp_path / missing).unlink()
  _, page = _read(report.build_report(tmp_path))
  assert f'has no {missing}' in page.text


def test_only_a_summary(tmp_path):
  metrics.write_summary(tmp_path, {'steps': 0})
  _, page = _read(report.build_report(tmp_path))
  assert 'Nothing to plot.' in page.text
  assert 'metrics.jsonl, evaluations.jsonl, timing.jsonl' in page.text


def test_long_curves_are_smoothed(tmp_path):
  _make(tmp_path, 60)
  report.build_report(tmp_path)
  assert (tmp_path / 'report' / 'reward.png').exists()


def test_resumed_step_counts_once(tmp_path):
  _make(tmp_path, 4)
  with metrics.MetricsWriter(tmp_path, resume_step=2, run_id='b') as writer:
    writer.write(3, {'reward/mean': 0.5, 'time/step': 9.0})
  run = plots.read_run(tmp_path)
  assert run.steps[3]['time/step'] == 9.0
  assert list(plots.series(run, 'reward/mean')[0]) == [1, 2, 3]


def test_empty_workdir_is_one_line(tmp_path):
  with pytest.raises(ConfigError, match='holds no run'):
    report.build_report(tmp_path)
  done = subprocess.run(
    [sys.executable, '-m', 'rlax_llm.report', f'--workdir={tmp_path}'],
    env={'PYTHONPATH': ':'.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: workdir ')
  assert done.stderr.count('\n') == 1
