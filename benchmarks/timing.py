"""Timing a plan on the executor alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from isthmus.serve.engine.executor import Executor, Launched
from isthmus.serve.engine.plan import StepPlan


@dataclass(frozen=True)
class Timing:
    """Of one plan, run again and again; seconds."""

    intervals: np.ndarray
    launches: np.ndarray
    inline: bool


def time_plan(executor: Executor, plan: StepPlan, warmup: int, repeats: int) -> Timing:
    """Runs `plan` with one step launched ahead."""
    clock = time.perf_counter
    inline = []
    for _ in range(warmup):
        launched = executor.launch(plan)
        inline.append(bool(launched.drawn.is_ready()))  # type: ignore[attr-defined]
        launched.read()
    ahead: Launched = executor.launch(plan)
    launches, results = [], []
    for _ in range(repeats + 1):
        start = clock()
        following = executor.launch(plan)
        launches.append(clock() - start)
        ahead.read()
        results.append(clock())
        ahead = following
    ahead.read()
    return Timing(np.diff(results), np.asarray(launches[1:]), sum(inline) * 2 > len(inline))
