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

from isthmus.model.ops.adjustments import words_for
from isthmus.model.ops.sampling import BAD_ROW, Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.masks import masks_of
from isthmus.serve.engine.messages import Ending, Event, Logprobs, Request
from isthmus.serve.engine.packing import Packer, RequestFault, Step, Work
from isthmus.serve.engine.pages import PagePool, page_key
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.sequence import Sequence

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
    """Owns requests from `add` to their last event, and the pages that they hold."""

    def __init__(self, config: EngineConfig, rope_switch: int = 0, vocab_size: int = 0) -> None:
        """config: resolved. rope_switch, vocab_size: as in ModelConfig."""
        self.config, self._rope_switch, self._vocab_size = config, rope_switch, vocab_size
        self.pool = PagePool(config.pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of admission: the last one is preempted first"""
        self.counters = Counters()
        self._sequences: dict[Request, Sequence] = {}
        """Those that haven't ended"""
        self._failed: list[Event] = []
        self._free_slots = list(range(config.max_sequences))[::-1]
        self._packer = Packer(config)

    def add(self, request: Request) -> Sequence:
        """Takes a request in. What is returned is for tests."""
        sequence = self._sequences[request] = Sequence(request)
        self.waiting.append(sequence)
        self.counters.prompt_tokens += sequence.prompt_length
        return sequence

    def cancel(self, request: Request, now: float = 0.0) -> list[Event]:
        """Ends a request; its pages are free at once. Returns its last event, or nothing if it had ended before."""
        sequence = self._sequences.get(request)
        return [] if sequence is None else [self._finish(sequence, Ending.CANCELLED, now)]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # plan: what the next step computes

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step, or None when nothing can be computed before the step in flight is read.

        now: seconds, on the same clock as the requests' times.
        """
        step = Step()
        preempted = self._schedule_running(step, now)
        if not preempted:
            self._admit(step, now)
        while step.singles or step.chunks:
            try:
                return self._packer.pack(step)
            except RequestFault as fault:
                step.drop(fault.sequence, self.config.block_size)
                self._fail(fault.sequence, fault.__cause__, now)
        return None

    def take_failed(self) -> list[Event]:
        """The last events of requests that ended on an exception since the previous call."""
        failed, self._failed = self._failed, []
        return failed

    def _fail(self, sequence: Sequence, error: BaseException | None, now: float) -> None:
        """Ends one request with an error of its own. Raises the error if that leaves pages or slots in disorder, which
        would affect other requests."""
        assert isinstance(error, Exception)
        logger.error("request %r ended on an error", sequence.request.id, exc_info=error)
        try:
            event = self._finish(sequence, Ending.ERROR, now, failure=error)
            self.check_holders()
        except Exception:
            raise error from None
        self._failed.append(event)

    def _schedule_running(self, step: Step, now: float) -> bool:
        """Gives the running requests their tokens, oldest first. Returns whether one was preempted."""
        preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            try:
                victim = self._schedule_one(sequence, step)
            except Exception as error:
                step.drop(sequence, self.config.block_size)
                self._fail(sequence, error, now)
                continue
            if victim is None:
                index += 1
            else:
                preempted = True
                self._preempt(victim)
        return preempted

    def _schedule_one(self, sequence: Sequence, step: Step) -> Sequence | None:
        """Gives a running sequence its tokens, or returns the one to preempt first."""
        count = self._next_count(sequence, step)
        if count == 0:
            return None
        if self._is_long(sequence) != sequence.uses_long_rope:
            return sequence  # its keys so far were turned by the short frequencies
        if not self._grow(sequence, sequence.computed + count):
            return self.running[-1]  # the newest, which may be this one
        self._schedule(sequence, count, step)
        return None

    def _next_count(self, sequence: Sequence, step: Step) -> int:
        """Tokens that the step has room to compute for `sequence`."""
        missing = sequence.length - sequence.computed
        if missing == 0 or (sequence.tokens_in_flight and not sequence.may_grow):
            return 0
        if missing == 1 and sequence.computed >= sequence.prompt_length:
            return 1
        room = (self.config.prefill_tokens // self.config.block_size - step.blocks) * self.config.block_size
        return min(missing, room)

    def _admit(self, step: Step, now: float) -> None:
        """Starts waiting requests while there are slots, pages for all their tokens, and room in the step."""
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            try:
                if not self._admit_one(sequence, step, now):
                    return
            except Exception as error:
                step.drop(sequence, self.config.block_size)
                self._fail(sequence, error, now)

    def _admit_one(self, sequence: Sequence, step: Step, now: float) -> bool:
        """Starts the first waiting sequence. Returns False, without starting it, if it must wait longer."""
        self._choose_frequencies(sequence)
        hit = self._cached_pages(sequence)
        needed = self._pages_for(sequence.length) - len(hit)
        # One spare page for each running sequence, so that their next pages don't preempt the new one.
        spare = len(self.running)
        if needed + self.pool.unheld(hit) + spare > self.pool.free:
            return False
        if step.blocks * self.config.block_size >= self.config.prefill_tokens:
            return False
        self._restrict(sequence)
        self.waiting.popleft()
        self._start(sequence, hit)
        if sequence.admitted_at is None:
            sequence.admitted_at = now
        self._schedule(sequence, self._next_count(sequence, step), step)
        return True

    def _restrict(self, sequence: Sequence) -> None:
        """Takes in what the request says about its draws, unless that was done before a preemption."""
        request = sequence.request
        sequence.masks = masks_of(request, self._vocab_size)
        sequence.adjusts = request.constraint is not None or request.sampling.adjusts
        if sequence.constraint is None and request.constraint is not None:
            sequence.constraint = request.constraint.copy()

    def _is_long(self, sequence: Sequence) -> bool:
        return 0 < self._rope_switch < sequence.length

    def _choose_frequencies(self, sequence: Sequence) -> None:
        uses_long_rope = self._is_long(sequence)
        if uses_long_rope != sequence.uses_long_rope:
            sequence.uses_long_rope, sequence.page_keys = uses_long_rope, []

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """Pages of the sequence's longest cached prefix of whole blocks, which ends before its last token."""
        if not self.config.prefix_cache:
            return []
        self._extend_keys(sequence)
        pages = self.pool.lookup(sequence.page_keys)
        pages_per_block = self.config.block_size // self.config.page_size
        blocks = min(len(pages) // pages_per_block, (sequence.length - 1) // self.config.block_size)
        return pages[: blocks * pages_per_block]

    def _extend_keys(self, sequence: Sequence) -> None:
        """Extends the sequence's page_keys to all full pages of known tokens."""
        size = self.config.page_size
        for page in range(len(sequence.page_keys), len(sequence.tokens) // size):
            parent = sequence.page_keys[-1] if sequence.page_keys else b"long" if sequence.uses_long_rope else b""
            sequence.page_keys.append(page_key(parent, sequence.tokens[page * size : (page + 1) * size]))

    def _start(self, sequence: Sequence, hit: list[int]) -> None:
        self.pool.hold(hit)
        fresh = self.pool.allocate(self._pages_for(sequence.length) - len(hit))
        assert fresh is not None, "admitted without pages"
        sequence.slot = self._free_slots.pop()
        sequence.pages = hit + fresh
        sequence.registered = len(hit)
        sequence.computed = len(hit) * self.config.page_size
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
            self.counters.cached_prompt_tokens += sequence.computed
        else:
            sequence.recomputed_tokens += sequence.length - sequence.computed
        self.running.append(sequence)
        self._packer.start(sequence)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Gives a sequence pages for `tokens` tokens. Returns False, without a change, if too few are free."""
        have = len(sequence.pages)
        if (needed := self._pages_for(tokens) - have) <= 0:
            return True
        fresh = self.pool.allocate(needed)
        if fresh is None:
            return False
        sequence.pages += fresh
        self._packer.tables[sequence.slot, have : have + needed] = fresh
        if tokens - sequence.computed > 1:  # a single token's page is part of its row
            self._packer.place(sequence)
        return True

    def _schedule(self, sequence: Sequence, count: int, step: Step) -> None:
        work = Work(sequence, sequence.computed, count)
        sequence.computed += count
        if count == 1 and work.start >= sequence.prompt_length:
            step.singles.append(work)
        else:
            step.chunks.append(work)
            step.blocks += -(-count // self.config.block_size)

    def _preempt(self, sequence: Sequence) -> None:
        """Puts a sequence back at the head of the queue; its tokens are kept and computed again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Frees pages and slot. Safe with a step in flight: later steps run after it on the device."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.registered = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def mask(self, plan: StepPlan, now: float = 0.0) -> np.ndarray:
        """int32[samples, words]: which ids each draw of an adjusted plan may give. If the plan awaits the step before,
        that is committed."""
        mask = np.full((plan.bucket.samples, words_for(self._vocab_size)), -1, np.int32)
        for row, sequence in plan.samples:
            if sequence.ending is not None or not sequence.adjusts:
                continue
            try:
                sequence.fill_mask(mask[row], int(plan.draws["position"][row]) - sequence.prompt_length)
            except Exception as error:
                mask[row] = -1
                self._fail(sequence, error, now)
        return mask

    # commit: what a step drew

    def commit(self, plan: StepPlan, drawn: Drawn, now: float = 0.0) -> list[Event]:
        """Takes in what `plan` drew, in numpy's arrays, which came at `now`; finished requests free their pages."""
        self.counters.steps += 1
        events = []
        for row, sequence in plan.samples:
            if sequence.ending is not None:  # it ended while the step ran
                continue
            sequence.tokens_in_flight -= 1
            try:
                events.append(self._take(sequence, drawn, row, now))
            except Exception as error:
                self._fail(sequence, error, now)
        return events

    def _take(self, sequence: Sequence, drawn: Drawn, row: int, now: float) -> Event:
        token, logprobs = int(drawn.token[row]), _logprobs(sequence.request, drawn, row)
        if token == BAD_ROW:
            return self._finish(sequence, Ending.ERROR, now)
        sequence.tokens.append(token)
        sequence.logprobs += logprobs
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        self.counters.completion_tokens += 1
        self._register_pages(sequence)
        reason = self._stops(sequence, token)
        if reason is not None:
            return self._finish(sequence, reason, now, (token,), logprobs)
        return Event(sequence.request, (token,), logprobs, progress=sequence.progress(now))

    def _stops(self, sequence: Sequence, token: int) -> Ending | None:
        request = sequence.request
        if token in request.eos_ids:
            return Ending.EOS
        if token in request.stop_ids:
            return Ending.STOP_TOKEN
        if sequence.constraint is not None:
            sequence.constraint.accept(token)
            if sequence.constraint.done:
                return Ending.COMPLETE
        if len(sequence.tokens) - sequence.prompt_length >= request.max_tokens:
            full = len(sequence.tokens) >= self.config.context_length
            return Ending.CONTEXT_LENGTH if full else Ending.LENGTH
        return None

    def _register_pages(self, sequence: Sequence) -> None:
        """Lets other requests find the pages that are full of computed, known tokens."""
        if not self.config.prefix_cache or sequence.slot < 0:
            return
        self._extend_keys(sequence)
        full = min(len(sequence.page_keys), min(sequence.computed, len(sequence.tokens)) // self.config.page_size)
        for page in range(sequence.registered, full):
            self.pool.register(sequence.pages[page], sequence.page_keys[page])
        sequence.registered = max(sequence.registered, full)

    def _finish(
        self,
        sequence: Sequence,
        reason: Ending,
        now: float,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[Logprobs, ...] = (),
        failure: Exception | None = None,
    ) -> Event:
        """Ends a request, running or waiting; its pages are free at once. Returns its last event."""
        assert sequence.ending is None, f"{sequence.request.id} finished twice"
        sequence.ending = reason
        del self._sequences[sequence.request]
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        end = sequence.end(now, failure)
        return Event(sequence.request, tokens, logprobs, end, end.progress)

    def check(self) -> None:
        """Asserts every invariant that holds after a commit; for tests."""
        self.check_holders()
        for sequence in self.running:
            assert sequence.ending is None and sequence.slot >= 0
            assert sequence.computed <= sequence.length and 0 <= sequence.tokens_in_flight <= 1
            assert len(sequence.pages) >= self._pages_for(sequence.computed), (
                f"{sequence.request.id} computes without pages"
            )
        for sequence in self.waiting:
            assert not sequence.pages and sequence.slot < 0 and sequence.computed == 0

    def check_holders(self) -> None:
        """Asserts that each page has as many holders as it counts, and each slot one; this holds at any time."""
        self.pool.check()
        held = np.zeros(self.config.pages, np.int32)
        for sequence in self.running:
            assert len(sequence.pages) <= self.config.pages_per_sequence
            assert (self._packer.tables[sequence.slot, : len(sequence.pages)] == sequence.pages).all()
            np.add.at(held, sequence.pages, 1)
        assert (held == self.pool._held).all(), "a page's reference count is not the number of its holders"
        slots = [sequence.slot for sequence in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_sequences)), "a slot is lost or held twice"


def _logprobs(request: Request, drawn: Drawn, row: int) -> tuple[Logprobs, ...]:
    """What is told about a row's token; nothing if it wasn't asked for."""
    count = request.sampling.logprobs
    if count < 0:
        return ()
    tokens, top = drawn.top_tokens[row, :count].tolist(), drawn.top_log_probabilities[row, :count].tolist()
    return (Logprobs(float(drawn.log_probability[row]), tuple(tokens), tuple(top)),)
