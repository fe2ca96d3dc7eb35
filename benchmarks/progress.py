"""What the benchmarks show while they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(console: Console, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call once for each of `total` parts done; a line at the end where there is no terminal."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
    if not console.is_terminal:
        console.print(f"{text}: {total} done", highlight=False)
