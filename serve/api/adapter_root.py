"""Where clients may load adapters from: the folders inside one that the operator has named, and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from isthmus.adapters import check_path
from isthmus.errors import ConfigError, InvalidRequest, ModelNotFound

MAX_PATH = 1024
"""Most characters of a path"""
MAX_ENTRIES = 1024
"""Most entries of an adapter's folder"""


class AdapterRoot:
    """A folder with adapters' folders in it."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if it isn't a folder."""
        try:
            self._root = folder.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"adapter_root={folder} must be a folder: {error}") from None
        if not self._root.is_dir():
            raise ConfigError(f"adapter_root={folder} must be a folder")

    def folder(self, path: str) -> Path:
        """The folder at a path that a client has sent, which is relative to the root.

        Raises InvalidRequest for a path that could lead out of the root, and for a folder with anything but plain files
        and folders of the root in it; ModelNotFound if there is no such folder, also where links lead out of the root,
        so that nobody learns what is there.
        """
        asked = PurePosixPath(check_path(path))
        if len(path) > MAX_PATH or not path.isprintable():
            raise InvalidRequest("path", f"must be at most {MAX_PATH} printable characters")
        if asked.is_absolute() or ".." in asked.parts or not asked.parts:
            raise InvalidRequest("path", "must be relative to the server's --adapter-root, and inside of it")
        found = self._inside(self._root / asked)
        if found is None or not found.is_dir():
            raise ModelNotFound("path", f"there is no folder {path!r:.160} in the server's --adapter-root")
        try:
            self._check_entries(found)
        except OSError as error:
            raise InvalidRequest("path", f"{path!r:.160} can't be read: {error.strerror}") from None
        return found

    def told(self, message: str) -> str:
        """A message without the root's own path."""
        return message.replace(f"{self._root}{os.sep}", "")

    def _check_entries(self, folder: Path) -> None:
        """What is read of a folder must not be a link to elsewhere, nor a pipe, at which reading would never end."""
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                real = self._inside(Path(entry.path))
                plain = real is not None and (stat.S_ISREG(mode := real.stat().st_mode) or stat.S_ISDIR(mode))
                if not plain or count >= MAX_ENTRIES:
                    raise InvalidRequest(
                        "path", f"must hold at most {MAX_ENTRIES} plain files and folders, and no links out of the root"
                    )

    def _inside(self, path: Path) -> Path | None:
        """The path without links; None where it leads out of the root, or nowhere."""
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: links that lead in a circle
            return None
        return real if real.is_relative_to(self._root) and real != self._root else None
