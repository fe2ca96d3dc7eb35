"""Replays a trace of arrivals against the real scheduler, a step ahead as the engine drives it, with draws that are
made up. The clock counts steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from isthmus.model.config import ModelConfig
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.messages import End, Request
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from tests.serve.engine.harness import only_tokens

MODEL = ModelConfig(context_length=1024)
ENGINE = EngineConfig(
    max_sequences=16, draft_rows=0, steps_per_launch=1, block_size=32, prefill_tokens=256, pages=16 * 20
).resolve(MODEL)
EOS = 0


@dataclass(frozen=True)
class Asked:
    """A request to come."""

    step: int
    prompt: list[int]
    max_tokens: int
    draws: int
    """It draws the end of its text after so many tokens, or max_tokens"""
    cancel_after: int | None = None
    """Steps until it is cancelled"""
    tenant: str = ""
    priority: int = 0
    max_queue_time: float | None = None
    scored_from: int | None = None
    pooling: Pooling | None = None
    """What its embedding is made of, where it asks for one; it draws nothing then"""


@dataclass
class Outcome:
    """What became of it, in steps."""

    asked: Asked
    end: End

    @property
    def first_token_after(self) -> float:
        assert self.end.progress.first_token_at is not None
        return self.end.progress.first_token_at - self.asked.step


@dataclass
class Replay:
    config: EngineConfig = ENGINE
    outcomes: list[Outcome] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    """That were computed"""

    def run(
        self, trace: Iterable[Asked], most_steps: int, on_step: Callable[[Scheduler], None] = lambda s: None
    ) -> None:
        """Plays `trace`, which is in the order of its steps, to its end. Fails if that takes more than most_steps."""
        self.scheduler = Scheduler(self.config)
        self._asked: dict[Request, Asked] = {}
        self._cancels: dict[int, list[Request]] = {}
        coming, in_flight = iter(trace), None
        arrival = next(coming, None)
        while arrival is not None or self._asked or in_flight is not None:
            while arrival is not None and arrival.step <= self.steps:
                self._submit(arrival)
                arrival = next(coming, None)
            in_flight = self._step(in_flight)
            on_step(self.scheduler)
            self.steps += 1
            assert self.steps < most_steps, f"{len(self._asked)} requests are left"
        self.scheduler.check()
        assert self.scheduler.idle and self.scheduler.pool.in_use == 0, "a page is held by nobody"

    def _submit(self, asked: Asked) -> None:
        request = Request(
            str(len(self.outcomes)),
            asked.prompt,
            Sampling(logprobs=-1 if asked.scored_from is None else 0),
            asked.max_tokens,
            eos_ids=frozenset({EOS}),
            tenant=asked.tenant,
            priority=asked.priority,
            max_queue_time=asked.max_queue_time,
            scored_from=asked.scored_from,
            pooling=asked.pooling,
            arrival=float(asked.step),
        )
        self._asked[request] = asked
        self.scheduler.add(request)
        if asked.cancel_after is not None:
            self._cancels.setdefault(self.steps + asked.cancel_after, []).append(request)

    def _step(self, in_flight: StepPlan | None) -> StepPlan | None:
        now, scheduler = float(self.steps), self.scheduler
        events = [event for request in self._cancels.pop(self.steps, ()) for event in scheduler.cancel(request, now)]
        plan = scheduler.plan(now)
        if plan is not None:
            self.tokens += plan.scheduled_tokens
        if in_flight is not None:
            hidden = np.zeros((in_flight.bucket.tokens, 1), np.float32)
            events += scheduler.commit(in_flight, only_tokens(self._draw(in_flight)), now, hidden)
        for event in (*events, *scheduler.take_ended()):
            if event.end is not None:
                self.outcomes.append(Outcome(self._asked.pop(event.request), event.end))
        return plan

    def _draw(self, plan: StepPlan) -> np.ndarray:
        drawn = np.ones(plan.bucket.samples, np.int32)
        for row, sequence in plan.samples:
            if sequence.ending is None and len(sequence.completion) + 1 >= self._asked[sequence.request].draws:
                drawn[row] = EOS
        return drawn


def prompt(rng: random.Random, length: int, family: int = 0) -> list[int]:
    """Token ids that begin like others of their family: with one of its shared blocks, or none of family 0."""
    own = [rng.randrange(2, 30000) for _ in range(min(length, 4))] * (length // 4 + 1)
    shared = [family] * (64 if family else 0)
    return (shared + own)[:length]
