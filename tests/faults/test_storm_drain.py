"""SIGTERM at a moment that dice choose, amid many streams, again and again."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest

from isthmus import generate_request
from isthmus.serve.api.server import CANCEL_GRACE_SECONDS
from isthmus.v1 import inference_pb2 as pb
from tests.faults.storms import OK, Caller, End, StartServing, one_by_one, requests
from tests.serve.api.harness import MANY, PATIENCE, PROMPT, ApiClient, ServeProcess, idle, wait_for

pytestmark = pytest.mark.slow

SEED = 5
ROUNDS = 6
CALLS = 24
"""Of each round, for 8 that may run: most are still waiting at the signal"""
SLOW = 4
"""Of those, who read nothing from the signal on until everybody else has ended"""
OTHER_SERVER = "UNAVAILABLE RetryInfo"
"""What sends a client elsewhere"""
ENDURING = generate_request(PROMPT, max_tokens=12_000, seed=1, ignore_eos=True)
"""It keeps the server draining for as long as new calls are tried"""
NARROW = ("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)
"""A connection that has hardly anything on its way"""
ENDLESS = [generate_request(PROMPT, max_tokens=MANY, seed=seed, ignore_eos=True) for seed in range(16)]


class Round:
    """The calls of one server's life, and the moment of its end."""

    def __init__(self, process: ServeProcess, moment: int) -> None:
        """moment: how many tokens of all streams together come before the signal."""
        self._process, self._moment, self._tokens = process, moment, 0
        self._told, self._others_ended = asyncio.Event(), asyncio.Event()

    async def run(self, asked: list[pb.GenerateRequest]) -> list[End]:
        """How each of `asked` ends, and the enduring one at last."""
        address = self._process.address()
        async with Caller(address) as caller, Caller(address) as late, Caller(address) as patient:
            enduring = asyncio.create_task(caller.stream(ENDURING, 2 * PATIENCE, self._count))
            quick = [self._quick(caller, index, request) for index, request in enumerate(asked[SLOW:])]
            slow = [patient.stream(request, 2 * PATIENCE, self._wait) for request in asked[:SLOW]]
            running = [asyncio.create_task(call) for call in (*slow, *quick)]
            await asyncio.wait_for(self._told.wait(), PATIENCE)
            refused = await self._refusal(late)
            assert not enduring.done(), "the server had nothing left to drain when it was asked"
            assert refused.how == OTHER_SERVER and refused.message, refused
            await asyncio.gather(*running[SLOW:])
            last = await enduring
            self._others_ended.set()
            return [*await asyncio.gather(*running), last]

    def _quick(self, caller: Caller, index: int, request: pb.GenerateRequest) -> Awaitable[End]:
        if index % 4:
            return caller.stream(request, 2 * PATIENCE, self._count)
        return caller.unary(request, 2 * PATIENCE)

    async def _count(self, call: Any, tokens: int) -> None:
        self._tokens += 1
        if self._tokens >= self._moment and not self._told.is_set():
            self._process.process.send_signal(signal.SIGTERM)
            self._told.set()

    async def _wait(self, call: Any, tokens: int) -> None:
        if self._told.is_set():
            await self._others_ended.wait()

    async def _refusal(self, late: Caller) -> End:
        """Of the first new call that isn't taken; those that come before the server has heard are answered."""
        while True:
            end = await late.unary(generate_request(PROMPT, max_tokens=1))
            if end.code != OK:
                return end


def test_whenever_the_signal_comes_everybody_is_answered(serve: StartServing) -> None:
    """In flight, waiting, streamed, whole, read slowly: as alone. Whoever comes later is sent elsewhere."""
    rng = random.Random(SEED)
    asked = requests(rng, CALLS * ROUNDS, longest=260)
    process = serve("--drain-seconds", str(PATIENCE))
    alone = asyncio.run(one_by_one(process.address(), [*asked, ENDURING]))
    for index in range(ROUNDS):
        part = slice(CALLS * index, CALLS * (index + 1))
        ends = asyncio.run(Round(process, rng.randrange(1, 1500)).run(asked[part]))
        for end, whole in zip(ends, [*alone[part], alone[-1]], strict=True):
            assert end.how == OK and end.answer == whole.answer, f"round {index}: {end} differs from {whole}"
        assert process.wait() == 0, process.printed
        assert "drained" in process.printed and "Traceback" not in process.printed, process.printed
        if index + 1 < ROUNDS:
            process = serve("--drain-seconds", str(PATIENCE))


async def _cut_off(process: ServeProcess) -> list[End]:
    begun = asyncio.Event()

    async def tell(call: Any, tokens: int) -> None:
        if tokens and not begun.is_set():
            begun.set()
            process.process.send_signal(signal.SIGTERM)

    async with Caller(process.address()) as caller:
        return await asyncio.gather(*(caller.stream(request, on_event=tell) for request in ENDLESS))


def test_who_is_left_when_the_time_is_over_is_sent_elsewhere(serve: StartServing) -> None:
    """With what came until then as it would have been; half of them had only waited."""
    process = serve("--drain-seconds", "0.3")
    ends = asyncio.run(_cut_off(process))
    assert process.wait() == 0, process.printed
    assert "drained" in process.printed and "Traceback" not in process.printed, process.printed
    assert {end.how for end in ends} == {OTHER_SERVER}
    again = serve("--drain-seconds", "0")
    alone = asyncio.run(one_by_one(again.address(), ENDLESS[:4]))
    for end, whole in zip(ends, alone, strict=False):
        assert end.begins(whole), f"{end} had begun otherwise than {whole}"


async def _read_late(process: ServeProcess) -> End:
    """A stream of which, from the signal on, nothing is read until its request has ended and calls were given up."""
    rested = False

    async def rest(call: Any, tokens: int) -> None:
        nonlocal rested
        if tokens and not rested:
            rested = True
            process.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_for, lambda: _is_through(process), "the end of the request")
            await asyncio.sleep(CANCEL_GRACE_SECONDS + 1)

    async with Caller(process.address(), *NARROW) as caller:
        return await caller.stream(ENDLESS[0], 2 * PATIENCE, rest)


def _is_through(process: ServeProcess) -> bool:
    try:
        with ApiClient(process.address()) as client:
            return idle(client)
    except grpc.RpcError:  # it is so far through that it takes no calls
        return True


def test_who_reads_slowly_has_the_time_to_drain_too(serve: StartServing) -> None:
    """Of a request that has ended, the answer is still on its way."""
    process = serve("--drain-seconds", str(PATIENCE))
    end = asyncio.run(_read_late(process))
    assert process.wait() == 0, process.printed
    assert end.code == OK and len(end.token_ids) == MANY, end
