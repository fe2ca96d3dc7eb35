"""A command as a process of its own: what it asks of the system before anything heavy is imported, and how it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from isthmus.model.process.signals import stop_at_once

_INTERRUPTED, _BROKEN_PIPE = 130, 141
"""Exit statuses, as a shell reports SIGINT and SIGPIPE"""


def run(command: Callable[[], int]) -> int:
    """Runs `command`, which is all that this process does, and returns the exit status: that of `command`, 130 after an
    interrupt, or 2 after an OSError, which is printed. It is 141 when nobody reads the output any more, as in
    `isthmus generate … | head -1`; that is no failure, so nothing is printed."""
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
        status = _BROKEN_PIPE
        _discard_output()
    except OSError as error:
        status = 2
        print(f"isthmus: {error}", file=sys.stderr)
        _discard_output()
    stop_at_once()  # a command with signal handlers of its own has restored Python's
    return status


def _prepare() -> None:
    from isthmus.model.device.memory import keep_heap
    from isthmus.model.process.resources import has_quota, usable_cpus

    keep_heap()
    if has_quota():  # XLA counts CPUs, whatever the quota, and would start a thread for each
        os.environ.setdefault("NPROC", str(usable_cpus()))
    # gRPC prints what strangers send, unescaped and without limit. Errors reach us as exceptions anyway.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _discard_output() -> None:
    """Sends standard output nowhere, so that the interpreter can flush what is left when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
