"""What to undo when a signal ends the process (model/process/signals.py): half-written folders, other processes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from isthmus.model.process.signals import cleanups


@contextlib.contextmanager
def cleaning(clean: Callable[[], object]) -> Iterator[None]:
    """Calls clean() if a signal ends the process inside this context. It may run between any two steps of the main
    thread, so it must not wait for a lock."""
    cleanups.append(clean)
    try:
        yield
    finally:
        cleanups.remove(clean)


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Makes a folder, by default among the system's temporary ones, and removes it at the end, also when a signal ends
    the process. Raises OSError when none can be made."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with cleaning(lambda: remove(folder)):
        try:
            yield folder
        finally:
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder as far as possible, also one that other threads are still writing into."""
    import shutil

    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt inside this context, for code that goes on after it. Does nothing outside of
    the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
