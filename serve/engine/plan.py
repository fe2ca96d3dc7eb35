"""A step's plan: one int32 array that host and device cut into the same named parts, so that a forward pass needs one
transfer, and a row for each draw."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from isthmus.serve.engine.config import Bucket
from isthmus.serve.engine.sequence import Sequence

FROM_DEVICE = -1
"""Stands for the token that the slot drew last, which the host may not know yet."""

PADDING = -1
"""The position of tokens that belong to nobody."""


class PlanArrays(NamedTuple):
    """The parts of a plan, whose shapes are in terms of Bucket's fields."""

    tokens: Any
    """int32[tokens]: ids, or FROM_DEVICE"""
    positions: Any
    """int32[tokens]: position in its sequence, or PADDING"""
    tables: Any
    """int32[rows + blocks, pages_per_sequence]: the pages of the sequence that a row or block belongs to"""
    uses_long_rope: Any
    """int32[rows + blocks]: 1 for a sequence longer than the model's rope_switch"""
    sample_token: Any
    """int32[samples]: index on the token axis of the token after which one is drawn"""
    row_slot: Any
    """int32[rows]: the slot whose last token FROM_DEVICE stands for"""


@lru_cache(maxsize=256)
def _layout(bucket: Bucket, pages_per_sequence: int) -> tuple[tuple[slice, tuple[int, ...]], ...]:
    """Where each part lies, and its shape. It is cached, because a plan is made every step."""
    tokens, samples = (bucket.tokens,), (bucket.samples,)
    sequences = bucket.rows + bucket.blocks
    tables = (sequences, pages_per_sequence)
    shapes = PlanArrays(tokens, tokens, tables, (sequences,), samples, (bucket.rows,))
    ends = list(accumulate(map(math.prod, shapes)))
    return tuple((slice(end - math.prod(shape), end), shape) for end, shape in zip(ends, shapes, strict=True))


def plan_size(bucket: Bucket, pages_per_sequence: int) -> int:
    return _layout(bucket, pages_per_sequence)[-1][0].stop


def split_plan(packed: Any, bucket: Bucket, pages_per_sequence: int) -> PlanArrays:
    """The parts of `packed`, int32[plan_size]: views of a numpy array, slices of a traced one."""
    return PlanArrays(*(packed[part].reshape(shape) for part, shape in _layout(bucket, pages_per_sequence)))


@dataclass(eq=False)
class StepPlan:
    """What a step computes, and for whom it draws."""

    bucket: Bucket
    packed: np.ndarray
    """PlanArrays in one array, int32[plan_size]"""
    draws: np.ndarray
    """DRAW[samples], a row for each row of the head"""
    samples: list[tuple[int, Sequence]] = field(default_factory=list)
    """(row of the head, sequence) of each token drawn"""
    scheduled_tokens: int = 0
    """Tokens that are not padding"""
