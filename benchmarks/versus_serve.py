"""`isthmus bench peer-servers`: `isthmus serve` beside llama-server and vLLM's server, under the same requests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from isthmus.benchmarks.child import BenchError, Child, module
from isthmus.benchmarks.machine import Machine, describe
from isthmus.benchmarks.peer_servers import PeerServer, Sizes, peer_server, version
from isthmus.benchmarks.pieces import Piece, errors, label, merged, newest, rotated, with_comparison
from isthmus.benchmarks.progress import progress_bar
from isthmus.benchmarks.record import Record, results_folder
from isthmus.benchmarks.serve import as_json, load_figures
from isthmus.benchmarks.stacks import STACKS, Installed, Stack, chosen, load_question
from isthmus.benchmarks.statistics import median, number
from isthmus.benchmarks.versus import PAUSE_SECONDS, machine_limits, show_rates, show_ratios, show_spinning
from isthmus.benchmarks.workload import PlannedRequest, poisson_arrivals
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.weights.folder import open_folder

SERVERS = tuple(name for name, stack in STACKS.items() if stack.engine != "transformers")
PROMPTS, COMPLETIONS = (16, 256), (16, 96)
"""Fewest and most tokens, drawn evenly"""
ENGINE_PROMPT, ENGINE_STEPS = 32, 32
"""Of the engine's own decoding, beside which the server's throughput is stated"""


@dataclass(frozen=True)
class PeerServersBench:
    """Sends the same requests to servers that run side by side, one after the other, and compares.

    Prompts of 16 to 256 tokens and completions of 16 to 96, as token ids, streamed, greedy, without prefix caches. At
    each rate they arrive as a Poisson process; in the closed loop --streams are always in flight. In each repetition
    every load is put on every server, in an order that rotates. Ours is also compared with its engine in a process of
    its own, which gets the requests of the closed loop directly and decodes --streams sequences.
    """

    model: Path = Path("models/125m")
    """A published folder; llama.cpp's files lie beside it, as make_gguf.py writes them"""
    stacks: tuple[str, ...] = ("isthmus-bf16", "llama-bf16", "vllm-bf16", "vllm-f32")
    """Whose servers to run"""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Requests a second"""
    seconds: float = 30.0
    """How long requests arrive at each rate"""
    streams: int = 32
    """Of the closed loop; 0 leaves it out"""
    requests: int = 96
    """Of the closed loop"""
    repeats: int = 3
    engine: bool = True
    """Run our engine in the closed loop too, without a server"""
    timeout: float = 300.0
    """Deadline of a request, in seconds; one that misses it has failed"""
    seed: int = 0
    """Of arrivals, lengths and prompts"""
    installed: Installed = field(default_factory=Installed)
    merge: bool = False
    """Add to the result's file what was measured before, on this machine; else replace it"""
    out: Path | None = None
    """Folder for PLATFORM-KIND-SUBJECT.json; default ./benchmarks/results where there is one, else ./bench-results"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        chosen(self.stacks, SERVERS)
        if any(not rate > 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ConfigError("rates must be above 0, and none twice")
        if not self.rates and not self.streams:
            raise ConfigError("rates: without any, streams must be above 0")
        for name, least in (("streams", 0), ("requests", self.streams), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.seconds > 0 or not self.timeout > 0:
            raise ConfigError("seconds and timeout must be above 0")
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"model: {self.model} is not a published model's folder; make_models.py writes two")

    @property
    def loads(self) -> dict[str, float]:
        """Requests a second by the load's name; 0 is the closed loop."""
        closed = {f"closed{self.streams}": 0.0} if self.streams else {}
        return closed | {f"rate{rate:g}": rate for rate in self.rates}


def sizes(bench: PeerServersBench) -> Sizes:
    context = -(-(PROMPTS[1] + COMPLETIONS[1]) // 128) * 128
    return Sizes(max(32, bench.streams), context)


def plan(bench: PeerServersBench, rate: float, turn: int, vocab: int) -> list[PlannedRequest]:
    """The requests of a load and repetition, the same for every server. rate 0: of the closed loop, all at 0."""
    random = np.random.default_rng([bench.seed, round(rate * 1e6), turn])
    times = poisson_arrivals(random, rate, bench.seconds) or [0.0] if rate else [0.0] * bench.requests
    requests = []
    for at in times:
        prompt, completion = (int(random.integers(low, high + 1)) for low, high in (PROMPTS, COMPLETIONS))
        ids = random.integers(min(10, vocab - 1), vocab, prompt).tolist()
        requests.append(PlannedRequest(at, ids, completion, int(random.integers(1 << 32))))
    return requests


Tick = Callable[[], None]


class _Run:
    """One piece while it is measured. A server that fails under a load is left out there, and what it said is kept."""

    def __init__(
        self, bench: PeerServersBench, config: ModelConfig, console: Console, tick: Callable[[], None]
    ) -> None:
        self._bench, self._config, self._console, self._tick = bench, config, console, tick
        self._servers: dict[str, PeerServer] = {}
        self._engines: dict[str, Child] = {}
        self._answers: dict[str, dict[str, list[dict[str, Any]]]] = {load: {} for load in bench.loads}
        self._idle: dict[str, tuple[float, float]] = {}
        self.stacks: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self.engine: dict[str, dict[str, list[float]]] = {}

    def start(self, stack: Stack, running: ExitStack, folder: Path) -> None:
        bench, begun = self._bench, time.perf_counter()
        model, log = bench.model.resolve(), folder / f"{stack.name}.log"
        try:
            server = running.enter_context(peer_server(stack, model, self._config, sizes(bench), bench.installed, log))
            self._servers[stack.name] = server
            seconds = time.perf_counter() - begun
            self.stacks[stack.name] = {"version": version(server), "seconds": seconds}
            self._console.print(f"{stack.name}: ready after {seconds:.1f} s", highlight=False)
            if stack.engine == "isthmus" and bench.engine and bench.streams:
                child = running.enter_context(Child(module("isthmus.benchmarks.engine_child"), folder / "engine.log"))
                size = sizes(bench)
                child.ask("load", **load_question(stack, model, size.sequences, size.context))
                self._engines[stack.name] = child
        except BenchError as error:
            self._failed(stack.name, "load", error)
        self._tick()

    def _failed(self, name: str, where: str, error: BenchError) -> None:
        self.errors.setdefault(name, {})[where] = str(error)
        self._console.print(f"{name}, {where}: {error}", style="red", markup=False, highlight=False)

    def warm_up(self, child: Child) -> None:
        """A few requests at once to each server, which compiles or touches what the first ones need."""
        some = plan(self._bench, 0.0, self._bench.repeats, self._config.vocab_size) if self._bench.requests else []
        for name in list(self._servers):
            try:
                self._send(child, name, some[:8] or [PlannedRequest(0.0, [10] * 16, 16, 0)], 8)
            except BenchError as error:
                self._failed(name, "warm-up", error)
            self._tick()

    def repeat(self, child: Child, turn: int) -> None:
        for load, rate in self._bench.loads.items():
            planned = plan(self._bench, rate, turn, self._config.vocab_size)
            for name in rotated(list(self._servers), turn) if self._servers else ():
                if load not in self.errors.get(name, {}):
                    self._measure(child, load, rate, name, planned)
                self._tick()

    def _measure(self, child: Child, load: str, rate: float, name: str, planned: list[PlannedRequest]) -> None:
        time.sleep(PAUSE_SECONDS)
        try:
            answer = self._send(child, name, planned, 0 if rate else self._bench.streams)
        except BenchError as error:
            self._failed(name, load, error)
            return
        figures = load_figures(answer)
        if figures["completed"] == 0:
            self._failed(name, load, BenchError(f"no request was answered: {figures['failures']}"))
            return
        self._answers[load].setdefault(name, []).append(answer)
        if not self._console.is_terminal:
            rate_done = figures["output_tokens_per_second"]
            self._console.print(f"{load}, {name}: {rate_done:,.1f} tok/s", highlight=False)
        if rate == 0 and name in self._engines:
            try:
                self._measure_engine(name, planned)
            except BenchError as error:
                self._failed(name, "engine", error)
                del self._engines[name]

    def _measure_engine(self, name: str, planned: list[PlannedRequest]) -> None:
        """The same requests without a server, and a decode of as many sequences."""
        child, streams = self._engines[name], self._bench.streams
        random = np.random.default_rng(self._bench.seed)
        prompts = random.integers(10, self._config.vocab_size, (streams, ENGINE_PROMPT)).tolist()
        time.sleep(PAUSE_SECONDS)
        closed = child.ask("closed", requests=as_json(planned), streams=streams)
        time.sleep(PAUSE_SECONDS)
        decode = child.ask("decode", tokens=prompts, steps=ENGINE_STEPS)
        found = self.engine.setdefault(name, {"closed": [], "decode": []})
        found["closed"].append(closed["tokens"] / closed["seconds"])
        found["decode"].append(streams * ENGINE_STEPS / decode["seconds"])

    def _send(self, child: Child, name: str, planned: list[PlannedRequest], streams: int) -> dict[str, Any]:
        """Also notes what processor time the waiting servers took meanwhile."""
        server = self._servers[name]
        target = {"address": server.address, "temperature": 0.0, "timeout": self._bench.timeout}
        others = [other for other in self._servers.values() if other is not server]
        begun, before = time.perf_counter(), [other.cpu_seconds() for other in others]
        fields = {"kind": server.stack.engine, "target": target, "model": server.model}
        answer = child.ask("load", **fields, requests=as_json(planned), streams=streams)
        seconds = time.perf_counter() - begun
        for other, cpu in zip(others, before, strict=True):
            waited, used = self._idle.get(other.stack.name, (0.0, 0.0))
            self._idle[other.stack.name] = (waited + seconds, used + max(0.0, other.cpu_seconds() - cpu))
        return answer

    def figures(self) -> dict[str, Any]:
        """The piece's part that this run measured: throughputs by repetition, and the latencies of all of them."""
        for name, (waited, used) in self._idle.items():
            self.stacks[name]["waiting_share"] = used / waited
        answers = {load: found for load, found in self._answers.items() if found}
        rates = {
            load: {name: [load_figures(a)["output_tokens_per_second"] for a in every] for name, every in found.items()}
            for load, found in answers.items()
        }
        served = {
            load: {name: load_figures(pooled(every)) for name, every in found.items()}
            for load, found in answers.items()
        }
        return {"rates": rates, "served": served, "engine": self.engine, "stacks": self.stacks, "errors": self.errors}


def pooled(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The load generator's answers of several repetitions as one."""
    total = {name: sum(answer[name] for answer in answers) for name in ("seconds", "cpu_seconds")}
    return {"outcomes": [outcome for answer in answers for outcome in answer["outcomes"]], **total}


def served_of_engine(piece: Piece) -> dict[str, dict[str, float]]:
    """Of each of our servers, by stack: the closed loop's throughput as a share of its engine's with the same requests,
    and of its engine's when it only decodes."""
    loads = [load for load in piece["rates"] if load.startswith("closed")]
    closed = piece["rates"][loads[0]] if loads else {}
    return {
        name: {key: median(closed[name]) / median(values) for key, values in found.items()}
        for name, found in piece["engine"].items()
        if name in closed
    }


def run(bench: PeerServersBench, console: Console) -> Record:
    """Measures and returns the record, merged if asked to. Raises ConfigError, BenchError."""
    bench.validate()
    machine = describe()
    config = open_folder(bench.model).config
    stacks = chosen(bench.stacks, SERVERS)
    before = machine_limits()
    total = len(stacks) * (2 + len(bench.loads) * bench.repeats)
    with (
        temporary_folder("isthmus-bench-") as folder,
        progress_bar(console, "servers", total) as tick,
        ExitStack() as running,
    ):
        piece = _Run(bench, config, console, tick)
        for stack in stacks:
            piece.start(stack, running, folder)
        child = running.enter_context(Child(module("isthmus.benchmarks.peer_load"), folder / "load.log"))
        piece.warm_up(child)
        for turn in range(bench.repeats):
            piece.repeat(child, turn)
            if not console.is_terminal:
                console.print(f"repetition {turn + 1} of {bench.repeats}", highlight=False)
        measured = _piece(bench, piece, machine, [before, machine_limits()])
    if not measured["rates"]:
        raise BenchError("every server failed; see above")
    subject = bench.model.resolve().name
    record = Record("peer-servers", subject, machine, dataclasses.asdict(bench), with_comparison([measured]))
    return merged(record, results_folder(bench.out)) if bench.merge else record


def _piece(bench: PeerServersBench, run: _Run, machine: Machine, limits: list[dict[str, float]]) -> Piece:
    about = {"date": machine.date, "commit": machine.commit, "load": machine.load, "limits": limits}
    piece: Piece = {**about, "streams": bench.streams, "seconds": bench.seconds, **run.figures()}
    return {**piece, "served_of_engine": served_of_engine(piece)}


def latency_rows(pieces: list[Piece]) -> list[list[str]]:
    """[load, server, tok/s, failed, TTFT p50 / p99 ms, ITL p50 / p99 ms], newest measurements."""
    pair = lambda summary: " / ".join(  # noqa: E731
        number(None if summary[key] is None else summary[key] * 1e3) for key in ("p50", "p99")
    )
    return [
        [
            label(load),
            name,
            number(row["output_tokens_per_second"], 4),
            str(row["requests"] - row["completed"]),
            pair(row["ttft"]),
            pair(row["itl"]),
        ]
        for load, found in newest(pieces, "served").items()
        for name, row in found.items()
    ]


LATENCY_HEAD = ("load", "server", "tok/s", "failed", "TTFT p50 / p99, ms", "ITL p50 / p99, ms")


def show(record: Record, console: Console) -> None:
    """Prints the record as tables."""
    pieces = record.figures["pieces"]
    show_rates(pieces, console, f"{record.subject}, tok/s of completions: medians")
    show_ratios(record.figures["compared"], console)
    table = Table(*LATENCY_HEAD)
    for row in latency_rows(pieces):
        table.add_row(*row)
    console.print(table)
    for piece in pieces:
        for line in (*engine_lines(piece), start_line(piece)):
            console.print(line, highlight=False)
    show_spinning(pieces[-1], console)
    for name, where, message in errors(pieces):
        console.print(f"{name}, {where}: {message.splitlines()[0]}", style="red", markup=False, highlight=False)


def engine_lines(piece: Piece) -> list[str]:
    return [
        f"{name}: {found['closed']:.1%} of its engine's throughput with the same requests, {found['decode']:.1%} of "
        f"its engine's when {piece['streams']} sequences only decode"
        for name, found in piece["served_of_engine"].items()
    ]


def start_line(piece: Piece) -> str:
    ready = (f"{name} {facts['seconds']:.1f} s" for name, facts in piece["stacks"].items())
    return f"From the command to the first health check that passed: {', '.join(ready)}"
