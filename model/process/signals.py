"""How the process ends on Ctrl-C, on SIGTERM, or when its terminal closes. Imports next to nothing, because it must be
in place before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_SHOW_CURSOR = b"\x1b[?25h\n"
"""A progress bar hides the cursor, and if it is cut off doesn't show it again"""

cleanups: list = []
"""Functions to call before the process ends, in reverse order; model/process/cleaning.py keeps the list"""


def stop_at_once() -> None:
    """From now on each signal of STOPPING calls `cleanups` and ends the process with the status 128 + its number.

    Nothing is raised: while a module is imported, or in a callback from C++, an exception may be swallowed or shown as
    a crash. A signal that was ignored when the process started, as under nohup, stays ignored. Outside of the main
    thread this does nothing.
    """
    try:
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
    except ValueError:  # in another thread
        return


def end_at_once(status: int) -> NoReturn:
    """Calls `cleanups` and ends the process with `status`, whatever its other threads do."""
    _do(*reversed(cleanups), sys.stdout.flush)
    os._exit(status)


def _stop(number: int, frame: object) -> None:
    for each in STOPPING:  # a second signal ends the process without waiting for the rest
        signal.signal(each, _end)
    _do(*reversed(cleanups), sys.stdout.flush, _say)  # flushing raises if the signal interrupted a print
    _end(number, frame)


def _do(*works: Callable[[], object]) -> None:
    for work in works:
        try:
            work()
        except Exception:  # the process ends all the same
            continue


def _say() -> None:
    os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"stopped\n")


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)
