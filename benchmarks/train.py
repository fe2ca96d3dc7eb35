"""`isthmus bench train`: our training step of nanoGPT's CPU recipe, beside nanoGPT's own in torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from isthmus.benchmarks.child import BenchError, Child
from isthmus.benchmarks.machine import Limits, better, describe, measure_limits
from isthmus.benchmarks.models import python_source
from isthmus.benchmarks.progress import progress_bar
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.statistics import median, summarize
from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS, ModelConfig
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
"""Of the recipe; the measured steps lie on its schedule of the learning rate"""
PAUSE_SECONDS = 0.2
"""Between turns, until the worker threads of the last one sleep"""


@dataclass(frozen=True)
class TrainBench:
    """Times training steps with the trainer and the batches that `isthmus train` uses, and the same recipe in torch.

    The recipe is nanoGPT's for a CPU (github.com/karpathy/nanoGPT, README): 4 layers, 4 heads, 128 wide, 64 tokens a
    sequence, 12 sequences a step, AdamW, gradients clipped at 1, float32. The text is Python's standard library as 65
    symbols, its 64 commonest characters and one for the rest: the vocabulary is exactly nanoGPT's 65, which `isthmus
    train` itself would round up to 128. Both sides read their loss; ours two steps late, as the training loop does.
    """

    preset: str = "nano"
    vocab_size: int = 65
    """Symbols; at least 2"""
    batch: int = 12
    """Sequences a step"""
    steps: int = 60
    """Of a turn"""
    turns: int = 9
    """Measured; the median counts"""
    warmup: int = 60
    """Steps before those, the compiling one included"""
    peer: bool = False
    """Time nanoGPT in torch too, in turns with ours, and report the ratio of medians"""
    peer_python: Path = Path(".venv-peers/bin/python")
    """Of the environment that `make peers` builds"""
    out: Path | None = None
    """Folder for PLATFORM-KIND-SUBJECT.json; default ./benchmarks/results where there is one, else ./bench-results"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        if self.preset not in PRESETS:
            raise ConfigError(f"preset: {self.preset!r} is none of {', '.join(PRESETS)}")
        for name, least in (("vocab_size", 2), ("batch", 1), ("steps", 1), ("turns", 3), ("warmup", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.peer and not self.peer_python.is_file():
            raise ConfigError(f"peer_python: {self.peer_python} does not exist; `make peers` builds it")


def write_symbols(stem: Path, vocab_size: int, limit: int = TEXT_BYTES) -> TokenFile:
    """Python's standard library in STEM.bin as uint16 symbols: the commonest characters, and one for all others."""
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
    """The product's trainer, run as its loop runs it."""

    def __init__(self, bench: TrainBench, config: ModelConfig, text: TokenFile) -> None:
        optimizer = OptimizerConfig(beta2=0.99)
        mesh = build_mesh(MeshShape())
        self._trainer = Trainer(config, build_optimizer(optimizer, SCHEDULE_STEPS), mesh)
        self._data = TrainingData(text, text, config.context_length, seed=0)
        self._state: TrainState = self._trainer.init(0)
        self._batch = bench.batch
        self._step = 0
        self.loss = float("nan")

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take, to the last loss."""
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

    def __init__(self, bench: TrainBench, config: ModelConfig, text: Path, log: Path) -> None:
        sizes = {
            "layers": config.layers,
            "heads": config.heads,
            "dim": config.dim,
            "block": config.context_length,
            "vocab": config.vocab_size,
            "batch": bench.batch,
            "data": str(text),
        }
        self._child = Child([str(bench.peer_python), str(PEER_SCRIPT), json.dumps(sizes)], log)
        self.facts = self._child.ask("facts")
        self.loss = float("nan")

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take, by the peer's own clock."""
        answer = self._child.ask("run", steps=steps)
        self.loss = answer["loss"]
        return float(answer["seconds"])

    def close(self) -> None:
        self._child.close()


@contextlib.contextmanager
def _peer(bench: TrainBench, config: ModelConfig, text: Path, log: Path) -> Iterator[Peer | None]:
    peer = Peer(bench, config, text, log) if bench.peer else None
    try:
        yield peer
    finally:
        if peer is not None:
            peer.close()


def take_turns(
    sides: dict[str, Callable[[int], float]], bench: TrainBench, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each side's turns; who begins alternates, so that a drift of the machine's speed touches both."""
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
    bench.validate()
    machine = describe()
    config = dataclasses.replace(PRESETS[bench.preset], vocab_size=bench.vocab_size)
    before = measure_limits(config.dtype)
    with temporary_folder("isthmus-bench-") as folder:
        stem = folder / "symbols"
        text = write_symbols(stem, bench.vocab_size)
        ours = Ours(bench, config, text)
        with _peer(bench, config, stem.with_suffix(".bin"), folder / "peer.log") as peer:
            sides: dict[str, Callable[[int], float]] = {"ours": ours.run}
            if peer is not None:
                sides["peer"] = peer.run
            with progress_bar(console, "turns of training", bench.turns) as tick:
                seconds = take_turns(sides, bench, tick)
            if not np.isfinite(ours.loss) or (peer and not np.isfinite(peer.loss)):
                raise BenchError("a loss is not finite: the figures would mean nothing")
            limits = better(before, measure_limits(config.dtype))
            figures = _figures(bench, config, ours, peer, seconds, limits)
    asked = {**dataclasses.asdict(bench), "model": dataclasses.asdict(config)}
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
        "spread": {name: dataclasses.asdict(summarize(values)) for name, values in rates.items()},
        "loss": ours.loss,
        "peer": None,
    }
    if peer is not None:
        theirs = median(rates["peer"])
        figures["peer"] = {**peer.facts, "tokens_per_second": theirs, "ratio": rate / theirs, "loss": peer.loss}
    return figures


def show(record: Record, console: Console) -> None:
    """Prints the record."""
    figures = record.figures
    spread = figures["spread"]["ours"]
    console.print(
        f"{record.machine.device}, {record.machine.cores} cores; {record.subject}: "
        f"{figures['tokens_per_second']:,.0f} tok/s ({spread['min']:,.0f} to {spread['max']:,.0f}), "
        f"MFU {figures['mfu']:.1%} of {figures['limits']['flops'] / 1e9:,.0f} GFLOP/s, "
        f"{figures['parameters'] / 1e6:.2f}M parameters, loss {figures['loss']:.2f}",
        highlight=False,
    )
    if (peer := figures["peer"]) is not None:
        spread = figures["spread"]["peer"]
        console.print(
            f"nanoGPT in torch {peer['torch']}: {peer['tokens_per_second']:,.0f} tok/s ({spread['min']:,.0f} to "
            f"{spread['max']:,.0f}), {peer['parameters'] / 1e6:.2f}M parameters, loss {peer['loss']:.2f}; "
            f"ours is {peer['ratio']:.2f}x as fast",
            highlight=False,
        )
