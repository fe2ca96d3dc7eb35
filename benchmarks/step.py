"""`isthmus bench step`: every bucket's step against the machine's limits, and what the engine adds to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isthmus.benchmarks.machine import Limits, better, describe, measure_limits
from isthmus.benchmarks.models import as_served, preset, random_params
from isthmus.benchmarks.overhead import measure_overhead
from isthmus.benchmarks.plans import build_plan, with_room
from isthmus.benchmarks.progress import progress_bar
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.roofline import Workload, cost, limit_seconds, workload
from isthmus.benchmarks.statistics import median
from isthmus.benchmarks.timing import Timing, time_plan
from isthmus.errors import ConfigError
from isthmus.model.config import Dtype, ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh, check_divisible
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.executor import Executor


@dataclass(frozen=True)
class StepBench:
    """Times every program that a server would run, with random weights, against memory bandwidth and peak FLOP/s.

    Each bucket is full: all its rows decode at --depth, its blocks compute prompts. The time of a step is the interval
    between results while one step is launched ahead, as the engine runs. The limit counts from shapes what must be
    moved (weights once, the KV cache read and written) and computed, at the bandwidth and the peak measured before and
    after. A share above 100% means that weights stayed in a processor's cache, which the limit doesn't know.
    """

    preset: str = "125m"
    """Size of the model"""
    vocab_size: int = 0
    """0 is the preset's, or 32000"""
    dtype: Dtype | None = None
    """Of weights, activations and KV cache; default bfloat16, and float32 on CPU"""
    tp: int = 1
    """Devices to split the model over"""
    depth: int = 0
    """Positions that each decoding row attends to; 0 is half of the context"""
    temperature: float = 1.0
    """1 draws from the model's distribution, which is the server's default; 0 is greedy and a little less work"""
    repeats: int = 20
    """Measured steps of each bucket; the median counts"""
    warmup: int = 3
    """Steps of each bucket before those"""
    overhead_tokens: int = 64
    """Tokens a sequence that the whole engine decodes, all sequences at once; 0 leaves that part out"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: Path | None = None
    """Folder for PLATFORM-KIND-SUBJECT.json; default ./benchmarks/results where there is one, else ./bench-results"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        for name, least in (("repeats", 3), ("warmup", 1), ("tp", 1), ("depth", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.overhead_tokens and self.overhead_tokens < 8:
            raise ConfigError(f"overhead_tokens={self.overhead_tokens} must be 0 or at least 8")


@dataclass(frozen=True)
class BucketFigures:
    """One bucket; times in seconds."""

    rows: int
    blocks: int
    block_size: int
    tokens: int
    """In the step, none of them padding"""
    drawn: int
    seconds: float
    """Median interval between results"""
    seconds_min: float
    seconds_max: float
    launch_seconds: float
    """Median of the call that launches a step"""
    inline: bool
    """The launch only returned once the step had run: XLA does so with tiny programs on CPU"""
    weight_bytes: int
    kv_read_bytes: int
    kv_written_bytes: int
    flops: int
    limit_seconds: float
    bound: str
    """What sets the limit: memory or compute"""
    limit_share: float
    """limit_seconds / seconds: 1 is as fast as the machine can"""
    tokens_per_second: float


def bucket_figures(
    config: ModelConfig, bucket: Bucket, work: Workload, timing: Timing, limits: Limits
) -> BucketFigures:
    """A bucket's timing against the least it could take."""
    least = cost(config, work)
    limit, bound = limit_seconds(least, limits)
    seconds = median(timing.intervals.tolist())
    return BucketFigures(
        *bucket,
        tokens=work.tokens,
        drawn=work.drawn,
        seconds=seconds,
        seconds_min=float(timing.intervals.min()),
        seconds_max=float(timing.intervals.max()),
        launch_seconds=median(timing.launches.tolist()),
        inline=timing.inline,
        weight_bytes=least.weight_bytes,
        kv_read_bytes=least.kv_read_bytes,
        kv_written_bytes=least.kv_written_bytes,
        flops=least.flops,
        limit_seconds=limit,
        bound=bound,
        limit_share=limit / seconds,
        tokens_per_second=work.tokens / seconds,
    )


def build_executor(bench: StepBench, config: ModelConfig, tick: Callable[[], None]) -> tuple[Executor, int]:
    """A compiled executor of random weights, and the depth its rows decode at. Raises ConfigError."""
    engine = bench.engine.resolve(config)
    depth = bench.depth or max(1, engine.context_length // 2)
    if depth > engine.context_length:
        raise ConfigError(f"depth={depth} must be at most the context, {engine.context_length}")
    shape = MeshShape(tp=bench.tp)
    check_divisible(config, shape)
    mesh = build_mesh(shape)
    executor = Executor(config, with_room(engine, depth), random_params(config, mesh), mesh, config.vocab_size)
    executor.compile(tick=lambda bucket: tick())
    return executor, depth


def run(bench: StepBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError."""
    bench.validate()
    machine = describe()
    config = as_served(preset(bench.preset, bench.vocab_size), bench.dtype)
    before = measure_limits(config.dtype, bench.tp)
    buckets = bench.engine.resolve(config).buckets
    with progress_bar(console, "compiling", len(buckets)) as tick:
        executor, depth = build_executor(bench, config, tick)
    timings: dict[Bucket, tuple[Workload, Timing]] = {}
    with progress_bar(console, "timing steps", len(buckets)) as tick:
        for bucket in buckets:
            work = workload(bucket, depth)
            plan = build_plan(executor.engine, bucket, work, bench.temperature)
            timings[bucket] = (work, time_plan(executor, plan, bench.warmup, bench.repeats))
            tick()
    overhead = measure_overhead(executor, bench.overhead_tokens, bench.temperature) if bench.overhead_tokens else None
    recompilations = executor.recompilations  # before the limits' own programs are compiled again
    limits = better(before, measure_limits(config.dtype, bench.tp))
    figures: dict[str, Any] = {
        "limits": dataclasses.asdict(limits),
        "depth": depth,
        "parameters": config.parameters,
        "compile_seconds": executor.compile_seconds,
        "buckets": [dataclasses.asdict(bucket_figures(config, bucket, *timings[bucket], limits)) for bucket in buckets],
        "overhead": dataclasses.asdict(overhead) if overhead else None,
        "recompilations": recompilations,
    }
    asked = {
        **dataclasses.asdict(bench),
        "model": dataclasses.asdict(config),
        "engine": dataclasses.asdict(executor.engine),
    }
    return Record("step", bench.preset, machine, asked, figures)


def show(record: Record, console: Console) -> None:
    """Prints the record as tables."""
    figures = record.figures
    limits = figures["limits"]
    console.print(
        f"{record.machine.device}, {record.machine.cores} cores: {limits['bandwidth'] / 1e9:.1f} GB/s, "
        f"{limits['flops'] / 1e9:,.0f} GFLOP/s ({limits['source']}); {record.subject}, "
        f"{figures['parameters'] / 1e6:.1f}M parameters, rows at {figures['depth']} positions",
        highlight=False,
    )
    table = Table("rows", "blocks", "tokens", "ms", "limit ms", "share", "bound", "tok/s", "launch ms")
    for row in figures["buckets"]:
        inline = " (inline)" if row["inline"] else ""
        table.add_row(
            *(str(row[name]) for name in ("rows", "blocks", "tokens")),
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['limit_seconds'] * 1e3:.2f}",
            f"{row['limit_share']:.0%}",
            row["bound"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['launch_seconds'] * 1e3:.2f}{inline}",
        )
    console.print(table)
    if (over := figures["overhead"]) is not None:
        console.print(_overhead_text(over), highlight=False)


def _overhead_text(over: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {over[f'{name}_seconds'] * 1e3:.2f}" for name in ("plan", "launch", "commit", "deliver"))
    return (
        f"engine, {over['sequences']} sequences, {over['steps']} steps of {over['step_seconds'] * 1e3:.2f} ms "
        f"({over['bare_seconds'] * 1e3:.2f} on the executor alone): host {over['host_share']:.1%} of a step "
        f"(ms: {parts}), its processor time {over['cpu_share']:.1%}; a step takes {over['slowdown']:+.1%} longer"
    )
