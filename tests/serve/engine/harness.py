"""Runs a real engine on requests that arrive, and are cancelled, at chosen steps: no clock decides anything."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.model.config import ModelConfig
from isthmus.model.ops.sampling import Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor, Launched, Served
from isthmus.serve.engine.messages import End, Ending, Event, Request
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.sampling import Sampling

CONFIG = ModelConfig(
    vocab_size=32,
    dim=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    context_length=32,
    tie_embeddings=False,
)
ENGINE = EngineConfig(max_sequences=2, page_size=8, block_size=16, prefill_tokens=16, max_waiting=3).resolve(CONFIG)
SERVED = Served(CONFIG, ENGINE, CONFIG.vocab_size)


class HookedExecutor(Executor):
    """Calls `hook` on the engine thread while a step is under way: after the inbox was read, before events go out."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def launch(self, plan: StepPlan) -> Launched:
        self.hook()
        return super().launch(plan)


def only_tokens(tokens: np.ndarray) -> Drawn:
    """What a step gives that drew these, where nobody asked for more."""
    none = np.zeros((len(tokens), 0))
    return Drawn(tokens, np.zeros(len(tokens)), none, none)


def make(name: str, prompt: int = 3, max_tokens: int = 8) -> Request:
    return Request(name, list(range(1, prompt + 1)), Sampling(temperature=0), max_tokens)


class Client:
    """Collects events and waits for ends."""

    def __init__(self, executor: Executor) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self.engine = Engine(executor, self._sink)

    def _sink(self, events: list[Event]) -> None:
        with self._changed:
            self.events += events
            self._changed.notify_all()

    def ends(self) -> Counter[str]:
        return Counter(event.request.id for event in self.events if event.end is not None)

    def end(self, request: Request) -> End:
        return end_of(request, self.events)

    def wait_for_ends(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends().total() >= count, timeout=60), self.engine.error


@dataclass
class Arrival:
    request: Request
    step: int = 0
    """Comes with the events of this step, counted in steps that gave any"""
    cancel_after: int | None = None
    """Cancelled when it has this many tokens"""
    end: End | None = None
    """How it ended, once it was played"""

    @property
    def completion(self) -> list[int]:
        assert self.end is not None
        return list(self.end.tokens)

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt, *self.completion]

    @property
    def ending(self) -> Ending:
        assert self.end is not None
        return self.end.reason


def end_of(request: Request, events: Sequence[Event]) -> End:
    """The one end of a request among events."""
    (end,) = (event.end for event in events if event.request is request and event.end is not None)
    return end


@dataclass
class Played:
    engine: Engine
    events: list[Event] = field(default_factory=list)


def play(executor: Executor, arrivals: Sequence[Arrival], on_step: Callable[[int], None] = lambda step: None) -> Played:
    """Runs all of `arrivals` to their end. Raises what the engine thread raised."""
    waiting = sorted(arrivals, key=lambda arrival: arrival.step)
    cancels = {a.request.id: a.cancel_after for a in arrivals if a.cancel_after is not None}
    finished, done = 0, threading.Event()
    drawn: Counter[str] = Counter()
    errors: list[BaseException] = []
    step = 0

    def submit_due(due: int) -> None:
        while waiting and waiting[0].step <= due:
            engine.submit(waiting.pop(0).request)

    def sink(events: list[Event]) -> None:
        nonlocal finished, step
        if errors:
            return
        try:
            played.events += events
            step += 1
            on_step(step)
            for event in events:
                finished += event.end is not None
                name = event.request.id
                drawn[name] += len(event.tokens)
                if event.end is None and drawn[name] == cancels.get(name):
                    engine.cancel(name)
            submit_due(step)
            if engine.in_flight == 0 and waiting:  # nothing would ever come again
                submit_due(waiting[0].step)
        except BaseException as error:
            errors.append(error)
            done.set()
            raise
        if finished >= len(arrivals):
            done.set()

    engine = Engine(executor, sink)
    played = Played(engine)
    submit_due(waiting[0].step)
    engine.start()
    try:
        assert done.wait(300), "the engine stopped giving events"
    finally:
        engine.close()
    if errors or engine.error is not None:
        raise (errors or [engine.error])[0]  # type: ignore[misc]
    engine.scheduler.check()
    assert engine.scheduler.idle and engine.scheduler.pool.in_use == 0
    for arrival in arrivals:
        arrival.end = end_of(arrival.request, played.events)
    return played
