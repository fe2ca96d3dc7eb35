"""From paths to documents. What a file holds is told by its suffix, whether it was named or found in a folder: .jsonl
or .ndjson a document a line, .json a document or an array of them, all else a text; each also gzipped (.gz)."""

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
    """Where it came from, for messages"""
    text: str
    """Of a conversation: its JSON object, with "messages" and perhaps "tools\""""
    kind: Literal["text", "messages"] = "text"
    tail: bool = False
    """The held-out end of a text whose beginning is trained on"""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of what it is: where it came from has no part in it."""
        digest = hashlib.sha256(f"{self.kind}:".encode())
        digest.update(self.text.encode())
        return digest.digest()

    @cached_property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


def read_documents(paths: Sequence[str], reading: Reading | None = None, setting: str = "data") -> Iterator[Document]:
    """Every non-empty document under `paths`, in an order that depends on names only.

    setting: what gave the paths, for errors.
    reading: told of each file that was read or left out. Raises ConfigError for a path that was named and can't be
    read, and for a file of documents one of which isn't.
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
    """Raises Unreadable before the first document where there is none, ConfigError for what is wrong after it. most:
    bytes of a text."""
    suffix = suffix_of(path)
    if suffix in LINES:
        yield from _checked(_lines(path), f"{name}:{{}}")
    elif suffix == ".json":
        yield from _json(path, name)
    else:
        yield Document(name, read_text(path, most))


def _json(path: Path, name: str) -> Iterator[Document]:
    """An object, an array of them, or what many publish under this suffix: one a line."""
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
    """The values that the file's lines hold, each with its line's number; ValueError for what is none."""
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
    """The documents that (place, value) are; `name` has a place for the place."""
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
    """A JSON value's document. Raises ValueError saying what is wrong with it."""
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
    except UnicodeEncodeError:  # an escaped half of a surrogate pair is JSON, and no text
        raise ValueError("holds half of a surrogate pair, which is no text") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError('has no list of messages in "messages"')
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is not an object")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f'messages[{index}] has no string in "role"')
        # A call of a tool says nothing beside it.
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f'messages[{index}] has no string in "content"')
