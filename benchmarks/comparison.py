"""Comparing stacks: how one run measures them in turns, what several runs add up to, and how that is shown.

A result holds runs, under "pieces". Each has both sides in it, and no ratio crosses two of them. A run holds `rates`,
tokens a second by cell, stack and repetition: {"decode8": {"llama-q8_0": [...]}}. A cell is one thing to measure.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import listed, median, number, paragraphs, table, table_of
from isthmus.benchmarks.machine import Machine, describe
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.record import Record, results_folder
from isthmus.benchmarks.stacks import CLASSES, STACKS, Installed, Sizes, Stack, Start
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.weights.folder import open_folder

PAUSE_SECONDS = 0.3
"""Between turns, until the worker threads of the last one sleep"""
SPINS = 0.05
"""A waiting process that takes more of a core than this disturbs the others"""

Run = dict[str, Any]


@dataclass(frozen=True)
class ComparisonBench(Bench):
    """What every comparison of stacks is told."""

    model: Path = Path("models/125m")
    """A published folder; llama.cpp's files lie beside it, as make_gguf.py writes them"""
    seed: int = 0
    """What prompts, and lengths and arrivals of requests, are drawn from"""
    installed: Installed = field(default_factory=Installed)
    merge: bool = False
    """Add to the result's file what was measured before, on this machine; else replace it"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"model: {self.model} is not a published model's folder; make_models.py writes two")

    def start(self, stack: Stack, config: ModelConfig, sizes: Sizes) -> Start:
        return Start(stack, self.model.resolve(), config, sizes, self.installed)


class Idle:
    """What a process takes of the processor while it isn't asked anything."""

    def __init__(self, cpu_seconds: Callable[[], float]) -> None:
        """cpu_seconds: processor time that it has taken until now."""
        self._cpu_seconds = cpu_seconds
        self._busy = self._busy_cpu = 0.0
        self._begun = time.perf_counter(), cpu_seconds()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """It is asked something meanwhile."""
        start, cpu = time.perf_counter(), self._cpu_seconds()
        try:
            yield
        finally:
            self._busy += time.perf_counter() - start
            self._busy_cpu += self._cpu_seconds() - cpu

    def share(self) -> float | None:
        """In cores; None when it was always asked, or has died."""
        start, cpu = self._begun
        idle = time.perf_counter() - start - self._busy
        used = self._cpu_seconds() - cpu - self._busy_cpu
        return max(0.0, used / idle) if idle > 0 and used > -0.1 else None


class Side(Protocol):
    """A stack that is ready to be measured."""

    facts: dict[str, Any]
    """What the result says of it: `version` and the `seconds` it took to start, at least"""
    idle: Idle


class Turns:
    """One run while it is measured. A side that fails in a cell is left out there, and what it said is kept."""

    def __init__(self, cells: Sequence[str], console: Console, tick: Tick) -> None:
        self._cells, self._console, self._tick = cells, console, tick
        self._sides: dict[str, Side] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self.rates: dict[str, dict[str, list[float]]] = {cell: {} for cell in cells}

    def start(self, stack: Stack, start: Callable[[], Side]) -> None:
        """Adds the side that start() makes, if it does."""
        with self._kept(stack.name, "load"):
            side = self._sides[stack.name] = start()
            self._console.print(
                f"{stack.name}: {side.facts['version']}, ready after {side.facts['seconds']:.1f} s", highlight=False
            )

    def each(self, where: str, do: Callable[[str, Any], None], turn: int = 0) -> None:
        """do(name, side) for every side that has not failed there, in the turn's order; it may raise BenchError."""
        for name in rotated(list(self._sides), turn):
            if where in self.errors.get(name, {}):
                self._tick()
                continue
            with self._kept(name, where):
                do(name, self._sides[name])

    def repeat(self, turns: int, measure: Callable[[str, int, str, Any], float], after: Tick = lambda: None) -> None:
        """measure(cell, turn, name, side) gives tokens a second, for every cell and side in each turn; after() ends a
        turn."""
        for turn in range(turns):
            for cell in self._cells:

                def one(name: str, side: Side, cell: str = cell, turn: int = turn) -> None:
                    time.sleep(PAUSE_SECONDS)
                    rate = measure(cell, turn, name, side)
                    self.rates[cell].setdefault(name, []).append(rate)

                self.each(cell, one, turn)
            after()
            self.log(f"repetition {turn + 1} of {turns}")

    @contextmanager
    def _kept(self, name: str, where: str) -> Iterator[None]:
        try:
            yield
        except BenchError as error:
            self.fail(name, where, error)
        self._tick()

    def fail(self, name: str, where: str, error: BenchError) -> None:
        self.errors.setdefault(name, {})[where] = str(error)
        self._console.print(f"{name}, {where}: {error}", style="red", markup=False, highlight=False)

    def log(self, text: str) -> None:
        """Prints a line where no progress bar shows how far the run is."""
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def figures(self, machine: Machine, limits: list[dict[str, float]]) -> Run:
        """limits: the machine's, before and after. Raises BenchError when nothing was measured."""
        if not any(self.rates.values()):
            raise BenchError("every stack failed; see above")
        return {
            **{name: getattr(machine, name) for name in ("date", "commit", "load")},
            "limits": limits,
            "stacks": {name: {**side.facts, "waiting_share": side.idle.share()} for name, side in self._sides.items()},
            "errors": self.errors,
            "rates": {cell: rates for cell, rates in self.rates.items() if rates},
        }


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: each begins one further, and every second one goes backwards, so that nobody always runs
    after the same other."""
    start = turn % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order


@dataclass(frozen=True)
class Session:
    """What one run has while it measures."""

    turns: Turns
    stacks: list[Stack]
    config: ModelConfig
    """The model's"""
    children: ExitStack
    """Ends every process that the run started"""
    folder: Path
    """For logs; it is gone afterwards"""
    machine: Machine


def run_comparison(
    kind: str,
    bench: ComparisonBench,
    stacks: list[Stack],
    cells: Sequence[str],
    amount: int,
    console: Console,
    measure: Callable[[Session], Run],
) -> Record:
    """Measures and returns the record, merged if asked to. amount: what the progress bar counts to. Raises ConfigError,
    BenchError."""
    machine = describe()
    config = open_folder(bench.model).config
    with (
        temporary_folder("isthmus-bench-") as folder,
        progress_bar(console, kind, amount) as tick,
        ExitStack() as children,
    ):
        run = measure(Session(Turns(cells, console, tick), stacks, config, children, folder, machine))
    record = Record(kind, bench.model.resolve().name, machine, asdict(bench), with_comparison([run]))
    return merged(record, results_folder(bench.out)) if bench.merge else record


# what several runs add up to


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each cell and class that Isthmus and a peer of the class had in one run.

    For each peer the newest run with both counts. `ratio` is of medians, `low` and `high` are the extremes of a
    repetition's own; the row's peer is the one that Isthmus does worst against.
    """
    rows = []
    for cell in cells(runs):
        for weights in CLASSES:
            members = [stack for stack in STACKS.values() if stack.weights == weights]
            pairs = [
                pair
                for ours in (stack.name for stack in members if stack.engine == "isthmus")
                for theirs in (stack.name for stack in members if stack.engine != "isthmus")
                if (pair := _newest_pair(runs, cell, ours, theirs)) is not None
            ]
            if pairs:
                worst = min(pairs, key=lambda pair: pair["ratio"])
                rows.append({"cell": cell, "class": weights, **worst, "pairs": pairs})
    return rows


def cells(runs: Sequence[Run]) -> list[str]:
    """Every run's cells, in the order they came."""
    return list(dict.fromkeys(cell for run in runs for cell in run["rates"]))


def _newest_pair(runs: Sequence[Run], cell: str, ours: str, theirs: str) -> dict[str, Any] | None:
    for run in reversed(runs):
        found = run["rates"].get(cell, {})
        rates, peer_rates = found.get(ours), found.get(theirs)
        if rates and peer_rates:
            each = [rate / peer for rate, peer in zip(rates, peer_rates, strict=False)]
            return {
                "ours": ours,
                "peer": theirs,
                "rate": median(rates),
                "peer_rate": median(peer_rates),
                "ratio": median(rates) / median(peer_rates),
                "low": min(each),
                "high": max(each),
                "repeats": len(each),
            }
    return None


def newest(runs: Sequence[Run], key: str = "rates") -> dict[str, dict[str, Any]]:
    """What the newest run with a value for it says, by cell and stack; stacks in the order of the table."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells(runs):
        values: dict[str, Any] = {}
        for run in runs:
            values.update({name: value for name, value in run[key].get(cell, {}).items() if value not in ([], None)})
        found[cell] = {name: values[name] for name in STACKS if name in values}
    return found


def errors(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(stack, where, message) of what failed and has not worked in a later run."""
    left: dict[tuple[str, str], str] = {}
    for run in runs:
        for name in run["stacks"]:
            left.pop((name, "load"), None)
        for cell, rates in run["rates"].items():
            for name in rates:
                left.pop((name, cell), None)
        for name, places in run["errors"].items():
            left.update({(name, where): message for where, message in places.items()})
    return [(name, where, message) for (name, where), message in left.items()]


def merged(record: Record, folder: Path) -> Record:
    """`record`, its run added to those of the file that it would replace.

    Raises ConfigError when that file is of another machine.
    """
    before = record.predecessor(folder)
    if before is None:
        return record
    for name in ("device", "cores", "platform"):
        old, new = getattr(before.machine, name), getattr(record.machine, name)
        if old != new:
            raise ConfigError(f"merge: {record.stem}.json in {folder} is of another machine: {name} {old}, not {new}")
    return record.with_figures(**with_comparison([*before.figures["pieces"], *record.figures["pieces"]]))


def with_comparison(runs: list[Run]) -> dict[str, Any]:
    """The figures of a record."""
    return {"pieces": runs, "compared": compare(runs)}


# how it is shown


def label(cell: str) -> str:
    """A cell in words."""
    words = {"prefill": "prompt of {} tokens", "decode": "decode, {} sequences", "closed": "{} streams"}
    words["rate"] = "{} requests/s"
    for prefix, text in words.items():
        if cell.startswith(prefix):
            return text.format(cell.removeprefix(prefix)).replace(" 1 sequences", " 1 sequence")
    return cell


def show_ratios(record: Record, qualities: Qualities) -> str:
    """The table of Isthmus' ratio to the fastest peer."""

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tok/s": lambda row: label(row["cell"]),
        "weights": lambda row: row["class"],
        "Isthmus": lambda row: number(row["rate"], 4),
        "fastest peer": lambda row: row["peer"],
        "its tok/s": lambda row: number(row["peer_rate"], 4),
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "repetitions'": lambda row: f"{row['low']:.2f} to {row['high']:.2f} of {row['repeats']}",
    }
    for model, lost in qualities.items():
        columns[f"KL, {model}: ours / its"] = partial(_lost, lost)
    return table_of(record.figures["compared"], columns)


def _lost(lost: dict[str, float], row: dict[str, Any]) -> str:
    """KL divergences of both sides of a ratio."""
    return " / ".join(number(lost.get(row[side]), 2) for side in ("ours", "peer"))


def show_rates(runs: Sequence[Run], qualities: Qualities) -> str:
    """The table of every stack's median."""
    found = newest(runs)
    rows = [
        [
            name,
            *(number(median(rates[name]), 4) if name in rates else "" for rates in found.values()),
            *(number(lost.get(name), 2) for lost in qualities.values()),
        ]
        for name in STACKS
        if any(name in rates for rates in found.values())
    ]
    return table(["", *map(label, found), *(f"KL, {model}" for model in qualities)], rows)


def show_conditions(runs: Sequence[Run]) -> str:
    """What ran, under which conditions, and what did not."""
    versions = {re.sub(r", [^ ]*\.gguf", "", facts["version"]) for run in runs for facts in run["stacks"].values()}
    limits = [side for run in runs for side in run["limits"]]
    bandwidth, flops = (
        " to ".join(f"{bound(side[key] for side in limits) / 1e9:,.0f}" for bound in (min, max))
        for key in ("bandwidth", "flops")
    )
    text = (
        f"Measured in runs with both sides in each ({len(runs)}), while the machine gave {bandwidth} GB/s, and "
        f"{flops} GFLOP/s of a matrix product. {'; '.join(sorted(versions))}."
    )
    failed = [f"{name}, {where}: `{message.splitlines()[0][:200]}`" for name, where, message in errors(runs)]
    return paragraphs(text, *(["Did not run:", listed(failed)] if failed else []))


def spinning(record: Record) -> str:
    """Which stacks of the last run took the processor while they waited."""
    stacks = record.figures["pieces"][-1]["stacks"].items()
    shares = {name: share for name, facts in stacks if (share := facts.get("waiting_share") or 0.0) > SPINS}
    return listed(
        [
            f"{name} took {share:.0%} of a core while it waited: it disturbed the others"
            for name, share in shares.items()
        ]
    )
