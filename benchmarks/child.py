"""Parts of a benchmark in processes of their own, which share no interpreter lock: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from isthmus.model.process.cleaning import cleaning


class BenchError(RuntimeError):
    """A benchmark that couldn't go on; the message says what failed."""


class Child:
    """A process that answers questions. What it prints goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(cleaning(self._process.kill))

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Calls the child's handler of that name and waits. Raises BenchError when it fails or has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the empty answer says so
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"a process of the benchmark died on {do!r}:\n{tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{do}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Of processor time that it has taken, all threads together and children that ended; 0 when it has died."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it: by the end of its input, else by a signal."""
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


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def tail(log: Path, size: int = 2000) -> str:
    return log.read_text(errors="replace")[-size:]


def answer(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The child's side: answers until its input ends. Whatever else prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        fields = json.loads(line)
        try:
            reply = handlers[fields.pop("do")](**fields)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": _reason(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
