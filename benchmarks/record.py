"""Results on disk: a JSON file for each platform, benchmark and subject, with all that is needed to repeat it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.benchmarks.machine import Machine
from isthmus.errors import ConfigError

FORMAT = 1
"""The files' format; files of another one are refused"""


@dataclass(frozen=True)
class Record:
    """A finished benchmark."""

    kind: str
    """The benchmark's name: step, serve, features, quality, peers, peer-servers, train or weights"""
    subject: str
    """What was measured: the preset or the model folder's name"""
    machine: Machine
    config: dict[str, Any]
    """The settings that it was run with"""
    figures: dict[str, Any]
    """The results; times in seconds, sizes in bytes, rates per second"""

    @property
    def stem(self) -> str:
        """PLATFORM-KIND-SUBJECT, the name of its file: a later record of the same name replaces an earlier one."""
        return f"{self.machine.platform}-{self.kind}-{self.subject}"

    def save(self, folder: Path) -> Path:
        """Writes FOLDER/STEM.json, and makes the folder if needed. NaN and infinity become null."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stem}.json"
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        path.write_text(json.dumps(finite(fields), indent=1, default=str) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Record:
        """Raises ConfigError when the file is not a record of this format."""
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ConfigError(f"{path} has another format than {FORMAT}: run the benchmark again")
            return cls(**{**fields, "machine": Machine(**fields["machine"])})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a benchmark's result: {error}") from None

    def predecessor(self, folder: Path) -> Record | None:
        """The record whose file in `folder` this one would replace, if there is one."""
        path = folder / f"{self.stem}.json"
        return Record.load(path) if path.is_file() else None

    def with_figures(self, **changes: Any) -> Record:
        """The same record with other figures under these names."""
        return dataclasses.replace(self, figures={**self.figures, **changes})


def results_folder(out: Path | None) -> Path:
    """`out`, else ./benchmarks/results where there is one, else ./bench-results."""
    if out is not None:
        return out
    house = Path("benchmarks/results")
    return house if house.is_dir() else Path("bench-results")


def load_all(folder: Path) -> list[Record]:
    """Every record in `folder`, by name. Raises ConfigError if there is none, or one can't be read or has a wrong
    name."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ConfigError(f"{folder} holds no results: run `isthmus bench step` first")
    records = [Record.load(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if path.stem != record.stem:  # its plot would replace that of the record with this name
            raise ConfigError(f"{path} holds {record.stem}: rename the file, or change the subject in it")
    return records


def finite(value: Any) -> Any:
    """`value` with every float that JSON can't hold as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
