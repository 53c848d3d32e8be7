"""Files of a published tokenizer: read with limits, checked against each other.

As published: tokenizer.json (the tokenizer itself) and tokenizer_config.json
(the names of its special tokens, further tokens, the chat template); where
present generation_config.json and config.json (more EOS ids) and
chat_template.jinja (goes before the template of tokenizer_config.json).
special_tokens_map.json and added_tokens.json are of an older layout: they are
read where tokenizer_config.json has no added_tokens_decoder, which replaced
both, and there the map goes before tokenizer_config.json.

Tokens that the other files declare are added to those of tokenizer.json, and
their flags go before its flags, as in transformers 5. It gives an added token
the next free id, whatever id is declared; here a declared id must be that one,
because the model was trained with the declared id.
"""

import collections
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import hashlib
import json
import os
from typing import Any
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken

from rlax_llm.config import ConfigError

_MAX_TOKENIZER = 2**28  # bytes of tokenizer.json; Gemma's has 2**25
_MAX_FILE = 2**23  # bytes of any other file
_MAX_VOCABULARY = 2**24
TOKENIZER_FILE = 'tokenizer.json'
_CONFIG_FILE = 'tokenizer_config.json'
_MAP_FILE = 'special_tokens_map.json'
_ADDED_FILE = 'added_tokens.json'
# In the order in which transformers adds those without an id.
_ROLES = (
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
)


class Declared(NamedTuple):
  """What the files beside tokenizer.json say of the tokens."""

  config: dict[str, Any]  # tokenizer_config.json
  source: str  # the file that gives ids
  given: tuple[tuple[int, AddedToken], ...]  # with an id, in its order
  named: dict[str, AddedToken]  # special tokens by role
  extra: tuple[AddedToken, ...]  # special tokens without a role

  @property
  def names(self) -> dict[str, str]:
    """Contents of the special tokens by role."""
    return {role: token.content for role, token in self.named.items()}


def _read(folder: str, name: str, limit: int = _MAX_FILE) -> str | None:
  """Returns a file's text; None: there is no such file."""
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    return None
  try:
    if not os.path.isfile(path):
      raise ConfigError(f'{path!r} is no file; give a folder as published')
    with open(path, 'rb') as file:
      data = file.read(limit + 1)
  except OSError as error:
    raise ConfigError(
      f'{path!r} cannot be read ({error.strerror}); check its permissions'
    ) from error
  if len(data) > limit:
    raise ConfigError(
      f'{path!r} is longer than {limit} bytes; this is not '
      'the file of a tokenizer'
    )
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{path!r} is no UTF-8 at byte {error.start}; download it again'
    ) from error


def _read_object(folder: str, name: str) -> dict[str, Any] | None:
  """Returns a file's JSON object; None: there is no such file."""
  text = _read(folder, name)
  if text is None:
    return None
  path = os.path.join(folder, name)
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise ConfigError(
      f'{path!r} is nested too deeply; this is not the file of a tokenizer'
    ) from error
  except ValueError as error:
    raise ConfigError(
      f'{path!r} is no JSON ({error}); download it again'
    ) from error
  if not isinstance(value, dict):
    raise ConfigError(
      f'{path!r} holds a {type(value).__name__}, no JSON '
      'object; this is not the file of a tokenizer'
    )
  return value


@contextlib.contextmanager
def _library(folder: str, what: str, remedy: str) -> Iterator[None]:
  """Turns whatever the tokenizers library raises into a ConfigError."""
  try:
    yield
  except BaseException as error:
    # The library raises nothing more specific; its panics are no Exception.
    if (
      not isinstance(error, Exception)
      and type(error).__name__ != 'PanicException'
    ):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise ConfigError(
      f'{os.path.join(folder, TOKENIZER_FILE)!r} {what} ({reason}); {remedy}'
    ) from error


def load_backend(folder: str) -> tokenizers.Tokenizer:
  """Returns the tokenizer of tokenizer.json, without limits on the length.

  Raises:
    ConfigError: the file is missing or holds no tokenizer.
  """
  text = _read(folder, TOKENIZER_FILE, _MAX_TOKENIZER)
  if text is None:
    raise ConfigError(
      f'{folder!r} holds no tokenizer.json; give the folder of a model that '
      'is published with one, or convert its tokenizer to this format'
    )
  with _library(
    folder, 'is no tokenizer', 'download it again, or upgrade tokenizers'
  ):
    backend = tokenizers.Tokenizer.from_str(text)
    backend.encode('1')  # a post-processor may name tokens that are not there
  # Files may carry the settings of a training: they would cut and pad prompts.
  backend.no_truncation()
  backend.no_padding()
  ids = backend.get_vocab().values()
  if not ids or max(ids) >= _MAX_VOCABULARY:
    raise ConfigError(
      f'{os.path.join(folder, TOKENIZER_FILE)!r} has '
      f'{len(ids)} tokens, the largest id is '
      f'{max(ids, default=None)}; it must be from 0 to '
      f'{_MAX_VOCABULARY - 1}'
    )
  return backend


def read_declared(folder: str) -> Declared:
  """Returns what the files beside tokenizer.json declare.

  Raises:
    ConfigError: tokenizer_config.json is missing, or a file is unreadable or
      declares what is no token.
  """
  config = _read_object(folder, _CONFIG_FILE)
  if config is None:
    raise ConfigError(
      f'{folder!r} holds no {_CONFIG_FILE}; download it with tokenizer.json'
    )
  modern = 'added_tokens_decoder' in config
  roles = dict(config)
  # additional_special_tokens is the older name.
  lists = [
    config.get('extra_special_tokens')
    or config.get('additional_special_tokens')
  ]
  if not modern:
    mapped = _read_object(folder, _MAP_FILE) or {}
    roles |= mapped
    # The older name is not read here: transformers 5 does not either.
    lists.append(mapped.get('extra_special_tokens'))
  extra: list[Any] = []
  for value in lists:
    if isinstance(value, Mapping):  # further roles
      roles |= value
    elif isinstance(value, list):
      extra += value
    elif value is not None:
      raise ConfigError(
        f'extra_special_tokens of {folder!r} is a '
        f'{type(value).__name__}; it must be a list of tokens'
      )
  named = _named_tokens(folder, roles)
  extras = tuple(
    _token(folder, 'extra_special_tokens', value, isinstance(value, str))
    for value in extra
  )
  if modern:
    where, given = (
      _CONFIG_FILE,
      _decoder(folder, config['added_tokens_decoder']),
    )
  else:
    special = {token.content for token in (*named.values(), *extras)}
    where, given = _ADDED_FILE, _encoder(folder, special)
  given.sort(key=lambda pair: pair[0])
  for name, values in (
    ('id', [i for i, _ in given]),
    ('token', [token.content for _, token in given]),
  ):
    twice = [value for value, n in collections.Counter(values).items() if n > 1]
    if twice:
      raise ConfigError(
        f'{os.path.join(folder, where)!r} has the {name} '
        f'{twice[0]!r} twice; mend the file'
      )
  return Declared(config, where, tuple(given), named, extras)


_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


def _token(folder: str, where: str, value: Any, special: bool) -> AddedToken:
  """Returns a token from its content, or an object with content and flags.

  Args:
    folder: for the error message.
    where: likewise.
    value: the content or the object.
    special: whether the token is special where the object does not say it.

  Raises:
    ConfigError: it is neither.
  """
  fields = {'content': value} if isinstance(value, str) else value
  try:
    flags = {name: fields[name] for name in _FLAGS if name in fields}
    if fields.keys() - flags.keys() - {'content', '__type', 'id'}:
      raise ValueError('another flag')
    return AddedToken(fields['content'], **{'special': special} | flags)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f'{where} of {folder!r} is no token: {str(value)[:80]!r}; give its '
      f'content, or an object of content and the flags {", ".join(_FLAGS)}'
    ) from error


def _named_tokens(
  folder: str, roles: Mapping[str, Any]
) -> dict[str, AddedToken]:
  """Returns the special tokens by role, in the order of transformers."""
  found = {role: roles[role] for role in _ROLES if roles.get(role) is not None}
  # The roles of single models; settings have such names too.
  found |= {
    name: value
    for name, value in roles.items()
    if name.endswith('_token')
    and name not in _ROLES
    and (
      isinstance(value, str)
      or isinstance(value, Mapping)
      and value.get('__type') == 'AddedToken'
    )
  }
  return {
    role: _token(folder, repr(role[:40]), value, True)
    for role, value in found.items()
  }


def _decoder(folder: str, items: Any) -> list[tuple[int, AddedToken]]:
  """Returns the tokens of added_tokens_decoder, with their ids."""
  if not isinstance(items, Mapping):
    raise ConfigError(
      f'added_tokens_decoder of {folder!r} is a {type(items).__name__}; it '
      'must be an object from ids to tokens'
    )
  found = []
  for text, value in items.items():
    where = f'added_tokens_decoder[{text[:40]!r}]'
    i = (
      int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    )
    fields = value if isinstance(value, Mapping) else {}
    found.append(
      (_check_id(folder, where, i), _token(folder, where, fields, False))
    )
  return found


def _encoder(folder: str, special: set[str]) -> list[tuple[int, AddedToken]]:
  """Returns the tokens of added_tokens.json, with their ids.

  Args:
    folder: may hold the file.
    special: contents of the tokens that are special.
  """
  found = []
  for text, i in (_read_object(folder, _ADDED_FILE) or {}).items():
    where = f'{_ADDED_FILE}[{text[:40]!r}]'
    found.append(
      (
        _check_id(folder, where, i),
        _token(folder, where, text, text in special),
      )
    )
  return found


def _check_id(folder: str, where: str, i: Any) -> int:
  """Returns an id, or raises ConfigError."""
  if type(i) is not int or not 0 <= i < _MAX_VOCABULARY:
    raise ConfigError(
      f'{where} of {folder!r} has no id from 0 to '
      f'{_MAX_VOCABULARY - 1}; mend the file'
    )
  return i


def _merge(
  own: Mapping[str, AddedToken], declared: Declared
) -> dict[str, AddedToken]:
  """Returns the tokens to add by content, in order; of known ones the flags.

  Args:
    own: the added tokens of tokenizer.json by content.
    declared: from `read_declared`.
  """
  tokens = {token.content: token for _, token in declared.given}
  if declared.source == _ADDED_FILE:
    tokens |= own  # added_tokens.json gives no flags
  for token in declared.named.values():
    if token.content in tokens or token.content not in own:
      tokens.setdefault(token.content, token).special = True
  for token in declared.extra:
    if token.content not in own:
      tokens.setdefault(token.content, token)
  return tokens


def add_tokens(
  folder: str, backend: tokenizers.Tokenizer, declared: Declared
) -> None:
  """Adds what the other files declare to the tokenizer of tokenizer.json.

  A BOS or EOS that no file gives an id is left out, and `token_id` refuses it:
  a token that the model has never seen neither begins nor ends its texts.

  Args:
    folder: for the error message.
    backend: changed.
    declared: from `read_declared`.

  Raises:
    ConfigError: a declared id is not the one that the token gets.
  """
  own = {t.content: t for t in backend.get_added_tokens_decoder().values()}
  seen = backend.get_vocab().keys() | {t.content for _, t in declared.given}
  unseen = {
    declared.names.get(role) for role in ('bos_token', 'eos_token')
  } - seen
  with _library(
    folder, 'cannot take the tokens of the other files', 'mend those files'
  ):
    backend.add_tokens(
      [
        token
        for content, token in _merge(own, declared).items()
        if content not in unseen
      ]
    )
  for i, token in declared.given:
    got = backend.token_to_id(token.content)
    if got != i:
      raise ConfigError(
        f'{os.path.join(folder, declared.source)!r} gives {token.content!r} '
        f'the id {i}, but with {TOKENIZER_FILE} it has the id {got}; both '
        'files must be of one model, and added ids must follow those of '
        f'{TOKENIZER_FILE} without a gap'
      )


def digest(folder: str) -> str:
  """Returns what tells the token ids of one tokenizer from another's.

  Returns:
    SHA-256 of tokenizer.json, and of the tokens that the other files change.

  Raises:
    ConfigError: as `read_declared`.
  """
  text = _read(folder, TOKENIZER_FILE, _MAX_TOKENIZER) or '{}'
  result = hashlib.sha256(text.encode())
  own = {
    entry['content']: _token(folder, TOKENIZER_FILE, entry, entry['special'])
    for entry in json.loads(text).get('added_tokens') or ()
  }
  declared = read_declared(folder)
  before = {content: token.__getstate__() for content, token in own.items()}
  after = {
    content: token.__getstate__()
    for content, token in _merge(own, declared).items()
  }
  if before | after != before:
    ids = [[i, token.content] for i, token in declared.given]
    result.update(json.dumps([ids, after], sort_keys=True).encode())
  return result.hexdigest()


def token_id(
  folder: str,
  vocabulary: Mapping[str, int],
  names: Mapping[str, str],
  role: str,
) -> int | None:
  """Returns the id of a special token; None: the role is not filled.

  Args:
    folder: for the error message.
    vocabulary: ids by token.
    names: special tokens by role.
    role: bos_token, for instance.

  Raises:
    ConfigError: the vocabulary lacks the token.
  """
  if role not in names:
    return None
  if names[role] not in vocabulary:
    raise ConfigError(
      f'{role} {names[role]!r} of {folder!r} is not in '
      'tokenizer.json, and no other file gives it an id; all '
      'files must be of one model'
    )
  return vocabulary[names[role]]


def eos_ids(
  folder: str, vocabulary: Mapping[str, int], names: Mapping[str, str]
) -> tuple[int, ...]:
  """Returns the ids that end a completion, each once.

  First that of tokenizer_config.json's eos_token, then eos_token_id (one id or
  a list) of generation_config.json, then that of config.json.

  Args:
    folder: holds the files.
    vocabulary: ids by token.
    names: special tokens by role.

  Raises:
    ConfigError: there is none, or one is no id of the tokenizer.
  """
  known = frozenset(vocabulary.values())
  found = [token_id(folder, vocabulary, names, 'eos_token')]
  for name in ('generation_config.json', 'config.json'):
    value = (_read_object(folder, name) or {}).get('eos_token_id')
    for item in value if isinstance(value, list) else [value]:
      if item is not None and (type(item) is not int or item not in known):
        raise ConfigError(
          f'eos_token_id {str(item)[:40]} of {os.path.join(folder, name)!r} '
          'is no id of the tokenizer; mend the file'
        )
      found.append(item)
  ids = tuple(dict.fromkeys(i for i in found if i is not None))
  if not ids:
    raise ConfigError(
      f'{folder!r} names no EOS token: completions would never '
      'end; set eos_token in tokenizer_config.json'
    )
  return ids


def template_source(
  folder: str, config: Mapping[str, Any]
) -> tuple[str, str] | None:
  """Returns (source, file) of the chat template; None: there is none.

  Args:
    folder: may hold chat_template.jinja.
    config: of tokenizer_config.json; its chat_template is a text, or a list of
      named ones, of which 'default' is taken.

  Raises:
    ConfigError: it is none of these.
  """
  path = os.path.join(folder, 'chat_template.jinja')
  text = _read(folder, 'chat_template.jinja')
  if text is not None:
    return text, repr(path)
  path = repr(os.path.join(folder, 'tokenizer_config.json'))
  template = config.get('chat_template')
  if isinstance(template, list):
    named = {
      t['name']: t.get('template')
      for t in template
      if isinstance(t, Mapping) and isinstance(t.get('name'), str)
    }
    if 'default' not in named:
      raise ConfigError(
        f'{path} names the chat templates {sorted(named)}, '
        "none of them 'default'; write the one to use to "
        'chat_template.jinja'
      )
    template = named['default']
  if template is None:
    return None
  if not isinstance(template, str):
    raise ConfigError(
      f'chat_template of {path} is a '
      f'{type(template).__name__}, no text; mend the file'
    )
  return template, path
