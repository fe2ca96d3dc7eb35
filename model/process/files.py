"""Reading the small files of a model folder, and writing files and folders whole or not at all.

A model folder may come from a stranger, so only regular files are read, and only up to a limit.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from isthmus.errors import ConfigError
from isthmus.model.process.cleaning import temporary_folder

MAX_SETTINGS_BYTES = 16 << 20
"""Limit for a file of settings: config.json, generation_config.json, tokenizer_config.json and their like"""
MAX_TOKENIZER_BYTES = 256 << 20
"""Limit for tokenizer.json"""
MAX_INDEX_BYTES = 256 << 20
"""Limit for the index of a model's safetensors files"""

_POINTER = b"version https://git-lfs.github.com/spec/"
_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def present(path: Path) -> bool:
    """Whether anything has this name, including what can't be read as a file and a link that leads nowhere."""
    return os.path.lexists(path)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all, and replaces an existing one. write(place) fills a temporary file, which then
    takes the name `path`. Its mode is that of any new file, whatever `write` gave it. Raises OSError, and what `write`
    raises."""
    part = path.with_name(f"{path.name}.part")
    part.touch()
    mode = part.stat().st_mode
    write(part)
    part.chmod(mode)  # safetensors makes files that only their owner may read
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all. Raises OSError."""
    replace_file(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Yields a temporary path to write a folder or a file to, which takes the name `target` at the end. It is removed
    if writing fails or a signal ends the process. No two processes get the same temporary path.

    Raises ConfigError when nothing can be made there, or the name is taken, now or at the end.
    """
    if target.exists():
        raise ConfigError(f"target: {target} exists already")
    with ExitStack() as stack:
        try:
            if not target.parent.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
            made = stack.enter_context(temporary_folder(f"{target.name}.partial-", target.parent)) / target.name
        except OSError as error:
            raise ConfigError(f"target: {target} can't be made: {error.strerror or error}") from None
        yield made
        if target.exists():
            raise ConfigError(f"target: {target} was made by somebody else meanwhile")
        made.rename(target)


def check_file(path: Path) -> None:
    """Raises ConfigError when the path is missing, isn't a regular file, or is a Git LFS pointer in place of a large
    file. Nothing but a regular file is opened, so this can't hang."""
    with _opened(path):
        pass


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ConfigError for a larger one, and as check_file
    does."""
    with _opened(path) as file:
        data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if data is None or len(data) > limit:
        raise ConfigError(f"{path} has more than {limit >> 20} MiB, the most that such a file may have")
    return data


def read_text(path: Path, limit: int = MAX_SETTINGS_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises ConfigError for any other, and as check_file does."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} can't be read as UTF-8: {error}") from None


def read_json(path: Path, limit: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError when it holds anything else, and as read_text does."""
    text = read_text(path, limit)
    try:
        values = json.loads(text)
        if _HALF_A_CHARACTER.search(text):
            json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair isn't text and can't be printed
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as JSON: {shortened(str(error))}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return values


def read_json_if_present(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one when there is no such file. Raises ConfigError as read_json does."""
    return read_json(path) if present(path) else {}


def shortened(text: str, limit: int = 200) -> str:
    """The first `limit` characters of `text`, made printable, for an error that quotes what somebody else wrote."""
    start = text[:limit].encode("utf-8", "backslashreplace").decode()
    return start if len(text) <= limit else f"{start}…"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        _check_kind(path, os.stat(path))
        # Since that check it may have become a pipe. Without O_NONBLOCK, opening one would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check_kind(path, os.fstat(file.fileno()))
            if os.pread(file.fileno(), len(_POINTER), 0) == _POINTER:
                raise ConfigError(
                    f"{path} is a Git LFS pointer instead of the file: run `git lfs pull` in {path.parent}, "
                    "or download the file itself"
                )
            yield file
    except FileNotFoundError:
        link = f" is a link to {os.readlink(path)}, which" if path.is_symlink() else ""
        raise ConfigError(f"{path}{link} does not exist") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shortened(str(path))} can't be read: {shortened(str(error))}") from None


def _check_kind(path: Path, found: os.stat_result) -> None:
    if kind := _KINDS.get(stat.S_IFMT(found.st_mode)):
        raise ConfigError(f"{path} is {kind}, not a file")
