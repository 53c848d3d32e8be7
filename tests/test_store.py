"""The host's store of past rollouts."""

import json

import numpy as np
import pytest

from rlax_llm.config import ConfigError
from rlax_llm.drafting import store as store_module
from rlax_llm.drafting.drafter import CorpusShape
from rlax_llm.drafting.store import corpus_texts
from rlax_llm.drafting.store import RolloutStore
from rlax_llm.types import Request
from rlax_llm.types import Rollout
from rlax_llm.types import TRAIN


def _request(prompt, *, step=0, request=0, samples=2):
  return Request(np.asarray(prompt, np.int32), samples, TRAIN, step, request)


def _rollout(prompt, tokens, index=0):
  tokens = np.asarray(tokens, np.int32)
  return Rollout(
    tokens,
    len(tokens),
    True,
    tokens,
    tokens,
    tokens,
    1,
    _request(prompt),
    index,
  )


def _store(history=3, megabytes=1, tokenizer='abc'):
  return RolloutStore(history=history, megabytes=megabytes, tokenizer=tokenizer)


def test_the_newest_replace_the_oldest():
  """R completions of a prompt stay, oldest first; others are untouched.

  Mutants: the newest is dropped; R counted over all prompts.
  """
  store = _store(history=3)
  for i in range(5):
    store.add([_rollout([1, 2], [i]), _rollout([7], [i, i])])
  for prompt, width in (([1, 2], 1), ([7], 2)):
    kept = store.history(_request(prompt))
    assert [k.tolist() for k in kept] == [[i] * width for i in (2, 3, 4)]
  assert store.history(_request([1])) == [] and len(store) == 2
  assert _store(history=0).history(_request([1, 2])) == []


def test_prompts_cannot_collide():
  """Prompts are told apart by their tokens, not by a name or a hash.

  Mutant: the key is the prompt's id, or its tokens joined without lengths.
  """
  store = _store()
  prompts = [[1], [1, 0], [0, 1], [256], [1, 256], [65537]]
  for i, prompt in enumerate(prompts):
    store.add([_rollout(prompt, [i])])
  for i, prompt in enumerate(prompts):
    assert [k.tolist() for k in store.history(_request(prompt))] == [[i]]


def test_the_budget_is_kept_and_the_least_recent_leave():
  """Bytes stay within the budget; the prompts sampled longest ago leave.

  Mutants: bytes of dropped rollouts still counted; the most recent leaves;
  a prompt sampled again counts as old.
  """
  store = _store(history=2, megabytes=1)
  long = np.zeros(2000, np.int32)
  for i in range(400):
    store.add([_rollout([i], long), _rollout([0], long)])
    assert store.bytes <= 1 << 20
  assert 50 < len(store) < 135
  assert store.history(_request([0])) and store.history(_request([399]))
  assert not store.history(_request([1]))
  counted = (
    sum(
      4 * len(k) + 200 for i in range(400) for k in store.history(_request([i]))
    )
    + len(store) * 204
  )
  assert store.bytes == counted


def test_hints_belong_to_one_sample_of_one_step():
  """A hint is found by step, request and index, and dropped with its step.

  Mutant: hints of the step itself survive.
  """
  store = _store()
  later = _request([1], step=4, request=2)
  store.add_hint(later, 1, np.asarray([5, 6]))
  assert store.hint(later, 1).tolist() == [5, 6]
  assert store.hint(later, 0) is None
  assert store.hint(_request([1], step=3, request=2), 1) is None
  store.drop_hints(3)
  assert store.hint(later, 1) is not None
  store.drop_hints(4)
  assert store.hint(later, 1) is None


def test_a_store_comes_back_from_its_text():
  """dump and restore are inverse, order of use and hints included.

  Mutants: hints left out; the order of prompts reversed.
  """
  store = _store(history=2)
  rng = np.random.default_rng(0)
  for i in range(30):
    prompt = rng.integers(0, 9, 1 + i % 3)
    store.add([_rollout(prompt, rng.integers(0, 9, i))])
  store.add_hint(_request([1], step=4), 1, np.asarray([5, 6]))
  other = _store(history=2)
  other.restore(json.loads(json.dumps(store.dump())))
  assert other.dump() == store.dump() and other.bytes == store.bytes
  assert len(other) == len(store) > 5
  smaller = _store(history=1)
  smaller.restore(store.dump())
  assert len(smaller) == len(store)
  empty = _store()
  empty.restore(_store().dump())
  assert len(empty) == 0 and empty.bytes == 0


def test_another_tokenizers_cache_is_refused():
  """A cache of another tokenizer is one clear error.

  Mutant: the tokenizer is not compared.
  """
  store = _store()
  store.add([_rollout([1], [2, 3])])
  with pytest.raises(ConfigError, match="'xyz'.*'abc'.*workdir"):
    _store().restore(
      json.dumps(json.loads(store.dump()) | {'tokenizer': 'xyz'})
    )


@pytest.mark.parametrize(
  'change',
  [
    dict(prompts=['AAAA', 'AAAA']),
    dict(hints=['no base64!', '']),
    dict(counts=[]),
    dict(counts=store_module._pack([np.asarray([3, -2], '<i4')])),
    dict(
      hint_keys=store_module._pack([np.asarray([3], '<i4')]),
      hints=store_module._pack([np.asarray([3], '<i4')]),
    ),
    None,
  ],
)
def test_a_damaged_cache_is_told_apart(change):
  """Damage is a ValueError and leaves the store as it was.

  Mutants: lengths are not compared with tokens; counts may be negative.
  """
  store = _store()
  store.add([_rollout([1], [2, 3])])
  text = store.dump()
  text = text[:-9] if change is None else json.dumps(json.loads(text) | change)
  other = _store()
  with pytest.raises(ValueError, match='unreadable'):
    other.restore(text)
  assert len(other) == 0


def test_texts_begin_with_history_and_prompts():
  """History, then the group's prompts, then hints; too long ones are cut.

  Mutants: the newest history left out when there is too much; a hint of
  another sample.
  """
  store, request = _store(), _request([1, 2], step=5)
  for i in range(3):
    store.add([_rollout([1, 2], [i] * 6)])
  store.add_hint(request, 1, np.asarray([8, 9]))
  shape = CorpusShape(prompts=4, capacity=6, history=2, group=2, hints=2)
  texts, length = corpus_texts(store, [request, _request([3])], 3, shape)
  assert texts.shape == (3, 6, 6)
  assert length.tolist() == [[6, 6, 2, 2, 0, 4], [0, 0, 1, 1, 0, 0], [0] * 6]
  assert texts[0, 0].tolist() == [1, 2, 1, 1, 1, 1]
  assert texts[0, 1].tolist() == [1, 2, 2, 2, 2, 2]
  assert texts[0, 5, :4].tolist() == [1, 2, 8, 9]
  assert texts[1, 2, 0] == 3
  _, nothing = corpus_texts(None, [request], 3, shape)
  assert nothing.tolist() == [[0, 0, 2, 2, 0, 0], [0] * 6, [0] * 6]
