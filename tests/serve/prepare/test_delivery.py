"""Outputs reach whoever waits for them, and an event loop is woken once a step, however many requests it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from isthmus.serve.engine.messages import End, Ending, Event, Request
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.prepare.delivery import LoopStream, Receiver, ThreadStream, deliver


def event(receiver: Receiver, *, last: bool = False) -> Event:
    request = Request("r", [1], Sampling(), 8, reply_to=receiver)
    return Event(request, (5,), end=End(Ending.LENGTH, (5,)) if last else None)


def test_a_step_wakes_a_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up a token would cost more than the token. Who waits for an end is not told before it."""

    async def work() -> None:
        loop, woken = asyncio.get_running_loop(), 0
        schedule = loop.call_soon_threadsafe

        def count(call: Callable[..., object], *args: Any) -> Any:
            nonlocal woken
            woken += 1
            return schedule(call, *args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        streams, ends = [LoopStream() for _ in range(3)], [LoopStream() for _ in range(3)]
        for end in ends:
            end.streams = False
        first = [event(receiver) for receiver in (*streams, *ends)]
        last = [event(receiver, last=True) for receiver in (*streams, *ends)]
        deliver([event(end) for end in ends])
        assert woken == 0
        deliver(first)
        deliver(last)
        assert woken == 2
        for index, (stream, end) in enumerate(zip(streams, ends, strict=True)):
            assert await stream.some(8) == [first[index], last[index]]
            assert await end.some(8) == [last[3 + index]]
        monkeypatch.undo()

    asyncio.run(work())


def test_threads_get_theirs() -> None:
    stream = ThreadStream()
    step = [event(stream)]
    deliver(step)
    assert stream.get(0) is step[0]


def test_a_loop_that_is_closed_holds_nobody_up() -> None:
    """One client's loop may end while others wait."""

    async def make() -> LoopStream:
        return LoopStream()

    gone, stream = asyncio.run(make()), ThreadStream()
    step = [event(gone), event(stream)]
    deliver(step)
    assert stream.get(0) is step[1]


def test_a_slow_reader_gets_no_more_tokens_at_once_than_it_takes() -> None:
    """An event has many tokens, and a reader that decodes thousands in a row keeps the loop from everybody else."""

    async def read() -> list[list[int]]:
        stream = LoopStream()
        for count in (3, 4, 2, 12, 1):
            stream.put_nowait(replace(event(stream), tokens=tuple(range(count))))
        return [[len(event.tokens) for event in await stream.some(8)] for _ in range(4)]

    assert asyncio.run(read()) == [[3, 4], [2], [12], [1]]
