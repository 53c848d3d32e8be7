"""Files of a published tokenizer: read with limits, checked against each other.

As published: tokenizer.json (the tokenizer itself) and tokenizer_config.json
(the names of its special tokens, the chat template); where present
generation_config.json and config.json (more EOS ids), special_tokens_map.json
(names that tokenizer_config.json leaves out) and chat_template.jinja (goes
before the template of tokenizer_config.json).
"""

import json
import os
from typing import Any, Mapping

import tokenizers

from rlax_llm.config import ConfigError

_MAX_TOKENIZER = 2**28  # bytes of tokenizer.json; Gemma's has 2**25
_MAX_FILE = 2**23  # bytes of any other file
_MAX_VOCABULARY = 2**24


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
    raise ConfigError(f'{path!r} cannot be read ({error.strerror}); check its '
                      'permissions') from error
  if len(data) > limit:
    raise ConfigError(f'{path!r} is longer than {limit} bytes; this is not '
                      'the file of a tokenizer')
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path!r} is no UTF-8 at byte {error.start}; download '
                      'it again') from error


def _read_object(folder: str, name: str) -> dict[str, Any] | None:
  """Returns a file's JSON object; None: there is no such file."""
  text = _read(folder, name)
  if text is None:
    return None
  path = os.path.join(folder, name)
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise ConfigError(f'{path!r} is nested too deeply; this is not the file '
                      'of a tokenizer') from error
  except ValueError as error:
    raise ConfigError(f'{path!r} is no JSON ({error}); download it '
                      'again') from error
  if not isinstance(value, dict):
    raise ConfigError(f'{path!r} holds a {type(value).__name__}, no JSON '
                      'object; download it again')
  return value


def load_backend(folder: str) -> tokenizers.Tokenizer:
  """Returns the tokenizer of tokenizer.json, without limits on the length.

  Raises:
    ConfigError: the file is missing or holds no tokenizer.
  """
  text = _read(folder, 'tokenizer.json', _MAX_TOKENIZER)
  if text is None:
    raise ConfigError(
        f'{folder!r} holds no tokenizer.json; give the folder of a model that '
        'is published with one, or convert its tokenizer to this format')
  try:
    backend = tokenizers.Tokenizer.from_str(text)
    backend.encode('1')  # a post-processor may name tokens that are not there
  except BaseException as error:
    # The library raises nothing more specific; its panics are no Exception.
    if (not isinstance(error, Exception) and
        type(error).__name__ != 'PanicException'):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise ConfigError(f'{os.path.join(folder, "tokenizer.json")!r} is no '
                      f'tokenizer ({reason}); download it again') from error
  # Files may carry the settings of a training: they would cut and pad prompts.
  backend.no_truncation()
  backend.no_padding()
  ids = backend.get_vocab().values()
  if not ids or max(ids) >= _MAX_VOCABULARY:
    raise ConfigError(f'{os.path.join(folder, "tokenizer.json")!r} has '
                      f'{len(ids)} tokens, the largest id is '
                      f'{max(ids, default=None)}; it must be from 0 to '
                      f'{_MAX_VOCABULARY - 1}')
  return backend


def special_tokens(folder: str) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns tokenizer_config.json, and the special tokens by role.

  Raises:
    ConfigError: the file is missing or unreadable.
  """
  config = _read_object(folder, 'tokenizer_config.json')
  if config is None:
    raise ConfigError(f'{folder!r} holds no tokenizer_config.json; download '
                      'it with tokenizer.json')
  roles = {**(_read_object(folder, 'special_tokens_map.json') or {}), **config}
  names = {}
  for role, token in roles.items():
    if isinstance(token, Mapping):
      token = token.get('content')
    if role.endswith('_token') and isinstance(token, str):
      names[role] = token
  return config, names


def token_id(folder: str, vocabulary: Mapping[str, int],
             names: Mapping[str, str], role: str) -> int | None:
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
    raise ConfigError(f'{role} {names[role]!r} of {folder!r} is not in '
                      'tokenizer.json; both files must be of one model')
  return vocabulary[names[role]]


def eos_ids(folder: str, vocabulary: Mapping[str, int],
            names: Mapping[str, str]) -> tuple[int, ...]:
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
            'is no id of the tokenizer; mend the file')
      found.append(item)
  ids = tuple(dict.fromkeys(i for i in found if i is not None))
  if not ids:
    raise ConfigError(f'{folder!r} names no EOS token: completions would never '
                      'end; set eos_token in tokenizer_config.json')
  return ids


def template_source(folder: str,
                    config: Mapping[str, Any]) -> tuple[str, str] | None:
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
      raise ConfigError(f'{path} names the chat templates {sorted(named)}, '
                        "none of them 'default'; write the one to use to "
                        'chat_template.jinja')
    template = named['default']
  if template is None:
    return None
  if not isinstance(template, str):
    raise ConfigError(f'chat_template of {path} is a '
                      f'{type(template).__name__}, no text; mend the file')
  return template, path
