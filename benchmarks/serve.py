"""`isthmus bench serve`: a server under load from another process, and what serving costs the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isthmus.benchmarks.child import Child, module
from isthmus.benchmarks.machine import Machine, describe_remote
from isthmus.benchmarks.progress import progress_bar
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.servers import Served, serve_flags, served
from isthmus.benchmarks.statistics import median, percentiles, summarize
from isthmus.benchmarks.workload import Lengths, PlannedRequest, all_at_once, open_loop
from isthmus.client import read_token, tls_credentials
from isthmus.errors import ConfigError
from isthmus.model.config import Dtype
from isthmus.model.process.cleaning import temporary_folder
from isthmus.serve.engine.config import EngineConfig

DEFAULT_LOADS = (0.25, 0.5, 0.75, 0.9)
"""Of the saturated request rate, when no rates are given"""


@dataclass(frozen=True)
class ServeBench:
    """Loads a server over gRPC from a process of its own, and compares it with the engine called directly.

    First, all of --compare-requests are sent at once, through the server and straight to an engine over the same
    compiled programs, in turns: the ratio of the medians is what gRPC, detokenizing and streaming cost. Then, for each
    rate, requests arrive as a Poisson process for --seconds, and every latency counts from a request's arrival. TTFT is
    the time to the first token, ITL the time from one message with tokens to the next, TPOT a request's mean time a
    token after its first, E2E the time to the end of the stream. The client shares the machine with the server.
    """

    preset: str = "125m"
    """Size of a model of random weights, when neither --model nor --address is given"""
    vocab_size: int = 0
    """Of that model; 0 is the preset's, or 32000"""
    model: Path | None = None
    """A model folder, as `isthmus train` writes it"""
    address: str | None = None
    """HOST:PORT of a running server; there is no comparison with its engine then"""
    auth_token_file: Path | None = None
    """For --address"""
    tls_ca: Path | None = None
    """For --address, of a server with --tls-cert: the certificate, in PEM, of who signed its, or its own"""
    rates: tuple[float, ...] = ()
    """Requests a second; default 25, 50, 75 and 90 % of what the server finished when all came at once"""
    seconds: float = 60.0
    """How long requests arrive at each rate"""
    lengths: Lengths = field(default_factory=Lengths)
    temperature: float = 1.0
    seed: int = 0
    """Of arrivals, lengths, prompts and draws"""
    timeout: float = 600.0
    """Deadline of a request, in seconds; one that misses it has failed"""
    compare_rounds: int = 3
    """Turns of server and engine; 0 leaves the comparison out"""
    compare_requests: int = 96
    """Requests of a turn"""
    dtype: Dtype | None = None
    """Default bfloat16, and float32 on CPU"""
    tp: int = 1
    """Devices to split the model over"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: Path | None = None
    """Folder for PLATFORM-KIND-SUBJECT.json; default ./benchmarks/results where there is one, else ./bench-results"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        self.lengths.validate()
        if self.model is not None and self.address is not None:
            raise ConfigError("model: a running server at --address has a model already")
        if not self.seconds > 0 or not self.timeout > 0:
            raise ConfigError("seconds and timeout must be above 0")
        if any(not rate > 0 for rate in self.rates):
            raise ConfigError("rates must be above 0")
        if self.compare_rounds < 0:
            raise ConfigError(f"compare_rounds={self.compare_rounds} must be at least 0")
        if not 1 <= self.compare_requests <= self.engine.max_waiting:
            raise ConfigError(f"compare_requests must be 1 to engine.max_waiting={self.engine.max_waiting}")


class _Load:
    """The load generator, the server it is pointed at, and how the requests for it are drawn."""

    def __init__(self, bench: ServeBench, child: Child, server: Served) -> None:
        self._bench, self._child = bench, child
        target = dataclasses.asdict(server)
        self._target = {**target, "temperature": bench.temperature, "timeout": bench.timeout}
        self.facts = child.ask("facts", target=self._target)
        self._sizes = (self.facts["vocab_size"], self.facts["context_length"])

    def at_once(self, round_: int) -> list[PlannedRequest]:
        bench = self._bench
        return all_at_once(bench.seed, round_, bench.compare_requests, bench.lengths, *self._sizes)

    def at_rate(self, rate: float) -> list[PlannedRequest]:
        bench = self._bench
        return open_loop(bench.seed, rate, bench.seconds, bench.lengths, *self._sizes)

    def send(self, requests: list[PlannedRequest]) -> dict[str, Any]:
        return self._child.ask("load", target=self._target, requests=as_json(requests))

    def counters(self) -> dict[str, Any]:
        return self._child.ask("counters", target=self._target)


def as_json(requests: list[PlannedRequest]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(request) for request in requests]


def load_figures(answer: dict[str, Any]) -> dict[str, Any]:
    """Throughput, latencies and failures of what the load generator saw. Failed requests count as failures only."""
    outcomes = answer["outcomes"]
    whole = [o for o in outcomes if o["error"] is None]
    failures: dict[str, int] = {}
    for outcome in outcomes:
        if outcome["error"] is not None:
            failures[outcome["error"]] = failures.get(outcome["error"], 0) + 1
    tokens = sum(o["tokens"] for o in whole)
    several = [o for o in whole if o["tokens"] > 1]
    samples = {
        "ttft": [o["first"] for o in whole if o["first"] is not None],
        "itl": [gap for o in whole for gap in o["gaps"]],
        "tpot": [sum(o["gaps"]) / (o["tokens"] - 1) for o in several],
        "e2e": [o["end"] for o in whole],
        "send_lag": [o["lag"] for o in outcomes],
    }
    return {
        "requests": len(outcomes),
        "completed": len(whole),
        "failures": failures,
        "seconds": answer["seconds"],
        "requests_per_second": len(whole) / answer["seconds"],
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / answer["seconds"],
        "tokens_per_message": tokens / max(1, sum(o["messages"] for o in whole)),
        "client_cpu_share": answer["cpu_seconds"] / answer["seconds"],
        **{name: dataclasses.asdict(summarize(values)) for name, values in samples.items()},
    }


def compare(bench: ServeBench, load: _Load, host: Child, tick: Callable[[], None]) -> dict[str, Any]:
    """The same requests through the server and on the engine alone, in turns whose order alternates.

    A quarter of a round before the first warms both and doesn't count.
    """
    rounds: dict[str, list[float]] = {"server": [], "engine": []}
    finished, cpu = [], []
    for round_ in range(bench.compare_rounds + 1):
        requests = load.at_once(round_)[: bench.compare_requests if round_ else -(-bench.compare_requests // 4)]
        for side in ("server", "engine") if round_ % 2 else ("engine", "server"):
            if side == "server":
                answer = load_figures(load.send(requests))
                rate, failed = answer["output_tokens_per_second"], sum(answer["failures"].values())
            else:
                answer = host.ask("direct", requests=as_json(requests), temperature=bench.temperature)
                rate, failed = answer["tokens"] / answer["seconds"], answer["failed"]
            if failed:
                raise ConfigError(f"{failed} requests failed on the {side}: nothing can be compared")
            if round_:
                rounds[side].append(rate)
                if side == "server":
                    finished.append(answer["requests_per_second"])
                    cpu.append(answer["client_cpu_share"])
            tick()
    server, engine = median(rounds["server"]), median(rounds["engine"])
    return {
        "requests": bench.compare_requests,
        "server_rounds": rounds["server"],
        "engine_rounds": rounds["engine"],
        "server_tokens_per_second": server,
        "engine_tokens_per_second": engine,
        "overhead": 1 - server / engine,
        "server_requests_per_second": median(finished),
        "client_cpu_share": median(cpu),
    }


def sweep(bench: ServeBench, load: _Load, rates: tuple[float, ...], tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Every rate in turn; the server is idle between them."""
    rows = []
    for rate in rates:
        before = load.counters()
        row = load_figures(load.send(load.at_rate(rate)))
        after = load.counters()
        rows.append({"rate": rate, **row, "server": {name: after[name] - before[name] for name in after}})
        tick()
    return rows


def run(bench: ServeBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError, BenchError."""
    bench.validate()
    with (
        temporary_folder("isthmus-bench-") as folder,
        Child(module("isthmus.benchmarks.load"), folder / "load.log") as child,
    ):
        if bench.address is not None:
            return _run_remote(bench, console, child, bench.address)
        return _run_local(bench, console, child, folder)


def _run_local(bench: ServeBench, console: Console, child: Child, folder: Path) -> Record:
    compared: dict[str, Any] | None = None
    with Child(module("isthmus.benchmarks.host"), folder / "host.log") as host:
        model = bench.model
        if model is None:
            model = folder / bench.preset
            console.print(f"writing {bench.preset} with random weights", highlight=False)
            host.ask("write", folder=str(model), name=bench.preset, vocab_size=bench.vocab_size)
        about = host.ask("machine", dtype=bench.dtype, devices=bench.tp)
        flags = serve_flags(model, bench.dtype, bench.tp, bench.engine)
        if bench.compare_rounds:
            console.print("starting a server to compare with its engine")
            port = host.ask("start", flags=flags)["port"]
            load = _Load(bench, child, Served(f"127.0.0.1:{port}"))
            with progress_bar(console, "server and engine in turns", 2 * bench.compare_rounds + 2) as tick:
                compared = compare(bench, load, host, tick)
    console.print("starting `isthmus serve`")
    with served(flags, folder / "serve.log") as server:
        rates, facts = _measure_rates(bench, console, child, server, compared)
    figures = {"limits": about["limits"], "server": facts, "compare": compared, "rates": rates}
    return Record("serve", model.resolve().name, Machine(**about["machine"]), dataclasses.asdict(bench), figures)


def _run_remote(bench: ServeBench, console: Console, child: Child, address: str) -> Record:
    try:
        token = None if bench.auth_token_file is None else read_token(bench.auth_token_file)
        if bench.tls_ca is not None:
            tls_credentials(bench.tls_ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"auth_token_file, tls_ca: {error}") from None
    server = Served(address, token, None if bench.tls_ca is None else str(bench.tls_ca))
    rates, facts = _measure_rates(bench, console, child, server, None)
    machine = describe_remote(facts["platform"], facts["devices"])
    figures = {"limits": None, "server": facts, "compare": None, "rates": rates}
    return Record("serve", facts["name"], machine, dataclasses.asdict(bench), figures)


def _measure_rates(
    bench: ServeBench, console: Console, child: Child, server: Served, compared: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    load = _Load(bench, child, server)
    rates = bench.rates
    if not rates:
        # A round of its own when nothing was compared; its prompts are none that the rates will send.
        at_once = compared["server_requests_per_second"] if compared else _saturate(load, console)
        rates = tuple(round(at_once * share, 3) for share in DEFAULT_LOADS)
    with progress_bar(console, f"rates {', '.join(f'{rate:g}' for rate in rates)} requests/s", len(rates)) as tick:
        return sweep(bench, load, rates, tick), load.facts


def _saturate(load: _Load, console: Console) -> float:
    console.print("sending all at once, to find the rates")
    return float(load_figures(load.send(load.at_once(0)))["requests_per_second"])


def show(record: Record, console: Console) -> None:
    """Prints the record as tables."""
    figures = record.figures
    facts = figures["server"]
    console.print(
        f"{record.machine.device}, {record.machine.cores} cores; {facts['name']}, {facts['parameters'] / 1e6:.1f}M "
        f"parameters, {facts['dtype']}, {facts['max_sequences']} sequences",
        highlight=False,
    )
    if (compared := figures["compare"]) is not None:
        console.print(
            f"all at once: {compared['server_tokens_per_second']:,.1f} tok/s through the server, "
            f"{compared['engine_tokens_per_second']:,.1f} on the engine: serving costs {compared['overhead']:.1%}; "
            f"the client takes {compared['client_cpu_share']:.0%} of a core",
            highlight=False,
        )
    table = Table("requests/s", "done/s", "tok/s", "failed", "TTFT p50/p90/p99 ms", "ITL ms", "TPOT ms", "E2E s")
    for row in figures["rates"]:
        table.add_row(
            f"{row['rate']:g}",
            f"{row['requests_per_second']:.3g}",
            f"{row['output_tokens_per_second']:,.1f}",
            str(row["requests"] - row["completed"]),
            *(percentiles(row[name], 1e3) for name in ("ttft", "itl", "tpot")),
            percentiles(row["e2e"], 1),
        )
    console.print(table)
