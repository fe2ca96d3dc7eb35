"""`isthmus bench peers`: the engine beside llama.cpp, vLLM and transformers on the same model, in turns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from isthmus.benchmarks import comparison
from isthmus.benchmarks.case import Qualities
from isthmus.benchmarks.comparison import ComparisonBench, Idle, Run, Session
from isthmus.benchmarks.figures import OF_MEDIANS, median, paragraphs, percent, table
from isthmus.benchmarks.machine import limits_of_any_dtype
from isthmus.benchmarks.processes import Child
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.roofline import StepWork, cost
from isthmus.benchmarks.stacks import STACKS, Sizes, Start, chosen
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig

MAX_SEQUENCES = 32
"""How many sequences every engine is loaded for at least, as a server would be, even if a cell decodes fewer"""
MIN_STEPS, MAX_STEPS, WARMUP_STEPS = 8, 128, 4
MAX_PASSES = 8


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, by names that all engines give the same meaning."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.02


@dataclass(frozen=True)
class PeersBench(ComparisonBench):
    """Times several engines on one model with the same prompts. All are loaded at once, and take turns.

    A cell is prefillN, one prompt of N tokens, decodeN, N sequences from when each has its first token, decoded
    greedily, or sampledN, the same with tokens drawn by the temperature and filters below, which every engine is given
    (but llama.cpp, whose benchmark chooses no tokens; it fails there). In each repetition every stack runs every cell,
    in an order that rotates. Rates, in tokens per second, are medians over the
    repetitions; the ratio is to the fastest stack whose weights have as many bits. A stack that waits should sleep: the
    processor time that it takes meanwhile is measured. So are the memory bandwidth and the peak of a matrix product,
    before and after each repetition.
    """

    stacks: tuple[str, ...] = tuple(STACKS)
    """Stacks to run: engines, each with one type of weights"""
    cells: tuple[str, ...] = ("prefill512", "decode1", "decode8", "decode32")
    """Cells to measure, each prefillN, decodeN or sampledN"""
    repeats: int = 5
    """How often every stack runs every cell"""
    prompt: int = 32
    """Tokens of each prompt that comes before decoding"""
    steps: int = 0
    """Steps of decoding in a turn; 0 takes as many as the median of the stacks does in --seconds"""
    sampling: Drawing = field(default_factory=Drawing)
    """How the tokens of sampledN are drawn"""
    seconds: float = 3.0
    """About how long a turn takes; a prompt is repeated to fill it"""

    def validate(self) -> None:
        chosen(self.stacks)
        if not self.cells or len(set(self.cells)) < len(self.cells):
            raise ConfigError("cells must name at least one, and none twice")
        for cell in self.cells:
            parse_cell(cell)
        self.check_least(repeats=1, prompt=1, steps=0)
        self.check_positive("seconds")
        drawing = self.sampling
        if not (drawing.temperature > 0 and drawing.top_k >= 0 and 0 < drawing.top_p <= 1 and 0 <= drawing.min_p <= 1):
            raise ConfigError("sampling: temperature above 0, top_k from 0, top_p above 0 and min_p from 0, both to 1")
        super().validate()


def parse_cell(cell: str) -> tuple[str, int]:
    """Returns ("prefill", tokens), ("decode", sequences) or ("sampled", sequences). Raises ConfigError."""
    found = re.fullmatch(r"(prefill|decode|sampled)([1-9]\d*)", cell)
    if found is None:
        raise ConfigError(f"cells: {cell!r} is none of prefillN, decodeN and sampledN")
    return found[1], int(found[2])


def cell_tokens(bench: PeersBench, cell: str, vocab: int) -> list[list[int]]:
    """The prompts of a cell, the same for every stack and run of a seed, without ids below 10, which may be special."""
    what, count = parse_cell(cell)
    random = np.random.default_rng([bench.seed, count, what != "prefill"])
    shape = (1, count) if what == "prefill" else (count, bench.prompt)
    return random.integers(min(10, vocab - 1), vocab, shape).tolist()


def room(bench: PeersBench) -> Sizes:
    """The sizes for which every stack is loaded: MAX_SEQUENCES and 512 tokens, or more if a cell needs more."""
    sizes = [parse_cell(cell) for cell in bench.cells]
    sequences = max([MAX_SEQUENCES, *(count for what, count in sizes if what != "prefill")])
    longest = max([512, *(count for what, count in sizes if what == "prefill")])
    longest = max(longest, bench.prompt + max(MAX_STEPS, bench.steps))
    return Sizes(sequences, -(-(longest + 2) // 128) * 128)


def amount(bench: PeersBench, cell: str, seconds: Sequence[float]) -> int:
    """How many passes of a prompt or steps of decoding a turn of any stack has. seconds: what one takes each stack."""
    fitting = round(bench.seconds / median(seconds))
    if parse_cell(cell)[0] == "prefill":
        return min(MAX_PASSES, max(1, fitting))
    return bench.steps or min(MAX_STEPS, max(MIN_STEPS, fitting))


class EngineSide:
    """A process that has loaded the model for a stack."""

    def __init__(self, start: Start, children: ExitStack, log: Path, sampling: Drawing) -> None:
        """Starts the process, which `children` ends, and loads the model. sampling: how tokens of sampledN are drawn.
        Raises BenchError."""
        self._sampling = sampling
        self._child = children.enter_context(Child(start.command(start.engine.child), log))
        self.facts = self._child.ask("load", **start.load)
        self.facts.setdefault("weight_bytes", start.weight_bytes())
        self.idle = Idle(self._child.cpu_seconds)

    def run(self, cell: str, tokens: list[list[int]], count: int) -> float:
        """Returns the seconds that `count` passes of a prompt, or `count` steps of decoding, take."""
        what, _ = parse_cell(cell)
        if what == "prefill":
            return sum(self._ask("prefill", tokens=tokens) for _ in range(count))
        drawn = {"sampling": dataclasses.asdict(self._sampling)} if what == "sampled" else {}
        return self._ask("decode", tokens=tokens, steps=count, **drawn)

    def _ask(self, do: str, **fields: Any) -> float:
        with self.idle.asked():
            return float(self._child.ask(do, **fields)["seconds"])


def run(bench: PeersBench, console: Console) -> Record:
    """Measures and returns the record, added to the result's file if --merge is set. Raises ConfigError, BenchError."""
    stacks = chosen(bench.stacks)
    amount = len(stacks) * (1 + len(bench.cells) * (1 + bench.repeats))
    return comparison.run_comparison("peers", bench, stacks, bench.cells, amount, console, partial(measure, bench))


def measure(bench: PeersBench, at: Session) -> Run:
    """Runs every cell once, briefly, to know how much work is a turn, then all repetitions. Measures the machine's
    limits before and after each repetition."""
    limits = [limits_of_any_dtype()]
    for stack in at.stacks:
        start, log = bench.start(stack, at.config, room(bench)), at.folder / f"{stack.name}.log"
        at.turns.start(stack, partial(EngineSide, start, at.children, log, bench.sampling))
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
    """By cell and stack, the share of the machine's limit that was reached: where one sequence decodes, of the
    bandwidth, by reading weights; for a prompt, of the FLOP/s of a matrix product. Medians of the repetitions, each of
    which is compared with the higher of the limits before and after it."""
    found: dict[str, dict[str, float]] = {}
    for cell, rates in run["rates"].items():
        what, count = parse_cell(cell)
        if what == "sampled" or (what == "decode" and count > 1):
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
        "All engines ran the same model and prompts, in turns, greedily where no sampling is named. Rates are medians; "
        f"the ratio is to the fastest peer whose weights have as many bits. {OF_MEDIANS} Float32 of vLLM and "
        "transformers counts as 16 bits."
    )
    text += " KL is what the same types of weights cost the trained models above." if qualities else ""
    parts = [text, comparison.show_ratios(record, qualities), comparison.show_rates(runs, qualities)]
    if found := {cell: found for cell, found in comparison.newest(runs, "shares").items() if found}:
        rows = [[name, *(percent(by_stack.get(name)) for by_stack in found.values())] for name in STACKS]
        parts += [
            "For one sequence decoding: the rate at which weights are read, as a share of the machine's bandwidth. For "
            "a prompt: FLOP/s, as a share of those of a matrix product.",
            table(["", *map(comparison.label, found)], [row for row in rows if any(cell != "-" for cell in row[1:])]),
        ]
    return paragraphs(*parts, comparison.show_conditions(runs))


def notes(record: Record) -> str:
    sides = record.figures["pieces"][-1]["limits"]
    limits = [f"{side['bandwidth'] / 1e9:.1f} GB/s and {side['flops'] / 1e9:,.0f} GFLOP/s" for side in sides]
    return paragraphs(f"The machine's limits were {', then '.join(limits)}.", comparison.spinning(record))
