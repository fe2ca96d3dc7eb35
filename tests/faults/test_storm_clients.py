"""A storm of clients, of every kind there is, on a server that has too few pages and places for them."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from isthmus import generate_request
from isthmus.v1 import inference_pb2 as pb
from tests.faults.storms import OK, Caller, End, StartServing, one_by_one, requests
from tests.serve.api.harness import SERVING, ApiClient, check_health, idle, wait_for

pytestmark = pytest.mark.slow

SEED = 12
CLIENTS = 64
CALLS = 40
"""Of each client, not counting how often one is refused for want of room"""
TRIES = 200
"""Until a call is taken"""
REQUESTS = 90
CONTEXT = 256
SIZES = [
    *("--engine.context-length", str(CONTEXT)),
    *("--engine.pages", "41", "--engine.max-waiting", "40"),  # 640 tokens for 8 that run at once, of up to 200 each
]
FULL = "RESOURCE_EXHAUSTED RetryInfo"
ENDS = {
    "whole": {OK, FULL},
    "streamed": {OK, FULL},
    "read slowly": {OK, FULL},
    "cancelled midway": {OK, FULL, "CANCELLED"},
    "with a deadline": {OK, FULL, "DEADLINE_EXCEEDED"},
    "abandoned": {OK, FULL, "CANCELLED"},
    "cancelled by id": {OK, FULL, "CANCELLED"},
    "with an id in flight": {OK, FULL, "ALREADY_EXISTS BadRequest"},
    "asked again after a cancel": {OK, FULL},
    "too long": {"INVALID_ARGUMENT BadRequest"},
}
"""How a call may end, by what its client does"""
MUST_COME = {OK, FULL, "CANCELLED", "DEADLINE_EXCEEDED", "ALREADY_EXISTS BadRequest", "INVALID_ARGUMENT BadRequest"}


@dataclass(frozen=True)
class Told:
    """What one call of a client came to."""

    kind: str
    index: int
    """Of its request"""
    end: End


class StormClient:
    """One of many, whose dice decide what it does."""

    def __init__(self, number: int, address: str, asked: list[pb.GenerateRequest]) -> None:
        self._rng = random.Random(f"{SEED}/{number}")
        self._number, self._address, self._asked = number, address, asked
        self._calls = 0
        self.told: list[Told] = []

    async def run(self) -> None:
        kinds: dict[str, Callable[[Caller, int], Awaitable[End]]] = {
            "whole": lambda caller, index: caller.unary(self._asked[index]),
            "streamed": lambda caller, index: caller.stream(self._asked[index]),
            "read slowly": self._slowly,
            "cancelled midway": self._cancelled,
            "with a deadline": self._in_time,
            "abandoned": self._abandoned,
            "cancelled by id": self._cancelled_by_id,
            "with an id in flight": self._twice,
            "asked again after a cancel": self._again,
            "too long": self._too_long,
        }
        async with Caller(self._address) as caller:
            for _ in range(CALLS):
                kind, index = self._rng.choice([*kinds]), self._rng.randrange(len(self._asked))
                for _ in range(TRIES):
                    end = await kinds[kind](caller, index)
                    self.told.append(Told(kind, index, end))
                    if end.how != FULL:
                        break
                    await asyncio.sleep(self._rng.uniform(0, 1))  # RetryInfo says a second

    def _named(self, index: int) -> pb.GenerateRequest:
        """The request under an id that nobody else has."""
        self._calls += 1
        named = pb.GenerateRequest()
        named.CopyFrom(self._asked[index])
        named.request_id = f"{self._number}/{self._calls}"
        return named

    async def _slowly(self, caller: Caller, index: int) -> End:
        async def rest(call: Any, tokens: int) -> None:
            await asyncio.sleep(0.01 if tokens % 4 == 0 else 0)

        return await caller.stream(self._asked[index], on_event=rest)

    async def _cancelled(self, caller: Caller, index: int, most: int = 60) -> End:
        enough = self._rng.randrange(most)

        async def leave(call: Any, tokens: int) -> None:
            if tokens >= enough:
                call.cancel()

        return await caller.stream(self._asked[index], on_event=leave)

    async def _in_time(self, caller: Caller, index: int) -> End:
        timeout = self._rng.choice([0.002, 0.05, 0.5, 2.0])
        ask = caller.stream if self._rng.random() < 0.5 else caller.unary
        return await ask(self._asked[index], timeout)

    async def _abandoned(self, _: Caller, index: int) -> End:
        """The connection goes with whatever is under way on it."""
        caller = Caller(self._address)
        enough = self._rng.randrange(30)

        async def go(call: Any, tokens: int) -> None:
            if tokens >= enough:
                await caller.channel.close()

        end = await caller.stream(self._asked[index], on_event=go)
        await caller.channel.close()
        return end

    async def _cancelled_by_id(self, caller: Caller, index: int) -> End:
        request = self._named(index)
        enough = self._rng.randrange(20)
        found: list[bool] = []

        async def cancel(call: Any, tokens: int) -> None:
            if tokens >= enough and not found:
                found.append(await caller.cancel(request.request_id))

        end = await caller.stream(request, on_event=cancel)
        assert end.code != "CANCELLED" or found == [True], "nobody else knows this id"
        return end

    async def _twice(self, caller: Caller, index: int) -> End:
        """The second call's end; the first must not notice."""
        request = self._named(index)
        second: list[End] = []

        async def again(call: Any, tokens: int) -> None:
            if not second:
                second.append(await caller.unary(request))

        first = await caller.stream(request, on_event=again)
        self.told.append(Told("streamed", index, first))
        return second[0] if second else first

    async def _again(self, caller: Caller, index: int) -> End:
        """The same id at once after giving up: the retry must be taken."""
        request = self._named(index)

        async def leave(call: Any, tokens: int) -> None:
            call.cancel()

        await caller.stream(request, on_event=leave)
        return await caller.stream(request)

    async def _too_long(self, caller: Caller, index: int) -> End:
        prompt: Any = self._rng.choice([[1] * CONTEXT, [1] * 100_000, "a b" * CONTEXT * 100, "a" * 1_000_000])
        return await caller.unary(generate_request(prompt))


async def _storm(address: str, asked: list[pb.GenerateRequest]) -> list[Told]:
    clients = [StormClient(number, address, asked) for number in range(CLIENTS)]
    await asyncio.gather(*(client.run() for client in clients))
    return [told for client in clients for told in client.told]


def _check(told: Told, alone: End) -> None:
    end = told.end
    assert end.how in ENDS[told.kind], told
    assert end.message if end.code != OK else True, f"a failure must say why: {told}"
    if end.code == OK:
        assert end.answer == alone.answer, f"{told} differs from its request alone: {alone}"
    else:
        assert end.begins(alone), f"{told} had begun otherwise than its request alone: {alone}"


def test_every_answer_in_a_storm_of_clients_is_as_alone(serve: StartServing) -> None:
    """Preempted, queued, beside those who leave: each answer is what its request is answered alone, cold or warm; each
    failure says what the API says; nothing is left behind."""
    process = serve(*SIZES)
    address = process.address()
    asked = requests(random.Random(SEED), REQUESTS, longest=200)
    alone = asyncio.run(one_by_one(address, asked[: REQUESTS // 2]))  # cold
    told = asyncio.run(_storm(address, asked))
    with ApiClient(address) as client:
        wait_for(lambda: idle(client), "an idle server after the storm")
        load = client.load()
        assert check_health(client.channel) == SERVING
    assert load.recompilations == 0, "a step was compiled while serving"
    assert load.preemptions > 0, "it was no storm: there were pages for everybody"
    alone += asyncio.run(one_by_one(address, asked[REQUESTS // 2 :]))  # warm
    for each in told:
        _check(each, alone[each.index])
    assert {each.end.how for each in told} == MUST_COME
    assert {each.kind for each in told} == ENDS.keys()
    taken = [each for each in told if each.end.how != FULL]
    assert len(taken) >= CLIENTS * CALLS, "somebody was refused for good"
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, process.printed
    assert "Traceback" not in process.printed and "ERROR" not in process.printed, process.printed
