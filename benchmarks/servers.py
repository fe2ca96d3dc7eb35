"""Starts servers, ours and others'. Each is a session of processes, and is ready when its health check passes."""

from __future__ import annotations

import contextlib
import dataclasses
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
from isthmus.benchmarks.processes import BenchError, module, session_cpu_seconds, stop, tail
from isthmus.benchmarks.stacks import Start
from isthmus.model.parameter import Dtype
from isthmus.model.process.cleaning import cleaning
from isthmus.serve.engine.config import EngineConfig

START_SECONDS = 1800.0
"""How long a server may take to load and compile"""

Health = Callable[[str], bool]
"""Returns whether the server at an address serves; takes a few seconds at most"""


@dataclass(frozen=True)
class RunningServer:
    """A server that this process has started."""

    address: str
    session: int
    """The id of the session that all its processes are in"""

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


def serve_flags(model: Path, dtype: Dtype | None, tp: int, kernels: str, engine: EngineConfig) -> list[str]:
    """The command line of `isthmus serve` for these settings, without --port."""
    flags = ["--model", str(model), "--mesh", f"tp={tp}", "--dtype", dtype or "auto", "--report-cached-tokens"]
    flags += ["--kernels", kernels]
    for item in dataclasses.fields(engine):
        name, value = item.name.replace("_", "-"), getattr(engine, item.name)
        if isinstance(value, bool):
            flags.append(f"--engine.{name}" if value else f"--engine.no-{name}")
        else:
            flags += [f"--engine.{name}", str(value)]
    return flags


@contextlib.contextmanager
def isthmus_server(flags: list[str], log: Path) -> Iterator[RunningServer]:
    """Runs `isthmus serve FLAGS` on a free port of the loopback, as `running_server` does. flags: without --port."""
    port = free_port()
    command = [*module("isthmus.commands.main"), "serve", *flags, "--port", str(port)]
    with running_server(command, port, grpc_health, log) as server:
        yield server


@contextlib.contextmanager
def stack_server(start: Start, log: Path) -> Iterator[RunningServer]:
    """Runs the stack's server by its command line in stacks.py, as `running_server` does."""
    port, health = free_port(), grpc_health if start.stack.engine == "isthmus" else http_health
    command = start.command(start.engine.server, port)
    with running_server(command, port, health, log, start.engine.environment) as server:
        yield server


@contextlib.contextmanager
def running_server(
    command: Sequence[str], port: int, health: Health, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Yields a server when it is healthy. At the end it gets SIGTERM, and then none of its processes is left. It prints
    to `log`. Raises BenchError, with what it printed last, if it doesn't become healthy."""
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
        with cleaning(kill):  # Ctrl-C doesn't reach its process group
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
    """The version of the server's software, as the server itself says."""
    path, key = APIS[engine].version
    text = get(address, path)
    return f"{engine} {json.loads(text)[key] if text else 'unknown'}"
