"""`isthmus bench peers`: the engine beside llama.cpp, vLLM and transformers on the same model, in turns."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from isthmus.benchmarks.child import BenchError, Child
from isthmus.benchmarks.machine import Machine, describe, measure_limits
from isthmus.benchmarks.pieces import Piece, errors, label, merged, newest, rotated, with_comparison
from isthmus.benchmarks.progress import progress_bar
from isthmus.benchmarks.record import Record, results_folder
from isthmus.benchmarks.roofline import Workload, cost
from isthmus.benchmarks.stacks import STACKS, Installed, Stack, chosen, load_question, weight_bytes
from isthmus.benchmarks.statistics import median, number
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.weights.folder import open_folder

MAX_SEQUENCES = 32
"""That every engine is loaded for, as a server would be, whatever a cell asks"""
MIN_STEPS, MAX_STEPS, WARMUP_STEPS = 8, 128, 4
MAX_PASSES = 8
PAUSE_SECONDS = 0.3
"""Between turns, until the worker threads of the last one sleep"""
SPINS = 0.05
"""Of a core: a waiting process that takes more than this disturbs the others"""


@dataclass(frozen=True)
class PeersBench:
    """Times engines that are loaded side by side, in turns, on one model with the same prompts, greedily.

    A cell is prefillN, one prompt of N tokens, or decodeN: N sequences from when each has its first token. In each
    repetition every cell is run by every stack, in an order that rotates. All have loaded the model first and warmed
    up; who waits sleeps, which is measured. Tokens a second are medians over the repetitions, and the ratio is against
    the fastest stack that stores weights in as many bits. Bandwidth and the peak of a matrix product are measured
    before and after each repetition.
    """

    model: Path = Path("models/125m")
    """A published folder; llama.cpp's files lie beside it, as make_gguf.py writes them"""
    stacks: tuple[str, ...] = tuple(STACKS)
    """Which to run"""
    cells: tuple[str, ...] = ("prefill512", "decode1", "decode8", "decode32")
    repeats: int = 5
    prompt: int = 32
    """Tokens of the prompts before decoding"""
    steps: int = 0
    """To decode; 0 takes as many as make a turn of --seconds in the median of the stacks"""
    seconds: float = 3.0
    """Of a turn, about; a prompt is repeated to fill it"""
    seed: int = 0
    """Of the prompts' tokens"""
    installed: Installed = field(default_factory=Installed)
    merge: bool = False
    """Add to the result's file what was measured before, on this machine; else replace it"""
    out: Path | None = None
    """Folder for PLATFORM-KIND-SUBJECT.json; default ./benchmarks/results where there is one, else ./bench-results"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        chosen(self.stacks)
        if not self.cells or len(set(self.cells)) < len(self.cells):
            raise ConfigError("cells must name at least one, and none twice")
        for cell in self.cells:
            parse_cell(cell)
        for name, least in (("repeats", 1), ("prompt", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds:g} must be above 0")
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"model: {self.model} is not a published model's folder; make_models.py writes two")


def parse_cell(cell: str) -> tuple[str, int]:
    """("prefill", tokens) or ("decode", sequences). Raises ConfigError."""
    found = re.fullmatch(r"(prefill|decode)([1-9]\d*)", cell)
    if found is None:
        raise ConfigError(f"cells: {cell!r} is neither prefillN nor decodeN")
    return found[1], int(found[2])


def cell_tokens(bench: PeersBench, cell: str, vocab: int) -> list[list[int]]:
    """The prompts of a cell, the same for every stack and every run of a seed. Ids below 10 may mean something."""
    what, count = parse_cell(cell)
    random = np.random.default_rng([bench.seed, count, what == "decode"])
    shape = (1, count) if what == "prefill" else (count, bench.prompt)
    return random.integers(min(10, vocab - 1), vocab, shape).tolist()


def room(bench: PeersBench) -> tuple[int, int]:
    """(sequences, tokens of a sequence) that every stack is loaded for: the same, whichever cells are run."""
    sizes = [parse_cell(cell) for cell in bench.cells]
    sequences = max([MAX_SEQUENCES, *(count for what, count in sizes if what == "decode")])
    longest = max([512, *(count for what, count in sizes if what == "prefill")])
    longest = max(longest, bench.prompt + max(MAX_STEPS, bench.steps))
    return sequences, -(-(longest + 2) // 128) * 128


class Side:
    """A stack's child, and what it took of the processor while others ran."""

    def __init__(self, stack: Stack, child: Child, loaded: dict[str, Any]) -> None:
        self.stack, self._child = stack, child
        self.facts = loaded
        self._busy_cpu = self._busy = 0.0
        self._begun = time.perf_counter(), child.cpu_seconds()

    def prefill(self, tokens: list[list[int]], passes: int) -> float:
        """Seconds of all passes."""
        return sum(self._ask("prefill", tokens=tokens) for _ in range(passes))

    def decode(self, tokens: list[list[int]], steps: int) -> float:
        return self._ask("decode", tokens=tokens, steps=steps)

    def _ask(self, do: str, **fields: Any) -> float:
        start, cpu = time.perf_counter(), self._child.cpu_seconds()
        try:
            return float(self._child.ask(do, **fields)["seconds"])
        finally:
            self._busy += time.perf_counter() - start
            self._busy_cpu += self._child.cpu_seconds() - cpu

    def waiting_share(self) -> float | None:
        """Of a core, while it was not asked anything; None when it was always asked, or has died."""
        start, cpu = self._begun
        idle = time.perf_counter() - start - self._busy
        used = self._child.cpu_seconds() - cpu - self._busy_cpu
        return max(0.0, used / idle) if idle > 0 and used > -0.1 else None


class _Run:
    """One piece while it is measured. A stack that fails somewhere is left out there, and what it said is kept."""

    def __init__(self, bench: PeersBench, config: ModelConfig, console: Console, tick: Callable[[], None]) -> None:
        self._bench, self._config, self._console, self._tick = bench, config, console, tick
        self._tokens = {cell: cell_tokens(bench, cell, config.vocab_size) for cell in bench.cells}
        self._sides: dict[str, Side] = {}
        self._warm: dict[str, dict[str, float]] = {cell: {} for cell in bench.cells}
        self.errors: dict[str, dict[str, str]] = {}
        self.amounts: dict[str, int] = {}
        self.rates: dict[str, dict[str, list[float]]] = {cell: {} for cell in bench.cells}

    def load(self, stack: Stack, children: ExitStack, log: Path) -> None:
        bench = self._bench
        try:
            child = children.enter_context(Child(bench.installed.command(stack), log))
            loaded = child.ask("load", **load_question(stack, bench.model.resolve(), *room(bench)))
        except BenchError as error:
            self._failed(stack.name, "load", error)
        else:
            loaded.setdefault("weight_bytes", weight_bytes(stack, self._config, bench.model))
            self._sides[stack.name] = Side(stack, child, loaded)
            self._console.print(
                f"{stack.name}: {loaded['version']}, {loaded['threads']} threads, loaded in {loaded['seconds']:.1f} s",
                highlight=False,
            )
        self._tick()

    def _failed(self, name: str, where: str, error: BenchError) -> None:
        self.errors.setdefault(name, {})[where] = str(error)
        self._console.print(f"{name}, {where}: {error}", style="red", markup=False, highlight=False)

    def warm_up(self) -> None:
        """Every cell once, briefly, which says how much a turn takes."""
        for cell, tokens in self._tokens.items():
            for name, side in self._sides.items():
                try:
                    if parse_cell(cell)[0] == "prefill":
                        self._warm[cell][name] = side.prefill(tokens, 1)
                    else:
                        self._warm[cell][name] = side.decode(tokens, WARMUP_STEPS) / WARMUP_STEPS
                except BenchError as error:
                    self._failed(name, cell, error)
                self._tick()
            if self._warm[cell]:
                self.amounts[cell] = amount(self._bench, cell, list(self._warm[cell].values()))

    def repeat(self, turn: int) -> None:
        """All cells once, by every stack that has not failed there."""
        for cell in self._bench.cells:
            for name in rotated(list(self._sides), turn) if self._sides else ():
                if cell not in self.errors.get(name, {}):
                    time.sleep(PAUSE_SECONDS)
                    self._measure(cell, name)
                self._tick()

    def _measure(self, cell: str, name: str) -> None:
        tokens, count, side = self._tokens[cell], self.amounts[cell], self._sides[name]
        prefill = parse_cell(cell)[0] == "prefill"
        try:
            seconds = side.prefill(tokens, count) if prefill else side.decode(tokens, count)
        except BenchError as error:
            self._failed(name, cell, error)
            return
        done = len(tokens[0]) * count if prefill else len(tokens) * count
        self.rates[cell].setdefault(name, []).append(done / seconds)

    def stacks(self) -> dict[str, dict[str, Any]]:
        return {name: {**side.facts, "waiting_share": side.waiting_share()} for name, side in self._sides.items()}


def amount(bench: PeersBench, cell: str, seconds: list[float]) -> int:
    """Passes of a prompt or steps of decoding in a turn, from what one took each stack: alike for all of them."""
    fitting = round(bench.seconds / median(seconds))
    if parse_cell(cell)[0] == "prefill":
        return min(MAX_PASSES, max(1, fitting))
    return bench.steps or min(MAX_STEPS, max(MIN_STEPS, fitting))


def machine_limits() -> dict[str, float]:
    """bandwidth, bytes/s; flops, FLOP/s of a matrix product in the faster of float32 and bfloat16."""
    limits = [measure_limits(dtype) for dtype in ("float32", "bfloat16")]
    return {"bandwidth": max(x.bandwidth for x in limits), "flops": max(x.flops for x in limits)}


def shares(piece: Piece, config: ModelConfig) -> dict[str, dict[str, float]]:
    """By cell and stack: decoding one sequence, what it reads of weights at the bandwidth; a prompt, its FLOPs at the
    peak. Medians of the repetitions, each against the more that was measured of before and after it."""
    found: dict[str, dict[str, float]] = {}
    for cell, rates in piece["rates"].items():
        what, count = parse_cell(cell)
        if what == "decode" and count > 1:
            continue
        limit = "bandwidth" if what == "decode" else "flops"
        limits = [max(before[limit], after[limit]) for before, after in pairwise(piece["limits"])]
        found[cell] = {}
        for name, values in rates.items():
            if what == "decode":
                needs = piece["stacks"][name]["weight_bytes"]
            else:
                needs = cost(config, Workload(0, 0, (count,))).flops / count
            # A stack that fails in a cell is not asked again there, so its values are those of the first repetitions.
            found[cell][name] = median([rate * needs / most for rate, most in zip(values, limits, strict=False)])
    return found


def run(bench: PeersBench, console: Console) -> Record:
    """Measures and returns the record, merged if asked to. Raises ConfigError, BenchError."""
    bench.validate()
    machine = describe()
    config = open_folder(bench.model).config
    stacks = chosen(bench.stacks)
    limits = [machine_limits()]
    total = len(stacks) * (1 + len(bench.cells) * (1 + bench.repeats))
    with (
        temporary_folder("isthmus-bench-") as folder,
        progress_bar(console, "peers", total) as tick,
        ExitStack() as children,
    ):
        piece = _Run(bench, config, console, tick)
        for stack in stacks:
            piece.load(stack, children, folder / f"{stack.name}.log")
        piece.warm_up()
        for turn in range(bench.repeats):
            piece.repeat(turn)
            limits.append(machine_limits())
            if not console.is_terminal:
                console.print(f"repetition {turn + 1} of {bench.repeats}", highlight=False)
        measured = _piece(bench, piece, machine, limits, config)
    if not any(measured["rates"].values()):
        raise BenchError("every stack failed; see above")
    asked = dataclasses.asdict(bench)
    record = Record("peers", bench.model.resolve().name, machine, asked, with_comparison([measured]))
    return merged(record, results_folder(bench.out)) if bench.merge else record


def _piece(
    bench: PeersBench, run: _Run, machine: Machine, limits: list[dict[str, float]], config: ModelConfig
) -> Piece:
    piece: Piece = {
        "date": machine.date,
        "commit": machine.commit,
        "load": machine.load,
        "limits": limits,
        "prompt": bench.prompt,
        "room": room(bench),
        "amounts": run.amounts,
        "stacks": run.stacks(),
        "errors": run.errors,
        "rates": {cell: rates for cell, rates in run.rates.items() if rates},
    }
    return {**piece, "shares": shares(piece, config)}


def show(record: Record, console: Console) -> None:
    """Prints the record as tables."""
    pieces = record.figures["pieces"]
    show_rates(pieces, console, f"{record.subject}, tok/s: medians")
    show_ratios(record.figures["compared"], console)
    for cell, found in newest(pieces, "shares").items():
        if found:
            what = "of the bandwidth" if cell.startswith("decode") else "of a matrix product's peak"
            text = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
            console.print(f"{label(cell)}, {what}: {text}", highlight=False)
    last = pieces[-1]["limits"]
    console.print(
        f"{record.machine.device}, {record.machine.cores} cores: "
        + ", then ".join(f"{side['bandwidth'] / 1e9:.1f} GB/s and {side['flops'] / 1e9:,.0f} GFLOP/s" for side in last),
        highlight=False,
    )
    show_spinning(pieces[-1], console)
    for name, where, message in errors(pieces):
        console.print(f"{name}, {where}: {message.splitlines()[0]}", style="red", markup=False, highlight=False)


def show_rates(pieces: Sequence[Piece], console: Console, title: str) -> None:
    found = newest(pieces)
    table = Table("", *found, title=title)
    for name in STACKS:
        if any(name in rates for rates in found.values()):
            table.add_row(name, *(number(median(rates[name]), 4) if name in rates else "" for rates in found.values()))
    console.print(table)


def show_ratios(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("cell", "weights", "Isthmus", "best peer", "", "ratio", "of a repetition")
    for row in rows:
        table.add_row(
            row["cell"],
            row["class"],
            number(row["rate"], 4),
            row["peer"],
            number(row["peer_rate"], 4),
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
        )
    console.print(table)


def show_spinning(piece: Piece, console: Console) -> None:
    for name, facts in piece["stacks"].items():
        share = facts.get("waiting_share") or 0.0
        if share > SPINS:
            console.print(
                f"{name} took {share:.0%} of a core while it waited: it disturbed the others",
                style="yellow",
                highlight=False,
            )
