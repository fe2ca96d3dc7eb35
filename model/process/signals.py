"""How the process ends when it is told to: Ctrl-C, SIGTERM, a terminal that closes. Imports next to nothing: it must be
in place before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_SHOW_CURSOR = b"\x1b[?25h\n"
"""A progress bar that is cut off has hidden it"""

cleanups: list = []
"""Functions to call first, the last one first; model/process/cleaning.py keeps them"""


def stop_at_once() -> None:
    """From now on STOPPING end the process with status 128 + their number, once what `cleaning` was given is done.

    Nothing is raised: while a module is imported, or in a callback from C++, an exception may be swallowed or shown as
    a crash. A signal that the process was started to ignore, as by nohup, stays ignored. Only the main thread can ask
    for it; elsewhere this does nothing.
    """
    try:
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
    except ValueError:  # in another thread
        return


def end_at_once(status: int) -> NoReturn:
    """Ends the process with a status, whatever its other threads do, once what `cleaning` was given is done."""
    _do(*reversed(cleanups), sys.stdout.flush)
    os._exit(status)


def _stop(number: int, frame: object) -> None:
    for each in STOPPING:  # told again, it doesn't wait for the rest
        signal.signal(each, _end)
    _do(*reversed(cleanups), sys.stdout.flush, _say)  # who is interrupted while printing can't flush
    _end(number, frame)


def _do(*works: Callable[[], object]) -> None:
    for work in works:
        try:
            work()
        except Exception:  # it ends all the same
            continue


def _say() -> None:
    os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"stopped\n")


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)
