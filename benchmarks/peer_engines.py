"""`isthmus bench peers`: the engine beside llama.cpp, vLLM and transformers on the same model, in turns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from isthmus.benchmarks import comparison
from isthmus.benchmarks.case import Qualities
from isthmus.benchmarks.comparison import ComparisonBench, Idle, Run, Session
from isthmus.benchmarks.figures import median, paragraphs, percent, table
from isthmus.benchmarks.machine import limits_of_any_dtype
from isthmus.benchmarks.processes import Child
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.roofline import StepWork, cost
from isthmus.benchmarks.stacks import STACKS, Sizes, Start, chosen
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig

MAX_SEQUENCES = 32
"""How many every engine is loaded for, as a server would be, whatever a cell asks"""
MIN_STEPS, MAX_STEPS, WARMUP_STEPS = 8, 128, 4
MAX_PASSES = 8


@dataclass(frozen=True)
class PeersBench(ComparisonBench):
    """Times engines that are loaded side by side, in turns, on one model with the same prompts, greedily.

    A cell is prefillN, one prompt of N tokens, or decodeN: N sequences from when each has its first token. In each
    repetition every cell is run by every stack, in an order that rotates. All have loaded the model first and warmed
    up; who waits sleeps, which is measured. Tokens a second are medians over the repetitions, and the ratio is against
    the fastest stack that stores weights in as many bits. Bandwidth and the peak of a matrix product are measured
    before and after each repetition.
    """

    stacks: tuple[str, ...] = tuple(STACKS)
    """Which to run"""
    cells: tuple[str, ...] = ("prefill512", "decode1", "decode8", "decode32")
    """What to measure, each prefillN or decodeN"""
    repeats: int = 5
    """How often every cell is run by every stack"""
    prompt: int = 32
    """Tokens of the prompts before decoding"""
    steps: int = 0
    """How many to decode; 0 takes as many as make a turn of --seconds in the median of the stacks"""
    seconds: float = 3.0
    """How long a turn takes, about; a prompt is repeated to fill it"""

    def validate(self) -> None:
        chosen(self.stacks)
        if not self.cells or len(set(self.cells)) < len(self.cells):
            raise ConfigError("cells must name at least one, and none twice")
        for cell in self.cells:
            parse_cell(cell)
        self.check_least(repeats=1, prompt=1, steps=0)
        self.check_positive("seconds")
        super().validate()


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


def room(bench: PeersBench) -> Sizes:
    """What every stack is loaded for: the same, whichever cells are run."""
    sizes = [parse_cell(cell) for cell in bench.cells]
    sequences = max([MAX_SEQUENCES, *(count for what, count in sizes if what == "decode")])
    longest = max([512, *(count for what, count in sizes if what == "prefill")])
    longest = max(longest, bench.prompt + max(MAX_STEPS, bench.steps))
    return Sizes(sequences, -(-(longest + 2) // 128) * 128)


def amount(bench: PeersBench, cell: str, seconds: Sequence[float]) -> int:
    """Passes of a prompt or steps of decoding in a turn, from what one took each stack: alike for all of them."""
    fitting = round(bench.seconds / median(seconds))
    if parse_cell(cell)[0] == "prefill":
        return min(MAX_PASSES, max(1, fitting))
    return bench.steps or min(MAX_STEPS, max(MIN_STEPS, fitting))


class EngineSide:
    """A stack's child that has loaded the model."""

    def __init__(self, start: Start, children: ExitStack, log: Path) -> None:
        """Raises BenchError."""
        self._child = children.enter_context(Child(start.command(start.engine.child), log))
        self.facts = self._child.ask("load", **start.load)
        self.facts.setdefault("weight_bytes", start.weight_bytes())
        self.idle = Idle(self._child.cpu_seconds)

    def run(self, cell: str, tokens: list[list[int]], count: int) -> float:
        """Seconds of `count` passes of a prompt, or of `count` steps of decoding."""
        if parse_cell(cell)[0] == "prefill":
            return sum(self._ask("prefill", tokens=tokens) for _ in range(count))
        return self._ask("decode", tokens=tokens, steps=count)

    def _ask(self, do: str, **fields: Any) -> float:
        with self.idle.asked():
            return float(self._child.ask(do, **fields)["seconds"])


def run(bench: PeersBench, console: Console) -> Record:
    """Measures and returns the record, merged if asked to. Raises ConfigError, BenchError."""
    bench.validate()
    stacks = chosen(bench.stacks)
    amount = len(stacks) * (1 + len(bench.cells) * (1 + bench.repeats))
    return comparison.run_comparison("peers", bench, stacks, bench.cells, amount, console, partial(measure, bench))


def measure(bench: PeersBench, at: Session) -> Run:
    """Every cell once, briefly, which says how much a turn takes; then all repetitions, the machine's limits before and
    after each."""
    limits = [limits_of_any_dtype()]
    for stack in at.stacks:
        start, log = bench.start(stack, at.config, room(bench)), at.folder / f"{stack.name}.log"
        at.turns.start(stack, partial(EngineSide, start, at.children, log))
    tokens = {cell: cell_tokens(bench, cell, at.config.vocab_size) for cell in bench.cells}
    amounts: dict[str, int] = {}
    for cell in bench.cells:
        steps = 1 if parse_cell(cell)[0] == "prefill" else WARMUP_STEPS
        warm: list[float] = []
        at.turns.each(cell, lambda _, side: warm.append(side.run(cell, tokens[cell], steps) / steps))  # noqa: B023
        if warm:
            amounts[cell] = amount(bench, cell, warm)

    def rate(cell: str, turn: int, name: str, side: EngineSide) -> float:
        return parse_cell(cell)[1] * amounts[cell] / side.run(cell, tokens[cell], amounts[cell])

    at.turns.repeat(bench.repeats, rate, after=lambda: limits.append(limits_of_any_dtype()))
    found = at.turns.figures(at.machine, limits)
    found |= {"prompt": bench.prompt, "room": dataclasses.astuple(room(bench)), "amounts": amounts}
    return {**found, "shares": shares(found, at.config)}


def shares(run: Run, config: ModelConfig) -> dict[str, dict[str, float]]:
    """By cell and stack: decoding one sequence, what it reads of weights at the bandwidth; a prompt, its FLOPs at the
    peak. Medians of the repetitions, each against the more that was measured of before and after it."""
    found: dict[str, dict[str, float]] = {}
    for cell, rates in run["rates"].items():
        what, count = parse_cell(cell)
        if what == "decode" and count > 1:
            continue
        limit = "bandwidth" if what == "decode" else "flops"
        limits = [max(before[limit], after[limit]) for before, after in pairwise(run["limits"])]
        flops = cost(config, StepWork(0, 0, (count,)), "float32").flops / count
        needs = {name: run["stacks"][name]["weight_bytes"] if what == "decode" else flops for name in rates}
        # A stack that fails in a cell is not asked again there, so its values are those of the first repetitions.
        found[cell] = {
            name: median([rate * needs[name] / most for rate, most in zip(values, limits, strict=False)])
            for name, values in rates.items()
        }
    return found


def show(record: Record, qualities: Qualities) -> str:
    runs = record.figures["pieces"]
    text = (
        "Engine against engine: the same model and prompts, greedy, in turns. Medians; the ratio is to the fastest "
        "that stores weights in as many bits; float32 of vLLM and transformers counts with the 16 bits."
    )
    text += " KL: what the same weights cost real models, above." if qualities else ""
    parts = [text, comparison.show_ratios(record, qualities), comparison.show_rates(runs, qualities)]
    if found := {cell: found for cell, found in comparison.newest(runs, "shares").items() if found}:
        rows = [[name, *(percent(by_stack.get(name)) for by_stack in found.values())] for name in STACKS]
        parts += [
            "One sequence decoding: weights read, of the bandwidth. A prompt: FLOPs, of a matrix product's peak.",
            table(["", *map(comparison.label, found)], [row for row in rows if any(cell != "-" for cell in row[1:])]),
        ]
    return paragraphs(*parts, comparison.show_conditions(runs))


def notes(record: Record) -> str:
    sides = record.figures["pieces"][-1]["limits"]
    limits = [f"{side['bandwidth'] / 1e9:.1f} GB/s and {side['flops'] / 1e9:,.0f} GFLOP/s" for side in sides]
    return paragraphs(f"The machine gave {', then '.join(limits)}.", comparison.spinning(record))
