"""How outputs travel from the engine's thread to whoever waits for them: on a thread of its own, or on an event loop,
which is woken once a step. A request's `reply_to` is one of these receivers, and the engine's sink is `deliver`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue
from typing import ClassVar

from isthmus.serve.engine.request import Output


class Receiver(ABC):
    """Takes the outputs of a request."""

    streams: ClassVar[bool]
    """Whether it gets each output as it comes, or only the last"""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop on which it gets outputs; None is the engine's thread"""

    @abstractmethod
    def put_nowait(self, item: Output, /) -> None:
        """Takes an output; must return quickly."""


class ThreadStream(Receiver):
    """Outputs for a thread, as they come."""

    streams = True

    def __init__(self) -> None:
        self._outputs: SimpleQueue[Output] = SimpleQueue()

    def put_nowait(self, output: Output, /) -> None:
        self._outputs.put(output)

    def get(self, timeout: float | None) -> Output:
        """The next output. Raises queue.Empty after `timeout` seconds."""
        return self._outputs.get(timeout=timeout)


class LoopStream(asyncio.Queue[Output], Receiver):
    """Outputs for a task on the event loop that it is made on, as they come."""

    streams = True

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()

    async def some(self, most: int) -> list[Output]:
        """Waits for an output. Returns those that have come, at most `most`: of several steps if the reader is slow."""
        outputs = [await self.get()]
        while not self.empty() and len(outputs) < most:
            outputs.append(self.get_nowait())
        return outputs


class ThreadEnd(Receiver):
    """The end of a request, for threads."""

    streams = False

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._then: list[Callable[[], object]] = []

    def put_nowait(self, output: Output, /) -> None:
        with self._lock:
            self._ended.set()
        for call in self._then:
            call()

    def wait(self, timeout: float | None) -> bool:
        """Waits until the request has ended. Returns whether that was within `timeout` seconds."""
        return self._ended.wait(timeout)

    def then(self, call: Callable[[], object]) -> None:
        """Calls `call` at the end, on the engine's thread, or at once if that has come. `call` must return quickly."""
        with self._lock:
            if not self._ended.is_set():
                self._then.append(call)
                return
        call()


class LoopEnd(Receiver):
    """The end of a request, for a task on the event loop that it is made on."""

    streams = False

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()

    def put_nowait(self, output: Output, /) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def deliver(outputs: list[Output]) -> None:
    """Gives a step's outputs to their receivers, called on the engine's thread. Each event loop is woken once."""
    batches: dict[asyncio.AbstractEventLoop, list[Output]] = {}
    for output in outputs:
        receiver: Receiver = output.request.reply_to
        if output.finish_reason is None and not receiver.streams:
            continue
        if receiver.loop is None:
            receiver.put_nowait(output)
        else:
            batches.setdefault(receiver.loop, []).append(output)
    for loop, batch in batches.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_put, batch)


def _put(outputs: list[Output]) -> None:
    for output in outputs:
        output.request.reply_to.put_nowait(output)
