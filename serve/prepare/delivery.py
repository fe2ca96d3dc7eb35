"""How events travel from the engine's thread to whoever waits for them: on a thread of its own, or on an event loop,
which is woken once a step. A request's `reply_to` is one of these receivers, and the engine's sink is `deliver`."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from concurrent.futures import Future
from queue import SimpleQueue

from isthmus.serve.engine.messages import End, Event


class Receiver(ABC):
    """Takes the events of a request."""

    streams: bool = True
    """Whether it gets each event as it comes, or only the last one"""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop on which it gets events; None is the engine's thread"""

    @abstractmethod
    def put_nowait(self, item: Event, /) -> None:
        """Takes an event of the engine; must return quickly."""


class ThreadStream(Receiver):
    """Events for a thread, as they come."""

    def __init__(self) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()

    def put_nowait(self, event: Event, /) -> None:
        self._events.put(event)

    def get(self, timeout: float | None) -> Event:
        """The next event. Raises queue.Empty after `timeout` seconds."""
        return self._events.get(timeout=timeout)


class Last(Receiver):
    """The end of a request, for whoever waits for that only."""

    streams = False

    def __init__(self) -> None:
        self.end: Future[End] = Future()
        """It can't be cancelled: cancel the request, and this has the end that says so"""
        self.end.set_running_or_notify_cancel()

    def put_nowait(self, event: Event, /) -> None:
        assert event.end is not None
        self.end.set_result(event.end)


class LoopStream(asyncio.Queue[Event], Receiver):
    """Events for a task on the event loop that it is made on, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self._left: Event | None = None
        """One that `some` has taken out and not returned"""

    async def some(self, most: int) -> list[Event]:
        """Waits for an event. Returns those that have come, of many steps if the reader is slow: one, or as many as
        have `most` tokens together."""
        first, self._left = self._left, None
        events = [await self.get() if first is None else first]
        tokens = len(events[0].tokens)
        while not self.empty() and len(events) < most:
            event = self.get_nowait()
            tokens += len(event.tokens)
            if tokens > most:
                self._left = event
                break
            events.append(event)
        return events


def deliver(events: list[Event]) -> None:
    """Gives a step's events to their receivers, called on the engine's thread. Each event loop is woken once."""
    batches: dict[asyncio.AbstractEventLoop, list[Event]] = {}
    for event in events:
        receiver: Receiver = event.request.reply_to
        if event.end is None and not receiver.streams:
            continue
        if receiver.loop is None:
            receiver.put_nowait(event)
        else:
            batches.setdefault(receiver.loop, []).append(event)
    for loop, batch in batches.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_put, batch)


def _put(events: list[Event]) -> None:
    for event in events:
        event.request.reply_to.put_nowait(event)
