"""Reads a published config.json field by field, so that no field that matters is silently ignored."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.process.files import read_json, shortened
from isthmus.model.weights.huggingface import known

_REQUIRED = object()


class Fields:
    """The fields of a JSON object. Every error names the file and the field. null counts as a value, and is an error
    unless the caller says what it stands for."""

    def __init__(
        self,
        values: dict[str, Any],
        path: Path,
        ignore: Collection[str] = (),
        *,
        read: set[str] | None = None,
        warnings: list[str] | None = None,
        inside: str = "",
    ) -> None:
        """ignore: names that are read as if they were absent. A field of an inner object is named like
        "rope_parameters.factor"."""
        self._values = {name: value for name, value in values.items() if inside + name not in ignore}
        self.path, self._ignore, self._inside = path, ignore, inside
        self._read = set() if read is None else read
        self.warnings: list[str] = [] if warnings is None else warnings
        """What the user should be told"""

    @classmethod
    def load(cls, path: Path, ignore: Collection[str] = ()) -> Fields:
        """Reads a file. Raises ConfigError when it doesn't exist or isn't a JSON object."""
        return cls(read_json(path), path, ignore)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def error(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self._inside}{shortened(name)}={self.quoted(name)} {why}")

    def quoted(self, name: str) -> str:
        return shortened(repr(self._values.get(name)))

    def warn(self, text: str) -> None:
        self.warnings.append(f"{self.path}: {text}")

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a field, which counts as read from then on. Raises ConfigError for an absent field
        without default."""
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self.path}: the field {self._inside}{name} is missing")
        return default

    def was_read(self, name: str) -> bool:
        return name in self._read

    def _value(self, name: str, default: Any, null: Any) -> Any:
        value = self.raw(name, default)
        return null if value is None and null is not _REQUIRED else value

    def integer(
        self, name: str, default: Any = _REQUIRED, *, low: int = 1, high: int = (1 << 31) - 1, null: Any = _REQUIRED
    ) -> int:
        """Reads a whole number from `low` to `high`. null: the value that null stands for."""
        value = self._value(name, default, null)
        if type(value) is not int or not low <= value <= high:
            limit = "" if high == (1 << 31) - 1 else f" and at most {high}"
            raise self.error(name, f"must be a whole number, at least {low}{limit}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, null: Any = _REQUIRED) -> float:
        value = self._value(name, default, null)
        if type(value) not in (int, float) or not 0 <= value < float(1 << 1000):
            raise self.error(name, "must be a number that is not negative")
        return float(value)

    def flag(self, name: str, default: bool, *, null: Any = _REQUIRED) -> bool:
        value = self._value(name, default, null)
        if type(value) is not bool:
            raise self.error(name, "must be true or false")
        return value

    def among(self, name: str, allowed: Collection[Any], default: Any = _REQUIRED) -> Any:
        value = self.raw(name, default)
        if not any(value == option and type(value) is type(option) for option in allowed):
            raise self.error(name, f"is not supported here; only {', '.join(map(repr, allowed))}")
        return value

    def integers(self, name: str, default: Any = _REQUIRED, *, null: Any = _REQUIRED) -> tuple[int, ...]:
        value = self._value(name, default, null)
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise self.error(name, "must be a list of whole numbers")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.raw(name)
        if not isinstance(value, list) or not all(type(x) in (int, float) and abs(x) < 1e300 for x in value):
            raise self.error(name, "must be a list of numbers")
        return tuple(map(float, value))

    def agrees(self, name: str, value: Any, meaning: str) -> None:
        """Raises ConfigError where the file gives another value than `value`, which follows from other fields. meaning:
        says in the error what `value` is."""
        if self.raw(name, None) not in (None, value):
            raise self.error(name, f"must be {shortened(repr(value))}, {meaning}, or left out")

    def with_values(self, values: dict[str, Any]) -> Fields:
        """Returns the same fields, with `values` in place of what the file says."""
        return self._like({**self._values, **values})

    def without(self, *names: str) -> Fields:
        """Returns the same fields without `names`, which count as read."""
        self._read.update(names)
        return self._like({name: value for name, value in self._values.items() if name not in names})

    def _like(self, values: dict[str, Any]) -> Fields:
        return Fields(values, self.path, self._ignore, read=self._read, warnings=self.warnings, inside=self._inside)

    def inner(self, name: str) -> Fields:
        """The object in the field `name`; empty where it is absent or null."""
        value = self.raw(name, None)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value or {}, self.path, self._ignore, warnings=self.warnings, inside=f"{self._inside}{name}.")

    def finish(self, model_type: str = "") -> None:
        """Raises ConfigError for a field that was not read and may change what the model computes. Warns of an unknown
        field whose value says that it is off. model_type: the family, for the fields of the file itself."""
        for name, value in self._values.items():
            if name in self._read or (not self._inside and known.is_harmless(model_type, name, value)):
                continue
            if known.is_off(model_type, name, value):
                if value is not None:
                    self.warn(f"{self._inside}{shortened(name)}={self.quoted(name)} is unknown, and has no effect")
                continue
            flag = shortened(f"{self._inside}{name}")
            raise self.error(name, f"is not supported, and may change what the model computes; to go on without it: "
                                   f"ignore_field= (--ignore-field {flag})")  # fmt: skip
