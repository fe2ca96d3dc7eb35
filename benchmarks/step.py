"""`isthmus bench step`: every bucket's step against the machine's limits, and what the engine adds to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import PAIRED, bucket_label, median, number, paragraphs, percent, table_of
from isthmus.benchmarks.machine import better, describe, measure_limits
from isthmus.benchmarks.models import preset
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.roofline import StepWork, cost, limit_seconds, workload
from isthmus.benchmarks.step_times import Timing, build_plan, measure_overhead, measure_samplings, time_plan, with_room
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.device.hardware import Limits, default_dtype
from isthmus.model.execution import Execution
from isthmus.model.ops.kernels import announcement
from isthmus.model.parameter import Dtype
from isthmus.model.sharding import MeshShape, build_mesh, check_divisible
from isthmus.model.weights.random import init_params
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling


@dataclass(frozen=True)
class StepBench(Bench):
    """Times every program that a server would run, with random weights, and compares it with the machine's limits.

    Each bucket is full: all its rows decode at --depth, and its blocks compute prompts. The time of a step is the
    interval between results while one step is launched ahead, as the engine does. The limit is the longer of two times:
    to move the weights once and the KV cache, at the memory bandwidth, and to compute the FLOPs, at the peak. Both
    limits are measured before and after. A share above 100% means that weights stayed in a processor's cache, which the
    limit doesn't consider.
    """

    preset: str = "125m"
    """Size of the model"""
    vocab_size: int = 0
    """The model's vocabulary; 0 is the preset's, or 32000"""
    dtype: Dtype | None = None
    """Dtype of weights, activations and KV cache; by default bfloat16, and float32 on CPU"""
    tp: int = 1
    """Devices to split the model over"""
    depth: int = 0
    """Positions that each decoding row attends to; 0 means half of the context"""
    temperature: float = 1.0
    """1 draws from the model's distribution, which is the server's default; 0 is greedy and a little less work"""
    repeats: int = 20
    """Measured steps of each bucket; the median counts"""
    warmup: int = 3
    """Steps of each bucket before the measured ones"""
    overhead_tokens: int = 64
    """Tokens that the whole engine decodes for each sequence, all sequences at once; 0 leaves that part out"""
    samplings: bool = True
    """Time the largest step without prompts for each way to draw tokens, beside greedy"""
    kernels: str = "auto"
    """Kernels that compute, as for `isthmus serve`: auto, reference, or the name of kernels such as cpu"""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(draft_rows=0, steps_per_launch=1))

    def validate(self) -> None:
        self.check_least(vocab_size=0, repeats=3, warmup=1, tp=1, depth=0)
        if self.overhead_tokens and self.overhead_tokens < 8:
            raise ConfigError(f"overhead_tokens={self.overhead_tokens} must be 0 or at least 8")


def bucket_figures(served: Served, bucket: Bucket, work: StepWork, timing: Timing, limits: Limits) -> dict[str, Any]:
    """A bucket's timing against the least it could take.

    tokens: what isn't padding. seconds: the median interval between results. launch_seconds: the median of the call
    that launches a step, which with `inline` only returned once the step had run. bound: what sets the limit, memory or
    compute. limit_share: limit_seconds / seconds; 1 is as fast as the machine can.
    """
    least = cost(served.model, work, served.execution.dtype)
    limit, bound = limit_seconds(least, limits)
    seconds = median(timing.intervals.tolist())
    return {
        **bucket._asdict(),
        "tokens": work.tokens,
        "drawn": work.drawn,
        "seconds": seconds,
        "seconds_min": float(timing.intervals.min()),
        "seconds_max": float(timing.intervals.max()),
        "launch_seconds": median(timing.launches.tolist()),
        "inline": timing.inline,
        **dataclasses.asdict(least),
        "limit_seconds": limit,
        "bound": bound,
        "limit_share": limit / seconds,
        "tokens_per_second": work.tokens / seconds,
    }


def build_executor(bench: StepBench, config: ModelConfig, dtype: Dtype, tick: Tick) -> tuple[Executor, int]:
    """Returns a compiled executor with random weights, and the depth at which its rows decode. Raises ConfigError."""
    engine = bench.engine.resolve(config)
    depth = bench.depth or max(1, engine.context_length // 2)
    if depth > engine.context_length:
        raise ConfigError(f"depth={depth} must be at most the context, {engine.context_length}")
    shape = MeshShape(tp=bench.tp)
    check_divisible(config, shape)
    mesh = build_mesh(shape)
    served = Served(config, with_room(engine, depth), config.vocab_size, Execution(dtype))
    executor = Executor(served.with_kernels(bench.kernels, mesh), init_params(config, 0, mesh, dtype=dtype), mesh)
    executor.warm_up(on_progress=lambda bucket: tick())
    return executor, depth


def run(bench: StepBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError."""
    machine = describe()
    config, dtype = preset(bench.preset, bench.vocab_size), bench.dtype or default_dtype()
    before = measure_limits(dtype, bench.tp)
    buckets = bench.engine.resolve(config).buckets
    with progress_bar(console, "compiling", len(buckets)) as tick:
        executor, depth = build_executor(bench, config, dtype, tick)
    console.print(announcement(executor.served.execution.kernels, executor.served.setting(executor.mesh)))
    timings: list[tuple[Bucket, StepWork, Timing]] = []
    with progress_bar(console, "timing steps", len(buckets)) as tick:
        for bucket in buckets:
            work = workload(bucket, depth)
            plan = build_plan(executor.engine, bucket, work, Sampling(bench.temperature))
            timings.append((bucket, work, time_plan(executor, plan, bench.warmup, bench.repeats)))
            tick()
    samplings = measure_samplings(executor, depth, bench.repeats) if bench.samplings else []
    overhead = measure_overhead(executor, bench.overhead_tokens, bench.temperature) if bench.overhead_tokens else None
    recompilations = executor.recompilations  # before the limits' own programs are compiled again
    limits = better(before, measure_limits(dtype, bench.tp))
    figures: dict[str, Any] = {
        "limits": dataclasses.asdict(limits),
        "depth": depth,
        "parameters": config.parameters,
        "compile_seconds": executor.compile_seconds,
        "buckets": [bucket_figures(executor.served, *timing, limits) for timing in timings],
        "samplings": samplings,
        "overhead": overhead,
        "recompilations": recompilations,
    }
    sizes = {"model": {**dataclasses.asdict(config), "dtype": dtype}, "engine": dataclasses.asdict(executor.engine)}
    return Record("step", bench.preset, machine, {**dataclasses.asdict(bench), **sizes}, figures)


def show(record: Record, _: Qualities) -> str:
    figures = record.figures
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "rows + prompt": lambda row: bucket_label(row, " + "),
        "tokens": lambda row: str(row["tokens"]),
        "ms": lambda row: number(row["seconds"] * 1e3),
        "limit, ms": lambda row: number(row["limit_seconds"] * 1e3),
        "of the limit": lambda row: percent(row["limit_share"]),
        "bound by": lambda row: row["bound"],
        "tok/s": lambda row: number(row["tokens_per_second"]),
    }
    text = (
        f"{figures['parameters'] / 1e6:.1f}M parameters, {record.config['model']['dtype']}; rows decode at "
        f"{figures['depth']} positions. The limit is the time to read the weights once, and to read and write the KV "
        f"cache, at the machine's bandwidth, or to compute the FLOPs at its peak, whichever is longer."
    )
    drawing = _samplings(figures.get("samplings", []))
    return paragraphs(text, table_of(figures["buckets"], columns), drawing, _overhead(figures["overhead"]))


def _samplings(rows: list[dict[str, Any]]) -> str:
    """How much slower it is to draw than to take the likeliest; empty for an older result."""
    if not rows:
        return ""
    parts = ", ".join(f"{row['name']} {number(row['seconds'] * 1e3)} ({row['greedy_ratio']:.2f}x)" for row in rows)
    told = f"The largest step without prompts by how its tokens are drawn, ms, and the rate beside greedy's: {parts}."
    return f"{told} {PAIRED}"


def _overhead(over: dict[str, Any] | None) -> str:
    if over is None:
        return ""
    return (
        f"With {over['sequences']} sequences decoding, a step takes {number(over['step_seconds'] * 1e3)} ms in the "
        f"engine and {number(over['bare_seconds'] * 1e3)} ms on the executor alone ({over['slowdown']:+.1%}). Host "
        f"work is {percent(over['host_share'])} of a step by the clock, and {percent(over['cpu_share'])} by the "
        f"processor time of the engine's thread."
    )


def notes(record: Record) -> str:
    rows, over = record.figures["buckets"], record.figures["overhead"]
    launches = ", ".join(f"{row['launch_seconds'] * 1e3:.2f}{' (inline)' if row['inline'] else ''}" for row in rows)
    text = f"Launching a step, ms: {launches}."
    if over is None:
        return text
    parts = ", ".join(f"{name} {over[f'{name}_seconds'] * 1e3:.2f}" for name in ("plan", "launch", "commit", "deliver"))
    return paragraphs(text, f"The host's part of {over['steps']} steps of the engine, ms per step: {parts}.")
