"""Reads a GGUF file's metadata key by key, so that no key that changes what the model computes is ignored."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.process.files import shortened

_REQUIRED = object()


class Metadata:
    """The metadata of a GGUF file. Every error names the file and the key."""

    def __init__(self, values: dict[str, Any], path: Path, ignore: Collection[str] = ()) -> None:
        """ignore: keys that are read as if they were absent."""
        self._values = {name: value for name, value in values.items() if name not in ignore}
        self.path = path
        self._read: set[str] = set()
        self.architecture = self.text("general.architecture")

    def error(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {shortened(name)}={shortened(repr(self._values.get(name)))} {why}")

    def own(self, name: str) -> str:
        """The full name of one of the architecture's own keys, which begin with the architecture's name."""
        return f"{self.architecture}.{name}"

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self.path}: {name} is missing from its metadata")
        return default

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """Reads a whole number from 0 to 2^31 - 1. A list that holds the same number for every layer counts as that
        number."""
        value = self.raw(name, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if (value != value[0]).any():
                raise self.error(name, "differs from layer to layer, which is not supported")
            value = value[0].item()
        if value is not default and (type(value) is not int or not 0 <= value < 1 << 31):
            raise self.error(name, "must be a whole number that is not negative")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.raw(name, default)
        if value is not default and (type(value) not in (int, float) or not abs(value) < 1e30):
            raise self.error(name, "must be a number")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.raw(name, default)
        if value is not default and not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def texts(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.raw(name, default)
        if value is not default and not isinstance(value, list):
            raise self.error(name, "must be a list of strings")
        return value

    def numbers(self, name: str, count: int) -> np.ndarray | None:
        """Reads a list of `count` numbers; None where the key is absent."""
        value = self.raw(name, None)
        if value is not None and (not isinstance(value, np.ndarray) or len(value) != count):
            raise self.error(name, f"must be a list of {count} numbers")
        return value

    def finish(self, harmless: Collection[str]) -> None:
        """Raises ConfigError for one of the architecture's own keys that was not read and isn't zero, false or empty.
        harmless: keys without effect, without the architecture's name."""
        prefix = f"{self.architecture}."
        for name, value in self._values.items():
            own = name.removeprefix(prefix)
            if own == name or name in self._read or own in harmless or not _on(value):
                continue
            raise self.error(name, "is not supported, and may change what the model computes; to go on without it: "
                                   f"ignore_field= (--ignore-field {shortened(name)})")  # fmt: skip


def _on(value: Any) -> bool:
    """Whether a value isn't zero, false or empty. A list holds strings, and numpy would make each as long as the
    longest."""
    return any(value) if isinstance(value, list) else bool(np.any(value))
