"""Writes what the scheduler gave each request into the arrays of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from isthmus.model.ops.sampling import BAD_ROW
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.plan import FROM_DEVICE, MOST_ENDS, Ahead, PlanArrays, Pooled, StepPlan, empty_plan
from isthmus.serve.engine.sampling import DRAW, Bias, draw_of, no_draws
from isthmus.serve.engine.sequence import Sequence
from isthmus.serve.engine.tables import Tables


@dataclass(eq=False)
class Work:
    """Tokens that a step computes for a sequence: [start, start + count)."""

    sequence: Sequence
    start: int
    count: int
    ahead: tuple[int, ...] = ()
    """What comes next, where `count` is 1: guesses, or tokens that are scored; they take a row each"""

    @property
    def draws(self) -> bool:
        """Whether these reach the end of the sequence as it is so far, so that the step draws its next token."""
        return self.sequence.embedding is None and self.start + self.count >= self.sequence.length

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Cuts the tokens into blocks (start, count) of at most `size`."""
        for start in range(self.start, self.start + self.count, size):
            yield start, min(size, self.start + self.count - start)


@dataclass(eq=False)
class Step:
    """What a step computes: sequences with a single token, and sequences with blocks of their prompt."""

    singles: list[Work] = field(default_factory=list)
    chunks: list[Work] = field(default_factory=list)
    blocks: int = 0
    steps: int = 1
    """Most steps that are launched at once, each with the next token of every single"""

    @property
    def rows(self) -> int:
        return len(self.singles) + sum(len(work.ahead) for work in self.singles)

    def drop(self, sequence: Sequence, block_size: int) -> None:
        """Removes what was scheduled for `sequence`."""
        self.singles = [work for work in self.singles if work.sequence is not sequence]
        self.chunks = [work for work in self.chunks if work.sequence is not sequence]
        self.blocks = sum(-(-work.count // block_size) for work in self.chunks)


_Draw = tuple[int, int, Sequence]
"""(row of the head, index on the token axis of the last known token, sequence)"""


class RequestFault(Exception):
    """Packing failed because of this sequence; __cause__ is the error. No sequence has been changed."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence.request.id)
        self.sequence = sequence


class Packer:
    """Writes steps as plans. It keeps what hardly changes between the steps of the request in each slot."""

    def __init__(self, config: EngineConfig) -> None:
        """config: resolved."""
        self._config = config
        self.tables = Tables(config)
        self.draws = np.zeros(config.max_sequences, DRAW)
        """Each slot's row, but for the position"""
        self._adapters = np.zeros(config.max_sequences, np.int32)
        """The place of each slot's adapter"""
        self._bias = Bias.none(config.nobody + 1)
        self._started: dict[int, Sequence] = {}
        """Sequences in slots that they have just got"""

    def start(self, sequence: Sequence) -> None:
        """Takes in a sequence that has just got its slot. Raises what its sampling has wrong."""
        request, slot = sequence.request, sequence.slot
        self.draws[slot] = draw_of(request.sampling, sequence.prompt_length)
        self.draws["slot"][slot] = slot
        self._adapters[slot] = 0 if request.adapter is None else request.adapter.place
        self._bias.set(slot, request.sampling.bias)
        self._started[slot] = sequence

    def pack(self, step: Step) -> StepPlan:
        """The step as arrays. Adds each token that it draws to its sequence's tokens_in_flight. Raises RequestFault."""
        bucket = self._config.bucket(step.rows, step.blocks, step.steps)
        packed, arrays = empty_plan(self._config, bucket)
        plan = StepPlan(bucket, packed, no_draws(bucket.samples, self._config.nobody))
        draws = self._pack_singles(arrays, step.singles)
        self._pack_ahead(plan, arrays, step.singles)
        block, row = 0, step.rows
        for work in step.chunks:
            try:
                plan.pooled += self._pooled(work, bucket.rows + block * self._config.block_size)
                block, last = self._pack_chunk(arrays, bucket.rows, block, work)
            except Exception as error:
                raise RequestFault(work.sequence) from error
            if work.draws:
                draws.append((row, last, work.sequence))
                row += 1
        plan.steps = step.steps
        self._pack_draws(plan, arrays, draws)
        plan.samples = [(row, sequence) for row, _, sequence in draws]
        plan.scheduled_tokens = step.steps * sum(work.count + len(work.ahead) for work in (*step.singles, *step.chunks))
        self._pack_placed(plan)
        return plan

    def _pack_placed(self, plan: StepPlan) -> None:
        """What the device has to know of the slots before the step."""
        plan.tables = self.tables.take_stale()
        for slot, sequence in self._started.items():
            if sequence.slot == slot and sequence.request.sampling.looks_back:
                tokens = np.zeros(self._config.context_length, np.int32)
                tokens[: len(sequence.tokens)] = sequence.tokens
                plan.tokens.append((slot, tokens))
        self._started.clear()

    def _pack_singles(self, arrays: PlanArrays, singles: list[Work]) -> list[_Draw]:
        """Writes all rows at once: an assignment to an array costs as much for one number as for all of them."""
        count, sequences = len(singles), [work.sequence for work in singles]
        slots = [sequence.slot for sequence in sequences]
        positions = [work.start for work in singles]
        arrays.tokens[:count] = [
            FROM_DEVICE if at >= len(sequence.tokens) and at >= sequence.prompt_length else sequence.known(at)
            for at, sequence in zip(positions, sequences, strict=True)
        ]
        arrays.positions[:count] = positions
        arrays.slots[:count] = slots
        arrays.row_page[:count] = self.tables.rows[slots, np.asarray(positions, np.int32) // self._config.page_size]
        arrays.uses_long_rope[:count] = [sequence.uses_long_rope for sequence in sequences]
        arrays.adapters[:count] = self._adapters[slots]
        return [(row, row, work.sequence) for row, work in enumerate(singles) if work.draws]

    def _pack_ahead(self, plan: StepPlan, arrays: PlanArrays, singles: list[Work]) -> None:
        """Writes a row for each token ahead, after all others; each draws as if the guesses before it were true."""
        row = len(singles)
        for work in singles:
            if not (count := len(work.ahead)):
                continue
            sequence, rows = work.sequence, slice(row, row + count)
            positions = work.start + 1 + np.arange(count)
            arrays.tokens[rows], arrays.positions[rows], arrays.slots[rows] = work.ahead, positions, sequence.slot
            arrays.row_page[rows] = self.tables.rows[sequence.slot, positions // self._config.page_size]
            arrays.uses_long_rope[rows] = sequence.uses_long_rope
            arrays.adapters[rows] = self._adapters[sequence.slot]
            arrays.sample_token[rows] = np.arange(row, row + count)
            plan.draws[rows] = self.draws[sequence.slot]
            plan.draws["position"][rows] = positions + 1
            plan.ahead[sequence] = Ahead(work.ahead, range(row, row + count))
            plan.guesses |= not sequence.scores
            row += count

    def _pack_chunk(self, arrays: PlanArrays, rows: int, block: int, work: Work) -> tuple[int, int]:
        """Writes a chunk from `block` on. Returns the block after it, and its last token's index on the token axis."""
        size, last = self._config.block_size, 0
        for start, count in work.blocks(size):
            first = rows + block * size
            arrays.tokens[first : first + count] = work.sequence.tokens[start : start + count]
            arrays.positions[first : first + count] = np.arange(start, start + count)
            arrays.slots[rows + block] = work.sequence.slot
            arrays.uses_long_rope[rows + block] = work.sequence.uses_long_rope
            arrays.adapters[rows + block] = self._adapters[work.sequence.slot]
            block, last = block + 1, first + count - 1
        return block, last

    def _pooled(self, work: Work, first: int) -> Iterator[Pooled]:
        """What an embedding takes in of a chunk that begins at `first` on the token axis: nothing that it has taken in
        before, when its sequence was preempted since. All blocks of a chunk but its last are full."""
        if (embedding := work.sequence.embedding) is None:
            return
        for start, count in work.blocks(self._config.block_size):
            at = first + start - work.start
            begin = max(start, embedding.known)
            if begin < start + count:
                yield Pooled(work.sequence, slice(at + begin - start, at + count))

    def _pack_draws(self, plan: StepPlan, arrays: PlanArrays, draws: list[_Draw]) -> None:
        for _, _, sequence in draws:
            if not sequence.may_grow:
                raise RequestFault(sequence) from AssertionError("it would draw more than it may have")
        rows, tokens = [row for row, _, _ in draws], [token for _, token, _ in draws]
        arrays.sample_token[rows] = tokens
        plan.draws[rows] = self.draws[[sequence.slot for _, _, sequence in draws]]
        plan.draws["position"][rows] = arrays.positions[tokens] + 1
        free = [sequence for _, _, sequence in draws if not sequence.scores]
        plan.awaits = any(sequence.constraint is not None for sequence in free)
        if any(sequence.adjusts for sequence in free):
            plan.bias = self._bias.rows(plan.draws["slot"].tolist())
        for row, _, sequence in draws:
            count = 1 + len(plan.rows_ahead(sequence))
            if sequence.scores:
                known = sequence.request.prompt[sequence.length : sequence.length + count]
                plan.draws["forced"][[row, *plan.rows_ahead(sequence)]] = known
            sequence.tokens_in_flight += max(count, plan.steps)
        if plan.steps > 1:
            plan.ends = np.full((plan.bucket.rows, MOST_ENDS), BAD_ROW, np.int32)
            for row, _, sequence in draws:
                plan.ends[row, : len(sequence.ends)] = list(sequence.ends)
