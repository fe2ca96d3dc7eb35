"""Folders that keep programs from one start to the next: those compiled by XLA, and the CPU's kernels.

The programs there are run, so nobody else may have put them there. They only save time, so a folder that can't be used
doesn't end the command. The mode and owner of a folder that exists are never changed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_PROBE = bytes(1 << 16)


class CacheError(RuntimeError):
    """A folder can't keep programs; the message says why and what to do."""


def user_cache(name: str) -> Path:
    """The folder for one kind of programs of this user: ~/.cache/isthmus/NAME. Raises CacheError without a home."""
    try:
        return Path("~/.cache/isthmus", name).expanduser()
    except RuntimeError:
        raise CacheError("there is no home folder: set HOME") from None


def check_trusted(folder: Path) -> None:
    """Raises CacheError when another user than root may have put something into an existing folder, or when it isn't a
    folder."""
    try:
        found = folder.stat()
    except OSError as error:
        raise CacheError(f"{folder} can't be looked into: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"{folder} is not a folder")
    if not hasattr(os, "geteuid"):
        return
    why = f"what lies there would be run; name a folder of your own, or remove {folder}"
    if found.st_uid not in (os.geteuid(), 0):
        raise CacheError(f"{folder} belongs to another user (uid {found.st_uid}), and {why}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise CacheError(f"others can write to {folder} (mode {mode}), and {why}, or: chmod go-w {folder}")


def open_cache(folder: Path) -> str | None:
    """Makes the folder, for this user alone, unless it exists. Returns why it can't be written to, or None if it can;
    what is in it can be used in both cases. Raises CacheError when it can't be made or must not be trusted."""
    if not os.path.exists(folder):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{folder} can't be made: {error.strerror}") from None
    check_trusted(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
    except OSError as error:
        return f"{folder} can't be written to: {error.strerror}"
    return None
