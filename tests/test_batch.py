"""Packing and batches: nothing lost, nothing moved, weights that add up."""

import numpy as np
import pytest

from rlax_llm.learning import batch as batches
from rlax_llm.learning.batch import Sample
from rlax_llm.ops import masking


def _random_lengths(seed, row_length=32):
  rng = np.random.default_rng(seed)
  return rng.integers(1, row_length + 1, rng.integers(1, 60)).tolist()


@pytest.mark.parametrize('seed', range(20))
def test_pack_places_every_sample_once_within_the_rows(seed):
  """Law: a partition of the samples, no row above L, the same at every call.

  Mutant: `room[row] > length` for `>=`: the waste bound below breaks.
  """
  lengths = _random_lengths(seed)
  rows = batches.pack(lengths, 32)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
  assert rows == batches.pack(lengths, 32)
  # First fit: any two rows together exceed L, or the second would not exist.
  used = [sum(lengths[i] for i in row) for row in rows]
  assert all(a + b > 32 for k, a in enumerate(used) for b in used[k + 1 :])


def test_pack_by_hand():
  """Law: 6, 5, 4, 3, 2 into rows of 10: {6, 4}, {5, 3, 2}.

  Mutant: first fit in the given order, which needs a third row.
  """
  assert batches.pack([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
  assert batches.pack([], 10) == []
  assert batches.pack([10, 10, 10], 10) == [[0], [1], [2]]


def _samples(count=30, seed=0):
  rng = np.random.default_rng(seed)
  samples = []
  for i in range(count):
    prompt, completion = rng.integers(1, 6), rng.integers(1, 12)
    samples.append(
      Sample(
        prompt=rng.integers(0, 100, prompt).astype(np.int32),
        completion=rng.integers(0, 100, completion).astype(np.int32),
        advantage=float(i + 1),
        behaviour_logprobs=rng.normal(size=completion).astype(np.float32),
      )
    )
  return samples


def _make(samples, *, reduction='token_mean', rows=4, keep=None, row_length=24):
  return batches.make_batch(
    samples,
    reduction=reduction,
    constant=12,
    row_length=row_length,
    microbatch_rows=rows,
    keep=keep,
  )


def _unpack(batch):
  """Yields dicts of the arrays of each segment, from the computed part."""
  for m in range(int(batch.count)):
    for r in range(batch.tokens.shape[1]):
      for segment in range(1, batch.segments[m, r].max() + 1):
        where = batch.segments[m, r] == segment
        yield {
          name: getattr(batch, name)[m, r][where]
          for name in (
            'tokens',
            'positions',
            'targets',
            'weights',
            'advantages',
            'behaviour_logprobs',
          )
        }


def test_batch_holds_each_sample_at_its_place():
  """Law: prompt then completion, contiguous, positions from 0, targets on the
  completion only, its advantage and behaviour log-probabilities at their own
  tokens; rows dealt evenly.

  Mutants: behaviour log-probabilities placed from the prompt's start;
  positions that continue across segments; targets one token early.
  """
  samples = _samples()
  batch = _make(samples)
  found = {float(s['advantages'].max()): s for s in _unpack(batch)}
  assert len(found) == len(samples)
  for sample in samples:
    part = found[sample.advantage]
    first = len(sample.prompt)
    whole = np.concatenate([sample.prompt, sample.completion])
    assert part['tokens'].tolist() == whole.tolist()
    assert part['positions'].tolist() == list(range(len(whole)))
    assert part['targets'].tolist() == [i >= first for i in range(len(whole))]
    np.testing.assert_array_equal(
      part['behaviour_logprobs'][first:], sample.behaviour_logprobs
    )
    for name in ('weights', 'advantages', 'behaviour_logprobs'):
      assert np.all(part[name][:first] == 0)
    assert np.all(part['advantages'][first:] == sample.advantage)
  per_microbatch = [
    (batch.segments[m].max(axis=1) > 0).sum() for m in range(int(batch.count))
  ]
  assert max(per_microbatch) - min(per_microbatch) <= 1


def test_batch_is_empty_beyond_its_count():
  """Law: M is a power of two, and nothing stands at or beyond `count`.

  Mutant: rows dealt over all M microbatches instead of the first `count`.
  """
  for count in (1, 5, 13, 30):
    batch = _make(_samples(count), rows=2)
    total = batch.tokens.shape[0]
    assert total & (total - 1) == 0 and total >= batch.count
    assert not batch.segments[int(batch.count) :].any()
    assert not batch.targets[int(batch.count) :].any()
    assert all(batch.segments[m].any() for m in range(int(batch.count)))


@pytest.mark.parametrize('reduction', masking.REDUCTIONS)
def test_weights_add_up(reduction):
  """Law: with loss 1 at every token, the weighted sum is the reduction's mean.

  token_mean and sequence_mean: 1. token_sum: the tokens.
  sequence_mean_token_sum: the mean length. sequence_sum_token_mean_constant:
  that over T = 12. No sample is empty here, so those over all samples agree.
  Mutant: weights looked up by place in the row instead of by sample.
  """
  samples = _samples()
  lengths = np.array([len(s.completion) for s in samples])
  batch = _make(samples, reduction=reduction)
  expected = {
    'token_mean': 1,
    'sequence_mean': 1,
    'sequence_mean_token_sum': lengths.mean(),
    'sequence_sum_token_mean_constant': lengths.mean() / 12,
    'token_sum': lengths.sum(),
    'sequence_mean_over_all': 1,
    'sequence_sum_token_mean_constant_over_all': lengths.mean() / 12,
  }[reduction]
  assert batch.weights.sum() == pytest.approx(expected, rel=1e-5)
  assert np.all((batch.weights > 0) == batch.targets)
  # What is left out still counts in the denominators.
  keep = np.arange(len(samples)) % 2 == 0
  kept = _make(samples, reduction=reduction, keep=keep)
  by_token = {
    float(s['advantages'].max()): s['weights'].max() for s in _unpack(batch)
  }
  for part in _unpack(kept):
    assert part['weights'].max() == by_token[float(part['advantages'].max())]
  assert kept.targets.sum() == lengths[keep].sum()


def test_nothing_to_keep_is_an_empty_batch():
  """Law: without signal there is one empty microbatch, of the usual shape.

  Mutant: count 0 and M = 0, for which another executable would be compiled.
  """
  batch = _make(_samples(), keep=np.zeros(30, bool))
  assert batch.count == 1 and batch.tokens.shape == (1, 4, 24)
  assert not batch.targets.any()


def test_too_long_a_sequence_is_refused():
  """Law: the message names both numbers. Mutant: silent truncation."""
  sample = Sample(np.zeros(5, np.int32), np.zeros(20, np.int32))
  with pytest.raises(ValueError, match=r'25 tokens exceeds .*row_length=24'):
    _make([sample])
