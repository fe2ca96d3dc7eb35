"""`isthmus bench train`: our training step of nanoGPT's CPU recipe, beside nanoGPT's own in torch."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import median, number, paragraphs, percent, summarize, table
from isthmus.benchmarks.machine import better, describe, measure_limits
from isthmus.benchmarks.models import python_source
from isthmus.benchmarks.processes import BenchError, Child
from isthmus.benchmarks.record import Record
from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS, ModelConfig
from isthmus.model.device.hardware import Limits
from isthmus.model.execution import DEFAULT_EXECUTION, PRESET_EXECUTIONS
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.train.config import OptimizerConfig
from isthmus.train.data import TokenFile, TrainingData
from isthmus.train.loop import RUN_AHEAD
from isthmus.train.optimizer import build_optimizer
from isthmus.train.step import Metrics, Trainer, TrainState

PEER_SCRIPT = Path(__file__).parent / "peers" / "nanogpt_torch.py"
TEXT_BYTES = 4 << 20
SCHEDULE_STEPS = 2000
"""Steps of the recipe; the measured steps lie on its schedule of the learning rate"""
PAUSE_SECONDS = 0.2
"""Pause between two turns, in which the worker threads of the side that ran last go to sleep"""


@dataclass(frozen=True)
class TrainBench(Bench):
    """Times training steps with the trainer and the batches that `isthmus train` uses, and the same recipe in torch.

    The recipe is nanoGPT's for a CPU (github.com/karpathy/nanoGPT, README): 4 layers, 4 heads, 128 wide, 64 tokens per
    sequence, 12 sequences per step, AdamW, gradients clipped at 1, float32. The text is the source of Python's standard
    library as 65 symbols, its 64 commonest characters and one for the rest: the vocabulary is exactly nanoGPT's 65,
    which `isthmus train` itself would round up to 128. Both sides read the loss of every step; ours reads it two steps
    late, as the training loop does.
    """

    preset: str = "nano"
    """Size of the model"""
    vocab_size: int = 65
    """Number of symbols; at least 2"""
    batch: int = 12
    """Sequences per step"""
    steps: int = 60
    """Training steps in a turn"""
    turns: int = 9
    """Turns that are measured; the median counts"""
    warmup: int = 60
    """Steps before the measured turns, with the one that compiles"""
    peer: bool = False
    """Also time nanoGPT in torch, in turns with ours, and report the ratio of the medians"""
    peer_python: Path = Path(".venv-peers/bin/python")
    """The Python of the environment that `make peers` builds"""

    def validate(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset: {self.preset!r} is none of {', '.join(PRESETS)}")
        self.check_least(vocab_size=2, batch=1, steps=1, turns=3, warmup=1)
        if self.peer and not self.peer_python.is_file():
            raise ConfigError(f"peer_python: {self.peer_python} does not exist; `make peers` builds it")


def write_symbols(stem: Path, vocab_size: int, limit: int = TEXT_BYTES) -> TokenFile:
    """Writes Python's library into STEM.bin as uint16 symbols: the commonest characters, and one for all others."""
    texts = list(python_source(limit))
    code = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    common, counts = np.unique(code, return_counts=True)
    table = np.full(int(common.max()) + 1, vocab_size - 1, np.uint16)
    table[common[np.argsort(-counts, kind="stable")][: vocab_size - 1]] = np.arange(min(vocab_size - 1, len(common)))
    table[code].tofile(stem.with_suffix(".bin"))
    np.save(stem.with_suffix(".npy"), np.cumsum([len(text) for text in texts], dtype=np.int64))
    meta = {"dtype": "uint16", "text_bytes": sum(len(text.encode()) for text in texts)}
    stem.with_suffix(".json").write_text(json.dumps(meta))
    return TokenFile.open(stem)


class Ours:
    """Our trainer, run as the training loop runs it."""

    def __init__(self, bench: TrainBench, config: ModelConfig, text: TokenFile) -> None:
        optimizer = OptimizerConfig(beta2=0.99)
        mesh = build_mesh(MeshShape())
        execution = PRESET_EXECUTIONS.get(bench.preset, DEFAULT_EXECUTION)
        self._trainer = Trainer(config, build_optimizer(optimizer, SCHEDULE_STEPS, config), mesh, execution)
        self._data = TrainingData(text, text, config.context_length, seed=0)
        self._state: TrainState = self._trainer.init(0)
        self._batch = bench.batch
        self._step = 0
        self.loss = float("nan")

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take, until the last loss is read."""
        pending: deque[Metrics] = deque()
        start = time.perf_counter()
        for step in range(self._step, self._step + steps):
            self._state, metrics = self._trainer.step(self._state, self._data.batch(step, self._batch, 1))
            pending.append(metrics)
            if len(pending) > RUN_AHEAD:
                self._read(pending.popleft())
        while pending:
            self._read(pending.popleft())
        self._step += steps
        return time.perf_counter() - start

    def _read(self, metrics: Metrics) -> None:
        self.loss = float(metrics.loss)
        float(metrics.grad_norm)


class Peer:
    """nanoGPT in torch, in a process and an environment of its own, on the same symbols."""

    def __init__(self, bench: TrainBench, config: ModelConfig, text: Path, child: Child) -> None:
        sizes = {"layers": config.layers, "heads": config.heads, "dim": config.dim, "block": config.context_length}
        self._child = child
        self.facts = child.ask("load", **sizes, vocab=config.vocab_size, batch=bench.batch, data=str(text))
        self.loss = float("nan")

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take, by the peer's own clock."""
        answer = self._child.ask("run", steps=steps)
        self.loss = answer["loss"]
        return float(answer["seconds"])


def take_turns(sides: dict[str, Callable[[int], float]], bench: TrainBench, tick: Tick) -> dict[str, list[float]]:
    """The seconds of each side's turns; who begins alternates, so that the machine's drift affects both."""
    for run_steps in sides.values():
        run_steps(bench.warmup)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(bench.turns):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            time.sleep(PAUSE_SECONDS)
            seconds[name].append(sides[name](bench.steps))
        tick()
    return seconds


def run(bench: TrainBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError, BenchError."""
    machine = describe()
    config = dataclasses.replace(PRESETS[bench.preset], vocab_size=bench.vocab_size)
    dtype = PRESET_EXECUTIONS.get(bench.preset, DEFAULT_EXECUTION).dtype
    before = measure_limits(dtype)
    with temporary_folder("isthmus-bench-") as folder, ExitStack() as children:
        stem = folder / "symbols"
        ours = Ours(bench, config, write_symbols(stem, bench.vocab_size))
        sides: dict[str, Callable[[int], float]] = {"ours": ours.run}
        peer: Peer | None = None
        if bench.peer:
            child = children.enter_context(Child([str(bench.peer_python), str(PEER_SCRIPT)], folder / "peer.log"))
            peer = Peer(bench, config, stem.with_suffix(".bin"), child)
            sides["peer"] = peer.run
        with progress_bar(console, "turns of training", bench.turns) as tick:
            seconds = take_turns(sides, bench, tick)
        if not np.isfinite(ours.loss) or (peer and not np.isfinite(peer.loss)):
            raise BenchError("a loss is not finite: the figures would mean nothing")
        limits = better(before, measure_limits(dtype))
    figures = _figures(bench, config, ours, peer, seconds, limits)
    asked = {**dataclasses.asdict(bench), "model": {**dataclasses.asdict(config), "dtype": dtype}}
    return Record("train", bench.preset, machine, asked, figures)


def _figures(
    bench: TrainBench,
    config: ModelConfig,
    ours: Ours,
    peer: Peer | None,
    seconds: dict[str, list[float]],
    limits: Limits,
) -> dict[str, Any]:
    tokens = bench.batch * config.context_length * bench.steps
    rates = {name: [tokens / s for s in turns] for name, turns in seconds.items()}
    rate = median(rates["ours"])
    flops = config.train_flops(bench.batch, config.context_length) / (bench.batch * config.context_length)
    figures: dict[str, Any] = {
        "limits": dataclasses.asdict(limits),
        "parameters": config.parameters,
        "tokens_per_second": rate,
        "mfu": rate * flops / limits.flops,
        "turns": rates,
        "spread": {name: summarize(values) for name, values in rates.items()},
        "loss": ours.loss,
        "peer": None,
    }
    if peer is not None:
        theirs = median(rates["peer"])
        figures["peer"] = {**peer.facts, "tokens_per_second": theirs, "ratio": rate / theirs, "loss": peer.loss}
    return figures


def show(record: Record, _: Qualities) -> str:
    figures = record.figures
    config, peer = record.config, figures["peer"]
    sides = [("Isthmus", figures, figures["spread"]["ours"])]
    if peer is not None:
        sides.append((f"nanoGPT, torch {peer['torch']} eager", peer, figures["spread"]["peer"]))
    rows = [
        [
            name,
            f"{side['parameters'] / 1e6:.2f}M",
            number(side["tokens_per_second"]),
            f"{number(spread['min'])} to {number(spread['max'])}",
        ]
        for name, side, spread in sides
    ]
    text = (
        f"{config['batch']} sequences of {config['model']['context_length']} tokens per step, {config['steps']} steps "
        f"per turn, {config['turns']} turns, {config['model']['dtype']}; MFU {percent(figures['mfu'])}."
    )
    ratio = "" if peer is None else f"Ratio of medians: {peer['ratio']:.2f}."
    return paragraphs(text, table(["", "parameters", "tok/s, median", "spread"], rows), ratio)


def notes(record: Record) -> str:
    peer = record.figures["peer"]
    theirs = "" if peer is None else f"; nanoGPT's {peer['loss']:.2f}"
    return f"Loss {record.figures['loss']:.2f}{theirs}."
