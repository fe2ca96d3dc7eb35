"""A server with a way around it, a process of its own (`python -m isthmus.benchmarks.host`).

The same compiled programs and the same memory are behind gRPC and behind an engine that is called directly, so that
what differs is the serving alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import tyro
import uvloop

from isthmus.benchmarks.child import answer
from isthmus.benchmarks.machine import describe, measure_limits
from isthmus.benchmarks.models import preset, write_model
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.device.hardware import default_dtype
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.server import Server
from isthmus.serve.engine.build import open_model
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.request import FinishReason, Output, Request, Sampling


class _Direct:
    """An engine of its own over the server's executor. Only one of the two may have requests at a time."""

    def __init__(self, server: Server) -> None:
        assert server.session.engine is not None
        self._engine = Engine(server.session.engine.executor, self._sink)
        self._engine.start()
        self._left = 0
        self._tokens = 0
        self._failed = 0
        self._end = 0.0
        self._done = threading.Event()

    def _sink(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._tokens += output.token is not None
            if output.finish_reason is not None:
                self._left -= 1
                self._failed += output.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED)
        if self._left == 0:
            self._end = time.perf_counter()
            self._done.set()

    def run(self, planned: list[PlannedRequest], temperature: float) -> dict[str, Any]:
        """Submits them all and waits. seconds: from the first to the end of the last."""
        requests = [
            Request(f"d{i}", p.prompt, Sampling(temperature=temperature, seed=p.seed), p.max_tokens)
            for i, p in enumerate(planned)
        ]
        self._left, self._tokens, self._failed = len(requests), 0, 0
        self._done.clear()
        start = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        while not self._done.wait(1.0):
            assert self._engine.alive, f"the engine died: {self._engine.error}"
        return {"seconds": self._end - start, "tokens": self._tokens, "failed": self._failed}

    def close(self) -> None:
        self._engine.close()


class Host:
    """The server's event loop runs in a thread; the main thread waits for questions."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: Server | None = None
        self._direct: _Direct | None = None

    def machine(self, dtype: str | None, devices: int) -> dict[str, Any]:
        """The machine and its limits, while nothing runs on it."""
        limits = measure_limits(dtype or default_dtype(), devices)
        return {"machine": dataclasses.asdict(describe()), "limits": dataclasses.asdict(limits)}

    def write(self, folder: str, name: str, vocab_size: int) -> dict[str, Any]:
        """A model folder of random weights."""
        write_model(Path(folder), preset(name, vocab_size))
        return {}

    def start(self, flags: list[str]) -> dict[str, Any]:
        """Serves as `isthmus serve FLAGS` would."""
        config = tyro.cli(ServeConfig, args=flags)
        enable_compilation_cache(config.compilation_cache)
        model = open_model(config.model, config.dtype)

        async def start() -> Server:
            server = Server(config, model)
            await server.start()
            await server.load()
            return server

        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        self._direct = _Direct(self._server)
        return {"port": self._server.port}

    def direct(self, requests: list[dict[str, Any]], temperature: float) -> dict[str, Any]:
        """The same requests on the engine alone."""
        assert self._direct is not None
        return self._direct.run([PlannedRequest(**request) for request in requests], temperature)

    def close(self) -> None:
        if self._server is None or self._direct is None:
            return
        self._direct.close()
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)


def main() -> None:
    host = Host()
    answer({"machine": host.machine, "write": host.write, "start": host.start, "direct": host.direct})
    host.close()


if __name__ == "__main__":
    main()
