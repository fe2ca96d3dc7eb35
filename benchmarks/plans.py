"""Steps without requests: plans that fill a bucket as a busy engine would, to run on the executor alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from isthmus.benchmarks.roofline import Workload
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import FROM_DEVICE, PADDING, PlanArrays, StepPlan, plan_size, split_plan


def with_room(engine: EngineConfig, depth: int) -> EngineConfig:
    """`engine` (resolved) with pages for every row at `depth` and a step's prompts, and a queue for as many as rows."""
    rows = engine.max_sequences * -(-depth // engine.page_size)
    prompts = engine.prefill_tokens // engine.page_size
    waiting = max(engine.max_waiting, engine.max_sequences)
    return dataclasses.replace(engine, pages=max(engine.pages, 1 + rows + prompts), max_waiting=waiting)


def build_plan(engine: EngineConfig, bucket: Bucket, work: Workload, temperature: float) -> StepPlan:
    """The step that does `work`. Every sequence has pages of its own, so that nothing is read from a cache by luck."""
    packed = np.zeros(plan_size(bucket, engine.pages_per_sequence), np.int32)
    arrays = split_plan(packed, bucket, engine.pages_per_sequence)
    arrays.positions[:] = PADDING
    arrays.sample_slot[:] = engine.max_sequences
    arrays.temperature.view(np.float32)[:] = temperature
    arrays.top_p.view(np.float32)[:] = 1.0
    arrays.seed_low[:] = np.arange(bucket.samples)
    first_page = _decode_rows(engine, arrays, work)
    _prompts(engine, bucket, arrays, work, first_page)
    return StepPlan(bucket, packed, scheduled_tokens=work.tokens)


def _decode_rows(engine: EngineConfig, arrays: PlanArrays, work: Workload) -> int:
    """Fills the single tokens; returns the first page that is left."""
    pages = -(-work.depth // engine.page_size)
    rows = np.arange(work.rows)
    arrays.tokens[: work.rows] = FROM_DEVICE
    arrays.positions[: work.rows] = work.depth - 1
    arrays.row_slot[: work.rows] = rows
    arrays.sample_token[: work.rows] = rows
    arrays.sample_slot[: work.rows] = rows
    arrays.tables[: work.rows, :pages] = 1 + rows[:, None] * pages + np.arange(pages)
    return 1 + work.rows * pages


def _prompts(engine: EngineConfig, bucket: Bucket, arrays: PlanArrays, work: Workload, first_page: int) -> None:
    """Fills the blocks; the last block of a prompt draws, for nobody (`last_token` has a place for that)."""
    row, token = bucket.rows, bucket.rows
    for tokens in work.prompts:
        pages, blocks = tokens // engine.page_size, tokens // bucket.block_size
        arrays.positions[token : token + tokens] = np.arange(tokens)
        arrays.tables[row : row + blocks, :pages] = first_page + np.arange(pages)
        first_page, row, token = first_page + pages, row + blocks, token + tokens
        arrays.sample_token[row - 1] = token - 1
