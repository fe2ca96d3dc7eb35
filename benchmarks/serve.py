"""`isthmus bench serve`: a server under load from another process, and what serving costs the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import median, number, paragraphs, percent, percentiles, table_of
from isthmus.benchmarks.load import Target, as_json, ask_load, load_figures, server_counters, server_facts
from isthmus.benchmarks.machine import Machine, describe
from isthmus.benchmarks.processes import BenchError, Child, module
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.servers import isthmus_server, serve_flags
from isthmus.benchmarks.workload import Lengths, PlannedRequest, all_at_once, open_loop
from isthmus.client import Client, read_token
from isthmus.errors import ConfigError, RequestError
from isthmus.model.parameter import Dtype
from isthmus.model.process.cleaning import temporary_folder
from isthmus.serve.engine.config import EngineConfig

DEFAULT_LOADS = (0.25, 0.5, 0.75, 0.9)
"""The rates that are measured if none are given, as shares of the rate at which requests end when all come at once"""


@dataclass(frozen=True)
class ServeBench(Bench):
    """Loads a server over gRPC from a process of its own, and compares it with the engine called directly.

    First, --compare-requests requests are sent at once, in turns through the server and straight to an engine over the
    same compiled programs: the ratio of the medians is what gRPC, detokenizing and streaming cost. Then, for each rate,
    requests arrive as a Poisson process for --seconds, and every latency counts from a request's arrival. TTFT is the
    time to the first token, ITL the time from one message with tokens to the next, TPOT a request's mean time per token
    after its first, E2E the time to the end of the stream. The client shares the machine with the server.
    """

    preset: str = "125m"
    """Size of a model with random weights, when neither --model nor --address is given"""
    vocab_size: int = 0
    """Vocabulary of the model with random weights; 0 is the preset's, or 32000"""
    model: Path | None = None
    """A model folder, as `isthmus train` writes it"""
    address: str | None = None
    """HOST:PORT of a running server, which can't be compared with its engine"""
    auth_token_file: Path | None = None
    """For --address: a file that holds the server's token"""
    tls_ca: Path | None = None
    """For --address, if the server has --tls-cert: a PEM file with the certificate of its authority, or its own"""
    rates: tuple[float, ...] = ()
    """Arrival rates, in requests per second; by default 25, 50, 75 and 90 % of what ended when all came at once"""
    seconds: float = 60.0
    """How long requests arrive at each rate"""
    lengths: Lengths = field(default_factory=Lengths)
    temperature: float = 1.0
    """Temperature at which tokens are drawn; 0 is greedy"""
    seed: int = 0
    """Seed of arrivals, lengths, prompts and drawn tokens"""
    timeout: float = 600.0
    """Deadline of a request, in seconds; one that misses it has failed"""
    compare_rounds: int = 3
    """Turns in which server and engine are compared; 0 leaves the comparison out"""
    compare_requests: int = 96
    """Requests that are sent in a turn of the comparison"""
    dtype: Dtype | None = None
    """Dtype in which the model computes; by default bfloat16, and float32 on CPU"""
    tp: int = 1
    """Devices to split the model over"""
    kernels: str = "auto"
    """Kernels that compute, as for `isthmus serve`: auto, reference, or the name of kernels such as cpu"""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(draft_rows=0))

    def validate(self) -> None:
        self.lengths.validate()
        if self.model is not None and self.address is not None:
            raise ConfigError("model: a running server at --address has a model already")
        self.check_positive("seconds", "timeout")
        if any(not rate > 0 for rate in self.rates):
            raise ConfigError("rates must be above 0")
        self.check_least(vocab_size=0, compare_rounds=0)
        if not 1 <= self.compare_requests <= self.engine.max_waiting:
            raise ConfigError(f"compare_requests must be 1 to engine.max_waiting={self.engine.max_waiting}")


class _Load:
    """A load generator and the server that it loads, for whose vocabulary and context requests are drawn."""

    def __init__(self, bench: ServeBench, child: Child, address: str, token: str | None = None) -> None:
        """Raises ConfigError for a file of --tls-ca that can't be read, BenchError for a server that doesn't answer."""
        self._bench, self._child = bench, child
        tls_ca = None if bench.tls_ca is None else str(bench.tls_ca)
        self._target = Target(address, token, tls_ca, bench.temperature, bench.timeout)
        self.facts = self._ask(server_facts)
        self._sizes = (self.facts["vocab_size"], self.facts["context_length"])

    def at_once(self, round_: int) -> list[PlannedRequest]:
        bench = self._bench
        return all_at_once(bench.seed, round_, bench.compare_requests, bench.lengths, *self._sizes)

    def at_rate(self, rate: float) -> list[PlannedRequest]:
        bench = self._bench
        return open_loop(bench.seed, rate, bench.seconds, bench.lengths, *self._sizes)

    def send(self, requests: list[PlannedRequest]) -> dict[str, Any]:
        return load_figures(ask_load(self._child, self._target, requests))

    def counters(self) -> dict[str, Any]:
        return self._ask(server_counters)

    def _ask(self, question: Callable[[Client], dict[str, Any]]) -> dict[str, Any]:
        target = self._target
        try:
            with Client(target.address, token=target.token, tls_ca=target.tls_ca) as client:
                return question(client)
        except OSError as error:
            raise ConfigError(f"tls_ca: {error}") from None
        except RequestError as error:
            raise BenchError(f"{target.address}: {error.code}: {error.message}") from None


def compare(bench: ServeBench, load: _Load, engine: Child, tick: Tick) -> dict[str, Any]:
    """Sends the same requests through the server and to the engine alone, in turns whose order alternates.

    A quarter of a round before the first warms up both and doesn't count. Raises BenchError when a request fails.
    """
    answers: list[dict[str, Any]] = []
    rates: list[float] = []
    for round_ in range(bench.compare_rounds + 1):
        requests = load.at_once(round_)[: bench.compare_requests if round_ else -(-bench.compare_requests // 4)]
        for side in ("server", "engine") if round_ % 2 else ("engine", "server"):
            if side == "engine":
                fields = {"streams": len(requests), "temperature": bench.temperature}
                alone = engine.ask("closed", requests=as_json(requests), **fields)
                rates += [alone["tokens"] / alone["seconds"]] if round_ else []
            else:
                answer = load.send(requests)
                if failed := sum(answer["failures"].values()):
                    raise BenchError(f"{failed} requests failed on the server: nothing can be compared")
                answers += [answer] if round_ else []
            tick()
    through = [answer["output_tokens_per_second"] for answer in answers]
    return {
        "requests": bench.compare_requests,
        "server_rounds": through,
        "engine_rounds": rates,
        "server_tokens_per_second": median(through),
        "engine_tokens_per_second": median(rates),
        "overhead": 1 - median(through) / median(rates),
        "server_requests_per_second": median([answer["requests_per_second"] for answer in answers]),
        "client_cpu_share": median([answer["client_cpu_share"] for answer in answers]),
    }


def sweep(load: _Load, rates: tuple[float, ...], tick: Tick) -> list[dict[str, Any]]:
    """Measures one rate after the other; the server is idle between them."""
    rows = []
    for rate in rates:
        before = load.counters()
        row = load.send(load.at_rate(rate))
        after = load.counters()
        rows.append({"rate": rate, **row, "server": {name: after[name] - before[name] for name in after}})
        tick()
    return rows


def run(bench: ServeBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError, BenchError."""
    with (
        temporary_folder("isthmus-bench-") as folder,
        Child(module("isthmus.benchmarks.load"), folder / "load.log") as child,
    ):
        if bench.address is not None:
            return _run_remote(bench, console, child, bench.address)
        return _run_local(bench, console, child, folder)


def _run_local(bench: ServeBench, console: Console, child: Child, folder: Path) -> Record:
    compared: dict[str, Any] | None = None
    with Child(module("isthmus.benchmarks.engine"), folder / "engine.log") as engine:
        model = bench.model
        if model is None:
            model = folder / bench.preset
            console.print(f"writing {bench.preset} with random weights", highlight=False)
            engine.ask("write", folder=str(model), name=bench.preset, vocab_size=bench.vocab_size)
        about = engine.ask("machine", dtype=bench.dtype, devices=bench.tp)
        flags = serve_flags(model, bench.dtype, bench.tp, bench.kernels, bench.engine)
        if bench.compare_rounds:
            console.print("starting a server to compare with its engine")
            port = engine.ask("serve", flags=[*flags, "--port", "0"])["port"]
            load = _Load(bench, child, f"127.0.0.1:{port}")
            with progress_bar(console, "server and engine in turns", 2 * bench.compare_rounds + 2) as tick:
                compared = compare(bench, load, engine, tick)
    console.print("starting `isthmus serve`")
    with isthmus_server(flags, folder / "serve.log") as server:
        load = _Load(bench, child, server.address)
        rates = _measure_rates(bench, console, load, compared)
    figures = {"limits": about["limits"], "server": load.facts, "compare": compared, "rates": rates}
    return Record("serve", model.resolve().name, Machine(**about["machine"]), dataclasses.asdict(bench), figures)


def _run_remote(bench: ServeBench, console: Console, child: Child, address: str) -> Record:
    try:
        token = None if bench.auth_token_file is None else read_token(bench.auth_token_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"auth_token_file: {error}") from None
    load = _Load(bench, child, address, token)
    rates, facts = _measure_rates(bench, console, load, None), load.facts
    machine = describe(facts["platform"], facts["devices"])
    figures = {"limits": None, "server": facts, "compare": None, "rates": rates}
    return Record("serve", facts["name"], machine, dataclasses.asdict(bench), figures)


def _measure_rates(
    bench: ServeBench, console: Console, load: _Load, compared: dict[str, Any] | None
) -> list[dict[str, Any]]:
    rates = bench.rates
    if not rates:
        at_once = compared["server_requests_per_second"] if compared else _saturated(load, console)
        rates = tuple(round(at_once * share, 3) for share in DEFAULT_LOADS)
    with progress_bar(console, f"rates {', '.join(f'{rate:g}' for rate in rates)} requests/s", len(rates)) as tick:
        return sweep(load, rates, tick)


def _saturated(load: _Load, console: Console) -> float:
    """The requests per second that end when all are sent at once. Their prompts don't come again at the rates."""
    console.print("sending all requests at once, to choose the rates")
    return float(load.send(load.at_once(0))["requests_per_second"])


def show(record: Record, _: Qualities) -> str:
    figures = record.figures
    facts, lengths = figures["server"], record.config["lengths"]
    prompt, output = (lengths[name] * lengths["scale"] for name in ("prompt_mean", "output_mean"))
    text = (
        f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, {facts['max_sequences']} sequences. Requests "
        f"arrive as a Poisson process; prompts of {prompt:.0f} and completions of {output:.0f} tokens in the mean, "
        f"lognormal, before the context of {facts['context_length']} cuts them. Latencies are p50 / p90 / p99."
    )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "requests/s": lambda row: f"{row['rate']:g}",
        "tok/s": lambda row: number(row["output_tokens_per_second"]),
        "failed": lambda row: str(row["requests"] - row["completed"]),
        "TTFT, ms": lambda row: percentiles(row["ttft"], 1e3),
        "ITL, ms": lambda row: percentiles(row["itl"], 1e3),
        "TPOT, ms": lambda row: percentiles(row["tpot"], 1e3),
        "E2E, s": lambda row: percentiles(row["e2e"], 1),
    }
    rates = table_of(figures["rates"], columns) if figures["rates"] else ""
    return paragraphs(text, rates, _comparison(figures["compare"]))


def _comparison(compared: dict[str, Any] | None) -> str:
    if compared is None:
        return ""
    return (
        f"With {compared['requests']} requests at once: {number(compared['server_tokens_per_second'], 4)} tok/s "
        f"through the server and {number(compared['engine_tokens_per_second'], 4)} on the engine alone, so gRPC and "
        f"streaming cost {percent(compared['overhead'])} (medians of {len(compared['server_rounds'])} turns each). "
        f"That includes the client, which takes {percent(compared['client_cpu_share'])} of a core."
    )


def notes(record: Record) -> str:
    done = (f"{row['requests_per_second']:.3g} of {row['rate']:g}" for row in record.figures["rates"])
    return f"Requests completed per second, of those sent: {', '.join(done)}."
