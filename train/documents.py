"""Makes documents from the files under paths. A file's suffix says what it holds, whether it was named or found in a
folder: .jsonl and .ndjson one document per line, .json a document or an array of them, any other suffix one text. Each
may also be gzipped (.gz)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from isthmus.errors import ConfigError
from isthmus.train.files import (
    DAMAGED,
    MAX_TEXT_BYTES,
    Reading,
    Unreadable,
    damage,
    files_in,
    lines_of,
    printable,
    read_text,
    suffix_of,
)

LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    name: str
    """Where the document came from, for error messages"""
    text: str
    """The text; for a conversation, its JSON object with "messages" and perhaps "tools\""""
    kind: Literal["text", "messages"] = "text"
    tail: bool = False
    """Whether it is the held-out end of a text whose beginning is trained on"""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the document's kind and text, but not of its name."""
        digest = hashlib.sha256(f"{self.kind}:".encode())
        digest.update(self.text.encode())
        return digest.digest()

    @cached_property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


def read_documents(paths: Sequence[str], reading: Reading | None = None, setting: str = "data") -> Iterator[Document]:
    """Every non-empty document under `paths`, in an order that depends on names only.

    reading: records each file that was read or left out. setting: the setting that gave the paths, for errors. Raises
    ConfigError for a named path that can't be read, and for a file of documents of which one is invalid.
    """
    reading = reading or Reading()
    for path in map(Path, paths):
        if path.is_dir():
            for file in files_in(path, reading):
                name = printable(file.relative_to(path.parent))
                try:
                    yield from _counted(_documents(file, name, MAX_TEXT_BYTES), reading)
                except Unreadable as reason:
                    reading.skip(name, reason.reason)
        elif not path.exists():
            raise ConfigError(f"{setting}: {printable(path)} does not exist")
        elif not path.is_file():
            raise ConfigError(f"{setting}: {printable(path)} is neither a file nor a folder")
        else:
            try:
                yield from _counted(_documents(path, printable(path), None), reading)
            except Unreadable as reason:
                raise ConfigError(f"{setting}: {printable(path)}: {reason}") from None


def _counted(documents: Iterator[Document], reading: Reading) -> Iterator[Document]:
    yield from documents
    reading.files += 1


def _documents(path: Path, name: str, most: int | None) -> Iterator[Document]:
    """The documents of one file. Raises Unreadable if there is no first document, and ConfigError for an error after
    it. most: the most bytes that a text may have."""
    suffix = suffix_of(path)
    if suffix in LINES:
        yield from _checked(_lines(path), f"{name}:{{}}")
    elif suffix == ".json":
        yield from _json(path, name)
    else:
        yield Document(name, read_text(path, most))


def _json(path: Path, name: str) -> Iterator[Document]:
    """The documents of a .json file: an object, an array of objects or, as many publish it, one object per line."""
    try:
        value = json.loads(read_text(path, None))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise Unreadable("not JSON", str(error)) from None
        yield from _checked(_lines(path), f"{name}:{{}}")
        return
    except (ValueError, RecursionError) as error:
        raise Unreadable("not JSON", str(error)) from None
    if isinstance(value, list):
        yield from _checked(enumerate(value), f"{name}[{{}}]")
    else:
        yield from _checked([("", value)], f"{name}{{}}")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line of the file. The value is a ValueError if the line isn't JSON."""
    number = 0
    try:
        for number, line in lines_of(path):
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                yield number, ValueError("is not a UTF-8 JSON object")
    except DAMAGED as error:
        if not number:
            raise Unreadable(damage(error)) from None
        yield number + 1, ValueError(damage(error))


def _checked(values: Iterable[tuple[int | str, Any]], name: str) -> Iterator[Document]:
    """The documents in (place, value) pairs; formatting `name` with the place gives the document's name."""
    good = 0
    for place, value in values:
        where = name.format(place)
        try:
            if isinstance(value, ValueError):
                raise value
            kind, text = _parse(value)
        except ValueError as error:
            if not good:
                raise Unreadable("no documents", f"{where} {error}") from None
            raise ConfigError(f"data: {where} {error}") from None
        good += 1
        if text:
            yield Document(where, text, kind)
    if not good:
        raise Unreadable("empty")


def _parse(fields: Any) -> tuple[Literal["text", "messages"], str]:
    """The kind and the text of the document in a JSON value. Raises ValueError saying what is wrong with the value."""
    if not isinstance(fields, dict) or not fields.keys() & {"text", "messages"}:
        raise ValueError('is not an object with a string in "text" or a list in "messages"')
    if "messages" not in fields:
        text = fields["text"]
        if not isinstance(text, str):
            raise ValueError('has no string in "text"')
        _check_encodes(text)
        return "text", text
    if "text" in fields:
        raise ValueError('holds both "text" and "messages": which one is the document?')
    _check_messages(fields["messages"])
    conversation = {name: fields[name] for name in ("messages", "tools") if fields.get(name) is not None}
    text = json.dumps(conversation, ensure_ascii=False)
    _check_encodes(text)
    return "messages", text


def _check_encodes(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON allows an escaped half of a surrogate pair
        raise ValueError("holds half of a surrogate pair, which is no text") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError('has no list of messages in "messages"')
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is not an object")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f'messages[{index}] has no string in "role"')
        # A message that calls a tool may have no content.
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f'messages[{index}] has no string in "content"')
