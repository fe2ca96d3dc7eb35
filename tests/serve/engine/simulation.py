"""The engine without a device: the real scheduler, driven a step ahead as the engine drives it, over a cache in a dict.

Where the device would keep keys and values, the dict keeps which token was written, at which position, after which
prefix. The "network" draws its next token from a hash of the prefix that it finds **through the page table**, and makes
its hidden state of another one; a page that was freed too early, shared wrongly or not filled gives another text, or
another embedding, than the prompt's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.model.ops.sampling import BAD_ROW, FREE, Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.messages import End, Ending, Event, Logprobs, Request
from isthmus.serve.engine.pages import NULL_PAGE
from isthmus.serve.engine.plan import FROM_DEVICE, PADDING, PlanArrays, StepPlan, split_plan
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.running import MOST_PREEMPTIONS
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from isthmus.serve.engine.sequence import Sequence

VOCAB = 7
EOS = 0
LATE = (Ending.QUEUE_TIME, Ending.DEADLINE)


def extend(prefix: bytes, token: int) -> bytes:
    return hashlib.blake2b(prefix + bytes([token % 256]), digest_size=8).digest()


def draw(prefix: bytes) -> int:
    """The token after a prefix; the end of the text one time in sixteen."""
    number = int.from_bytes(hashlib.blake2b(b"draw" + prefix, digest_size=4).digest(), "big")
    return EOS if number % 16 == 0 else 1 + number // 16 % (VOCAB - 1)


def told(prefix: bytes, token: int) -> float:
    """The log-probability of a token after a prefix."""
    return -float(int.from_bytes(hashlib.blake2b(b"told" + extend(prefix, token), digest_size=3).digest(), "big"))


def state_of(prefix: bytes) -> np.ndarray:
    """float32[4]: the hidden state after a prefix, in whole numbers, whose sums are exact in any order."""
    return np.frombuffer(hashlib.blake2b(b"state" + prefix, digest_size=4).digest(), np.int8).astype(np.float32)


def prefix_of(tokens: list[int]) -> bytes:
    prefix = b""
    for token in tokens:
        prefix = extend(prefix, token)
    return prefix


def expected_completion(request: Request) -> list[int]:
    """What the request would get with the device to itself and no cache."""
    prefix, out = prefix_of(request.prompt), []
    while len(out) < request.max_tokens:
        out.append(draw(prefix))
        prefix = extend(prefix, out[-1])
        if out[-1] in request.eos_ids or out[-1] in request.stop_ids:
            break
    return out


def expected_scores(request: Request) -> tuple[Logprobs, ...]:
    """What is told about the tokens of the prompt that the request asks for."""
    if request.scored_from is None:
        return ()
    at = range(request.scored_from, len(request.prompt))
    return tuple(Logprobs(told(prefix_of(request.prompt[:index]), request.prompt[index]), (), ()) for index in at)


def expected_embedding(request: Request) -> np.ndarray:
    """What the request would get with the device to itself and no cache."""
    states = [state_of(prefix_of(request.prompt[:end])) for end in range(1, len(request.prompt) + 1)]
    return states[-1] if request.pooling is Pooling.LAST else np.mean(states, axis=0, dtype=np.float64)


@dataclass
class Entry:
    """What the cache holds for a token."""

    token: int
    position: int
    prefix: bytes
    """Of all tokens up to this one"""
    writer: Sequence
    """Whose tokens they are"""


@dataclass
class InFlight:
    plan: StepPlan
    drawn: Drawn
    hidden: np.ndarray


class Simulation:
    def __init__(self, config: EngineConfig) -> None:
        """config: resolved."""
        self.config = config
        self.scheduler = Scheduler(config)
        self.cache: dict[tuple[int, int], Entry] = {}
        self.tables = np.zeros((config.nobody + 1, config.pages_per_sequence), np.int32)
        self.tokens: dict[tuple[int, int], int] = {}
        """What was drawn for a slot and position"""
        self.in_flight: InFlight | None = None
        self.scored: dict[str, list[Logprobs]] = {}
        """What the events have told about a request's prompt"""
        self.live: dict[str, Sequence] = {}
        self.finished: list[Sequence] = []
        self.poison: set[str] = set()
        """Requests whose next row, or next block of an embedding, comes out not finite"""
        self.steps = 0
        self.tokens_computed = 0

    # what a front end does, between two steps

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        stop_ids: frozenset[int] = frozenset(),
        **options: Any,
    ) -> Sequence:
        """options: fields of Request."""
        name = f"r{len(self.live) + len(self.finished)}"
        options.setdefault("arrival", float(self.steps))
        sampling = Sampling(logprobs=-1 if options.get("scored_from") is None else 0)
        request = Request(name, prompt, sampling, max_tokens, stop_ids=stop_ids, eos_ids=eos_ids, **options)
        self.live[name] = self.scheduler.add(request)
        return self.live[name]

    def cancel(self, name: str) -> None:
        sequence = self.live.pop(name)
        (event,) = self.scheduler.cancel(sequence.request)
        self._heard([event])
        self._finished(sequence, event)

    # one turn of the engine's loop: plan and launch t + 1, then read and commit t

    def step(self) -> list[Event]:
        now = float(self.steps)  # the clock counts steps
        plan = self.scheduler.plan(now)
        self.scheduler.pool.check()
        launched = None
        if plan is not None:
            self._place(plan)
            self._check_plan(plan)
            launched = InFlight(plan, *self._launch(plan))
        events: list[Event] = []
        if self.in_flight is not None:
            read = self.in_flight
            hidden = read.hidden if read.plan.pooled else None
            events = self.scheduler.commit(read.plan, read.drawn, now, hidden)
        events += self.scheduler.take_ended()
        self.in_flight = launched
        self.scheduler.check()
        self._heard(events)
        for event in events:
            if event.end is not None:
                self._finished(self.live.pop(event.request.id), event)
        self.steps += 1
        return events

    def drain(self) -> None:
        """Runs until nothing is left, which must come: a request that never ends holds its client for ever."""
        work = sum(len(s.request.prompt) + s.request.max_tokens for s in self.live.values())
        limit = self.steps + 20 * (work + 10)
        while self.live or self.in_flight is not None:
            self.step()
            assert self.steps < limit, (
                f"no end in sight: {[(s.request.id, s.computed, s.length) for s in self.live.values()]}"
            )
        assert self.scheduler.idle
        assert self.scheduler.pool.in_use == 0, "a page is held by nobody"
        self.scheduler.check()

    def _heard(self, events: list[Event]) -> None:
        assert len({event.request.id for event in events}) == len(events), "a step gives a request one event"
        for event in events:
            assert event.end is not None or event.tokens or event.prompt_logprobs
            assert not (event.tokens and event.prompt_logprobs)
            self.scored.setdefault(event.request.id, []).extend(event.prompt_logprobs)

    def _finished(self, sequence: Sequence, event: Event) -> None:
        self.finished.append(sequence)
        request, end = sequence.request, event.end
        assert end is not None
        want, got = expected_completion(request), list(end.tokens)
        scores, scored = expected_scores(request), end.prompt_logprobs
        assert got == sequence.completion and scored == tuple(self.scored.pop(request.id))
        assert sequence.slot == -1 and not sequence.pages
        assert sequence.preemptions <= MOST_PREEMPTIONS, "it is computed again and again"
        if end.reason in LATE:
            self._check_expired(sequence, end)
        if request.pooling is not None:
            self._check_embedding(request, end)
            return
        if end.reason in (Ending.CANCELLED, Ending.ERROR, *LATE):
            assert got == want[: len(got)], f"{request.id} read another prefix than its own"
            assert scored == scores[: len(scored)] and (scored == scores or not got)
            return
        assert got == want and scored == scores, f"{request.id} read another prefix than its own"
        if not got:
            assert request.max_tokens == 0 and end.reason is Ending.LENGTH
        elif got[-1] in request.eos_ids:
            assert end.reason is Ending.EOS and end.stop_token in request.eos_ids
        elif got[-1] in request.stop_ids:
            assert end.reason is Ending.STOP_TOKEN and end.stop_token == got[-1]
        elif len(sequence.tokens) == self.config.context_length:
            assert end.reason is Ending.CONTEXT_LENGTH
        else:
            assert end.reason is Ending.LENGTH

    def _check_embedding(self, request: Request, end: End) -> None:
        assert not end.tokens and end.reason in (Ending.EMBEDDED, Ending.CANCELLED, Ending.ERROR, *LATE)
        assert (end.embedding is not None) == (end.reason is Ending.EMBEDDED)
        if end.embedding is not None:
            assert end.embedding.tolist() == expected_embedding(request).astype(np.float32).tolist()
        if request.pooling is Pooling.MEAN:
            assert end.progress.cached_tokens == 0, "the cache has no hidden states"

    def _check_expired(self, sequence: Sequence, end: End) -> None:
        request = sequence.request
        if end.reason is Ending.DEADLINE:
            assert request.deadline is not None and request.deadline <= end.progress.at
        else:
            assert request.max_queue_time is not None and end.progress.admitted_at is None and not end.tokens
            assert end.progress.at >= request.arrival + request.max_queue_time

    # the device

    def _rows(self, arrays: PlanArrays, plan: StepPlan) -> Iterator[tuple[int, range]]:
        """(row of tables, indices on the token axis) of each single token and block."""
        bucket = plan.bucket
        for row in range(bucket.rows):
            yield row, range(row, row + 1)
        for block in range(bucket.blocks):
            first = bucket.rows + block * bucket.block_size
            yield bucket.rows + block, range(first, first + bucket.block_size)

    def _arrays(self, plan: StepPlan) -> PlanArrays:
        return split_plan(plan.packed, plan.bucket)

    def _at(self, arrays: PlanArrays, row: int, position: int) -> tuple[int, int]:
        size = self.config.page_size
        return int(self.tables[arrays.slots[row]][position // size]), position % size

    def _place(self, plan: StepPlan) -> None:
        """Takes in the pages that a plan brings."""
        for slot, pages in plan.tables:
            self.tables[slot] = pages
        arrays = self._arrays(plan)
        for row in range(plan.bucket.rows):
            if (position := int(arrays.positions[row])) != PADDING:
                self.tables[arrays.slots[row], position // self.config.page_size] = arrays.row_page[row]

    def _launch(self, plan: StepPlan) -> tuple[Drawn, np.ndarray]:
        """What was drawn, and the hidden states: of several steps one after the other, up to one in which a row ends,
        or, now and then, one after which the host has something new."""
        arrays = self._arrays(plan)
        if plan.steps == 1:
            return self._compute(plan, arrays)
        assert plan.ends is not None
        every: list[Drawn] = []
        known = arrays.positions != PADDING
        for turn in range(plan.steps):
            tokens = arrays.tokens if turn == 0 else np.full_like(arrays.tokens, FROM_DEVICE)
            now = arrays._replace(tokens=tokens, positions=np.where(known, arrays.positions + turn, PADDING))
            drawn, hidden = self._compute(plan, now, turn)
            every.append(drawn)
            rows = [row for row, _ in plan.samples]
            if (drawn.token[rows, None] == plan.ends[rows]).any() or (drawn.token[rows] == BAD_ROW).any():
                break
            if self.steps % 5 == turn:
                break
        return Drawn(*(np.concatenate(rows) for rows in zip(*every, strict=True))), hidden

    def _compute(self, plan: StepPlan, arrays: PlanArrays, turn: int = 0) -> tuple[Drawn, np.ndarray]:
        """Writes every token, then reads every token's prefix, as each layer does. Returns what was drawn, and the
        hidden states. turn: which step of a launch it is."""
        owners = {page: sequence for sequence in self.scheduler.running for page in sequence.pages}
        for row, indices in self._rows(arrays, plan):
            for index in indices:
                position = int(arrays.positions[index])
                if position == PADDING:
                    continue
                token = int(arrays.tokens[index])
                if token == FROM_DEVICE:
                    token = self.tokens[int(arrays.slots[row]), position]
                before = b""
                if position:
                    before = self.cache[self._at(arrays, row, position - 1)].prefix
                place = self._at(arrays, row, position)
                self.cache[place] = Entry(token, position, extend(before, token), owners[place[0]])
                self.tokens_computed += 1
        prefixes: dict[int, bytes] = {}
        for row, indices in self._rows(arrays, plan):
            for index in indices:
                if (position := int(arrays.positions[index])) != PADDING:
                    reader = owners[self._at(arrays, row, position)[0]]
                    prefixes[index] = self._read(arrays, row, position, reader)
        return self._draw(plan, arrays, prefixes, turn), self._hidden(plan, prefixes)

    def _read(self, arrays: PlanArrays, row: int, position: int, reader: Sequence) -> bytes:
        """The prefix of a token as attention sees it: all positions before it, in order, from one sequence."""
        prefix = b""
        for at in range(position + 1):
            entry = self.cache.get(self._at(arrays, row, at))
            assert entry is not None, f"position {at} was never written"
            assert entry.position == at, f"position {at} holds position {entry.position}"
            prefix = extend(prefix, entry.token)
            self._check_may_read(reader, entry)
            assert entry.prefix == prefix, f"position {at} holds a token of another sequence"
        return prefix

    def _check_may_read(self, reader: Sequence, entry: Entry) -> None:
        asked, gave = reader.request, entry.writer.request
        if asked is gave:
            return
        assert asked.cache_salt == gave.cache_salt, "a page went from one salt to another"
        assert asked.cache_read, "a request that bypasses the cache reads another's page"
        assert gave.cache_write, "a request reads a page that wasn't to be kept"

    def _draw(self, plan: StepPlan, arrays: PlanArrays, prefixes: dict[int, bytes], turn: int) -> Drawn:
        drawn = np.full(plan.bucket.samples, 10**6, np.int32)  # what padding draws must interest nobody
        own = np.zeros(plan.bucket.samples)
        for first, sequence in plan.samples:
            known = prefix_of(sequence.tokens)
            for at in range(len(sequence.tokens), int(plan.draws["position"][first]) + turn):
                scored = at < sequence.prompt_length
                known = extend(known, sequence.request.prompt[at] if scored else self.tokens[sequence.slot, at])
            prefix = prefixes[int(arrays.sample_token[first])]
            assert prefix == known, f"{sequence.request.id} draws after another prefix than its own"
            rows = [first, *plan.rows_ahead(sequence)]
            bad = first if plan.draws["forced"][first] == FREE else rows[len(rows) // 2]
            for row in rows:  # as if the guesses before it were right
                prefix, forced = prefixes[int(arrays.sample_token[row])], int(plan.draws["forced"][row])
                drawn[row] = draw(prefix) if forced == FREE else forced
                own[row] = told(prefix, int(drawn[row]))
                if row == bad and sequence.request.id in self.poison:
                    self.poison.discard(sequence.request.id)
                    drawn[row] = BAD_ROW
                self.tokens[int(plan.draws["slot"][row]), int(plan.draws["position"][row]) + turn] = int(drawn[row])
        none = np.zeros((plan.bucket.samples, 0))
        return Drawn(drawn, own, none, none)

    def _hidden(self, plan: StepPlan, prefixes: dict[int, bytes]) -> np.ndarray:
        hidden = np.full((plan.bucket.tokens, 4), np.nan, np.float32)
        for index, prefix in prefixes.items():
            hidden[index] = state_of(prefix)
        for sequence, tokens in plan.pooled:
            if sequence.request.id in self.poison:
                self.poison.discard(sequence.request.id)
                hidden[tokens] = np.nan
        return hidden

    # what must hold of every plan

    def _check_plan(self, plan: StepPlan) -> None:
        arrays, pool = self._arrays(plan), self.scheduler.pool
        holder: dict[int, list[Sequence]] = {}
        for sequence in self.scheduler.running:
            for page in sequence.pages:
                holder.setdefault(page, []).append(sequence)
        written: set[tuple[int, int]] = set()
        scheduled = 0
        for row, indices in self._rows(arrays, plan):
            positions = [int(arrays.positions[i]) for i in indices]
            real = [p for p in positions if p != PADDING]
            scheduled += len(real)
            assert positions == real + [PADDING] * (len(positions) - len(real)), "padding amid tokens"
            if not real:
                assert arrays.slots[row] == self.config.nobody, "padding in somebody's slot"
                continue
            assert real == list(range(real[0], real[0] + len(real))), "positions are not consecutive"
            if len(indices) > 1:
                assert real[0] % self.config.block_size == 0, "a block off the grid"
                assert all(arrays.tokens[i] != FROM_DEVICE for i in indices), "a block takes known tokens only"
            pages = {self._at(arrays, row, p)[0] for p in real}
            owners = [r for r in self.scheduler.running if pages <= set(r.pages)]
            assert len(owners) == 1, "a row writes to pages that are not one running request's"
            assert owners[0].computed > real[-1], "computed doesn't count what was planned"
            covered = -(-(real[-1] + 1) // self.config.page_size)
            assert self.tables[arrays.slots[row]][:covered].tolist() == owners[0].pages[:covered]
            for page in pages:
                assert page != NULL_PAGE
                assert len(holder[page]) == 1 and pool._held[page] == 1, "a write to a page that others read"
                assert pool._key_of[page] is None, "a write to a page that others may find"
            places = {self._at(arrays, row, p) for p in real}
            assert len(places) == len(real) and not places & written, "two tokens are written to one place"
            written |= places
        assert scheduled * plan.steps == plan.scheduled_tokens > 0
        self._check_samples(plan, arrays)

    def _check_samples(self, plan: StepPlan, arrays: PlanArrays) -> None:
        nobody = self.config.nobody
        assert len({id(sequence) for _, sequence in plan.samples}) == len(plan.samples)
        rows = [row for row, _ in plan.samples] + [row for ahead in plan.ahead.values() for row in ahead.rows]
        assert len(rows) == len(set(rows))
        for row in range(plan.bucket.samples):
            if row not in rows:
                assert plan.draws["slot"][row] == nobody, "a draw that nobody asked for is kept"
        for row, sequence in plan.samples:
            ahead = plan.rows_ahead(sequence)
            forced = sequence.request.scored_from is not None and plan.draws["position"][row] < sequence.prompt_length
            before = sequence.tokens_in_flight - len(ahead) - plan.steps  # of the launch in flight
            if plan.steps > 1:
                assert plan.ends is not None and not ahead and not forced
                assert set(plan.ends[row].tolist()) - {BAD_ROW} == sequence.ends
            assert plan.draws["slot"][row] == sequence.slot and sequence.request.pooling is None
            assert 0 <= before <= (self.config.max_sequences if sequence.in_prompt else 1)
            position = sequence.computed - plan.steps - len(ahead)
            assert arrays.positions[arrays.sample_token[row]] == position
            assert position == sequence.length - 1 - plan.steps - len(ahead)
            for index, each in enumerate((row, *ahead)):
                at = position + 1 + index
                assert plan.draws["slot"][each] == sequence.slot and plan.draws["position"][each] == at
                assert arrays.positions[arrays.sample_token[each]] == at - 1
                assert plan.draws["forced"][each] == (sequence.request.prompt[at] if forced else FREE)


def run_until(simulation: Simulation, done: Callable[[], bool], limit: int = 1000) -> None:
    for _ in range(limit):
        if done():
            return
        simulation.step()
    raise AssertionError("it never came to that")
