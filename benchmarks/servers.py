"""The one driver of a server: ours and others', each a session of processes of its own that is ready when its health
check passes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.benchmarks.http_api import APIS, get
from isthmus.benchmarks.processes import BenchError, session_cpu_seconds, stop, tail
from isthmus.benchmarks.stacks import ENGINES, Start, isthmus_command
from isthmus.model.process.cleaning import cleaning

START_SECONDS = 1800.0
"""To load and compile"""

Health = Callable[[str], bool]
"""Whether the server at an address serves; takes a few seconds at most"""


@dataclass(frozen=True)
class RunningServer:
    """A server that was started here."""

    address: str
    session: int
    """Of its processes"""

    def cpu_seconds(self) -> float:
        """Processor time that its processes have taken."""
        return session_cpu_seconds(self.session)


def grpc_health(address: str) -> bool:
    """Whether grpc.health.v1 says SERVING."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def http_health(address: str) -> bool:
    return get(address, "/health") is not None


@contextlib.contextmanager
def isthmus_server(flags: list[str], log: Path) -> Iterator[RunningServer]:
    """`isthmus serve FLAGS`, without --port: a free one of the loopback is taken. As `running_server` otherwise."""
    port = free_port()
    with running_server(isthmus_command(flags, port), port, grpc_health, log) as server:
        yield server


@contextlib.contextmanager
def stack_server(start: Start, log: Path) -> Iterator[RunningServer]:
    """The stack's server, started as stacks.py says. As `running_server` otherwise."""
    port, engine = free_port(), start.stack.engine
    health = grpc_health if engine == "isthmus" else http_health
    with running_server(start.server(port), port, health, log, ENGINES[engine].environment) as server:
        yield server


@contextlib.contextmanager
def running_server(
    command: Sequence[str], port: int, health: Health, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Starts a server and waits until it is healthy; SIGTERM at the end, after which none of its processes is left.
    Raises BenchError with what it printed, which goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    kill = partial(os.killpg, process.pid, signal.SIGKILL)
    try:
        with cleaning(kill):  # a group of its own: no Ctrl-C reaches it
            _wait_until_healthy(process, f"127.0.0.1:{port}", health, log)
            yield RunningServer(f"127.0.0.1:{port}", process.pid)
    finally:
        stop(process, 60.0, signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            kill()


def _wait_until_healthy(process: subprocess.Popen, address: str, health: Health, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the server ended before it served:\n{tail(log)}")
        if health(address):
            return
        time.sleep(0.1)
    raise BenchError(f"the server was not ready after {START_SECONDS:g} s:\n{tail(log)}")


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def http_version(engine: str, address: str) -> str:
    """The software's version, as the server itself says."""
    path, key = APIS[engine].version
    text = get(address, path)
    return f"{engine} {json.loads(text)[key] if text else 'unknown'}"
