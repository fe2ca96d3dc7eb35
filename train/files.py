"""The files under the paths that were named, what they hold as bytes and as text, and which of them were left out."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 64 << 20
"""A larger text in a folder is data of another kind (a log, a dump); name it on its own to use it."""

SHOWN = 2
"""Names that a summary gives for each reason."""

_PACKAGES = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


class Unreadable(Exception):
    """A file that holds no document. reason: in a few words, alike for alike files; detail: where to look."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class Reading:
    """What became of everything that lay under the paths."""

    files: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Names by reason; a folder that was left out counts once"""

    def skip(self, name: str, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        """One line: 12 files read, 3 entries skipped: 2 hidden (a/.git, a/.env), 1 binary (a/image.png)"""
        read = f"{self.files} file{'s'[: self.files != 1]} read"
        total = sum(map(len, self.skipped.values()))
        if not total:
            return read
        reasons = []
        for reason, names in sorted(self.skipped.items()):
            more = ", …" if len(names) > SHOWN else ""
            reasons.append(f"{len(names)} {reason} ({', '.join(names[:SHOWN])}{more})")
        return f"{read}, {total} entr{'y' if total == 1 else 'ies'} skipped: {', '.join(reasons)}"


def printable(path: Path) -> str:
    """The path's name; bytes in it that are no UTF-8 are spelt out."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def files_in(folder: Path, reading: Reading) -> list[Path]:
    """The regular files under `folder`, sorted. Hidden ones, links and other people's packages are left out."""
    return sorted(_walk(folder, folder.parent, reading))


def _walk(folder: Path, root: Path, reading: Reading) -> Iterator[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        reading.skip(printable(folder.relative_to(root)), reason_of(error))
        return
    for entry in entries:
        if (reason := _left_out(entry)) is not None:
            reading.skip(printable(entry.relative_to(root)), reason)
        elif entry.is_dir():
            yield from _walk(entry, root, reading)
        else:
            yield entry


def _left_out(entry: Path) -> str | None:
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_symlink():
            return "linked"
        if entry.is_dir():
            return "packages or caches" if entry.name in _PACKAGES else None
        return None if entry.is_file() else "no regular file"
    except OSError as error:
        return reason_of(error)


def described(error: Exception, where: Path | None = None) -> str:
    """In one line; of an error of the system the file, or else `where`, and what it is."""
    if isinstance(error, OSError) and error.strerror:
        name = where if error.filename is None else os.fsdecode(error.filename)
        return error.strerror if name is None else f"{name}: {error.strerror}"
    return str(error)


def reason_of(error: OSError) -> str:
    return f"unreadable: {error.strerror or error}"


def suffix_of(path: Path) -> str:
    """In lower case, without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_file(path: Path) -> BinaryIO:
    """The file's bytes; those of a .gz file decompressed, which never lie in memory together. Raises OSError."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")


DAMAGED = (OSError, EOFError, zlib.error)
"""What reading a file can raise, a compressed one included."""


def damage(error: BaseException) -> str:
    """What one of DAMAGED says of a file, to go on from its name."""
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return reason_of(error)
    return "damaged: its compressed data end early or are wrong"


def read_text(path: Path, most: int | None) -> str:
    """All of a file as text. most: bytes, after decompression; None is any number. Raises Unreadable."""
    try:
        with open_file(path) as file:
            data = file.read(-1 if most is None else most + 1)
    except DAMAGED as error:
        raise Unreadable(damage(error)) from None
    if most is not None and len(data) > most:
        binary = b"\0" in data and not data.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        raise Unreadable("binary" if binary else f"larger than {most >> 20} MiB: name it on its own")
    return decode(data)


def decode(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark; the mark itself is no text. Raises Unreadable."""
    wide = data.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("binary" if b"\0" in data else "not UTF-8 text") from None
    if "\0" in text:
        raise Unreadable("binary")
    if not text:
        raise Unreadable("empty")
    return text


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The file's lines that aren't blank, in UTF-8 if it is text, with their numbers from 1. Raises DAMAGED."""
    with open_file(path) as file:
        if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
            file.seek(0)
            lines: Iterator[bytes] = iter(decode(file.read()).encode().split(b"\n"))
        else:
            file.seek(0)
            lines = iter(file)
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line
