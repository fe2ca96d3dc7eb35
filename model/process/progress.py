"""Shows the progress of long work: in a moving display on a terminal, elsewhere in a line from time to time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Time between two lines where there is no terminal"""


class Display(Console):
    """A console for what accompanies the work, which goes on when nobody reads that any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Shows `text`, and yields a function that shows another text, which may be called from any thread."""
    if console.is_terminal:
        with console.status(text) as status:
            yield status.update
        return
    now = text

    def update(text: str) -> None:
        nonlocal now
        now = text

    with _lines(console, lambda: now):
        yield update


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Stages]:
    """Yields the Stages to which work reports how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        shown = Stages(bars)
        with contextlib.nullcontext() if console.is_terminal else _lines(console, lambda: shown.now):
            yield shown


@dataclass
class Stages:
    """The stages of some work, which follow each other and are shown one below the other."""

    bars: Progress
    now: str = ""
    """The stage that reported last, and how far it is"""

    def begin(self, name: str, total: float | None, unit: str = "GB") -> Stage:
        """Begins a stage. total: its amount in `unit`, or in bytes if that is GB; None means that it isn't known."""
        stage = Stage(self, self.bars.add_task(name, total=total), name, total, unit)
        stage.advance(0)
        return stage

    def say(self, text: str) -> None:
        """Begins a stage that doesn't report how far it is."""
        self.bars.add_task(text, total=None)
        self.now = text


@dataclass
class Stage:
    stages: Stages
    task: TaskID
    name: str
    total: float | None
    unit: str
    done: float = 0

    def advance(self, more: float = 1) -> None:
        self.done += more
        self._show()

    def finish(self) -> None:
        """Marks the stage as done, also if it didn't count everything or didn't know its total."""
        self.done = self.total = self.total or self.done
        self._show()

    def text(self) -> str:
        scale, digits = (1e9, 2) if self.unit == "GB" else (1, 0)
        of = "" if self.total is None else f" of {self.total / scale:.{digits}f}"
        return f"{self.name}: {self.done / scale:.{digits}f}{of} {self.unit}"

    def _show(self) -> None:
        self.stages.now = self.text()
        self.stages.bars.update(self.task, completed=self.done, total=self.total, description=self.text())


@contextlib.contextmanager
def _lines(console: Console, now: Callable[[], str]) -> Iterator[None]:
    """Prints now() every LINE_SECONDS inside this context."""
    done = threading.Event()
    start = time.monotonic()

    def show() -> None:
        while not done.wait(LINE_SECONDS):
            console.print(f"{now()} ({time.monotonic() - start:.0f} s)", highlight=False, markup=False)

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
