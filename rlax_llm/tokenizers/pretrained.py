"""Tokenizers of published models, read from the model's folder."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import datetime
import functools
import itertools
import os
from typing import Any

import tokenizers

from rlax_llm import config as config_lib
from rlax_llm.config import ConfigError
from rlax_llm.tokenizers import chat_template
from rlax_llm.tokenizers import files

_UNKNOWN = '\N{REPLACEMENT CHARACTER}'
_OURS = frozenset(
  ('messages', 'add_generation_prompt')
)  # variables that the run sets
_NAMED = 20  # names in one message
_PROBE = 'How many legs have 3 cats?'
_REPLY = '12 legs.'


class PretrainedTokenizer:
  """A published model's tokenizer; a `tokenizer.TextTokenizer`.

  A prompt begins with BOS exactly once if the tokenizer's post-processor adds
  it, tokenizer_config.json has add_bos_token, or the chat template writes it;
  EOS is never added. (The transformers library leaves BOS out of a chat whose
  template does not write it, even if all its other prompts have it.)

  Names of special tokens in a prompt become special tokens, as a template
  needs it; in `encode` they are text. `decode` never deletes spaces before
  punctuation, whatever clean_up_tokenization_spaces says.
  """

  def __init__(
    self,
    folder: str,
    *,
    chat: bool,
    system: str,
    variables: Mapping[str, Any],
    date: datetime.date,
  ) -> None:
    """Reads the files; see `load_tokenizer`."""
    self._folder = folder
    self._chat = chat
    self._system = system
    declared = files.read_declared(folder)
    config, self._names = declared.config, declared.names
    self._backend = files.load_backend(folder)
    files.add_tokens(folder, self._backend, declared)
    # Published with the tokenizer: names of special tokens are text to it.
    split = config.get('split_special_tokens')
    self._backend.encode_special_tokens = split is True
    vocabulary = self._backend.get_vocab()
    self._ids = frozenset(vocabulary.values())
    self._vocab_size = max(self._ids) + 1
    self._eos_ids = files.eos_ids(folder, vocabulary, self._names)
    self._bos_id = files.token_id(folder, vocabulary, self._names, 'bos_token')
    self._lead = self._find_lead(config.get('add_bos_token') is True)
    specials = self._backend.get_added_tokens_decoder().items()
    self._skipped = frozenset(
      i for i, token in specials if token.special
    ).union(self._eos_ids, self._lead)
    source = files.template_source(folder, config)
    self._template = (
      None
      if source is None
      else chat_template.ChatTemplate(source[0], origin=source[1], date=date)
    )
    self._variables = {**self._names, **variables}
    self._warnings: tuple[str, ...] = ()
    if chat:
      self._check_template()
      self._check_variables(variables)

  def _find_lead(self, add_bos: bool) -> tuple[int, ...]:
    """Returns the ids that begin every prompt."""
    encoding = self._backend.encode('1')
    lead = tuple(
      i
      for i, _ in itertools.takewhile(
        lambda pair: pair[1] == 1,
        zip(encoding.ids, encoding.special_tokens_mask),
      )
    )
    if not add_bos:
      return lead
    if self._bos_id is None:
      raise ConfigError(
        f'{os.path.join(self._folder, "tokenizer_config.json")!r} has '
        'add_bos_token but no bos_token; mend the file'
      )
    return lead if self._bos_id in lead else (self._bos_id, *lead)

  def _check_template(self) -> None:
    """Renders once: a template must work, and keep what it is given."""
    text = self.render_chat(self._messages(_PROBE))
    for name, part in (
      ('problem', _PROBE),
      ('task.system_prompt', self._system.strip()),
    ):
      if part not in text:
        raise ConfigError(
          f'the chat template of {self._folder!r} drops the '
          f'{name}; mend it or set task.chat_template=False'
        )
    if not self._begins_reply(text):
      self._warnings = (
        f'the chat template of {self._folder!r} ignores '
        "add_generation_prompt: no prompt has the header of the model's own "
        "turn, and the model may continue the user's turn; write a template "
        'that adds the header to chat_template.jinja, or set '
        'task.chat_template=False',
      )

  def _begins_reply(self, prompt: str) -> bool:
    """Whether a prompt ends where the model's own turn begins.

    A template that ignores add_generation_prompt is right if a reply has no
    header and the user's turn has an end mark: Llama 2 writes
    '[INST] problem [/INST] reply'.

    Args:
      prompt: the rendering of the probe.
    """
    turn = self._messages(_PROBE)
    reply = {'role': 'assistant', 'content': _REPLY}

    def render(messages: Sequence[Mapping[str, str]]) -> str | None:
      try:
        return self.render_chat(messages, add_generation_prompt=False)
      except ConfigError:
        return None

    if render(turn) != prompt:
      return True
    answered = render([*turn, reply])
    if answered is None:
      return False
    end_mark = prompt.rpartition(_PROBE)[2].strip()
    header = answered.removeprefix(prompt).partition(_REPLY)[0].strip()
    return (
      bool(end_mark)
      and answered.startswith(prompt)
      and _REPLY in answered
      and not header
    )

  def _check_variables(self, variables: Mapping[str, Any]) -> None:
    """Refuses variables of the user's that change nothing."""
    if not variables:
      return
    assert self._template is not None
    read = self._template.names() - _OURS
    for name in variables:
      if name not in read:
        raise ConfigError(
          f'task.chat_variables[{name!r}] is none that the chat template of '
          f'{self._folder!r} leaves to you'
          f'{config_lib.nearest(name, read)}; those are '
          f'{", ".join(sorted(read)[:_NAMED]) or "none"}'
        )

  @property
  def warnings(self) -> tuple[str, ...]:
    """What a run tells its user at its start, a line each."""
    return self._warnings

  @property
  def vocab_size(self) -> int:
    """The largest id + 1; a model needs as many."""
    return self._vocab_size

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Ids that end a completion.

    First that of tokenizer_config.json's eos_token, with which a chat template
    closes a turn, so a demonstration too; then those of generation_config.json,
    then those of config.json, each once.
    """
    return self._eos_ids

  @property
  def bos_id(self) -> int | None:
    """Id of the BOS token; None: the model has none."""
    return self._bos_id

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that reads special tokens as text."""
    plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
    plain.encode_special_tokens = True
    return plain

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without specials.

    Args:
      text: a lone surrogate, which UTF-8 cannot hold, becomes '?'.
    """
    return self._plain.encode(_utf8(text), add_special_tokens=False).ids

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a problem as the model is to see it.

    Args:
      text: put to the model as it is, or as the user's turn of a chat, behind
        the system text if there is one.

    Raises:
      ConfigError: the chat template refuses it.
    """
    if self._chat:
      text = self.render_chat(self._messages(text))
    ids = self._backend.encode(_utf8(text), add_special_tokens=False).ids
    lead = list(self._lead)
    begun = ids[: len(lead)] == lead or ids[:1] == [self._bos_id]
    return ids if begun else lead + ids

  def _messages(self, text: str) -> list[dict[str, str]]:
    system = [{'role': 'system', 'content': self._system}]
    return [
      *(system if self._system else []),
      {'role': 'user', 'content': text},
    ]

  def render_chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns the text of a conversation in the model's chat template.

    Args:
      messages: each with a role (system, user, assistant) and a content.
      add_generation_prompt: end with the header of the model's own turn.

    Raises:
      ConfigError: there is no template, it is wrong, or refuses the messages.
    """
    if self._template is None:
      raise ConfigError(
        f'{self._folder!r} holds no chat template; set '
        'task.chat_template=False or write one to chat_template.jinja'
      )
    return self._template.render(
      messages,
      add_generation_prompt=add_generation_prompt,
      variables=self._variables,
    )

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids` (ints, or an int array), specials skipped.

    `decode(encode(text)) == text`, up to what the tokenizer itself normalises.
    Ids without a token (a model may be padded to more) and invalid UTF-8 become
    U+FFFD: sampled tokens never raise.
    """
    kept = [i for i in map(int, ids) if i not in self._skipped]
    if self._ids.issuperset(kept):
      return self._backend.decode(kept, skip_special_tokens=False)
    # The library would drop the ids that it does not know.
    tokens = [
      (self._backend.id_to_token(i) if i in self._ids else None) or _UNKNOWN
      for i in kept
    ]
    decoder = self._backend.decoder
    return ' '.join(tokens) if decoder is None else decoder.decode(tokens)


def _utf8(text: str) -> str:
  return text.encode('utf-8', 'replace').decode('utf-8')


def load_tokenizer(
  folder: str,
  *,
  chat: bool = False,
  system: str = '',
  variables: Mapping[str, Any] | None = None,
  date: datetime.date = chat_template.DATE,
) -> PretrainedTokenizer:
  """Returns the tokenizer of a published model.

  Args:
    folder: holds tokenizer.json and tokenizer_config.json.
    chat: `encode_prompt` puts problems to the model in its chat template, as
      the user's turn; else as they are.
    system: the system turn before it; '': none, whatever the template then
      writes. Needs `chat`.
    variables: further variables of the template (Qwen3: enable_thinking).
      Needs `chat`.
    date: what the template takes for today.

  Raises:
    ConfigError: a file is missing, is not what it should be, or contradicts
      another; or the chat template is missing, wrong, or drops the messages.
  """
  if not os.path.isdir(folder):
    raise ConfigError(
      f'{folder!r} is no folder; give one that holds tokenizer.json'
    )
  if (system or variables) and not chat:
    raise ConfigError(
      'a system text and variables are read by the chat '
      'template only; set task.chat_template=True or give none'
    )
  return PretrainedTokenizer(
    folder,
    chat=chat,
    system=system,
    variables=config_lib.to_dict(variables or {}),
    date=date,
  )
