"""How the process ends when it is told to: Ctrl-C, SIGTERM, a terminal that closes. Imports nothing heavy: it must be
in place before anything slow is imported."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_SHOW_CURSOR = b"\x1b[?25h\n"
"""A progress bar that is cut off has hidden it"""

_cleanups: list[Callable[[], object]] = []


def stop_at_once() -> None:
    """From now on STOPPING end the process with status 128 + their number, once what `cleaning` was given is done.

    Nothing is raised: while a module is imported, or in a callback from C++, an exception may be swallowed or shown as
    a crash. A signal that the process was started to ignore, as by nohup, stays ignored. Only the main thread can ask
    for it; elsewhere this does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


@contextlib.contextmanager
def cleaning(clean: Callable[[], object]) -> Iterator[None]:
    """clean() is called when a signal ends the process meanwhile. It runs between any two steps of the main thread, so
    it must not wait for a lock."""
    _cleanups.append(clean)
    try:
        yield
    finally:
        _cleanups.remove(clean)


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder, by default among the system's temporary ones, that is gone afterwards, also when a signal ends the
    process. Raises OSError where none can be made."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with cleaning(lambda: remove(folder)):
        try:
            yield folder
        finally:
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder as far as that goes, also one that other threads are still writing into."""
    import shutil

    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt meanwhile, for who goes on afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _stop(number: int, frame: FrameType | None) -> None:
    for each in STOPPING:  # told again, it doesn't wait for the rest
        signal.signal(each, _end)
    for clean in reversed(_cleanups):
        with contextlib.suppress(Exception):
            clean()
    with contextlib.suppress(Exception):  # who is interrupted while printing can't flush
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"stopped\n")
    _end(number, frame)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
