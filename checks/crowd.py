"""Runs an engine on requests that arrive, and are cancelled, with the events of chosen steps: no clock decides when."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from isthmus.errors import FailedPrecondition
from isthmus.model.weights.lora import Adapter
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Ending, Event, Request


class Guest(NamedTuple):
    """An adapter that is loaded for the requests that have it, and unloaded as soon as they are submitted."""

    name: str
    adapter: Adapter


@dataclass
class Arrival:
    request: Request
    step: int = 0
    """Comes with the events of this step, counted in steps that gave any"""
    cancel_after: int | None = None
    """Cancelled when it has this many tokens, or more by the step that brings them"""
    guest: Guest | None = None
    """The adapter that the request gets when it comes, which is as soon as there is a place"""
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
    """Closed, and with nothing left"""
    events: list[Event] = field(default_factory=list)


class _Players:
    """What happens on the engine's thread: requests are submitted and cancelled when their steps come."""

    def __init__(self, arrivals: Sequence[Arrival], on_events: Callable[[Sequence[Event]], None]) -> None:
        self.waiting = sorted(arrivals, key=lambda arrival: arrival.step)
        self._cancels = {a.request.id: a.cancel_after for a in arrivals if a.cancel_after is not None}
        self._left, self._step, self._on_events = len(arrivals), 0, on_events
        self._drawn: Counter[str] = Counter()
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self.done = threading.Event()

    def submit_due(self, engine: Engine, due: int) -> None:
        late = [arrival for arrival in self.waiting if arrival.step <= due and not _submitted(engine, arrival)]
        self.waiting = late + [arrival for arrival in self.waiting if arrival.step > due]

    def take(self, engine: Engine, events: list[Event]) -> None:
        if self.error is not None:
            return
        try:
            self._take(engine, events)
        except BaseException as error:
            self.error = error
            self.done.set()
            raise

    def _take(self, engine: Engine, events: list[Event]) -> None:
        self.events += events
        self._step += 1
        self._on_events(events)
        for event in events:
            self._left -= event.end is not None
            name = event.request.id
            self._drawn[name] += len(event.tokens)
            if event.end is None and self._drawn[name] >= self._cancels.get(name, math.inf):
                del self._cancels[name]
                engine.cancel(name)
        self.submit_due(engine, self._step)
        if engine.in_flight == 0 and self.waiting:  # nothing would ever come again
            self.submit_due(engine, self.waiting[0].step)
        if self._left == 0:
            self.done.set()


def _submitted(engine: Engine, arrival: Arrival) -> bool:
    """Submits a request, unless there is no place for its guest."""
    if (guest := arrival.guest) is not None:
        try:
            resident = engine.load_adapter(guest.name, guest.adapter)
        except FailedPrecondition:
            return False
        arrival.request = replace(arrival.request, adapter=resident)
    engine.submit(arrival.request)
    if guest is not None:
        engine.unload_adapter(guest.name)
    return True


def play(
    executor: Executor,
    arrivals: Sequence[Arrival],
    on_events: Callable[[Sequence[Event]], None] = lambda events: None,
) -> Played:
    """Runs all of `arrivals` to their end, and tells each how it ended. on_events: called on the engine's thread with
    the events of each step. Raises what that thread raised."""
    players = _Players(arrivals, on_events)
    engine = Engine(executor, lambda events: players.take(engine, events))
    players.submit_due(engine, players.waiting[0].step)
    engine.start()
    try:
        while not players.done.wait(1):
            if not engine.alive:
                break
    finally:
        engine.close()
    if error := players.error or engine.error:
        raise error
    engine.scheduler.check()
    assert engine.scheduler.idle and engine.scheduler.pool.in_use == 0, "something is left"
    for arrival in arrivals:
        arrival.end = end_of(arrival.request, players.events)
    return Played(engine, players.events)
