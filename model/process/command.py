"""A command as a process of its own: what it asks of the system before anything heavy is imported, and how it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from isthmus.model.process.signals import stop_at_once

_INTERRUPTED, _NOBODY_READS = 130, 141
"""As a shell reports SIGINT and SIGPIPE"""


def run(command: Callable[[], int]) -> int:
    """The exit status of `command`, which is all that this process does. Interrupted, it is 130; 141 when nobody reads
    what it prints any more, as in `isthmus generate … | head -1`: that is no failure, and nothing is said."""
    stop_at_once()
    try:
        _prepare()
        try:
            status = command()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except BrokenPipeError:
        status = _NOBODY_READS
        _print_nowhere()
    except OSError as error:
        status = 2
        print(f"isthmus: {error}", file=sys.stderr)
        _print_nowhere()
    stop_at_once()  # a command that had handlers of its own has put back Python's
    return status


def _prepare() -> None:
    from isthmus.model.device.memory import keep_heap
    from isthmus.model.process.resources import has_quota, usable_cpus

    keep_heap()
    if has_quota():  # XLA counts the CPUs alone, and would start a thread for each
        os.environ.setdefault("NPROC", str(usable_cpus()))
    # gRPC prints what strangers send, as it is and as often as they like. Errors reach us as exceptions too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _print_nowhere() -> None:
    """So that the interpreter, which flushes what is left, has nothing to complain about."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
