"""`isthmus serve` as a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus.benchmarks.child import BenchError, stop, tail
from isthmus.model.config import Dtype
from isthmus.model.process.cleaning import cleaning
from isthmus.serve.engine.config import EngineConfig

START_SECONDS = 1800.0
"""To load and compile"""


@dataclass(frozen=True)
class Served:
    """A running server."""

    address: str
    token: str | None = None
    tls_ca: str | None = None
    """As isthmus.Client's"""


def serve_flags(model: Path, dtype: Dtype | None, tp: int, engine: EngineConfig) -> list[str]:
    """The command line of `isthmus serve` for these settings, on a free port of the loopback."""
    flags = ["--model", str(model), "--port", "0", "--tp", str(tp), "--dtype", dtype or "auto"]
    flags.append("--report-cached-tokens")
    for item in dataclasses.fields(engine):
        name, value = item.name.replace("_", "-"), getattr(engine, item.name)
        if isinstance(value, bool):
            flags.append(f"--engine.{name}" if value else f"--engine.no-{name}")
        else:
            flags += [f"--engine.{name}", str(value)]
    return flags


@contextlib.contextmanager
def served(flags: list[str], log: Path) -> Iterator[Served]:
    """Starts the server and waits until it says SERVING; SIGTERM at the end. Raises BenchError with what it printed."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", "isthmus.commands.main", "serve", *flags]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        with cleaning(process.terminate):
            yield Served(_wait_for_address(process, log))
    finally:
        stop(process, 60.0, signal.SIGTERM)


def _wait_for_address(process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = re.search(r"SERVING on (\S+:\d+)", log.read_text(errors="replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            raise BenchError(f"`isthmus serve` ended before it served:\n{tail(log)}")
        time.sleep(0.1)
    raise BenchError(f"`isthmus serve` was not ready after {START_SECONDS:g} s:\n{tail(log)}")
