"""Finds the files under named paths, reads them as bytes or text, and records which of them were left out."""

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
"""Most bytes of a text that is found in a folder. A larger one is data of another kind, such as a log or a dump; it is
used if the file itself is named."""

SHOWN = 2
"""How many names a summary gives for each reason"""

_PACKAGES = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


class Unreadable(Exception):
    """A file holds no document. reason: a few words that are the same for similar files; detail: where to look."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class Reading:
    """Counts the files under the paths that were read, and names the entries that were skipped."""

    files: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Names of what was skipped, by reason; a folder counts once"""

    def skip(self, name: str, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        """One line, such as: 12 files read, 3 entries skipped: 2 hidden (a/.git, a/.env), 1 binary (a/image.png)"""
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
    """The path as text; bytes in it that aren't UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def files_in(folder: Path, reading: Reading) -> list[Path]:
    """The regular files under `folder`, sorted, without hidden ones, links, caches and installed packages."""
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
    """The error in one line. For an error of the system, that is the file's name, or else `where`, and the reason."""
    if isinstance(error, OSError) and error.strerror:
        name = where if error.filename is None else os.fsdecode(error.filename)
        return error.strerror if name is None else f"{name}: {error.strerror}"
    return str(error)


def reason_of(error: OSError) -> str:
    return f"unreadable: {error.strerror or error}"


def suffix_of(path: Path) -> str:
    """The last suffix in lower case; .gz doesn't count."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_file(path: Path) -> BinaryIO:
    """Opens a file for its bytes. A .gz file is decompressed while it is read. Raises OSError."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")


DAMAGED = (OSError, EOFError, zlib.error)
"""Errors that reading a file can raise, whether or not it is compressed"""


def damage(error: BaseException) -> str:
    """What an error of DAMAGED says about a file, to be put after the file's name."""
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return reason_of(error)
    return "damaged: its compressed data end early or are wrong"


def read_text(path: Path, most: int | None) -> str:
    """The content of a file as text. most: the most bytes after decompression; None means any number. Raises
    Unreadable."""
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
    """The text in `data`, which is UTF-8, or UTF-16 with a byte order mark. The mark is left out. Raises Unreadable."""
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
    """The file's lines that aren't blank, with their numbers from 1; those in UTF-16 are turned into UTF-8. Raises the
    errors of DAMAGED, and Unreadable for UTF-16 that is wrong."""
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
