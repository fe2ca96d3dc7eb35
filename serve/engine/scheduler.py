"""Decides what the next step computes. Host state only: no device, no clock, no I/O.

There are no separate phases for prompts and completions: a step gives each request tokens until `computed` reaches
`length`. A token that was drawn takes a single row; a prompt takes blocks, cut on one grid whatever else the step
holds. A step is planned before the one in flight is read, so `computed` and `length` count what was launched, and a
token that the host doesn't know yet is read on the device.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import numpy as np

from isthmus.model.ops.sampling import BAD_ROW, Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.packing import Packer, RequestFault, Step, Work
from isthmus.serve.engine.pages import PagePool, page_key
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.request import FinishReason, Logprobs, Output, Request
from isthmus.serve.engine.sampling import draw_of

logger = logging.getLogger("isthmus.engine")


@dataclass
class Counters:
    """Totals since the engine started."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


class Scheduler:
    """Owns the requests from `add` to their finish, and the pages they hold."""

    def __init__(self, config: EngineConfig, rope_switch: int = 0) -> None:
        """config: resolved. rope_switch: as in ModelConfig."""
        self.config, self._rope_switch = config, rope_switch
        self.pool = PagePool(config.pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In the order of admission: the last one is preempted first"""
        self.counters = Counters()
        self._failed: list[Output] = []
        self._free_slots = list(range(config.max_sequences))[::-1]
        self._packer = Packer(config)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.counters.prompt_tokens += len(request.prompt)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # plan: what the next step computes

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step, or None when nothing can be computed before the step in flight is read.

        now: seconds, on the same clock as the requests' times.
        """
        step = Step()
        preempted = self._schedule_running(step)
        if not preempted:
            self._admit(step, now)
        while step.singles or step.chunks:
            try:
                return self._packer.pack(step)
            except RequestFault as fault:
                step.drop(fault.request, self.config.block_size)
                self._fail(fault.request, fault.__cause__)
        return None

    def take_failed(self) -> list[Output]:
        """The last outputs of requests that ended on an exception since the previous call."""
        failed, self._failed = self._failed, []
        return failed

    def _fail(self, request: Request, error: BaseException | None) -> None:
        """Ends one request with an error of its own. Raises the error if that leaves pages or slots in disorder, which
        would affect other requests."""
        assert isinstance(error, Exception)
        logger.error("request %r ended on an error", request.id, exc_info=error)
        request.failure = error
        try:
            self.finish(request, FinishReason.ERROR)
            self.check_holders()
        except Exception:
            raise error from None
        self._failed.append(Output(request, None, FinishReason.ERROR))

    def _schedule_running(self, step: Step) -> bool:
        """Gives the running requests their tokens, oldest first. Returns whether one was preempted."""
        preempted = False
        index = 0
        while index < len(self.running):
            request = self.running[index]
            try:
                victim = self._schedule_one(request, step)
            except Exception as error:
                step.drop(request, self.config.block_size)
                self._fail(request, error)
                continue
            if victim is None:
                index += 1
            else:
                preempted = True
                self._preempt(victim)
        return preempted

    def _schedule_one(self, request: Request, step: Step) -> Request | None:
        """Gives a running request its tokens, or returns the request to preempt first."""
        count = self._next_count(request, step)
        if count == 0:
            return None
        if self._is_long(request) != request.uses_long_rope:
            return request  # its keys so far were turned by the short frequencies
        if not self._grow(request, request.computed + count):
            return self.running[-1]  # the newest, which may be this one
        self._schedule(request, count, step)
        return None

    def _next_count(self, request: Request, step: Step) -> int:
        """Tokens that the step has room to compute for `request`."""
        missing = request.length - request.computed
        if missing == 0 or (request.tokens_in_flight and not request.may_grow):
            return 0
        if missing == 1 and request.computed >= len(request.prompt):
            return 1
        room = (self.config.prefill_tokens // self.config.block_size - step.blocks) * self.config.block_size
        return min(missing, room)

    def _admit(self, step: Step, now: float) -> None:
        """Starts waiting requests while there are slots, pages for all their tokens, and room in the step."""
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            try:
                if not self._admit_one(request, step, now):
                    return
            except Exception as error:
                step.drop(request, self.config.block_size)
                self._fail(request, error)

    def _admit_one(self, request: Request, step: Step, now: float) -> bool:
        """Starts the first waiting request. Returns False, without starting it, if it must wait longer."""
        self._choose_frequencies(request)
        hit = self._cached_pages(request)
        needed = self._pages_for(request.length) - len(hit)
        # One spare page for each running request, so that their next pages don't preempt the new one.
        spare = len(self.running)
        if needed + self.pool.unheld(hit) + spare > self.pool.free:
            return False
        if step.blocks * self.config.block_size >= self.config.prefill_tokens:
            return False
        draw = draw_of(request.sampling)
        self.waiting.popleft()
        self._start(request, hit, draw)
        if request.admitted_at is None:
            request.admitted_at = now
        self._schedule(request, self._next_count(request, step), step)
        return True

    def _is_long(self, request: Request) -> bool:
        return 0 < self._rope_switch < request.length

    def _choose_frequencies(self, request: Request) -> None:
        uses_long_rope = self._is_long(request)
        if uses_long_rope != request.uses_long_rope:
            request.uses_long_rope, request.page_keys = uses_long_rope, []

    def _cached_pages(self, request: Request) -> list[int]:
        """Pages of the request's longest cached prefix of whole blocks, which ends before its last token."""
        if not self.config.prefix_cache:
            return []
        self._extend_keys(request)
        pages = self.pool.lookup(request.page_keys)
        pages_per_block = self.config.block_size // self.config.page_size
        blocks = min(len(pages) // pages_per_block, (request.length - 1) // self.config.block_size)
        return pages[: blocks * pages_per_block]

    def _extend_keys(self, request: Request) -> None:
        """Extends the request's page_keys to all full pages of known tokens."""
        size = self.config.page_size
        for page in range(len(request.page_keys), len(request.tokens) // size):
            parent = request.page_keys[-1] if request.page_keys else b"long" if request.uses_long_rope else b""
            request.page_keys.append(page_key(parent, request.tokens[page * size : (page + 1) * size]))

    def _start(self, request: Request, hit: list[int], draw: np.ndarray) -> None:
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
        self._packer.tables[request.slot, : len(request.pages)] = request.pages
        self._packer.draws[request.slot] = draw
        self._packer.draws["slot"][request.slot] = request.slot
        self.running.append(request)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def _grow(self, request: Request, tokens: int) -> bool:
        """Gives a request pages for `tokens` tokens. Returns False, without a change, if too few are free."""
        have = len(request.pages)
        if (needed := self._pages_for(tokens) - have) <= 0:
            return True
        fresh = self.pool.allocate(needed)
        if fresh is None:
            return False
        request.pages += fresh
        self._packer.tables[request.slot, have : have + needed] = fresh
        return True

    def _schedule(self, request: Request, count: int, step: Step) -> None:
        work = Work(request, request.computed, count)
        request.computed += count
        if count == 1 and work.start >= len(request.prompt):
            step.singles.append(work)
        else:
            step.chunks.append(work)
            step.blocks += -(-count // self.config.block_size)

    def _preempt(self, request: Request) -> None:
        """Puts a request back at the head of the queue; its tokens are kept and computed again."""
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        """Frees pages and slot. Safe with a step in flight: later steps run after it on the device."""
        self.pool.release(request.pages)
        request.pages = []
        request.registered = 0
        self._free_slots.append(request.slot)
        request.slot = -1

    # commit: what a step drew

    def commit(self, plan: StepPlan, drawn: Drawn) -> list[Output]:
        """Takes in what `plan` drew, in numpy's arrays; finished requests free their pages."""
        self.counters.steps += 1
        outputs = []
        for row, request in plan.samples:
            if request.finish_reason is not None:  # it ended while the step ran
                continue
            request.tokens_in_flight -= 1
            try:
                outputs.append(self._take(request, int(drawn.token[row]), _logprobs(request, drawn, row)))
            except Exception as error:
                self._fail(request, error)
        return outputs

    def _take(self, request: Request, token: int, logprobs: Logprobs | None) -> Output:
        if token == BAD_ROW:
            self.finish(request, FinishReason.ERROR)
            return Output(request, None, FinishReason.ERROR)
        request.tokens.append(token)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        self.counters.completion_tokens += 1
        self._register_pages(request)
        reason = self._stops(request, token)
        if reason is not None:
            self.finish(request, reason)
        return Output(request, token, reason, logprobs)

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
        """Lets other requests find the pages that are full of computed, known tokens."""
        if not self.config.prefix_cache or request.slot < 0:
            return
        self._extend_keys(request)
        full = min(len(request.page_keys), min(request.computed, len(request.tokens)) // self.config.page_size)
        for page in range(request.registered, full):
            self.pool.register(request.pages[page], request.page_keys[page])
        request.registered = max(request.registered, full)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, running or waiting; its pages are free at once."""
        assert request.finish_reason is None, f"{request.id} finished twice"
        request.finish_reason = reason
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def check(self) -> None:
        """Asserts every invariant that holds after a commit; for tests."""
        self.check_holders()
        for request in self.running:
            assert request.finish_reason is None and request.slot >= 0
            assert request.computed <= request.length and 0 <= request.tokens_in_flight <= 1
            assert len(request.pages) >= self._pages_for(request.computed), f"{request.id} computes without pages"
        for request in self.waiting:
            assert not request.pages and request.slot < 0 and request.computed == 0

    def check_holders(self) -> None:
        """Asserts that each page has as many holders as it counts, and each slot one; this holds at any time."""
        self.pool.check()
        held = np.zeros(self.config.pages, np.int32)
        for request in self.running:
            assert len(request.pages) <= self.config.pages_per_sequence
            assert (self._packer.tables[request.slot, : len(request.pages)] == request.pages).all()
            np.add.at(held, request.pages, 1)
        assert (held == self.pool._held).all(), "a page's reference count is not the number of its holders"
        slots = [request.slot for request in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_sequences)), "a slot is lost or held twice"


def _logprobs(request: Request, drawn: Drawn, row: int) -> Logprobs | None:
    count = request.sampling.logprobs
    if count < 0:
        return None
    tokens, top = drawn.top_tokens[row, :count].tolist(), drawn.top_log_probabilities[row, :count].tolist()
    return Logprobs(float(drawn.log_probability[row]), tuple(tokens), tuple(top))
