"""Times steps on the executor alone, with plans that fill a bucket as a busy engine would, and the host work that an
engine adds, measured on the engine's thread."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.benchmarks.comparison import rotated
from isthmus.benchmarks.engine import Driver, SeenStep
from isthmus.benchmarks.figures import median
from isthmus.benchmarks.roofline import StepWork
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.model.ops.adjustments import words_for
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor, Launched
from isthmus.serve.engine.plan import FROM_DEVICE, PlanArrays, StepPlan, empty_plan
from isthmus.serve.engine.sampling import DRAW, Bias, Sampling, draw_of

PROMPT_TOKENS = 16
BARE_REPEATS = 20


def with_room(engine: EngineConfig, depth: int) -> EngineConfig:
    """The resolved `engine`, with pages for every row at `depth` and a step's prompts, and a queue for all rows or
    more."""
    rows = engine.max_sequences * -(-depth // engine.page_size)
    prompts = engine.prefill_tokens // engine.page_size
    waiting = max(engine.max_waiting, engine.max_sequences)
    return dataclasses.replace(engine, pages=max(engine.pages, 1 + rows + prompts), max_waiting=waiting)


def build_plan(engine: EngineConfig, bucket: Bucket, work: StepWork, sampling: Sampling) -> StepPlan:
    """The plan of a step that does `work`. Every sequence has pages of its own, so that none is found in a processor's
    cache because another sequence has read it."""
    packed, arrays = empty_plan(engine, bucket)
    draws = np.zeros(bucket.samples, DRAW)
    draws[:] = draw_of(sampling)
    draws["seed_low"] = np.arange(bucket.samples)
    draws["slot"] = engine.nobody
    draws["slot"][: work.rows] = np.arange(work.rows)
    draws["position"] = work.depth - 1
    _decode_rows(arrays, work)
    _prompts(bucket, arrays, work)
    bias = Bias.none(bucket.samples) if sampling.adjusts else None
    return StepPlan(
        bucket, packed, draws, list(enumerate(_tables(engine, work))), bias=bias, scheduled_tokens=work.tokens
    )


def _tables(engine: EngineConfig, work: StepWork) -> np.ndarray:
    """int32[sequences, pages_per_sequence]: pages of their own for each row and then for each prompt."""
    counts = [-(-tokens // engine.page_size) for tokens in [work.depth] * work.rows + list(work.prompts)]
    tables, first = np.zeros((len(counts), engine.pages_per_sequence), np.int32), 1
    for table, pages in zip(tables, counts, strict=True):
        table[:pages] = np.arange(first, first + pages)
        first += pages
    return tables


def _decode_rows(arrays: PlanArrays, work: StepWork) -> None:
    """Fills in the rows that decode, in the first slots."""
    for array in (arrays.slots, arrays.sample_token):
        array[: work.rows] = np.arange(work.rows)
    arrays.tokens[: work.rows] = FROM_DEVICE
    arrays.positions[: work.rows] = work.depth - 1


def _prompts(bucket: Bucket, arrays: PlanArrays, work: StepWork) -> None:
    """Fills in the blocks of prompts, in the slots after those of rows. The last block of each draws a token, which is
    kept for nobody."""
    row, token = bucket.rows, bucket.rows
    for index, tokens in enumerate(work.prompts):
        blocks = tokens // bucket.block_size
        arrays.positions[token : token + tokens] = np.arange(tokens)
        arrays.slots[row : row + blocks] = work.rows + index
        row, token = row + blocks, token + tokens
        arrays.sample_token[work.rows + index] = token - 1


@dataclass(frozen=True)
class Timing:
    """The times, in seconds, of a plan that is run again and again."""

    intervals: np.ndarray
    """From one result to the next"""
    launches: np.ndarray
    """How long each call took that launched a step"""
    inline: bool
    """Whether most launches returned only when the step had run, as XLA does with tiny programs on CPU"""


def _start(executor: Executor, plan: StepPlan) -> Launched:
    launched = executor.launch(plan)
    mask = None
    if plan.bias is not None:
        mask = np.full((plan.bucket.samples, words_for(executor.model.vocab_size)), -1, np.int32)
    executor.sample(launched, mask)
    return launched


def time_plan(executor: Executor, plan: StepPlan, warmup: int, repeats: int) -> Timing:
    """Runs `plan` with one step launched ahead, as the engine does."""
    clock = time.perf_counter
    inline = []
    _start(executor, plan).read()
    plan = dataclasses.replace(plan, tables=[])  # which the device has from now on
    for _ in range(warmup):
        launched = _start(executor, plan)
        inline.append(bool(launched.drawn.token.is_ready()))  # type: ignore[union-attr]
        launched.read()
    ahead = _start(executor, plan)
    launches, results = [], []
    for _ in range(repeats + 1):
        start = clock()
        following = _start(executor, plan)
        launches.append(clock() - start)
        ahead.read()
        results.append(clock())
        ahead = following
    ahead.read()
    return Timing(np.diff(results), np.asarray(launches[1:]), sum(inline) * 2 > len(inline))


SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "temperature 1": Sampling(),
    "top_k 50": Sampling(top_k=50),
    "top_p 0.95": Sampling(top_p=0.95),
    "all filters": Sampling(0.8, 50, 0.95, 0.05),
    "all filters, 5 logprobs": Sampling(0.8, 50, 0.95, 0.05, logprobs=5),
}
"""What people ask for, by the name in the result."""
ROUNDS = 5


def measure_samplings(executor: Executor, depth: int, repeats: int) -> list[dict[str, Any]]:
    """The step of the largest bucket without prompts, by how its tokens are drawn. The kinds take turns, so that a
    machine that changes its pace changes it for all.

    seconds: the median interval between results. greedy_ratio: the rate of the kind over that of greedy, the median
    over the rounds.
    """
    config = executor.engine
    bucket = config.bucket(config.max_sequences, 0)
    work = StepWork(bucket.rows, depth, ())
    plans = {name: build_plan(config, bucket, work, sampling) for name, sampling in SAMPLINGS.items()}
    found: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(ROUNDS):
        for name in rotated(list(plans), turn):
            found[name].append(median(time_plan(executor, plans[name], 1, repeats).intervals.tolist()))
    greedy = found["greedy"]
    return [
        {
            "name": name,
            "seconds": median(seconds),
            "greedy_ratio": median([one / other for one, other in zip(greedy, seconds, strict=True)]),
        }
        for name, seconds in found.items()
    ]


def measure_overhead(executor: Executor, tokens: int, temperature: float) -> dict[str, Any]:
    """Decodes `tokens` tokens, or as many as the context holds, of max_sequences sequences at once in a real engine.
    Times are seconds per step.

    step_seconds: wall time in the engine. bare_seconds: the same step on the executor alone, at the mean position, the
    median of before and after. wait_seconds: the engine's thread waits for the device. cpu_seconds: processor time of
    that thread. host_share: (plan + launch + commit + deliver) / step, all that the host does, though most of it
    overlaps with the device; if launches are `inline` (see Timing), they hold the device's time as well and are left
    out. cpu_share: cpu_seconds / step_seconds. slowdown: step_seconds / bare_seconds - 1, what doesn't overlap and, on
    CPU, what the host takes from the device's cores.
    """
    config = executor.engine
    prompt = min(PROMPT_TOKENS, config.context_length // 4)
    tokens = min(tokens, config.context_length - prompt)
    depth = prompt + tokens // 2
    before, inline = _bare_steps(executor, depth, temperature)
    seen = _run_engine(executor, prompt, tokens, temperature)
    after, _ = _bare_steps(executor, depth, temperature)
    return _figures(seen, config.max_sequences, median([*before, *after]), inline)


def _bare_steps(executor: Executor, depth: int, temperature: float) -> tuple[list[float], bool]:
    config = executor.engine
    bucket = config.bucket(config.max_sequences, 0)
    plan = build_plan(config, bucket, StepWork(bucket.rows, depth, ()), Sampling(temperature))
    timing = time_plan(executor, plan, 3, BARE_REPEATS)
    return timing.intervals.tolist(), timing.inline


def _run_engine(executor: Executor, prompt: int, tokens: int, temperature: float) -> list[SeenStep]:
    count = executor.engine.max_sequences
    prompts = np.random.default_rng(0).integers(0, executor.model.vocab_size, (count, prompt)).tolist()
    planned = [PlannedRequest(0.0, ids, tokens, seed) for seed, ids in enumerate(prompts)]
    driver = Driver(lambda sink: Engine(executor, sink))
    try:
        return driver.run(driver.requests(planned, Sampling(temperature)), count, lambda seen: seen[-1].ended == count)
    finally:
        driver.engine.close()


def _figures(seen: list[SeenStep], sequences: int, bare: float, inline: bool) -> dict[str, Any]:
    """The figures of the steps from when every sequence has three tokens to the first that ends a sequence."""
    drawn = np.cumsum([step.drawn for step in seen])
    begin = seen[int(np.argmax(drawn >= 3 * sequences))]
    end = next(step for step in seen if step.ended and step.at > begin.at)
    steps = max(1, end.times.steps - begin.times.steps)
    step, cpu = (end.at - begin.at) / steps, (end.cpu - begin.cpu) / steps
    parts = {
        name: (getattr(end.times, name) - getattr(begin.times, name)) / steps
        for name in ("plan", "launch", "wait", "commit", "deliver")
    }
    host = sum(parts.values()) - parts["wait"] - (parts["launch"] if inline else 0.0)
    return {
        "sequences": sequences,
        "steps": steps,
        "step_seconds": step,
        "bare_seconds": bare,
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        "cpu_seconds": cpu,
        "host_share": host / step,
        "cpu_share": cpu / step,
        "slowdown": step / bare - 1,
        "inline": inline,
    }
