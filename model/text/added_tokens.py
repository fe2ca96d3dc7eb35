"""Tokens that tokenizer_config.json declares.

Wherever a text that may hold special tokens spells one of them, it is a single token, also if tokenizer.json, which may
have been pruned or written by another tool, has it as an ordinary word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from isthmus.errors import ConfigError
from isthmus.model.text.chat import TOKENIZER_CONFIG, special_tokens, tokenizer_config

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Attributes of an AddedToken besides its content"""


class Declared(NamedTuple):
    token: AddedToken
    promotes: bool
    """Whether the token becomes special if tokenizer.json has it as an added token that isn't special"""


def declared_tokens(folder: Path) -> list[Declared]:
    """The declared tokens, in the order in which transformers adds them. Raises ConfigError naming a malformed file."""
    config, path = tokenizer_config(folder), folder / TOKENIZER_CONFIG
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(name.isdecimal() for name in decoder):
        raise ConfigError(f"{path}: added_tokens_decoder must be an object from ids to tokens")
    declared = [Declared(_token(decoder[name], path), True) for name in sorted(decoder, key=int)]
    declared += [Declared(_special(name), True) for name in special_tokens(folder).values()]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        found = config.get(field) or []
        values = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(values, list):
            raise ConfigError(f"{path}: {field} must be a list of tokens")
        named = isinstance(found, dict)
        declared += [Declared(_special(_token(value, path).content), named) for value in values]
    return declared


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _token(value: Any, path: Path) -> AddedToken:
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ConfigError(f"{path}: a token must be a string, or an object with its content")
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in FLAGS if type(fields.get(flag)) is bool})
