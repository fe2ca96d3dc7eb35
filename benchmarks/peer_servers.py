"""`isthmus bench peer-servers`: `isthmus serve` beside llama-server and vLLM's server, under the same requests."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from isthmus.benchmarks import comparison
from isthmus.benchmarks.case import Qualities
from isthmus.benchmarks.comparison import PAUSE_SECONDS, ComparisonBench, Idle, Run, Session, Turns
from isthmus.benchmarks.figures import OF_MEDIANS, listed, median, number, paragraphs, percentiles, table
from isthmus.benchmarks.load import Target, as_json, ask_load, load_figures
from isthmus.benchmarks.machine import limits_of_any_dtype
from isthmus.benchmarks.processes import BenchError, Child, module
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.servers import http_version, stack_server
from isthmus.benchmarks.stacks import SERVERS, Sizes, Start, chosen
from isthmus.benchmarks.workload import PlannedRequest, poisson_arrivals
from isthmus.errors import ConfigError

PROMPTS, COMPLETIONS = (16, 256), (16, 96)
"""Fewest and most tokens; all numbers between them are as likely"""
ENGINE_PROMPT, ENGINE_STEPS = 32, 32
"""Tokens of each prompt, and steps, when the engine alone only decodes, to be compared with the server"""


@dataclass(frozen=True)
class PeerServersBench(ComparisonBench):
    """Sends the same requests to several servers that run side by side, one after the other, and compares them.

    Prompts have 16 to 256 tokens and completions 16 to 96; they are sent as token ids, streamed and greedy, to servers
    without prefix caches. At each rate they arrive as a Poisson process; in the closed loop --streams are always in
    flight. In each repetition every load is put on every server, in an order that rotates. Our server is also compared
    with its engine in a process of its own, which gets the requests of the closed loop directly and decodes --streams
    sequences.
    """

    stacks: tuple[str, ...] = ("isthmus-bf16", "llama-bf16", "vllm-bf16", "vllm-f32")
    """Stacks whose servers are run"""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Arrival rates, in requests per second"""
    seconds: float = 30.0
    """How long requests arrive at each rate"""
    streams: int = 32
    """Requests that the closed loop keeps in flight; 0 leaves it out"""
    requests: int = 96
    """Requests that the closed loop sends"""
    repeats: int = 3
    """How often every load is put on every server"""
    engine: bool = True
    """Also run our engine without a server, on the requests of the closed loop"""
    timeout: float = 300.0
    """Deadline of a request, in seconds; one that misses it has failed"""

    def validate(self) -> None:
        chosen(self.stacks, SERVERS)
        if any(not rate > 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ConfigError("rates must be above 0, and none twice")
        if not self.rates and not self.streams:
            raise ConfigError("rates: without any, streams must be above 0")
        self.check_least(streams=0, requests=self.streams, repeats=1)
        self.check_positive("seconds", "timeout")
        super().validate()

    @property
    def runs_engine(self) -> bool:
        return self.engine and self.streams > 0

    @property
    def loads(self) -> dict[str, float]:
        """Requests per second by the load's name; 0 is the closed loop."""
        closed = {f"closed{self.streams}": 0.0} if self.streams else {}
        return closed | {f"rate{rate:g}": rate for rate in self.rates}


def sizes(bench: PeerServersBench) -> Sizes:
    """The sizes for which every server is started."""
    return Sizes(max(32, bench.streams), -(-(PROMPTS[1] + COMPLETIONS[1]) // 128) * 128)


def plan(bench: PeerServersBench, rate: float, turn: int, vocab: int) -> list[PlannedRequest]:
    """The requests of a load in a repetition, the same for every server. rate: requests per second; 0 means the closed
    loop, whose requests are all due at the start."""
    random = np.random.default_rng([bench.seed, round(rate * 1e6), turn])
    times = poisson_arrivals(random, rate, bench.seconds) or [0.0] if rate else [0.0] * bench.requests
    requests = []
    for at in times:
        prompt, completion = (int(random.integers(low, high + 1)) for low, high in (PROMPTS, COMPLETIONS))
        ids = random.integers(min(10, vocab - 1), vocab, prompt).tolist()
        requests.append(PlannedRequest(at, ids, completion, int(random.integers(1 << 32))))
    return requests


class ServerSide:
    """A stack's server that is ready and, beside a server of ours, a process with the engine alone."""

    def __init__(self, bench: PeerServersBench, start: Start, running: ExitStack, folder: Path) -> None:
        """Starts the server, which `running` ends. Raises BenchError."""
        self._start, self._running, self._folder = start, running, folder
        begun, stack = time.perf_counter(), start.stack
        server = running.enter_context(stack_server(start, folder / f"{stack.name}.log"))
        self.facts: dict[str, Any] = {"seconds": time.perf_counter() - begun}
        ours = stack.engine == "isthmus"
        self.facts["version"] = (
            f"isthmus, jax {jax.__version__}" if ours else http_version(stack.engine, server.address)
        )
        self._target = Target(server.address, None, None, 0.0, bench.timeout, stack.engine, str(start.model))
        self.idle = Idle(server.cpu_seconds)
        self.engine: Child | None = None

    def start_engine(self) -> None:
        """Loads the engine alone if the server is ours. Raises BenchError."""
        if self._start.stack.engine != "isthmus":
            return
        log = self._folder / f"{self._start.stack.name}-engine.log"
        child = self._running.enter_context(Child(self._start.command(self._start.engine.child), log))
        child.ask("load", **self._start.load)
        self.engine = child

    def send(self, generator: Child, planned: list[PlannedRequest], streams: int) -> dict[str, Any]:
        """Sends requests. Returns the load generator's answer. Raises BenchError, also when no request was answered."""
        with self.idle.asked():
            answer = ask_load(generator, self._target, planned, streams)
        if not (figures := load_figures(answer))["completed"]:
            raise BenchError(f"no request was answered: {figures['failures']}")
        return answer


class _Loads:
    """Puts the loads on the servers, and keeps what the load generator saw."""

    def __init__(self, bench: PeerServersBench, vocab: int, turns: Turns, generator: Child) -> None:
        self._bench, self._vocab, self._turns, self._generator = bench, vocab, turns, generator
        self._answers: dict[str, dict[str, list[dict[str, Any]]]] = {load: {} for load in bench.loads}
        self._engines: dict[str, dict[str, list[float]]] = {}

    def warm_up(self) -> None:
        """Sends a few requests at once to each server, so that it has compiled or read what the first ones need."""
        some = plan(self._bench, 0.0, self._bench.repeats, self._vocab)[:8] or [PlannedRequest(0.0, [10] * 16, 16, 0)]
        self._turns.each("warm-up", lambda _, side: side.send(self._generator, some, 8))

    def measure(self, load: str, turn: int, name: str, side: ServerSide) -> float:
        """Completed tokens per second of a server under a load. After the closed loop, the engine alone is measured."""
        rate = self._bench.loads[load]
        planned = plan(self._bench, rate, turn, self._vocab)
        answer = side.send(self._generator, planned, 0 if rate else self._bench.streams)
        self._answers[load].setdefault(name, []).append(answer)
        found = load_figures(answer)["output_tokens_per_second"]
        self._turns.log(f"{load}, {name}: {found:,.1f} tok/s")
        if not rate and side.engine is not None:
            try:
                self._measure_engine(name, side.engine, planned)
            except BenchError as error:
                self._turns.fail(name, "engine", error)
                side.engine = None
        return float(found)

    def _measure_engine(self, name: str, engine: Child, planned: list[PlannedRequest]) -> None:
        """Runs the same requests on the engine alone, and decodes as many sequences."""
        streams = self._bench.streams
        random = np.random.default_rng(self._bench.seed)
        prompts = random.integers(10, self._vocab, (streams, ENGINE_PROMPT)).tolist()
        time.sleep(PAUSE_SECONDS)
        closed = engine.ask("closed", requests=as_json(planned), streams=streams)
        time.sleep(PAUSE_SECONDS)
        decode = engine.ask("decode", tokens=prompts, steps=ENGINE_STEPS)
        found = self._engines.setdefault(name, {"closed": [], "decode": []})
        found["closed"].append(closed["tokens"] / closed["seconds"])
        found["decode"].append(streams * ENGINE_STEPS / decode["seconds"])

    def figures(self) -> dict[str, Any]:
        """Returns the latencies of all repetitions together, and the engines' throughputs by repetition."""
        answers = {load: found for load, found in self._answers.items() if found}
        return {
            "served": {
                load: {name: load_figures(*every) for name, every in found.items()} for load, found in answers.items()
            },
            "engine": self._engines,
        }


def run(bench: PeerServersBench, console: Console) -> Record:
    """Measures and returns the record, added to the result's file if --merge is set. Raises ConfigError, BenchError."""
    stacks = chosen(bench.stacks, SERVERS)
    amount = len(stacks) * (2 + bench.runs_engine + len(bench.loads) * bench.repeats)
    return comparison.run_comparison(
        "peer-servers", bench, stacks, list(bench.loads), amount, console, partial(measure, bench)
    )


def measure(bench: PeerServersBench, at: Session) -> Run:
    """Puts all loads on all servers. Measures the machine's limits before and after."""
    before = limits_of_any_dtype()
    for stack in at.stacks:
        start = bench.start(stack, at.config, sizes(bench))
        at.turns.start(stack, partial(ServerSide, bench, start, at.children, at.folder))
    if bench.runs_engine:
        at.turns.each("engine", lambda _, side: side.start_engine())
    generator = at.children.enter_context(Child(module("isthmus.benchmarks.load"), at.folder / "load.log"))
    loads = _Loads(bench, at.config.vocab_size, at.turns, generator)
    loads.warm_up()
    at.turns.repeat(bench.repeats, loads.measure)
    found = {**at.turns.figures(at.machine, [before, limits_of_any_dtype()]), **loads.figures()}
    found |= {"streams": bench.streams, "seconds": bench.seconds}
    return {**found, "served_of_engine": served_of_engine(found)}


def served_of_engine(run: Run) -> dict[str, dict[str, float]]:
    """Returns, for each stack of ours, the server's throughput in the closed loop as a share of its engine's: with the
    same requests (`closed`), and when it only decodes (`decode`)."""
    loads = [load for load in run["rates"] if load.startswith("closed")]
    closed = run["rates"][loads[0]] if loads else {}
    return {
        name: {key: median(closed[name]) / median(values) for key, values in found.items()}
        for name, found in run["engine"].items()
        if name in closed
    }


def show(record: Record, qualities: Qualities) -> str:
    runs = record.figures["pieces"]
    text = (
        "All servers got the same requests: prompts of 16 to 256 tokens and completions of 16 to 96, streamed, greedy, "
        "without prefix caches. They arrive as a Poisson process, or a number of streams is always in flight. Rates "
        f"are completed tokens per second, medians of the repetitions. {OF_MEDIANS}"
    )
    text += " KL is what the same types of weights cost the trained models above." if qualities else ""
    lines = [line for run in runs for line in (*_engine_lines(run), _start_line(run))]
    return paragraphs(
        text,
        comparison.show_ratios(record, qualities),
        _latencies(runs),
        listed(lines),
        comparison.show_conditions(runs),
    )


def notes(record: Record) -> str:
    return paragraphs(comparison.show_rates(record.figures["pieces"], {}), comparison.spinning(record))


def _latencies(runs: list[Run]) -> str:
    """The table of the newest throughputs and latencies, by load and server."""
    rows = [
        [
            comparison.label(load),
            name,
            number(row["output_tokens_per_second"], 4),
            str(row["requests"] - row["completed"]),
            *(percentiles(row[latency], 1e3, ("p50", "p99")) for latency in ("ttft", "itl")),
        ]
        for load, found in comparison.newest(runs, "served").items()
        for name, row in found.items()
    ]
    return table(("load", "server", "tok/s", "failed", "TTFT p50 / p99, ms", "ITL p50 / p99, ms"), rows)


def _engine_lines(run: Run) -> list[str]:
    return [
        f"{name}: {found['closed']:.1%} of its engine's throughput with the same requests, {found['decode']:.1%} of "
        f"its engine's when {run['streams']} sequences only decode"
        for name, found in run["served_of_engine"].items()
    ]


def _start_line(run: Run) -> str:
    ready = (f"{name} {facts['seconds']:.1f} s" for name, facts in run["stacks"].items())
    return f"Time from the command to the first health check that passed: {', '.join(ready)}"
