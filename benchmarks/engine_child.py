"""Isthmus' engine in a process of its own (`python -m isthmus.benchmarks.engine_child`): the questions of
benchmarks/peers/protocol.py, timed as the vLLM peer is, and the same requests that a server gets."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

from isthmus.benchmarks.child import answer
from isthmus.benchmarks.peers.protocol import check, cores
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.device.memory import keep_heap
from isthmus.model.ops.cpu.packed import Packed
from isthmus.model.sharding import MeshShape
from isthmus.model.weights.packing import place_matrices
from isthmus.serve.engine.build import build_engine, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.request import FinishReason, Output, Request, Sampling

GREEDY = Sampling(temperature=0.0)
FAILED = (FinishReason.ERROR, FinishReason.CANCELLED)


class _Steps:
    """Notes when every sequence of some requests had its first token, and when each of `steps` more steps was known."""

    def __init__(self, requests: list[Request], steps: int) -> None:
        self._own, self._sequences, self._wanted = set(requests), len(requests), 1 + steps
        self._begun: set[str] = set()
        self.times: list[float] = []
        self.error: str | None = None
        self.done = threading.Event()

    def take(self, outputs: list[Output]) -> None:
        """On the engine's thread. The last question's requests are heard to be cancelled in this one's time."""
        outputs = [output for output in outputs if output.request in self._own]
        if self.done.is_set() or not outputs:
            return
        now = time.perf_counter()
        drawn = [output.request.id for output in outputs if output.token is not None]
        if any(output.finish_reason in FAILED for output in outputs):
            self.error = "a request failed"
        self._begun.update(drawn)
        if len(self._begun) == self._sequences:
            if self.times and len(drawn) < self._sequences:
                self.error = f"a step drew {len(drawn)} tokens for {self._sequences} sequences"
            self.times.append(now)
        if self.error or len(self.times) == self._wanted:
            self.done.set()


class _Closed:
    """Requests of which `streams` are in flight until there are no more."""

    def __init__(self, engine: Any, planned: list[PlannedRequest], streams: int, prefix: str) -> None:
        self._engine, self._streams = engine, streams
        self._waiting = deque(
            Request(f"{prefix}-{i}", request.prompt, GREEDY, request.max_tokens) for i, request in enumerate(planned)
        )
        self._left = len(planned)
        self.tokens = 0
        self.error: str | None = None
        self.end = 0.0
        self.done = threading.Event()

    def start(self) -> None:
        for _ in range(min(self._streams, self._left)):
            self._engine.submit(self._waiting.popleft())

    def take(self, outputs: list[Output]) -> None:
        """On the engine's thread."""
        for output in outputs:
            self.tokens += output.token is not None
            if output.finish_reason is None:
                continue
            self._left -= 1
            if output.finish_reason in FAILED:
                self.error = "a request failed"
            if self._waiting:
                self._engine.submit(self._waiting.popleft())
        if self._left == 0:
            self.end = time.perf_counter()
            self.done.set()


class EngineChild:
    """Greedy, past any end of text, without the prefix cache."""

    def __init__(self) -> None:
        self._watch: _Steps | _Closed | None = None
        self._questions = 0

    def load(self, model: str, dtype: str, max_sequences: int, context: int, quantize: str = "none") -> dict[str, Any]:
        """Loads and compiles. quantize: none, int8 or int4."""
        start = time.perf_counter()
        enable_compilation_cache()
        options: dict[str, Any] = {} if quantize == "none" else {"quantize": quantize}
        folder = open_model(Path(model), dtype, **options)
        self._limits = max_sequences, context
        page = EngineConfig.page_size
        config = EngineConfig(
            max_sequences=max_sequences,
            context_length=context,
            pages=1 + max_sequences * -(-context // page),
            max_waiting=4096,
            prefix_cache=False,
        )
        self._engine = build_engine(folder, config, MeshShape(), self._sink)
        self._engine.start()
        seconds = time.perf_counter() - start
        version = f"isthmus, jax {jax.__version__}"
        return {
            "version": version,
            "seconds": seconds,
            "threads": len(cores()),
            "weight_bytes": self._weight_bytes(folder.config.tie_embeddings),
        }

    def _weight_bytes(self, tied: bool) -> int:
        """That a step reads: an embedding that is not the head is only looked up."""
        params = self._engine.executor._params
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        embedding = place_matrices(params)["embedding"]
        looked_up = sum(leaf.nbytes for leaf in jax.tree.leaves(embedding))
        if isinstance(embedding, Packed):
            looked_up //= embedding.lines.shape[0]  # of a stack
        return size if tied else size - looked_up

    def _sink(self, outputs: list[Output]) -> None:
        watch = self._watch
        if watch is not None:
            watch.take(outputs)

    def prefill(self, tokens: list[list[int]]) -> dict[str, Any]:
        start = time.perf_counter()
        return {"seconds": self._run(tokens, 0)[0] - start}

    def decode(self, tokens: list[list[int]], steps: int) -> dict[str, Any]:
        times = self._run(tokens, steps)
        return {"seconds": times[-1] - times[0]}

    def _run(self, tokens: list[list[int]], steps: int) -> list[float]:
        """When every sequence had its first token, and when each of `steps` steps after that was known."""
        length = check(tokens, 1 + steps, *self._limits)
        longest = self._limits[1] - length if steps else 1
        self._questions += 1
        requests = [Request(f"q{self._questions}-{i}", prompt, GREEDY, longest) for i, prompt in enumerate(tokens)]
        watch = _Steps(requests, steps)
        self._watch = watch
        for request in requests:
            self._engine.submit(request)
        self._wait(watch)
        for request in requests:
            self._engine.cancel(request)
        self._settle()
        if watch.error:
            raise RuntimeError(watch.error)
        return watch.times

    def closed(self, requests: list[dict[str, Any]], streams: int) -> dict[str, Any]:
        """The requests, `streams` of them in flight, without a server. seconds: to the end of the last."""
        self._questions += 1
        planned = [PlannedRequest(**request) for request in requests]
        watch = _Closed(self._engine, planned, streams, f"q{self._questions}")
        self._watch = watch
        start = time.perf_counter()
        watch.start()
        self._wait(watch)
        self._settle()
        if watch.error:
            raise RuntimeError(watch.error)
        return {"seconds": watch.end - start, "tokens": watch.tokens}

    def _wait(self, watch: _Steps | _Closed) -> None:
        while not watch.done.wait(1.0):
            if not self._engine.alive:
                raise RuntimeError(f"the engine died: {self._engine.error}")

    def _settle(self) -> None:
        """Until nothing is in flight, so that the next question has the engine to itself."""
        while self._engine.in_flight:
            time.sleep(0.001)
        self._watch = None


def main() -> None:
    keep_heap()  # as the command `isthmus` does, and so `isthmus serve`
    child = EngineChild()
    answer({"load": child.load, "prefill": child.prefill, "decode": child.decode, "closed": child.closed})


if __name__ == "__main__":
    main()
