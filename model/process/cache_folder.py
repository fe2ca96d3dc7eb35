"""Folders that programs are kept in from one start to the next: compiled by XLA, or the CPU's kernels.

What lies there is run, so nobody else may have put it there; and a user can do without, so a folder that can't be used
costs time, not the command. Nothing of a folder that exists is changed."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_PROBE = bytes(1 << 16)


class CacheError(RuntimeError):
    """A folder that programs can't be kept in; the message says why and what to do."""


def user_cache(name: str) -> Path:
    """Where programs of that kind are kept for one user: ~/.cache/isthmus/name. Raises CacheError without a home."""
    try:
        return Path("~/.cache/isthmus", name).expanduser()
    except RuntimeError:
        raise CacheError("there is no home folder: set HOME") from None


def check_trusted(folder: Path) -> None:
    """Raises CacheError when another user may have put something into an existing folder. Root may."""
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
    """Makes the folder, for this user alone, unless it is there. Returns why nothing can be written to it (None: it
    can); what is in it counts all the same. Raises CacheError where there is none, or one that must not be read."""
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
