"""Decides what the next step computes. Host state only: no device, no clock, no I/O.

There are no phases: a step gives each request tokens until `computed` reaches `length`. A token that was drawn takes a
single row; a prompt takes blocks, cut on one grid whatever else the step holds. A step is planned before the one in
flight is read, so `computed` and `length` count what was launched, and the token that isn't known yet is taken on the
device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from serve.engine.config import EngineConfig
from serve.engine.pages import PagePool, page_key
from serve.engine.plan import (
    FROM_DEVICE,
    PADDING,
    SAMPLING,
    PlanArrays,
    StepPlan,
    plan_size,
    sampling_words,
    split_plan,
)
from serve.engine.request import FinishReason, Output, Request
from serve.engine.sampling import BAD_ROW


@dataclass
class Counters:
    """Since the engine started."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class _Work:
    """Tokens that a step computes for a request: [start, start + count)."""

    request: Request
    start: int
    count: int


_Draw = tuple[int, int, Request]
"""(row of the head, index on the token axis of the last known token, request)"""


@dataclass(eq=False)
class _Step:
    singles: list[_Work] = field(default_factory=list)
    chunks: list[_Work] = field(default_factory=list)
    blocks: int = 0


class Scheduler:
    """Owns the requests from `add` to their finish, and the pages they hold."""

    def __init__(self, config: EngineConfig, rope_switch: int = 0) -> None:
        """config: resolved; rope_switch: the model's."""
        self.config, self._rope_switch = config, rope_switch
        self.pool = PagePool(config.pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In the order of admission: the last one is preempted first"""
        self.counters = Counters()
        self._free_slots = list(range(config.max_sequences))[::-1]
        self._tables = np.zeros((config.max_sequences, config.pages_per_sequence), np.int32)
        self._sampling = np.zeros((config.max_sequences, SAMPLING.stop - SAMPLING.start), np.int32)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.counters.prompt_tokens += len(request.prompt)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # plan: what the next step computes

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step, or None when nothing can be computed before the step in flight is read.

        now: seconds, on the clock that the requests' times are on.
        """
        step = _Step()
        preempted = self._schedule_running(step)
        if not preempted:
            self._admit(step, now)
        if not step.singles and not step.chunks:
            return None
        return self._pack(step)

    def _schedule_running(self, step: _Step) -> bool:
        """Gives the running requests their tokens, oldest first. Returns whether one was preempted."""
        preempted = False
        index = 0
        while index < len(self.running):
            request = self.running[index]
            count = self._next_count(request, step)
            if count and self._is_long(request) != request.long:
                preempted = True
                self._preempt(request)  # what it has computed turned by the short frequencies
                continue
            if count and not self._grow(request, request.computed + count):
                preempted = True
                self._preempt(self.running[-1])  # the newest: perhaps this one
                continue
            if count:
                self._schedule(request, count, step)
            index += 1
        return preempted

    def _next_count(self, request: Request, step: _Step) -> int:
        """Tokens that the step has room to compute for `request`."""
        missing = request.length - request.computed
        if missing == 0 or (request.unread and not request.may_grow):
            return 0
        if missing == 1 and request.computed >= len(request.prompt):
            return 1
        room = (self.config.prefill_tokens // self.config.block_size - step.blocks) * self.config.block_size
        return min(missing, room)

    def _admit(self, step: _Step, now: float) -> None:
        """Starts waiting requests while there are slots, pages for all they have, and room in the step."""
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            self._choose_frequencies(request)
            hit = self._cached_pages(request)
            needed = self._pages_for(request.length) - len(hit)
            # One spare page for each that runs, so that the newcomer isn't preempted by their next page.
            spare = len(self.running) if self.running else 0
            if needed + self.pool.unheld(hit) + spare > self.pool.free:
                return
            if step.blocks * self.config.block_size >= self.config.prefill_tokens:
                return
            self.waiting.popleft()
            self._start(request, hit)
            if request.admitted_at is None:
                request.admitted_at = now
            self._schedule(request, self._next_count(request, step), step)

    def _is_long(self, request: Request) -> bool:
        return 0 < self._rope_switch < request.length

    def _choose_frequencies(self, request: Request) -> None:
        long = self._is_long(request)
        if long != request.long:
            request.long, request.page_keys = long, []

    def _cached_pages(self, request: Request) -> list[int]:
        """Pages of the request's longest cached prefix, on the block grid and short of its last token."""
        if not self.config.prefix_cache:
            return []
        self._extend_keys(request)
        pages = self.pool.lookup(request.page_keys)
        pages_per_block = self.config.block_size // self.config.page_size
        blocks = min(len(pages) // pages_per_block, (request.length - 1) // self.config.block_size)
        return pages[: blocks * pages_per_block]

    def _extend_keys(self, request: Request) -> None:
        """Keys of all full pages of known tokens."""
        size = self.config.page_size
        for page in range(len(request.page_keys), len(request.tokens) // size):
            parent = request.page_keys[-1] if request.page_keys else b"long" if request.long else b""
            request.page_keys.append(page_key(parent, request.tokens[page * size : (page + 1) * size]))

    def _start(self, request: Request, hit: list[int]) -> None:
        self.pool.hold(hit)
        fresh = self.pool.allocate(self._pages_for(request.length) - len(hit))
        assert fresh is not None, "admitted without pages"
        request.slot = self._free_slots.pop()
        request.pages = hit + fresh
        request.registered = len(hit)
        request.computed = len(hit) * self.config.page_size
        if request.preemptions == 0:
            request.cached_tokens = request.computed
            self.counters.cached_prompt_tokens += request.computed
        else:
            request.recomputed_tokens += request.length - request.computed
        self._tables[request.slot, : len(request.pages)] = request.pages
        self._sampling[request.slot] = sampling_words(request.sampling)
        self.running.append(request)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def _grow(self, request: Request, tokens: int) -> bool:
        """Makes room for `tokens` tokens. False, and no change, without pages."""
        have = len(request.pages)
        if (needed := self._pages_for(tokens) - have) <= 0:
            return True
        fresh = self.pool.allocate(needed)
        if fresh is None:
            return False
        request.pages += fresh
        self._tables[request.slot, have : have + needed] = fresh
        return True

    def _schedule(self, request: Request, count: int, step: _Step) -> None:
        work = _Work(request, request.computed, count)
        request.computed += count
        if count == 1 and work.start >= len(request.prompt):
            step.singles.append(work)
        else:
            step.chunks.append(work)
            step.blocks += -(-count // self.config.block_size)

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue; its tokens are kept and computed again."""
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        """Frees pages and slot. Safe with a step in flight: what comes later runs later on the device."""
        self.pool.release(request.pages)
        request.pages = []
        request.registered = 0
        self._free_slots.append(request.slot)
        request.slot = -1

    # pack: the plan as arrays

    def _pack(self, step: _Step) -> StepPlan:
        bucket = self.config.bucket(len(step.singles), step.blocks)
        per_sequence = self.config.pages_per_sequence
        packed = np.zeros(plan_size(bucket, per_sequence), np.int32)
        arrays = split_plan(packed, bucket, per_sequence)
        arrays.positions[:] = PADDING
        arrays.sample_slot[:] = self.config.max_sequences
        plan = StepPlan(bucket, packed)
        draws = self._pack_singles(arrays, step.singles)
        block = 0
        for work in step.chunks:
            for start, count in self._blocks(work):
                first = bucket.rows + block * bucket.block_size
                arrays.tokens[first : first + count] = work.request.tokens[start : start + count]
                arrays.positions[first : first + count] = np.arange(start, start + count)
                arrays.tables[bucket.rows + block] = self._tables[work.request.slot]
                arrays.long[bucket.rows + block] = work.request.long
                block += 1
            if self._draws(work):
                draws.append((bucket.rows + block - 1, first + count - 1, work.request))
        self._pack_samples(arrays, draws)
        plan.samples = [(row, request) for row, _, request in draws]
        plan.scheduled_tokens = sum(work.count for work in (*step.singles, *step.chunks))
        return plan

    def _pack_singles(self, arrays: PlanArrays, singles: list[_Work]) -> list[_Draw]:
        """All rows at once: an assignment to an array costs as much for one number as for all of them."""
        count, requests = len(singles), [work.request for work in singles]
        slots = [request.slot for request in requests]
        arrays.tokens[:count] = [
            work.request.tokens[work.start] if work.start < len(work.request.tokens) else FROM_DEVICE
            for work in singles
        ]
        arrays.positions[:count] = [work.start for work in singles]
        arrays.row_slot[:count] = slots
        arrays.tables[:count] = self._tables[slots]
        arrays.long[:count] = [request.long for request in requests]
        return [(row, row, work.request) for row, work in enumerate(singles) if self._draws(work)]

    def _blocks(self, work: _Work) -> Iterator[tuple[int, int]]:
        """Cuts a chunk into (start, count) of at most block_size."""
        size = self.config.block_size
        for start in range(work.start, work.start + work.count, size):
            yield start, min(size, work.start + work.count - start)

    def _draws(self, work: _Work) -> bool:
        """Whether a token is drawn after this: after the last known one, unless more of the prompt is to come."""
        return work.start + work.count >= work.request.length

    def _pack_samples(self, arrays: PlanArrays, draws: list[_Draw]) -> None:
        rows, slots = [row for row, _, _ in draws], [request.slot for _, _, request in draws]
        arrays.sample_token[rows] = [token for _, token, _ in draws]
        arrays.sample_slot[rows] = slots
        for part, words in zip(arrays[SAMPLING], self._sampling[slots].T, strict=True):
            part[rows] = words
        for _, _, request in draws:
            assert request.may_grow, f"{request.id} would draw more than it may have"
            request.unread += 1

    # commit: what a step drew

    def commit(self, plan: StepPlan, drawn: np.ndarray) -> list[Output]:
        """Takes in the tokens int32[samples] that `plan` drew; finished requests free their pages."""
        self.counters.steps += 1
        outputs = []
        for row, request in plan.samples:
            if request.finish_reason is not None:  # it ended while the step ran
                continue
            request.unread -= 1
            outputs.append(self._take(request, int(drawn[row])))
        return outputs

    def _take(self, request: Request, token: int) -> Output:
        if token == BAD_ROW:
            self.finish(request, FinishReason.ERROR)
            return Output(request, None, FinishReason.ERROR)
        request.tokens.append(token)
        self.counters.completion_tokens += 1
        self._register_pages(request)
        reason = self._stops(request, token)
        if reason is not None:
            self.finish(request, reason)
        return Output(request, token, reason)

    def _stops(self, request: Request, token: int) -> FinishReason | None:
        if token in request.eos_ids:
            request.stop_token = token
            return FinishReason.EOS
        if token in request.stop_ids:
            request.stop_token = token
            return FinishReason.STOP_TOKEN
        if len(request.tokens) - len(request.prompt) >= request.max_tokens:
            full = len(request.tokens) >= self.config.context_length
            return FinishReason.CONTEXT_LENGTH if full else FinishReason.LENGTH
        return None

    def _register_pages(self, request: Request) -> None:
        """Lets others find the pages that are full of computed, known tokens."""
        if not self.config.prefix_cache or request.slot < 0:
            return
        self._extend_keys(request)
        full = min(len(request.page_keys), min(request.computed, len(request.tokens)) // self.config.page_size)
        for page in range(request.registered, full):
            self.pool.register(request.pages[page], request.page_keys[page])
        request.registered = max(request.registered, full)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it stands; its pages are free at once."""
        assert request.finish_reason is None, f"{request.id} finished twice"
        request.finish_reason = reason
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def check(self) -> None:
        """Asserts every invariant, as it holds after a commit; for tests."""
        self.pool.check()
        held = np.zeros(self.config.pages, np.int32)
        for request in self.running:
            assert request.finish_reason is None and request.slot >= 0
            assert request.computed <= request.length and 0 <= request.unread <= 1
            assert len(request.pages) >= self._pages_for(request.computed), f"{request.id} computes without pages"
            assert len(request.pages) <= self.config.pages_per_sequence
            assert (self._tables[request.slot, : len(request.pages)] == request.pages).all()
            np.add.at(held, request.pages, 1)
        assert (held == self.pool._held).all(), "a page's reference count is not the number of its holders"
        slots = [request.slot for request in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_sequences)), "a slot is lost or held twice"
        for request in self.waiting:
            assert not request.pages and request.slot < 0 and request.computed == 0
