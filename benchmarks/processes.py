"""Processes that a benchmark starts to ask them questions (protocol.py), and the processor time of a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.model.process.cleaning import cleaning


class BenchError(RuntimeError):
    """A benchmark can't go on; the message says what failed."""


class Child:
    """A process that answers questions, as protocol.py says. What it prints goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(cleaning(self._process.kill))

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Calls the child's method of that name and waits. Raises BenchError when it fails or has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the child has died, and its answer is empty
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"a process of the benchmark died on {do!r}:\n{tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{do}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time of its threads, and of its children that ended, in seconds; 0 when it has died."""
        return cpu_seconds(self._process.pid)

    def close(self) -> None:
        """Ends the process by closing its input, or kills it if it doesn't end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        stop(self._process)
        self._guard.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def module(name: str) -> list[str]:
    """The command that runs a module of this project."""
    return [sys.executable, "-m", name]


def stop(process: subprocess.Popen, seconds: float = 30.0, number: int | None = None) -> None:
    """Waits for a process after sending it signal `number`, if any; kills it after `seconds`."""
    if number is not None and process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def tail(log: Path, size: int = 2000) -> str:
    """The last `size` characters of a file."""
    return log.read_text(errors="replace")[-size:]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of its children that ended, in seconds, from Linux's /proc; 0 when it is gone."""
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def session_cpu_seconds(session: int) -> float:
    """Processor time in seconds of all processes of a session, and of children that ended and were waited for."""
    found = (fields for path in Path("/proc").glob("[0-9]*/stat") if (fields := _stat(path)))
    ticks = sum(sum(map(int, fields[11:15])) for fields in found if int(fields[3]) == session)
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; none when the process is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []
