"""Servers of other people and ours, each a process group of its own that is ready when it says so."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from isthmus.benchmarks.child import BenchError, stop, tail
from isthmus.benchmarks.servers import START_SECONDS, serve_flags
from isthmus.benchmarks.stacks import Installed, Stack, gguf_path
from isthmus.model.config import ModelConfig
from isthmus.model.process.cleaning import cleaning
from isthmus.model.process.resources import usable_cpus
from isthmus.serve.engine.config import EngineConfig

VLLM_BLOCK = 128
"""Tokens of a block of vLLM's cache on CPUs"""


@dataclass(frozen=True)
class PeerServer:
    """One that runs."""

    stack: Stack
    address: str
    model: str
    """What a request must call it"""
    group: int
    """Of its processes"""

    def cpu_seconds(self) -> float:
        """Of processor time that its processes have taken."""
        return session_cpu_seconds(self.group)


@dataclass(frozen=True)
class Sizes:
    """What every server is started for."""

    sequences: int
    context: int


def session_cpu_seconds(session: int) -> float:
    """Processor time of all processes of a session, those included that ended and were waited for."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def isthmus_command(stack: Stack, model: Path, sizes: Sizes) -> list[str]:
    pages = 1 + sizes.sequences * -(-sizes.context // EngineConfig.page_size)
    engine = EngineConfig(
        max_sequences=sizes.sequences,
        context_length=sizes.context,
        pages=pages,
        prefix_cache=False,
        max_waiting=4096,
    )
    flags = serve_flags(model, "bfloat16", 1, engine)
    quantize = [] if stack.quantize == "none" else ["--quantize", stack.quantize]
    return [sys.executable, "-m", "isthmus.commands.main", "serve", *flags, *quantize]


def llama_command(stack: Stack, model: Path, sizes: Sizes, installed: Installed, port: int) -> list[str]:
    """A slot a sequence, each with room for a whole one; batches that mix prompts and steps are its default."""
    gguf = gguf_path(stack, model)
    if not gguf.is_file():
        raise BenchError(f"{gguf} does not exist; make_gguf.py makes it")
    threads = str(usable_cpus())
    room = str(sizes.sequences * sizes.context)
    flags = ["--host", "127.0.0.1", "--port", str(port), "-np", str(sizes.sequences), "-c", room]
    caches = ["--no-cache-prompt", "--cache-ram", "0", "--no-webui"]
    program = str(installed.program("llama-server"))
    return [program, "-m", str(gguf), "-t", threads, "-tb", threads, *flags, *caches]


def vllm_command(
    stack: Stack, model: Path, config: ModelConfig, sizes: Sizes, installed: Installed, port: int
) -> list[str]:
    """Its OpenAI server, a cache for as many sequences as ours. The `vllm` program looks for a package of that name,
    which the build for CPUs is not."""
    python = installed.command(stack)[0]
    width = 4 if stack.dtype == "float32" else 2
    token = 2 * config.layers * config.kv_heads * config.head_dim * width
    cache = (sizes.sequences * -(-sizes.context // VLLM_BLOCK) + 1) * VLLM_BLOCK * token
    limits = ["--max-model-len", str(sizes.context), "--max-num-seqs", str(sizes.sequences)]
    where = ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    program = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", stack.dtype]
    return [*program, *limits, *where, "--kv-cache-memory-bytes", str(cache)]


@contextlib.contextmanager
def peer_server(
    stack: Stack, model: Path, config: ModelConfig, sizes: Sizes, installed: Installed, log: Path
) -> Iterator[PeerServer]:
    """Starts the stack's server and waits until it is ready; ends all its processes after that. Raises BenchError."""
    port = free_port()
    environment = dict(os.environ)
    if stack.engine == "isthmus":
        command = isthmus_command(stack, model, sizes)
    elif stack.engine == "llama":
        command = llama_command(stack, model, sizes, installed, port)
    else:
        command = vllm_command(stack, model, config, sizes, installed, port)
        threads = str(usable_cpus())
        environment.update(OMP_NUM_THREADS=threads, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    ready = _says_serving(log) if stack.engine == "isthmus" else _is_healthy(port)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        with cleaning(partial(os.killpg, process.pid, signal.SIGKILL)):  # a group of its own: no Ctrl-C reaches it
            yield PeerServer(stack, _wait(process, ready, log), str(model), process.pid)
    finally:
        stop(process, 30.0, signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, ready: Callable[[], str | None], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        address = ready()
        if address is not None:
            return address
        if process.poll() is not None:
            raise BenchError(f"the server ended before it served:\n{tail(log)}")
        time.sleep(0.2)
    raise BenchError(f"the server was not ready after {START_SECONDS:g} s:\n{tail(log)}")


def _says_serving(log: Path) -> Callable[[], str | None]:
    def ready() -> str | None:
        found = re.search(r"SERVING on (\S+:\d+)", log.read_text(errors="replace"))
        return found[1] if found else None

    return ready


def _is_healthy(port: int) -> Callable[[], str | None]:
    return lambda: f"127.0.0.1:{port}" if _get(f"127.0.0.1:{port}", "/health") is not None else None


def version(server: PeerServer) -> str:
    """Of the software, as the server itself says where it does."""
    if server.stack.engine == "isthmus":
        return f"isthmus, jax {jax.__version__}"
    path, key = ("/props", "build_info") if server.stack.engine == "llama" else ("/version", "version")
    text = _get(server.address, path)
    return f"{server.stack.engine} {json.loads(text)[key] if text else 'unknown'}"


def _get(address: str, path: str) -> bytes | None:
    """The body, if the answer is a success."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
