"""From paths to documents: text files, folders of them, JSONL of texts and of conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import ConfigError

MAX_FILE_BYTES = 64 << 20
"""A larger text file in a folder is data of another kind; name it on its own to use it."""

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    name: str
    """Stable: it decides the split"""
    text: str
    """Of a conversation: its JSON object, with "messages" and perhaps "tools\""""
    kind: Literal["text", "messages"] = "text"


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """Every non-empty document under `paths`, in an order that depends on names only.

    Raises ConfigError for a path that doesn't exist, or a .jsonl line that holds neither a text nor messages.
    """
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(_files(path)):
                if (text := _read_text(file)) is not None:
                    yield Document(str(file.relative_to(path.parent)), text)
        elif not path.is_file():
            raise ConfigError(f"data: {path} does not exist")
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        else:
            text = _read_text(path)
            if text is None:
                raise ConfigError(f"data: {path} is empty or is not UTF-8 text")
            yield Document(path.name, text)


def _files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _files(entry)
        elif entry.is_file() and entry.stat().st_size <= MAX_FILE_BYTES:
            yield entry


def _read_text(path: Path) -> str | None:
    data = path.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8") or None
    except UnicodeDecodeError:
        return None


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                kind, text = _parse_line(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"data: {path}:{number} {error}") from None
            if text:
                yield Document(f"{path.name}:{number}", text, kind)


def _parse_line(line: bytes) -> tuple[Literal["text", "messages"], str]:
    """A JSONL line's document. Raises ValueError saying what is wrong with it."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except ValueError:
        raise ValueError("is not a UTF-8 JSON object") from None
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


def is_heldout(name: str, fraction: float) -> bool:
    """Whether a document is kept out of training: decided by its name alone, so that adding data moves none."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64
