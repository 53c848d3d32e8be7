"""Width by occupancy, against a simulated machine."""

import pytest

from rlax_llm.drafting.strategy import WidthPolicy


def _simulate(cost, accept, *, rows=(32, 16, 8), steps=40, widths=(1, 4)):
  """Runs whole rollouts; returns (seconds, seconds at W = 1, policy).

  Args:
    cost: (rows, width) -> seconds of a forward.
    accept: (step, width) -> tokens per row and forward.
    rows: the batch thins from the first to the last.
    steps: rollouts.
    widths: to choose from.
  """
  policy = WidthPolicy(widths)
  spent = plain = 0.0
  for step in range(steps):
    for n in rows:
      left = 64.0  # tokens of each row
      while left > 1e-6:
        width, forwards = policy.choose(n, 64, 32)
        gain = accept(step, width)
        used = min(forwards, max(1, -int(-left // gain)))
        seconds = used * cost(n, width)
        policy.observe(n,
                       64,
                       width,
                       seconds=seconds,
                       forwards=used,
                       row_forwards=used * n,
                       tokens=int(used * n * gain))
        spent += seconds
        left -= used * gain
      plain += 64 * cost(n, 1)
  return spent, plain, policy


def _favourite(policy, n, cost, accept):
  """Returns the width of most of the next segments; others are probes."""
  used = []
  for _ in range(11):
    width, forwards = policy.choose(n, 64, 32)
    used.append(width)
    policy.observe(n,
                   64,
                   width,
                   seconds=forwards * cost(n, width),
                   forwards=forwards,
                   row_forwards=forwards * n,
                   tokens=int(forwards * n * accept(0, width)))
  return max(set(used), key=used.count)


COMPUTE_BOUND = lambda n, w: 1e-4 + 2e-5 * n * w
MEMORY_BOUND = lambda n, w: 1e-3 + 1e-6 * n * w


def test_never_much_slower_than_no_speculation():
  """Where speculation cannot pay, probing costs under 5 %.

  Mutants: probes have no budget; a failed probe is repeated at once.
  """
  for accept in (1.0, 1.3):
    spent, plain, _ = _simulate(COMPUTE_BOUND,
                                lambda s, w, a=accept: a if w > 1 else 1.0)
    assert spent < 1.05 * plain


def test_speculation_is_found_where_it_pays():
  """With free verification and good drafts nearly all of the gain is taken.

  Mutants: never probed; the gain is that of one row.
  """
  spent, plain, policy = _simulate(MEMORY_BOUND, lambda s, w: 3.2
                                   if w > 1 else 1.0)
  assert plain / spent > 2.8
  assert policy.choose(32, 64, 32)[0] == 4


def test_it_is_found_later_when_drafts_get_better():
  """An empty cache at first; from the tenth rollout on, drafts are good.

  Mutant: a failed probe is never repeated.
  """
  spent, plain, policy = _simulate(MEMORY_BOUND,
                                   lambda s, w: (3.2 if s >= 10 else 1.0)
                                   if w > 1 else 1.0,
                                   steps=60)
  assert policy.choose(8, 64, 32)[0] == 4
  assert plain / spent > 1.5


def test_few_rows_draft_and_many_do_not():
  """The width follows the occupancy. Mutant: one gain for every N."""
  _, _, policy = _simulate(lambda n, w: 1e-3 + 4e-5 * max(n * w - 40, 0),
                           lambda s, w: 2.5 if w > 1 else 1.0,
                           rows=(128, 8))
  assert policy.choose(8, 64, 32)[0] == 4
  assert policy.choose(128, 64, 32)[0] == 1


def test_the_best_of_several_widths_wins():
  """Each width has its own cost and acceptance. Mutant: the widest wins."""
  cost = lambda n, w: 1e-3 * (1 + 0.1 * (w - 1)**1.6)
  accept = lambda s, w: {1: 1.0, 4: 3.0, 16: 4.0}[w]
  _, _, policy = _simulate(cost, accept, widths=(1, 4, 16))
  assert _favourite(policy, 8, cost, accept) == 4


def test_the_last_of_several_widths_can_win():
  """A width that pays does not hide a wider one that pays more.

  Mutant: the first width that pays is kept.
  """
  spent, plain, policy = _simulate(lambda n, w: 1e-3 * (1 + 0.02 * w),
                                   lambda s, w: {
                                       1: 1.0,
                                       4: 2.5,
                                       8: 5.0
                                   }[w],
                                   widths=(1, 4, 8))
  assert policy.choose(8, 64, 32)[0] == 8 and plain / spent > 3


def test_a_small_gain_is_not_probed_for_ever():
  """Just above W = 1, below the margin: W = 1 is used, and probed is little.

  Mutant: no rest between probes.
  """
  used = []

  def cost(rows, width):
    used.append((width, rows))
    return 1e-3 * (1 if width == 1 else 2.0)

  _simulate(cost, lambda s, w: 2.1 if w > 1 else 1.0, rows=(8,), steps=60)
  wide = sum(width > 1 for width, _ in used)
  assert 0 < wide < 0.2 * len(used)


def test_one_slow_yardstick_is_forgotten():
  """W = 1 is measured again. Mutant: its cost is that of its second run."""
  runs = []

  def cost(rows, width):
    del rows
    runs.append(width)
    hiccup = 3 if width == 1 and runs.count(1) in (1, 2) else 1
    return 1e-3 * (1 if width == 1 else 2.0) * hiccup

  spent, plain, policy = _simulate(cost,
                                   lambda s, w: 1.3 if w > 1 else 1.0,
                                   rows=(8,),
                                   steps=100)
  used = [policy.choose(8, 64, 32)[0] for _ in range(1)]
  assert used == [1] or runs[-50:].count(1) > 35
  assert spent < 1.1 * min(plain, 100 * 64e-3)


def test_a_stopped_clock_is_no_error():
  """Zero seconds tell nothing. Mutant: a division by the cost."""
  _, _, policy = _simulate(lambda n, w: 0.0, lambda s, w: 1.0)
  assert policy.choose(8, 64, 32)[0] == 1


@pytest.mark.parametrize('widths', [(1,), ()])
def test_without_a_choice_there_is_no_speculation(widths):
  """Only W = 1 to choose from. Mutant: an unlisted width is tried."""
  assert WidthPolicy(widths).choose(8, 64, 32) == (1, 32)
