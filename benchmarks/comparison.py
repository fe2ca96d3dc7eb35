"""Compares stacks: one run measures them in turns, several runs make a result, and the result is shown as tables.

A result holds its runs under "pieces". A ratio is always between two stacks of the same run. A run holds `rates`,
tokens per second by cell, stack and repetition: {"decode8": {"llama-q8_0": [...]}}. A cell is one thing to measure,
such as decoding 8 sequences.
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
"""Pause between two turns, in which the worker threads of the stack that ran last go to sleep"""
SPINS = 0.05
"""Share of a core. A process that takes more than this while it waits is reported, because it disturbs the others"""

Run = dict[str, Any]


@dataclass(frozen=True)
class ComparisonBench(Bench):
    """Settings that every comparison of stacks has."""

    model: Path = Path("models/125m")
    """A model folder in Hugging Face's layout; llama.cpp's files lie beside it, where make_gguf.py writes them"""
    seed: int = 0
    """Seed of the prompts, and of the lengths and arrival times of requests"""
    installed: Installed = field(default_factory=Installed)
    merge: bool = False
    """Add the run to those in the result's file, which must be of this machine; otherwise the file is replaced"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"model: {self.model} has no config.json; benchmarks/peers/make_models.py makes two")

    def start(self, stack: Stack, config: ModelConfig, sizes: Sizes) -> Start:
        return Start(stack, self.model.resolve(), config, sizes, self.installed)


class Idle:
    """Measures how much processor time a process takes while it isn't asked anything."""

    def __init__(self, cpu_seconds: Callable[[], float]) -> None:
        """cpu_seconds: returns the processor time that the process has taken until now."""
        self._cpu_seconds = cpu_seconds
        self._busy = self._busy_cpu = 0.0
        self._begun = time.perf_counter(), cpu_seconds()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Marks the time in which the process is asked something, which doesn't count."""
        start, cpu = time.perf_counter(), self._cpu_seconds()
        try:
            yield
        finally:
            self._busy += time.perf_counter() - start
            self._busy_cpu += self._cpu_seconds() - cpu

    def share(self) -> float | None:
        """Processor time per second of waiting, in cores; None when the process never waited, or has died."""
        start, cpu = self._begun
        idle = time.perf_counter() - start - self._busy
        used = self._cpu_seconds() - cpu - self._busy_cpu
        return max(0.0, used / idle) if idle > 0 and used > -0.1 else None


class Side(Protocol):
    """A stack that is ready to be measured."""

    facts: dict[str, Any]
    """What the result says about the stack: at least its `version`, and the `seconds` that it took to start"""
    idle: Idle


class Turns:
    """One run while it is measured. A side that fails in a cell isn't measured there again, and its error is kept."""

    def __init__(self, cells: Sequence[str], console: Console, tick: Tick) -> None:
        self._cells, self._console, self._tick = cells, console, tick
        self._sides: dict[str, Side] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self.rates: dict[str, dict[str, list[float]]] = {cell: {} for cell in cells}

    def start(self, stack: Stack, start: Callable[[], Side]) -> None:
        """Adds the side that start() returns. If it raises BenchError, the stack is left out, and the error is kept."""
        with self._kept(stack.name, "load"):
            side = self._sides[stack.name] = start()
            self._console.print(
                f"{stack.name}: {side.facts['version']}, ready after {side.facts['seconds']:.1f} s", highlight=False
            )

    def each(self, where: str, do: Callable[[str, Any], None], turn: int = 0) -> None:
        """Calls do(name, side), which may raise BenchError, for every side that has not failed at `where`, a cell or a
        stage such as "warm-up", in the turn's order."""
        for name in rotated(list(self._sides), turn):
            if where in self.errors.get(name, {}):
                self._tick()
                continue
            with self._kept(name, where):
                do(name, self._sides[name])

    def repeat(self, turns: int, measure: Callable[[str, int, str, Any], float], after: Tick = lambda: None) -> None:
        """Measures every cell on every side in each turn. measure(cell, turn, name, side) returns tokens per second;
        after() is called at the end of a turn."""
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
        """The run's figures. limits: the machine's, at each measurement. Raises BenchError if every stack failed."""
        if not any(self.rates.values()):
            raise BenchError("every stack failed, with the errors printed above")
        return {
            **{name: getattr(machine, name) for name in ("date", "commit", "load")},
            "limits": limits,
            "stacks": {name: {**side.facts, "waiting_share": side.idle.share()} for name, side in self._sides.items()},
            "errors": self.errors,
            "rates": {cell: rates for cell, rates in self.rates.items() if rates},
        }


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Returns the order of the stacks in a turn. It begins one stack later in each turn, and every second turn is
    reversed, so that no stack always runs after the same other one."""
    start = turn % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order


@dataclass(frozen=True)
class Session:
    """What a run needs while it measures."""

    turns: Turns
    stacks: list[Stack]
    config: ModelConfig
    """The model's configuration"""
    children: ExitStack
    """Ends every process that the run started"""
    folder: Path
    """A temporary folder for logs"""
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
    """Measures and returns the record, added to the result's file if --merge is set. amount: what the progress bar
    counts to. Raises ConfigError, BenchError."""
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


# several runs, combined


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns a row for each cell and class in which Isthmus and a peer were measured in one run; of several such runs
    the newest counts.

    `ratio` is that of the medians; `low` and `high` are the lowest and the highest ratio of a single repetition. A row
    has the peer to which Isthmus has the lowest ratio; `pairs` has all.
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
    """The cells of all runs, in the order in which they first appear."""
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
    """By cell and stack, in the order of STACKS: the value under `key` of the newest run that has one."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells(runs):
        values: dict[str, Any] = {}
        for run in runs:
            values.update({name: value for name, value in run[key].get(cell, {}).items() if value not in ([], None)})
        found[cell] = {name: values[name] for name in STACKS if name in values}
    return found


def errors(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Returns (stack, where, message) for each failure, unless a later run succeeded there."""
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
    """Returns `record` with the runs of the file it would replace. Raises ConfigError if they are another machine's."""
    before = record.predecessor(folder)
    if before is None:
        return record
    for name in ("device", "cores", "platform"):
        old, new = getattr(before.machine, name), getattr(record.machine, name)
        if old != new:
            raise ConfigError(f"merge: {record.stem}.json in {folder} is of another machine: {name} {old}, not {new}")
    return record.with_figures(**with_comparison([*before.figures["pieces"], *record.figures["pieces"]]))


def with_comparison(runs: list[Run]) -> dict[str, Any]:
    """Returns the figures of a record with these runs."""
    return {"pieces": runs, "compared": compare(runs)}


# the result as tables


def label(cell: str) -> str:
    """Describes a cell in words."""
    words = {"prefill": "prompt of {} tokens", "decode": "decode, {} sequences", "closed": "{} streams"}
    words["sampled"] = "decode with sampling, {} sequences"
    words["rate"] = "{} requests/s"
    for prefix, text in words.items():
        if cell.startswith(prefix):
            return text.format(cell.removeprefix(prefix)).replace(" 1 sequences", " 1 sequence")
    return cell


def show_ratios(record: Record, qualities: Qualities) -> str:
    """The table of Isthmus' ratios, each to the fastest peer of the class."""

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tok/s": lambda row: label(row["cell"]),
        "weights": lambda row: row["class"],
        "Isthmus": lambda row: number(row["rate"], 4),
        "fastest peer": lambda row: row["peer"],
        "peer's tok/s": lambda row: number(row["peer_rate"], 4),
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "range over repetitions": lambda row: f"{row['low']:.2f} to {row['high']:.2f} of {row['repeats']}",
    }
    for model, lost in qualities.items():
        columns[f"KL, {model}: ours / peer's"] = partial(_lost, lost)
    return table_of(record.figures["compared"], columns)


def _lost(lost: dict[str, float], row: dict[str, Any]) -> str:
    """The KL divergences of Isthmus and of the row's peer, as text."""
    return " / ".join(number(lost.get(row[side]), 2) for side in ("ours", "peer"))


def show_rates(runs: Sequence[Run], qualities: Qualities) -> str:
    """The table of every stack's median rate in each cell."""
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
    """The versions that ran, the machine's limits meanwhile, and what failed."""
    versions = {re.sub(r", [^ ]*\.gguf", "", facts["version"]) for run in runs for facts in run["stacks"].values()}
    limits = [side for run in runs for side in run["limits"]]
    bandwidth, flops = (
        " to ".join(f"{bound(side[key] for side in limits) / 1e9:,.0f}" for bound in (min, max))
        for key in ("bandwidth", "flops")
    )
    text = (
        f"Measured in {len(runs)} {'run' if len(runs) == 1 else 'runs'}, with both sides of each ratio in the same "
        f"run, while the machine reached {bandwidth} GB/s, and {flops} GFLOP/s in a matrix product. "
        f"{'; '.join(sorted(versions))}."
    )
    failed = [f"{name}, {where}: `{message.splitlines()[0][:200]}`" for name, where, message in errors(runs)]
    return paragraphs(text, *(["These failed:", listed(failed)] if failed else []))


def spinning(record: Record) -> str:
    """A list of the stacks in the last run that took processor time while they waited."""
    stacks = record.figures["pieces"][-1]["stacks"].items()
    shares = {name: share for name, facts in stacks if (share := facts.get("waiting_share") or 0.0) > SPINS}
    return listed(
        [
            f"{name} took {share:.0%} of a core while it waited: it disturbed the others"
            for name, share in shares.items()
        ]
    )
