"""A step's plan: one int32 array that host and device cut into the same named parts, so that a forward pass needs one
transfer, and a row for each draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.sampling import Bias
from isthmus.serve.engine.sequence import Sequence

FROM_DEVICE = -1
"""Stands for the token that was drawn for that slot and position, which the host may not know yet."""

PADDING = -1
"""The position of tokens that belong to nobody."""

MOST_ENDS = 16
"""Ids that may end a sequence within a launch of several steps"""


class PlanArrays(NamedTuple):
    """The parts of a plan, whose shapes are in terms of Bucket's fields."""

    tokens: Any
    """int32[tokens]: ids, or FROM_DEVICE"""
    positions: Any
    """int32[tokens]: position in its sequence, or PADDING"""
    slots: Any
    """int32[rows + blocks]: the slot of the sequence that a row or block belongs to"""
    row_page: Any
    """int32[rows]: the page that takes a row's token, which its slot's table may not hold yet"""
    uses_long_rope: Any
    """int32[rows + blocks]: 1 for a sequence longer than the model's rope_switch"""
    adapters: Any
    """int32[rows + blocks]: the place of the sequence's adapter, from 1 on; 0 for none"""
    sample_token: Any
    """int32[samples]: index on the token axis of the token after which one is drawn; after its end for none"""


@lru_cache(maxsize=256)
def _layout(bucket: Bucket) -> tuple[slice, ...]:
    """Where each part lies. It is cached, because a plan is made every step."""
    tokens, sequences = bucket.tokens, bucket.rows + bucket.blocks
    sizes = PlanArrays(tokens, tokens, sequences, bucket.rows, sequences, sequences, bucket.samples)
    return tuple(slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True))


def plan_size(bucket: Bucket) -> int:
    return int(_layout(bucket)[-1].stop)


def split_plan(packed: Any, bucket: Bucket) -> PlanArrays:
    """The parts of `packed`, int32[plan_size]: views of a numpy array, slices of a traced one."""
    return PlanArrays(*(packed[part] for part in _layout(bucket)))


def empty_plan(engine: EngineConfig, bucket: Bucket) -> tuple[np.ndarray, PlanArrays]:
    """A packed step that computes nothing, and its parts to write to."""
    packed = np.zeros(plan_size(bucket), np.int32)
    arrays = split_plan(packed, bucket)
    arrays.positions[:] = PADDING
    arrays.slots[:] = engine.nobody
    arrays.sample_token[:] = bucket.tokens
    return packed, arrays


class Ahead(NamedTuple):
    """Tokens of a sequence after the one whose row is among the plan's samples: guesses of what it draws, or scored
    tokens of its prompt."""

    tokens: tuple[int, ...]
    rows: range
    """The row of the head behind each of them"""


class Pooled(NamedTuple):
    """Tokens of a block whose hidden states an embedding takes in."""

    sequence: Sequence
    tokens: slice
    """Where they lie on the token axis"""


@dataclass(eq=False)
class StepPlan:
    """What a step computes, and for whom it draws."""

    bucket: Bucket
    packed: np.ndarray
    """PlanArrays in one array, int32[plan_size]"""
    draws: np.ndarray
    """DRAW[samples], a row for each row of the head"""
    tables: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """(slot, its pages) of sequences whose table on the device is to be replaced first"""
    tokens: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """(slot, its tokens) of sequences whose draws look at tokens that the device doesn't have"""
    bias: Bias | None = None
    """What is added to logits, where a draw is adjusted at all; None where none is"""
    samples: list[tuple[int, Sequence]] = field(default_factory=list)
    """(row of the head, sequence) of each token drawn"""
    ahead: dict[Sequence, Ahead] = field(default_factory=dict)
    """What some of these sequences have rows for beyond their next token"""
    steps: int = 1
    """Most steps of the launch; all but the first compute what the step before drew"""
    ends: np.ndarray | None = None
    """int32[rows, MOST_ENDS]: the ids that end each row's sequence, where there are several steps; -1 after them"""
    guesses: bool = False
    """Whether some of what is ahead are guesses"""
    pooled: list[Pooled] = field(default_factory=list)
    """Whose embeddings take in hidden states of this step, a sequence's blocks in their order"""
    awaits: bool = False
    """Whether a draw's mask follows from tokens of the step before, so that it can be drawn only when they are known"""
    blocks: int = 0
    """Blocks that are not padding"""
    planned_at: float = 0.0
    """When it was planned, in seconds"""
    scheduled_tokens: int = 0
    """Tokens that are not padding"""

    @property
    def is_open(self) -> bool:
        """Whether how far it leads its sequences, and so what comes after it, is known only when it is read."""
        return self.guesses or self.steps > 1

    def rows_of(self, row: int, sequence: Sequence, drawn: int) -> list[int]:
        """The rows of what was drawn for a sequence among the plan's samples, in the order of its tokens. drawn: how
        many rows there are, those of a step after those of the step before."""
        return [*range(row, drawn, self.bucket.rows)] if self.steps > 1 else [row, *self.rows_ahead(sequence)]

    def tokens_ahead(self, sequence: Sequence) -> tuple[int, ...]:
        """A sequence's tokens ahead."""
        return self.ahead[sequence].tokens if sequence in self.ahead else ()

    def rows_ahead(self, sequence: Sequence) -> range:
        """The rows of the head behind a sequence's tokens ahead."""
        return self.ahead[sequence].rows if sequence in self.ahead else range(0)
