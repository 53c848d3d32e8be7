"""Metrics files, resumption, progress, manifest."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import proto

from rlax_llm.config import Config
from rlax_llm.config import ConfigError
from rlax_llm.config import field_classes
from rlax_llm.config import Section
from rlax_llm.config import to_dict
from rlax_llm.workdir import manifest
from rlax_llm.workdir import metric_names
from rlax_llm.workdir import metrics
from rlax_llm.workdir import progress


def _writer(folder, resume_step=None, run_id='a'):
  return metrics.MetricsWriter(
    folder, resume_step=resume_step, evaluated_step=resume_step, run_id=run_id
  )


def _run(folder, steps, resume_step=None, run_id='a'):
  with _writer(folder, resume_step, run_id) as writer:
    for step in steps:
      writer.write(
        step,
        {
          'reward/mean': jnp.float32(0.1) * step,
          'policy/entropy': np.float64(1 / step),
          'rollout/tokens': 10**12 + step,
          'time/step': 0.25,
          'evaluate/pass_at_4': 0.5,
        },
      )
      writer.write_samples(step, [{'prompt': 'é', 'completion': f'{step}'}])


def test_vocabulary():
  for name, metric in metric_names.METRICS.items():
    assert metric.kind in ('training', 'evaluation', 'speed'), name
    assert (metric.kind == 'evaluation') == name.startswith('evaluate/'), name
    assert metric.unit and metric.meaning
  assert metric_names.describe('evaluate/pass_at_16').unit == 'fraction'
  for name in ('reward/maen', 'evaluate/pass_at_0', 'evaluate/pass_at_4x'):
    with pytest.raises(ValueError, match=name):
      metric_names.describe(name)


def test_split_exactness_and_order(tmp_path):
  """Mutant: rounding or `str(float32)`, which no longer reads back."""
  _run(tmp_path, [3])
  (row,) = metrics.read_jsonl(tmp_path / 'metrics.jsonl')
  assert list(row) == [
    'step',
    'policy/entropy',
    'reward/mean',
    'rollout/tokens',
  ]
  assert row['reward/mean'] == float(jnp.float32(0.1) * 3)
  assert row['policy/entropy'] == 1 / 3
  assert row['rollout/tokens'] == 10**12 + 3
  (row,) = metrics.read_jsonl(tmp_path / 'evaluations.jsonl')
  assert row == {'step': 3, 'evaluate/pass_at_4': 0.5}
  (row,) = metrics.read_jsonl(tmp_path / 'timing.jsonl')
  assert row == {'step': 3, 'run': 'a', 'time/step': 0.25}


def test_unknown_name_writes_nothing(tmp_path):
  with _writer(tmp_path) as writer:
    with pytest.raises(ValueError, match="'reward/maen' is not in"):
      writer.write(1, {'reward/mean': 1.0, 'reward/maen': 1.0})
  assert not metrics.read_jsonl(tmp_path / 'metrics.jsonl')


def test_a_step_is_written_once(tmp_path):
  with _writer(tmp_path) as writer:
    writer.write(1, {'reward/mean': 1.0})
    writer.write(1, {'time/checkpoint': 1.0})
    with pytest.raises(ValueError, match='already holds step 1'):
      writer.write(1, {'reward/mean': 1.0})


def test_non_finite_is_valid_json(tmp_path):
  """Mutant: json.dumps as it is writes NaN, which is not JSON."""
  with _writer(tmp_path) as writer:
    writer.write(
      1,
      {
        'reward/mean': math.nan,
        'reward/std': jnp.inf,
        'learning/loss': jnp.bfloat16(0.5),
      },
    )
  text = (tmp_path / 'metrics.jsonl').read_text()

  def refuse(name):
    raise AssertionError(name)

  assert json.loads(text, parse_constant=refuse) == {
    'step': 1,
    'reward/mean': None,
    'reward/std': None,
    'learning/loss': 0.5,
  }


@pytest.mark.parametrize('torn', ['', '{"step": 6, "reward', '{"step": 4}'])
def test_resume_equals_the_uninterrupted_run(tmp_path, torn):
  """Mutants: `step < last`; no truncation; a torn line kept."""
  _run(tmp_path / 'whole', range(1, 9))
  _run(tmp_path / 'killed', range(1, 7))
  for file in (
    'metrics.jsonl',
    'evaluations.jsonl',
    'samples.jsonl',
    'timing.jsonl',
  ):
    with open(tmp_path / 'killed' / file, 'a', encoding='utf-8') as stream:
      stream.write(torn)
  _run(tmp_path / 'killed', range(5, 9), resume_step=4, run_id='b')
  for file in ('metrics.jsonl', 'evaluations.jsonl', 'samples.jsonl'):
    assert (tmp_path / 'killed' / file).read_bytes() == (
      tmp_path / 'whole' / file
    ).read_bytes()
  rows = metrics.read_jsonl(tmp_path / 'killed' / 'timing.jsonl')
  timed = [(r['step'], r['run']) for r in rows if 'run' in r]
  assert timed == (
    [(s, 'a') for s in range(1, 7)] + [(s, 'b') for s in range(5, 9)]
  )


def test_start_from_nothing_drops_an_unsaved_run(tmp_path):
  _run(tmp_path, range(1, 4))
  _run(tmp_path, range(1, 3))
  rows = metrics.read_jsonl(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2]


def test_samples_are_bounded_and_survive_odd_text(tmp_path):
  row = {'prompt': 'ü\n\u2028', 'completion': 'bad \udc80 byte', 'step': 99}
  with _writer(tmp_path) as writer:
    writer.write_samples(5, [row] * 100)
  rows = metrics.read_jsonl(tmp_path / 'samples.jsonl')
  assert len(rows) == metrics.SAMPLES_PER_STEP
  assert rows[0] == {**row, 'step': 5}


def test_tensorboard_events_hold_the_values(tmp_path):
  _run(tmp_path, [1, 2])
  (file,) = (tmp_path / 'tensorboard').iterdir()
  data, found = file.read_bytes(), {}
  while data:
    length = int.from_bytes(data[:8], 'little')
    event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]
    for value in event.summary.value:
      found[event.step, value.tag] = value.simple_value
  assert found[2, 'time/step'] == 0.25
  assert found[1, 'policy/entropy'] == 1.0


def test_summary(tmp_path):
  metrics.write_summary(tmp_path, {'steps': np.int32(3), 'x': jnp.float32(0.5)})
  assert json.loads((tmp_path / 'summary.json').read_text()) == {
    'steps': 3,
    'x': 0.5,
  }


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_plain_progress_is_sparse_and_ends_with_the_last_step():
  stream, now = io.StringIO(), [0.0]
  with progress.Progress(stream, clock=lambda: now[0]) as shown:
    shown.phase('reinforcement learning', 20)
    for step in range(1, 21):
      now[0] += 0.5
      shown.update(step, {'reward/mean': step / 20, 'time/step': 1.0})
  lines = stream.getvalue().splitlines()
  assert len(lines) == 6  # 10 s at 2 s a line, and the last
  assert lines[0] == 'reinforcement learning 1/20  reward 0.050'
  assert lines[1].endswith('ETA 0:08')
  assert lines[-1] == 'reinforcement learning 20/20  reward 1.000'


def test_live_progress_redraws_one_line(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  stream = _Terminal()
  with progress.Progress(stream) as shown:
    shown.phase('warm start', 3)
    for step in range(1, 4):
      shown.update(step, {'sft/loss': 1.0})
    shown.message('a [warning]')
  assert 'warm start 3/3  loss 1.000' in stream.getvalue()
  assert 'a [warning]' in stream.getvalue()
  assert '\x1b[2K' in stream.getvalue()


def _config(**changes):
  config = Config()
  for name, value in changes.items():
    *sections, field = name.split('__')
    target = config
    for section in sections:
      target = getattr(target, section)
    setattr(target, field, value)
  return to_dict(config)


def test_workdir_of_another_config_is_refused(tmp_path):
  assert not manifest.check_workdir(tmp_path, _config())
  manifest.write_manifest(tmp_path, _config(), run_id='a')
  with pytest.raises(ConfigError) as e:
    manifest.check_workdir(
      tmp_path,
      _config(seed=3, task__options={'x': 1}, algorithm__loss='clipped'),
    )
  message = str(e.value)
  assert 'seed (0 there, 3 now)' in message
  assert 'algorithm.loss (None there, ' in message
  assert "task.options.x ('absent' there, 1 now)" in message
  assert '--workdir' in message and '\n' not in message


def test_what_may_differ(tmp_path):
  manifest.write_manifest(tmp_path, _config(), run_id='a')
  allowed = _config(
    num_steps=7,
    checkpoint__every=1,
    evaluate__every=3,
    rollout__width=1,
    control__compact=False,
  )
  assert not manifest.check_workdir(tmp_path, allowed)
  with pytest.raises(ConfigError, match='rollout.width'):
    manifest.check_workdir(tmp_path, allowed, allow={field_classes.EXTENT})


def test_every_field_has_a_class():
  """Law: each field of each section has one class, which says whether a
  resume may change it; what is not known to be harmless is refused.

  Mutants: a field missing from the table; a field listed twice; a field of
  `control`, or the slots of logical time, counted as speed.
  """
  names = [
    f'{path}.{name}'.lstrip('.')
    for path, section in field_classes.sections(Config())
    for name, value in vars(section).items()
    if not isinstance(value, Section)
  ]
  assert len(names) > 150
  classes = {name: field_classes.class_of(name) for name in names}
  assert set(classes.values()) == {
    field_classes.TRAINING,
    *field_classes.MAY_DIFFER,
  }
  assert field_classes.class_of('task.options.x') == field_classes.TRAINING
  assert field_classes.class_of('no.such.field') == field_classes.TRAINING


@pytest.mark.parametrize(
  'changes',
  [
    dict(control__over_provision=1.5),
    dict(control__max_staleness=1),
    dict(control__dynamic_sampling=2),
    dict(control__staleness=1),
    dict(control__replay=1),
    dict(control__replay_steps=1),
    dict(control__order='longest_first'),
    dict(control__prune_at=4),
    dict(control__prune_keep=0.25),
    dict(control__prune_steps=1),
    dict(control__prune_weights=False),
    dict(control__extra_samples=4),
    dict(control__extra_by_hardness=True),
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_a_resume_keeps_what_decides_on_training(tmp_path, changes):
  """Law: a resume refuses another policy of which samples a step learns from.

  Mutant: all of `control` counted as speed.
  """
  manifest.write_manifest(tmp_path, _config(), run_id='a')
  (name,) = (name.replace('__', '.') for name in changes)
  with pytest.raises(ConfigError, match=name):
    manifest.check_workdir(tmp_path, _config(**changes))


def test_slots_are_speed_unless_logical_time_counts_them(tmp_path):
  """Law: with over-provision and no `control.logical_slots`, `rollout.slots`
  says which sample is late; otherwise it may change.

  Mutants: `rollout.slots` never compared; always compared.
  """

  def check(old, new):
    manifest.write_manifest(tmp_path, _config(**old), run_id='a')
    return manifest.check_workdir(tmp_path, _config(**new))

  assert not check({}, dict(rollout__slots=8))
  late = dict(control__over_provision=1.5)
  with pytest.raises(
    ConfigError, match=r'by default rollout.slots \(64 there, 8'
  ):
    check(late, dict(late, rollout__slots=8))
  assert not check(
    late, dict(late, rollout__slots=8, control__logical_slots=64)
  )
  late['control__logical_slots'] = 16
  assert not check(late, dict(late, rollout__slots=8))


def test_a_longer_run_of_a_stale_policy_warns(tmp_path):
  """Mutant: no warning."""
  stale = dict(control__staleness=2)
  manifest.write_manifest(tmp_path, _config(**stale), run_id='a')
  (line,) = manifest.check_workdir(tmp_path, _config(**stale, num_steps=200))
  assert 'num_steps was 100 and is 200' in line and 'staleness=2' in line


def test_longer_run_of_a_schedule_warns(tmp_path):
  manifest.write_manifest(
    tmp_path, _config(learning__schedule='cosine'), run_id='a'
  )
  (line,) = manifest.check_workdir(
    tmp_path, _config(learning__schedule='cosine', num_steps=7)
  )
  assert 'num_steps was 100 and is 7' in line


def test_field_unknown_to_the_older_run_has_its_default(tmp_path):
  old = _config()
  del old['learning']['b1']
  manifest.write_manifest(tmp_path, old, run_id='a')
  assert not manifest.check_workdir(tmp_path, _config())
  with pytest.raises(ConfigError, match='learning.b1'):
    manifest.check_workdir(tmp_path, _config(learning__b1=0.5))


@pytest.mark.parametrize(
  'old, new',
  [
    ({'correct': 1.0, 'format': 0.1}, {'format': 0.1}),
    ({'format': 0.1}, {'correct': 1.0, 'format': 0.1}),
  ],
  ids=str,
)
def test_a_dict_of_the_users_is_one_value(tmp_path, old, new):
  """Law: another mix of rewards is another run, also where it leaves out what
  the default has.

  Mutant: defaults filled in within `task.rewards`.
  """
  manifest.write_manifest(tmp_path, _config(task__rewards=old), run_id='a')
  assert not manifest.check_workdir(tmp_path, _config(task__rewards=old))
  with pytest.raises(ConfigError, match='task.rewards'):
    manifest.check_workdir(tmp_path, _config(task__rewards=new))


def test_another_layout_is_allowed_with_a_warning(tmp_path):
  """Law: a checkpoint restores onto another mesh and other microbatches; the
  user is told that the curve may part. Mutant: no warning.
  """
  manifest.write_manifest(tmp_path, _config(), run_id='a')
  (line,) = manifest.check_workdir(
    tmp_path, _config(mesh__fsdp=2, learning__microbatch_rows=2)
  )
  assert 'mesh.fsdp, ' in line or ', mesh.fsdp' in line
  assert 'learning.microbatch_rows' in line and 'may part' in line


def test_manifest_lists_runs_and_warns_of_another_machine(
  tmp_path, monkeypatch
):
  assert not manifest.write_manifest(tmp_path, _config(), run_id='a')
  assert not manifest.write_manifest(
    tmp_path, _config(), run_id='b', resume_step=3
  )
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=x')
  (line,) = manifest.write_manifest(
    tmp_path, _config(), run_id='c', resume_step=5, extra={'reference': 'r'}
  )
  assert line.startswith("xla_flags was '") and 'xla_dump_to' in line
  runs = json.loads((tmp_path / 'manifest.json').read_text())['runs']
  assert [r['run'] for r in runs] == ['a', 'b', 'c']
  assert runs[2]['resumed_step'] == 5 and runs[2]['reference'] == 'r'
  assert set(runs[0]['versions']) >= {'python', 'jax', 'flax', 'optax'}


def test_broken_manifest_is_a_user_error(tmp_path):
  (tmp_path / 'manifest.json').write_text('{"config": {')
  with pytest.raises(ConfigError, match='is not a manifest'):
    manifest.check_workdir(tmp_path, _config())


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
  """One line that names the folder. Mutant: the OSError passed on."""
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='--workdir=.*cannot be written'):
    manifest.write_manifest(tmp_path / 'file' / 'run', _config(), run_id='a')
