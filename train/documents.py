"""From paths to documents: text files, folders of them, JSONL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.config import ConfigError

MAX_FILE_BYTES = 64 << 20
"""A larger text file in a folder is data of another kind; name it on its own to use it."""

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    name: str
    """Stable: it decides the split"""
    text: str


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """Every non-empty document under `paths`, in an order that depends on names only.

    Raises ConfigError for a path that doesn't exist, or a .jsonl line without a string in "text".
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
                text = json.loads(line.decode("utf-8"))["text"]
                text.encode("utf-8")  # an escaped half of a surrogate pair is JSON, and no text
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f'data: {path}:{number} is not a UTF-8 JSON object with a string in "text"') from None
            if text:
                yield Document(f"{path.name}:{number}", text)


def is_heldout(name: str, fraction: float) -> bool:
    """Whether a document is kept out of training: decided by its name alone, so that adding data moves none."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64
