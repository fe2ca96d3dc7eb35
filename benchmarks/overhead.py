"""What the engine adds to the executor's steps: its host work, measured on the engine's own thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np

from isthmus.benchmarks.plans import build_plan
from isthmus.benchmarks.roofline import Workload
from isthmus.benchmarks.statistics import median
from isthmus.benchmarks.timing import time_plan
from isthmus.serve.engine.engine import Engine, StepTimes
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.request import Output, Request, Sampling

PROMPT_TOKENS = 16
BARE_REPEATS = 20


@dataclass(frozen=True)
class Overhead:
    """All sequences decoding at once; seconds are of one step."""

    sequences: int
    steps: int
    step_seconds: float
    """Wall time a step takes in the engine"""
    bare_seconds: float
    """The same step on the executor alone, at the mean position: before and after, the median of all"""
    plan_seconds: float
    launch_seconds: float
    wait_seconds: float
    """For the device: the rest of the step, and no work"""
    commit_seconds: float
    deliver_seconds: float
    cpu_seconds: float
    """Processor time of the engine thread: wall time less what it was kept from running"""
    host_share: float
    """(plan + launch + commit + deliver) / step: all that the host does, though most of it overlaps with the device.
    When `inline` is true the launch holds the device's time as well, and is left out"""
    cpu_share: float
    """cpu_seconds / step_seconds"""
    slowdown: float
    """step_seconds / bare_seconds - 1: what doesn't overlap, and on CPU what the host takes from the device's cores"""
    inline: bool
    """The launch only returned once the step had run: XLA does so with tiny programs on CPU"""


@dataclass(eq=False)
class _Window:
    """Times the steps from the first with every sequence decoding to the first that ends a sequence.

    `sink` runs on the engine's thread, so the thread's processor time can be read in it.
    """

    sequences: int
    engine: Engine | None = None
    done: threading.Event = field(default_factory=threading.Event)
    times: StepTimes | None = None
    elapsed: float = 0.0
    cpu: float = 0.0
    _drawn: int = 0
    _finished: int = 0
    _begin: tuple[float, float] | None = None

    def sink(self, outputs: list[Output]) -> None:
        assert self.engine is not None
        self._drawn += len(outputs)
        ended = sum(output.finish_reason is not None for output in outputs)
        if self._begin is None and self._drawn >= 3 * self.sequences:
            self._begin = (time.perf_counter(), time.thread_time())
            self.engine.times = StepTimes()
        elif self._begin is not None and ended and self.times is None:
            self.times = self.engine.times
            self.engine.times = StepTimes()
            self.elapsed = time.perf_counter() - self._begin[0]
            self.cpu = time.thread_time() - self._begin[1]
        self._finished += ended
        if self._finished >= self.sequences:
            self.done.set()


def measure_overhead(executor: Executor, tokens: int, temperature: float) -> Overhead:
    """Decodes `tokens` tokens (at most what the context holds) of max_sequences sequences through a real engine."""
    config = executor.engine
    prompt = min(PROMPT_TOKENS, config.context_length // 4)
    tokens = min(tokens, config.context_length - prompt)
    depth = prompt + tokens // 2
    before, inline = _bare_steps(executor, depth, temperature)
    window = _run_engine(executor, prompt, tokens, temperature)
    after, _ = _bare_steps(executor, depth, temperature)
    assert window.times is not None, "the engine ended before the window did"
    return _figures(window, window.times, median([*before, *after]), inline)


def _bare_steps(executor: Executor, depth: int, temperature: float) -> tuple[list[float], bool]:
    config = executor.engine
    bucket = config.bucket(config.max_sequences, 0)
    plan = build_plan(config, bucket, Workload(bucket.rows, depth, ()), temperature)
    timing = time_plan(executor, plan, 3, BARE_REPEATS)
    return timing.intervals.tolist(), timing.inline


def _run_engine(executor: Executor, prompt: int, tokens: int, temperature: float) -> _Window:
    window = _Window(executor.engine.max_sequences)
    engine = window.engine = Engine(executor, window.sink)
    draw = np.random.default_rng(0)
    # Handed over before the engine starts, so that one step admits them all.
    for index in range(window.sequences):
        ids = draw.integers(0, executor.model.vocab_size, prompt).tolist()
        engine.submit(Request(f"r{index}", ids, Sampling(temperature=temperature, seed=index), tokens))
    engine.start()
    try:
        while not window.done.wait(0.1):
            assert engine.alive, f"the engine died: {engine.error}"
    finally:
        engine.close()
    return window


def _figures(window: _Window, times: StepTimes, bare: float, inline: bool) -> Overhead:
    steps = max(1, times.steps)
    step = window.elapsed / steps
    launch = 0.0 if inline else times.launch
    host = times.plan + launch + times.commit + times.deliver
    return Overhead(
        sequences=window.sequences,
        steps=times.steps,
        step_seconds=step,
        bare_seconds=bare,
        plan_seconds=times.plan / steps,
        launch_seconds=times.launch / steps,
        wait_seconds=times.wait / steps,
        commit_seconds=times.commit / steps,
        deliver_seconds=times.deliver / steps,
        cpu_seconds=window.cpu / steps,
        host_share=host / steps / step,
        cpu_share=window.cpu / window.elapsed,
        slowdown=step / bare - 1,
        inline=inline,
    )
