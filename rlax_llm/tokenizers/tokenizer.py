"""Text to token ids and back: UTF-8 bytes, or a small character alphabet."""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Protocol

from rlax_llm.config import ConfigError

EOS = 0
BOS = 1
NUM_SPECIALS = 2


class TextTokenizer(Protocol):
  """What a run needs of a tokenizer: `Tokenizer`, or a published model's."""

  @property
  def warnings(self) -> tuple[str, ...]:
    """What a run tells its user at its start, a line each."""

  @property
  def vocab_size(self) -> int:
    """Number of ids, specials included; a model may have more."""

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Ids that end a completion; the first one closes a demonstration."""

  @property
  def bos_id(self) -> int | None:
    """Id of the token that begins a prompt; None: there is none."""

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without specials."""

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a problem as the model is to see it."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of any ids, specials skipped; never raises."""


def check_vocabulary(tokenizer: TextTokenizer, vocabulary: int) -> None:
  """Refuses a model that lacks ids of the tokenizer; it may have more.

  Args:
    tokenizer: of the run.
    vocabulary: V, the ids that the model can read and write.

  Raises:
    ConfigError: if it has fewer.
  """
  if vocabulary < tokenizer.vocab_size:
    raise ConfigError(
      f'model.vocabulary={vocabulary} is less than the '
      f'{tokenizer.vocab_size} ids of the tokenizer; raise it or set 0, or '
      "take a pretrained model's own tokenizer"
    )


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """One id per byte, or per character of `alphabet`.

  Ids: 0 ends a sequence (EOS), 1 begins it (BOS), the alphabet follows in
  its own order.

  Attributes:
    alphabet: the characters, each once; None: the 256 bytes of UTF-8.
  """

  alphabet: str | None = None

  @property
  def warnings(self) -> tuple[str, ...]:
    """There are none."""
    return ()

  @property
  def vocab_size(self) -> int:
    """Number of ids, specials included."""
    size = 256 if self.alphabet is None else len(self.alphabet)
    return size + NUM_SPECIALS

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Ids that end a completion."""
    return (EOS,)

  @property
  def bos_id(self) -> int | None:
    """Id that begins a prompt."""
    return BOS

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {c: i + NUM_SPECIALS for i, c in enumerate(self.alphabet or '')}

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without specials.

    Args:
      text: a lone surrogate, which UTF-8 cannot hold, becomes '?'.

    Raises:
      ValueError: a character outside the alphabet.
    """
    if self.alphabet is None:
      return [b + NUM_SPECIALS for b in text.encode('utf-8', 'replace')]
    try:
      return [self._ids[c] for c in text]
    except KeyError as error:
      raise ValueError(
        f'character {error.args[0]!r} is not in the alphabet '
        f'{self.alphabet!r}; add it to model.tokenizer or set '
        "model.tokenizer='bytes'"
      ) from None

  def encode_prompt(self, text: str) -> list[int]:
    """Returns BOS and the ids of `text`; raises as `encode` does."""
    return [BOS, *self.encode(text)]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids` (ints, or an int array), specials skipped.

    `decode(encode(text)) == text`. An id beyond the vocabulary (a model may
    be padded to more ids) and invalid UTF-8 become U+FFFD: sampled tokens
    never raise.
    """
    kept = [int(i) - NUM_SPECIALS for i in ids if int(i) >= NUM_SPECIALS]
    if self.alphabet is None:
      # 0xFF occurs in no UTF-8 text, so it decodes to U+FFFD.
      return bytes(min(i, 255) for i in kept).decode('utf-8', 'replace')
    return ''.join(_character(self.alphabet, i) for i in kept)


def _character(alphabet: Sequence[str], index: int) -> str:
  return (
    alphabet[index] if index < len(alphabet) else '\N{REPLACEMENT CHARACTER}'
  )


def make_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer of a `model.tokenizer` value.

  Args:
    name: 'bytes', or the string of characters that is the alphabet.

  Raises:
    ValueError: an empty alphabet or a repeated character.
  """
  if name == 'bytes':
    return Tokenizer()
  if not name:
    raise ValueError("model.tokenizer is empty; set 'bytes' or an alphabet")
  repeated = sorted({c for c in name if name.count(c) > 1})
  if repeated:
    raise ValueError(
      f'model.tokenizer {name!r} holds {repeated[0]!r} twice; '
      "give each character once, or set 'bytes'"
    )
  return Tokenizer(name)
