"""Drives an engine without a server: submits requests, and notes what each step returned. As a process of its own
(`python -m isthmus.benchmarks.engine`) it answers the questions of protocol.py and a few more."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import tyro
import uvloop

from isthmus.benchmarks.machine import describe, measure_limits
from isthmus.benchmarks.models import preset, write_model
from isthmus.benchmarks.protocol import Inference, answer, cores
from isthmus.benchmarks.stacks import Sizes
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.device.hardware import default_dtype
from isthmus.model.device.memory import keep_heap
from isthmus.model.ops.cpu.packed import Packed
from isthmus.model.ops.linear import unpacked
from isthmus.model.parameter import Dtype
from isthmus.model.sharding import MeshShape
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.server import Server
from isthmus.serve.engine.build import build_engine, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine, Sink, StepTimes
from isthmus.serve.engine.messages import Ending, Event, Request
from isthmus.serve.engine.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
FAILED = (Ending.ERROR, Ending.CANCELLED)


@dataclass(frozen=True)
class SeenStep:
    """What the engine delivered to its sink in one call."""

    at: float
    """time.perf_counter()"""
    cpu: float
    """Processor time of the engine's thread until now, in seconds"""
    times: StepTimes
    """How that thread has spent its time until now"""
    drawn: int
    """How many tokens the watched requests got"""
    begun: int
    """How many watched requests have got a token until now"""
    ended: int
    """How many watched requests have ended until now"""


class _Watch:
    """One run of requests, as the engine's thread sees it. Each run has a watch of its own, because the engine may
    report the cancelled requests of a run when the next one has begun."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], streams: int, enough: Callable[[list[SeenStep]], bool]
    ) -> None:
        self._engine, self._own, self._enough = engine, set(requests), enough
        self._waiting = deque(requests[streams:])
        self._begun: set[Request] = set()
        self._ended = 0
        self.seen: list[SeenStep] = []
        self.error: str | None = None
        self.done = threading.Event()

    def take(self, events: list[Event]) -> None:
        """Notes a step, and submits a waiting request for each one that ended."""
        now = time.perf_counter()
        events = [event for event in events if event.request in self._own]
        if not events or self.done.is_set():
            return
        drawn = [event.request for event in events for _ in event.tokens]
        ended = [event.end.reason for event in events if event.end is not None]
        for _ in ended[: len(self._waiting)]:
            self._engine.submit(self._waiting.popleft())
        self._begun.update(drawn)
        self._ended += len(ended)
        times = dataclasses.replace(self._engine.times)
        self.seen.append(SeenStep(now, time.thread_time(), times, len(drawn), len(self._begun), self._ended))
        if any(reason in FAILED for reason in ended):
            self.error = "a request failed"
        if self.error or self._enough(self.seen):
            self.done.set()


class Driver:
    """Runs requests on an engine without a server, one run after the other."""

    def __init__(self, build: Callable[[Sink], Engine]) -> None:
        """build: makes an engine with the given sink, and doesn't start it."""
        self.engine = build(self._take)
        self._watch: _Watch | None = None
        self._questions = 0

    def _take(self, events: list[Event]) -> None:
        if (watch := self._watch) is not None:
            watch.take(events)

    def run(
        self, requests: Sequence[Request], streams: int, enough: Callable[[list[SeenStep]], bool]
    ) -> list[SeenStep]:
        """Runs requests, `streams` at a time, until enough(steps) is true of the steps seen, and cancels the rest.
        Nothing is in flight afterwards. Raises RuntimeError when the engine died or a request failed."""
        first, self._watch = self._watch is None, _Watch(self.engine, requests, streams, enough)
        watch = self._watch
        for request in requests[:streams]:
            self.engine.submit(request)
        if first:  # only now, so that the engine's first step admits them all
            self.engine.start()
        while not watch.done.wait(0.1):
            if not self.engine.alive:
                raise RuntimeError(f"the engine died: {self.engine.error}")
        for request in requests:
            self.engine.cancel(request)
        while self.engine.in_flight:
            time.sleep(0.001)
        if watch.error:
            raise RuntimeError(watch.error)
        return watch.seen

    def steps(self, prompts: list[list[int]], steps: int, longest: int, sampling: Sampling = GREEDY) -> list[float]:
        """Returns 1 + `steps` times by time.perf_counter: when every prompt had its first token, or later, and when
        each of the next `steps` steps was done, at equal distances within a launch. Tokens are drawn past any end of
        text, with a seed for each prompt. longest: the most tokens of a request. Raises RuntimeError, also for a step
        that drew less than a token of each sequence."""
        planned = [PlannedRequest(0.0, prompt, longest, seed) for seed, prompt in enumerate(prompts)]
        requests = self.requests(planned, sampling)
        count = len(requests)

        def enough(seen: list[SeenStep]) -> bool:
            short = len(seen) > 1 and seen[-2].begun == count and seen[-1].drawn < count
            return short or len(times_of(seen, count)) > steps

        seen = self.run(requests, count, enough)
        times = times_of(seen, count)
        if len(times) <= steps:
            raise RuntimeError(f"a step drew less than a token of each of {count} sequences")
        return times[len(times) - 1 - steps :]

    def requests(self, planned: Sequence[PlannedRequest], sampling: Sampling) -> list[Request]:
        """Returns requests with ids that were never used before. sampling: but for the seed."""
        self._questions += 1
        return [
            Request(f"q{self._questions}-{i}", p.prompt, dataclasses.replace(sampling, seed=p.seed), p.max_tokens)
            for i, p in enumerate(planned)
        ]

    def closed_loop(self, planned: Sequence[PlannedRequest], streams: int, temperature: float) -> dict[str, Any]:
        """Runs the requests, `streams` at a time. Returns the `seconds` until the last one's end, and all `tokens`."""
        requests = self.requests(planned, Sampling(temperature=temperature))
        start = time.perf_counter()
        seen = self.run(requests, streams, lambda seen: seen[-1].ended == len(requests))
        return {"seconds": seen[-1].at - start, "tokens": sum(step.drawn for step in seen)}


def times_of(seen: list[SeenStep], count: int) -> list[float]:
    """When all of `count` requests had begun, and when each step since was done, up to one that drew too little."""
    first = next((index for index, step in enumerate(seen) if step.begun == count), len(seen))
    times = [step.at for step in seen[first : first + 1]]
    for before, launch in pairwise(seen[first:]):
        if launch.drawn < count:
            break
        steps = launch.drawn // count
        times += [before.at + (launch.at - before.at) * (step + 1) / steps for step in range(steps)]
    return times


class EngineProcess(Inference):
    """The questions that the process answers. `load` or `serve` comes before those for tokens."""

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._stopping: list[Callable[[], object]] = []

    @property
    def driver(self) -> Driver:
        assert self._driver is not None, "nothing is loaded"
        return self._driver

    def machine(self, dtype: str | None, devices: int) -> dict[str, Any]:
        """Describes the machine and measures its limits; nothing else should run meanwhile."""
        limits = measure_limits(dtype or default_dtype(), devices)
        return {"machine": dataclasses.asdict(describe()), "limits": dataclasses.asdict(limits)}

    def write(self, folder: str, name: str, vocab_size: int) -> dict[str, Any]:
        """Writes a model folder with random weights."""
        write_model(Path(folder), preset(name, vocab_size))
        return {}

    def load(
        self, model: str, dtype: Dtype, max_sequences: int, context: int, quantize: str = "none"
    ) -> dict[str, Any]:
        """Loads and compiles a model, without a prefix cache, and without guesses, which random weights make come true
        more often than text does. quantize: as for `isthmus serve --quantize`."""
        start = time.perf_counter()
        enable_compilation_cache()
        folder = open_model(Path(model), dtype, quantize=quantize)
        self.limits = max_sequences, context
        config = EngineConfig(
            max_sequences=max_sequences,
            context_length=context,
            pages=Sizes(max_sequences, context).pages,
            max_waiting=4096,
            prefix_cache=False,
            draft_rows=0,
        )
        self._driver = Driver(lambda sink: build_engine(folder, config, MeshShape(), sink))
        return {
            "version": f"isthmus, jax {jax.__version__}",
            "seconds": time.perf_counter() - start,
            "threads": len(cores()),
            "weight_bytes": weight_bytes_read(self.driver.engine, folder.config.tie_embeddings),
        }

    def serve(self, flags: list[str]) -> dict[str, Any]:
        """Starts a server in a thread, as `isthmus serve FLAGS` would, and an engine that shares its compiled programs
        and its memory. Only one of the two may have requests at a time."""
        config = tyro.cli(ServeConfig, args=flags)
        enable_compilation_cache(config.compilation_cache)
        model = open_model(config.model, config.dtype)
        loop = uvloop.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()

        async def start() -> Server:
            server = Server(config, model)
            await server.start()
            await server.load()
            return server

        server = asyncio.run_coroutine_threadsafe(start(), loop).result()
        assert server.session.engine is not None
        executor = server.session.engine.executor
        self._driver = Driver(lambda sink: Engine(executor, sink))
        self._stopping.append(lambda: asyncio.run_coroutine_threadsafe(server.stop(), loop).result())
        return {"port": server.port}

    def times(self, tokens: list[list[int]], steps: int, sampling: dict[str, Any] | None) -> list[float]:
        drawn = GREEDY if sampling is None else Sampling(**sampling)
        return self.driver.steps(tokens, steps, self.limits[1] - len(tokens[0]) if steps else 1, drawn)

    def closed(self, requests: list[dict[str, Any]], streams: int, temperature: float = 0.0) -> dict[str, Any]:
        """Runs requests, given as the fields of PlannedRequest, `streams` at a time."""
        return self.driver.closed_loop([PlannedRequest(**request) for request in requests], streams, temperature)

    def close(self) -> None:
        if self._driver is not None:
            self._driver.engine.close()
        for stop in self._stopping:
            stop()


def weight_bytes_read(engine: Engine, tied: bool) -> int:
    """Bytes of weights that a step reads; an embedding that is not the head is only looked up, and doesn't count."""
    params = engine.executor.params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    embedding = unpacked(params)["embedding"]
    looked_up = sum(leaf.nbytes for leaf in jax.tree.leaves(embedding))
    if isinstance(embedding, Packed):
        looked_up //= embedding.lines.shape[0]  # the embedding is one of the stack's matrices
    return size if tied else size - looked_up


if __name__ == "__main__":
    keep_heap()  # as the command `isthmus` does
    process = EngineProcess()
    answer(process)
    process.close()
