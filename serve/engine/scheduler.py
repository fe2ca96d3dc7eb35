"""Decides what the next step computes. Host state only: no device, no clock, no I/O.

There are no separate phases for prompts and completions: a step gives each request tokens until `computed` reaches
`length`. A token that was drawn takes a single row; a prompt takes blocks, cut on one grid whatever else the step
holds. A step is planned before the one in flight is read, so `computed` and `length` count what was launched, and a
token that the host doesn't know yet is read on the device.
"""

from __future__ import annotations

import logging

import numpy as np

from isthmus.model.ops.adjustments import words_for
from isthmus.model.ops.sampling import FREE, Drawn
from isthmus.serve.engine.ahead import LookAhead
from isthmus.serve.engine.budget import Budget
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.drafts import MOST_GUESSES
from isthmus.serve.engine.holdings import Holdings
from isthmus.serve.engine.intake import Intake
from isthmus.serve.engine.launches import Launches
from isthmus.serve.engine.masks import masks_of
from isthmus.serve.engine.messages import Ending, Event, Request
from isthmus.serve.engine.outcomes import Counters
from isthmus.serve.engine.packing import Packer, RequestFault, Step, Work
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.queue import Queue
from isthmus.serve.engine.room import Room
from isthmus.serve.engine.running import Running
from isthmus.serve.engine.sequence import Sequence

logger = logging.getLogger("isthmus.engine")

MOST_PASSES = 16
"""So many sequences may start past one that finds no pages; then pages are left free until it does"""
LOOK_AHEAD = 4
"""Waiting sequences that a step looks at and doesn't start"""


class Scheduler:
    """Owns requests from `add` to their last event, and the pages that they hold."""

    def __init__(self, config: EngineConfig, rope_switch: int = 0, vocab_size: int = 0) -> None:
        """config: resolved. rope_switch, vocab_size: as in ModelConfig."""
        self.config, self._rope_switch, self._vocab_size = config, rope_switch, vocab_size
        self.waiting, self.running = Queue(), Running(config)
        self.counters = Counters()
        self._sequences: dict[Request, Sequence] = {}
        """All sequences that haven't ended"""
        self._ended: list[Event] = []
        """The last events of those that a plan ended"""
        self._put_back: set[Sequence] = set()
        """Sequences that the last plan preempted"""
        self._launched: list[Sequence] = []
        """Sequences of whose prompts the last plan computes a part"""
        self._open: StepPlan | None = None
        """The plan in flight, if what comes after it is known only when it is read"""
        self._budget, self._read_at = Budget(config), 0.0
        self._most_blocks = 0
        """The most blocks that the step may have which is being planned"""
        self._packer = Packer(config)
        self._holdings = Holdings(config, self._packer.tables)
        self.pool, self._prefixes = self._holdings.pool, self._holdings.prefixes
        self._room = Room(self._holdings, self.running)
        self._ahead = LookAhead(config, rope_switch, self._holdings)
        self._intake = Intake(config, self._holdings, self.counters, self._finish)
        self._launches = Launches(config, rope_switch, self._holdings, self._budget)

    def add(self, request: Request) -> Sequence:
        """Takes a request in. What is returned is for tests."""
        sequence = self._sequences[request] = Sequence(request)
        self.waiting.add(sequence)
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
        if self._open is not None:
            return None
        self._put_back.clear()
        self._expire(now)
        self._register_launched(now)
        step = Step()
        self._ahead.begin(self.running)
        drawn, prompts, yielding = self._by_turn()
        self._most_blocks = self._budget.blocks(len(drawn))
        preempted = any([self._schedule_safely(sequence, step, now) for sequence in (*drawn, *prompts)])
        if not preempted:
            self._admit(step, now, self._most_blocks - (max(1, self._most_blocks // 2) if yielding else 0))
        for sequence in yielding:
            self._schedule_safely(sequence, step, now)
        self._ahead.add(step)
        if not self.waiting:
            self._launches.extend(step, len(self.running))
        return self._packed(step, now)

    def _packed(self, step: Step, now: float) -> StepPlan | None:
        """The plan of a step, without the requests that can't be written into one; None if that leaves nothing."""
        while step.singles or step.chunks:
            try:
                plan = self._packer.pack(step)
                self._launched = [work.sequence for work in step.chunks]
                self._open = plan if plan.is_open else None
                plan.planned_at, plan.blocks = now, step.blocks
                return plan
            except RequestFault as fault:
                step.drop(fault.sequence, self.config.block_size)
                self._fail(fault.sequence, fault.__cause__, now)
        return None

    def take_ended(self) -> list[Event]:
        """The last events of requests that ended outside of `cancel` and `commit` since the previous call: on an
        exception, or because they had waited too long."""
        ended, self._ended = self._ended, []
        return ended

    def _expire(self, now: float) -> None:
        """Ends waiting requests that are of no use any more, before they cost anything."""
        while (sequence := self.waiting.next_expired(now)) is not None:
            deadline = sequence.request.deadline
            late = deadline is not None and deadline <= now
            self._ended.append(self._finish(sequence, Ending.DEADLINE if late else Ending.QUEUE_TIME, now))

    def _register_launched(self, now: float) -> None:
        """Lets others find what the step in flight computes of prompts: theirs runs after it. Before anything is
        scheduled, `computed` counts no more than that."""
        for sequence in self._launched:
            try:
                if sequence.slot >= 0:
                    self._holdings.register(sequence)
            except Exception as error:
                self._fail(sequence, error, now)
        self._launched = []

    def _fail(self, sequence: Sequence, error: BaseException | None, now: float) -> None:
        """Ends one request with an error of its own. Raises the error if that leaves pages or slots in disorder, which
        would affect other requests."""
        assert isinstance(error, Exception)
        logger.error("request %r ended on an error", sequence.request.id, exc_info=error)
        try:
            event = self._finish(sequence, Ending.ERROR, now, failure=error)
            self._holdings.check(self.running)
        except Exception:
            raise error from None
        self._ended.append(event)

    def _by_turn(self) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
        """The running requests: those that wait for one token, those with more to compute, and those with more that
        give way to the first waiting one, which leave half of the step's blocks to it. An embedding whose last tokens
        are in flight waits for none."""
        drawn: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            if missing := sequence.length - sequence.computed:
                (prompts if missing > 1 else drawn).append(sequence)
        prompts.sort(key=self.running.turn)
        first = next(self.waiting.candidates(), None) if prompts else None
        yielding = [one for one in prompts if first is not None and self.running.gives_way(one, first)]
        return drawn, [one for one in prompts if one not in yielding], yielding

    def _schedule_safely(self, sequence: Sequence, step: Step, now: float) -> bool:
        """Gives a running sequence its tokens. Returns whether one was preempted for that, which may be this one; an
        exception ends this one."""
        preempted = False
        try:
            while sequence.slot >= 0 and (victim := self._schedule_one(sequence, step)) is not None:
                preempted = True
                self._preempt(victim, step)
        except Exception as error:
            step.drop(sequence, self.config.block_size)
            self._fail(sequence, error, now)
        return preempted

    def _schedule_one(self, sequence: Sequence, step: Step) -> Sequence | None:
        """Gives a running sequence its tokens, or returns the one to preempt first."""
        count = self._next_count(sequence, step, self._most_blocks)
        if count == 0:
            return None
        if self._is_long(sequence) != sequence.uses_long_rope:
            return sequence  # its keys so far were turned by the short frequencies
        if not self._holdings.grow(sequence, sequence.computed + count):
            return self.running.last()
        self._schedule(sequence, count, step)
        return None

    def _next_count(self, sequence: Sequence, step: Step, blocks: int) -> int:
        """Tokens that a step of at most `blocks` blocks has room to compute for `sequence`."""
        missing = sequence.length - sequence.computed
        if missing == 0 or (sequence.tokens_in_flight and not sequence.may_grow):
            return 0
        if missing == 1 and self._ahead.holds_back(sequence):
            return 0
        if missing == 1 and sequence.computed >= sequence.drawn_from:
            return 1
        return min(missing, max(0, blocks - step.blocks) * self.config.block_size)

    # admission

    def _admit(self, step: Step, now: float, blocks: int) -> None:
        """Starts waiting requests while there are slots, pages for all their tokens, and room in the step, which is to
        have at most `blocks` blocks then."""
        skipped: list[Sequence] = []
        blocked: list[Sequence] = []
        while step.blocks < blocks and len(skipped) < LOOK_AHEAD:
            sequence = next((one for one in self.waiting.candidates() if one not in skipped), None)
            if sequence is None:
                return
            try:
                if self._admit_one(sequence, step, now, blocks, blocked):
                    for one in blocked:
                        one.passed += 1
                    continue
            except Exception as error:
                step.drop(sequence, self.config.block_size)
                self._fail(sequence, error, now)
                continue
            skipped.append(sequence)

    def _admit_one(self, sequence: Sequence, step: Step, now: float, blocks: int, blocked: list[Sequence]) -> bool:
        """Starts a waiting sequence. Returns False, without starting it, if it must wait longer, and appends it to
        those that found no pages if that is why."""
        if sequence in self._put_back:  # the step in flight may draw its next token
            return False
        if not self._holdings.free_slots and next(self.running.victims(sequence), None) is None:
            return False
        self._choose_frequencies(sequence)
        hit = self._prefixes.find(sequence)
        if self._prefixes.is_coming(sequence, len(hit)):
            return False
        victims = self._room.victims(sequence, hit, reserved=any(one.passed >= MOST_PASSES for one in blocked))
        for victim in victims or ():
            self._preempt(victim, step)
        if victims is None or self._holdings.needed(sequence, hit) > self.pool.free:
            blocked.append(sequence)
            return False
        self._restrict(sequence)
        self._start(sequence, hit, now)
        self._schedule(sequence, self._next_count(sequence, step, blocks), step)
        return True

    def _restrict(self, sequence: Sequence) -> None:
        """Takes in what the request says about its draws, unless that was done before a preemption."""
        request = sequence.request
        sequence.masks = masks_of(request, self._vocab_size)
        sequence.adjusts = request.constraint is not None or request.sampling.adjusts
        if sequence.constraint is None and request.constraint is not None:
            sequence.constraint = request.constraint.copy()
            for token in request.resumed:
                sequence.constraint.accept(token)

    def _is_long(self, sequence: Sequence) -> bool:
        return 0 < self._rope_switch < sequence.length

    def _choose_frequencies(self, sequence: Sequence) -> None:
        uses_long_rope = self._is_long(sequence)
        if uses_long_rope != sequence.uses_long_rope:
            sequence.uses_long_rope, sequence.page_keys = uses_long_rope, []

    def _start(self, sequence: Sequence, hit: list[int], now: float) -> None:
        """Moves a waiting sequence to those that run."""
        self.waiting.take(sequence)
        self._holdings.start(sequence, hit)
        self.running.start(sequence)
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
            self.counters.cached_prompt_tokens += sequence.computed
        else:
            sequence.recomputed_tokens += sequence.length - sequence.computed
        if sequence.admitted_at is None:
            sequence.admitted_at = now
        self._packer.start(sequence)

    def _schedule(self, sequence: Sequence, count: int, step: Step) -> None:
        work = Work(sequence, sequence.computed, count)
        sequence.computed += count
        if count == 1 and work.start >= sequence.drawn_from:
            step.singles.append(work)
        else:
            step.chunks.append(work)
            step.blocks += -(-count // self.config.block_size)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Puts a running sequence back into the queue; its tokens are kept and computed again."""
        step.drop(sequence, self.config.block_size)
        self.running.remove(sequence)
        self._holdings.release(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.put_back(sequence)
        self._put_back.add(sequence)

    def mask(self, plan: StepPlan, now: float = 0.0) -> np.ndarray:
        """int32[samples, words]: which ids each draw of an adjusted plan may give. If the plan awaits the step before,
        that is committed."""
        mask = np.full((plan.bucket.samples, words_for(self._vocab_size)), -1, np.int32)
        for first, sequence in plan.samples:
            if sequence.ending is not None or not sequence.adjusts or plan.draws["forced"][first] != FREE:
                continue
            try:
                rows, guesses = plan.rows_ahead(sequence), plan.tokens_ahead(sequence)
                drawn = int(plan.draws["position"][first]) - sequence.prompt_length
                sequence.fill_masks([mask[row] for row in (first, *rows)], drawn, guesses)
            except Exception as error:
                mask[first] = -1
                self._fail(sequence, error, now)
        return mask

    # commit: what a step drew

    def commit(self, plan: StepPlan, drawn: Drawn, now: float = 0.0, hidden: np.ndarray | None = None) -> list[Event]:
        """Takes in what `plan` drew, in numpy's arrays, which came at `now`; finished requests free their pages.

        hidden: the hidden states [tokens, dim] of the plan's tokens, after the model's last norm; they are there if the
        plan pools some."""
        steps = len(drawn.token) // plan.bucket.rows if plan.steps > 1 else 1
        self.counters.steps += steps
        # It began when it was launched, or when the step before it was done.
        self._budget.learn(plan.blocks, (now - max(plan.planned_at, self._read_at)) / steps)
        self._read_at = now
        if plan is self._open:
            self._open = None
        events = []
        for row, sequence in plan.samples:
            if sequence.ending is not None:  # it ended while the step ran
                continue
            try:
                events.append(self._intake.draws(plan, row, sequence, drawn, now))
            except Exception as error:
                self._fail(sequence, error, now)
        for pooled in plan.pooled:
            assert hidden is not None, "hidden states are missing"
            if pooled.sequence.ending is not None:
                continue
            try:
                events += self._intake.hidden(pooled.sequence, hidden[pooled.tokens], now)
            except Exception as error:
                self._fail(pooled.sequence, error, now)
        return events

    def _finish(self, sequence: Sequence, reason: Ending, now: float, failure: Exception | None = None) -> Event:
        """Ends a request, running or waiting; its pages are free at once. Returns its last event."""
        assert sequence.ending is None, f"{sequence.request.id} finished twice"
        sequence.ending = reason
        del self._sequences[sequence.request]
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._holdings.release(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.admission:
            self.waiting.settle(sequence)
        end = sequence.end(now, failure)
        self._ahead.keep(sequence.request, end)
        return Event(sequence.request, end=end, progress=end.progress)

    def check(self) -> None:
        """Asserts every invariant that holds after a commit; for tests."""
        self._holdings.check(self.running)
        for sequence in self.running:
            assert sequence.ending is None and sequence.slot >= 0
            most = 1 if self._open is None else max(MOST_GUESSES + 1, self._open.steps + 1)
            if sequence.in_prompt:
                most = self.config.max_sequences
            assert sequence.computed <= sequence.length and 0 <= sequence.tokens_in_flight <= most
            room = len(sequence.pages) * self.config.page_size
            assert room >= sequence.computed, f"{sequence.request.id} computes without pages"
        for sequence in self.waiting:
            assert not sequence.pages and sequence.slot < 0 and sequence.computed == 0
