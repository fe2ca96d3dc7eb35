"""What a benchmark is: its name and settings, how it runs, and how its result is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from isthmus.benchmarks.figures import machine_line, paragraphs
from isthmus.benchmarks.record import Record
from isthmus.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Qualities = dict[str, dict[str, float]]
"""KL divergence by model and stack, in nats per token, as `isthmus bench quality` measured it"""

Tick = Callable[[], None]
"""A function to call once for each part of the work that is done"""


@dataclass(frozen=True)
class Bench:
    """Settings that every benchmark has. The command line is generated from its subclasses."""

    out: Path | None = None
    """Folder of the results, PLATFORM-KIND-SUBJECT.json; by default benchmarks/results if it exists, else
    bench-results"""

    def validate(self) -> None:
        """Raises ConfigError for a setting that can't be used, and names the field."""

    def check_least(self, **least: int) -> None:
        """Raises ConfigError for the first of these fields that is less than the number given for it."""
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {bound}")

    def check_positive(self, *names: str) -> None:
        """Raises ConfigError for the first of these fields that isn't above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name):g} must be above 0")


B = TypeVar("B", bound=Bench)


@dataclass(frozen=True)
class Case(Generic[B]):
    """One benchmark: `isthmus bench NAME`, and a section of the report."""

    name: str
    title: str
    """The heading of its results in the report"""
    bench: type[B]
    run: Callable[[B, Console], Record]
    """Measures with settings that `validate` has passed, and returns the record. Raises ConfigError for what only the
    work finds out, and BenchError"""
    show: Callable[[Record, Qualities], str]
    """Returns the result in Markdown. The second argument is {} where no qualities were measured"""
    plot: Callable[[Record], Figure | None] | None = None
    notes: Callable[[Record], str] = lambda record: ""
    """Returns more Markdown, which is shown on the terminal after a run, but not in the report"""

    def section(self, record: Record, qualities: Qualities) -> str:
        """The result and the machine that it was measured on, in Markdown."""
        return paragraphs(self.show(record, qualities), machine_line(record))


@contextlib.contextmanager
def progress_bar(console: Console, text: str, total: int) -> Iterator[Tick]:
    """Yields a function to call once for each of `total` parts done. Shows progress; without a terminal, only at the
    end."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
    if not console.is_terminal:
        console.print(f"{text}: {total} done", highlight=False)
