"""What a text must be: JSON of some schema, what an expression matches, a grammar, or one of some texts.

A form is added as a class to ResponseFormat, and as a keyword to FormatOptions.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, runtime_checkable

from isthmus.errors import InvalidRequest


@runtime_checkable
class SchemaClass(Protocol):
    """A class that knows its JSON schema, as pydantic's models do."""

    def model_json_schema(self) -> Mapping[str, object]: ...


Schema = str | Mapping[str, object] | SchemaClass
"""A JSON schema: its text, a mapping whose order of keys is the order in the text that is written, or a class with
`model_json_schema`, such as a pydantic model"""


@dataclass(frozen=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True)
class JsonSchema:
    """JSON that a schema allows. The properties of an object come in the order in which the schema lists them."""

    schema: Schema

    def text(self) -> str:
        """The schema as JSON. Raises InvalidRequest for what isn't a schema."""
        given = self.schema
        try:
            if isinstance(given, SchemaClass):
                given = given.model_json_schema()
            if isinstance(given, Mapping):
                given = json_text.dumps(dict(given), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest("schema", f"can't be written as JSON: {error}") from None
        if not isinstance(given, str):
            kinds = "a dict, JSON text or a class with model_json_schema"
            raise InvalidRequest("schema", f"must be {kinds}, not {type(given).__name__}")
        return check_string("schema", given)


@dataclass(frozen=True)
class Regex:
    """A text that a regular expression matches as a whole, in the syntax of Rust's regex crate."""

    pattern: str


@dataclass(frozen=True)
class Grammar:
    """A text of a context-free grammar, in llguidance's variant of Lark."""

    lark: str


@dataclass(frozen=True)
class Choices:
    """One of some texts."""

    texts: Sequence[str]


ResponseFormat = JsonObject | JsonSchema | Regex | Grammar | Choices


class FormatOptions(TypedDict, total=False):
    """The forms of a text as keywords of a call, of which it may have one."""

    json: bool
    """Any JSON object"""
    schema: Schema
    regex: str
    grammar: str
    choices: Sequence[str]


def response_format(options: FormatOptions) -> ResponseFormat | None:
    """The form that keywords ask for; None for json=False. Raises InvalidRequest if there are several."""
    if len(options) > 1:
        raise InvalidRequest(sorted(options)[1], f"can't be combined with {sorted(options)[0]}: a text has one form")
    match options:
        case {"json": wanted}:
            if not isinstance(wanted, bool):
                raise InvalidRequest("json", "must be True or False; a schema is given as schema=")
            return JsonObject() if wanted else None
        case {"schema": schema}:
            return JsonSchema(schema)
        case {"regex": pattern}:
            return Regex(pattern)
        case {"grammar": lark}:
            return Grammar(lark)
    return Choices(options["choices"])


def check_choices(texts: Sequence[str]) -> list[str]:
    """The texts of which one is to be written. Raises InvalidRequest for what is no sequence of strings."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise InvalidRequest("choices", f"must be a list of texts, not {type(texts).__name__}")
    return [check_string(f"choices[{index}]", text) for index, text in enumerate(texts)]


def check_string(field: str, text: str) -> str:
    """The text. Raises InvalidRequest for what is no string, and for one that UTF-8 can't hold."""
    if not isinstance(text, str):
        raise InvalidRequest(field, f"must be a string, not {type(text).__name__}")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            field, f"has U+{ord(text[error.start]):04X} at {error.start}, half of a surrogate pair, which is no text"
        ) from None
    return text
