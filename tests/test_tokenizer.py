"""Laws of the tokenizers."""

import random

import numpy as np
import pytest

from rlax_llm.tokenizers import tokenizer as tokenizer_lib

ALPHABET = '0123456789+-*/=() \n'


def random_text(rng, alphabet, length=40):
  return ''.join(rng.choice(alphabet) for _ in range(length))


def test_alphabet_round_trip():
  """Mutant: `decode` off by one of the two specials."""
  tokenizer = tokenizer_lib.make_tokenizer(ALPHABET)
  rng = random.Random(0)
  for _ in range(50):
    text = random_text(rng, ALPHABET)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert all(2 <= i < tokenizer.vocab_size for i in ids)


def test_bytes_round_trip():
  """Mutant: latin-1 in place of UTF-8."""
  tokenizer = tokenizer_lib.make_tokenizer('bytes')
  for text in ('', 'a=1\n', 'naïve ✅→×', '\x00\x7f', '🙂' * 3):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.vocab_size == 258


def test_ids_are_disjoint_and_cover_the_vocabulary():
  for name in ('bytes', ALPHABET):
    tokenizer = tokenizer_lib.make_tokenizer(name)
    symbols = ALPHABET if name != 'bytes' else ''
    ids = {i for c in symbols for i in tokenizer.encode(c)}
    specials = {*tokenizer.eos_ids, tokenizer.bos_id}
    assert specials == {0, 1}
    assert not ids & specials
    if name != 'bytes':
      assert ids | specials == set(range(tokenizer.vocab_size))


def test_specials_are_skipped_and_the_prompt_has_one_bos():
  """Mutant: a BOS for every call of `encode`."""
  for name in ('bytes', ALPHABET):
    tokenizer = tokenizer_lib.make_tokenizer(name)
    ids = tokenizer.encode('1+1=')
    prompt = tokenizer.encode_prompt('1+1=')
    assert prompt == [tokenizer.bos_id, *ids]
    noisy = [0, *prompt, 1, 0, *tokenizer.eos_ids]
    assert tokenizer.decode(np.array(noisy, np.int32)) == '1+1='


def test_sampled_ids_never_raise():
  """A padded vocabulary and broken UTF-8 decode to U+FFFD."""
  for name in ('bytes', ALPHABET):
    tokenizer = tokenizer_lib.make_tokenizer(name)
    rng = random.Random(1)
    for _ in range(20):
      tokenizer.decode([rng.randrange(600) for _ in range(50)])
    assert tokenizer.decode([tokenizer.vocab_size]) == '�'
  assert tokenizer_lib.make_tokenizer('bytes').decode([2 + 0xC3]) == '�'


@pytest.mark.parametrize(
  'name, words',
  [('', ['model.tokenizer', 'empty']), ('abca', ["'a'", 'twice'])],
)
def test_bad_alphabets(name, words):
  with pytest.raises(ValueError) as error:
    tokenizer_lib.make_tokenizer(name)
  assert all(word in str(error.value) for word in words)


def test_character_outside_the_alphabet():
  with pytest.raises(ValueError, match='model.tokenizer') as error:
    tokenizer_lib.make_tokenizer('01').encode('0x1')
  assert "'x'" in str(error.value)
  assert '\n' not in str(error.value)
