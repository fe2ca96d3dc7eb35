"""A storm of malformed and hostile calls and connections, with and without a token."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.client import bearer
from tests.faults import hostile
from tests.faults.hostile import HEALTH, METHODS, NOWHERE, REFLECTION, STREAM, WATCH
from tests.faults.storms import OK, End, StartServing, ended, resident_bytes
from tests.serve.api.harness import PATIENCE, SERVING, ApiClient, ServeProcess, check_health, collect, idle, wait_for

pytestmark = pytest.mark.slow

CALLS = 9600
AT_ONCE = 24
CONNECTIONS = 1000
LEFT_OPEN = 40
"""Connections that stay, with half of something said"""
TOKEN = "correct horse battery staple"
MOST_LOGGED = 20_000
"""Characters: gRPC's and Python's own, of all calls and connections together"""
MOST_GROWN = 512 << 20
"""Bytes of memory, by the storm: its longest texts' in a few threads, which the heap keeps"""

REFUSED = "UNAUTHENTICATED"
FOR_STRANGERS = {REFUSED}
FOR_CALLERS = {
    OK,
    "INVALID_ARGUMENT",  # no message of this kind
    "INVALID_ARGUMENT BadRequest",  # a message whose field is at fault
    "ALREADY_EXISTS BadRequest",  # two that share an id
    "CANCELLED",  # by a Cancel of another's
    "RESOURCE_EXHAUSTED RetryInfo",
}
MUST_COME = {OK, "INVALID_ARGUMENT", "INVALID_ARGUMENT BadRequest"}
FOR_ANYBODY = {OK, "INVALID_ARGUMENT", "INVALID_ARGUMENT BadRequest", "NOT_FOUND"}
"""Health's own: a name that it doesn't know is NOT_FOUND"""
CANCELLED_BY_ID = "the request was cancelled"


@pytest.fixture(params=[1, 2], ids=lambda seed: f"seed {seed}")
def seed(request: pytest.FixtureRequest) -> int:
    return request.param


async def _call(channel: grpc.aio.Channel, method: str, data: bytes, metadata: Any) -> End:
    """One call, of bytes; a watch, which has no end, is left after its first answer."""
    options = {"timeout": 2 * PATIENCE, "metadata": metadata}
    try:
        if method in (STREAM, WATCH, REFLECTION):
            call = channel.unary_stream(method)(data, **options)
        else:
            call = channel.unary_unary(method)(data, **options)
            await call
            return End(OK)
        async for _ in call:
            if method == WATCH:
                call.cancel()
                return End(OK)
    except grpc.aio.AioRpcError:
        pass
    return await ended(call)


def _stated(method: str, known: bool) -> set[str]:
    """How a call may end that has a token, or hasn't."""
    if method in NOWHERE:
        return {"UNIMPLEMENTED"}
    if method.startswith(HEALTH):
        return FOR_ANYBODY
    return FOR_CALLERS if known else FOR_STRANGERS


async def _calls(address: str, rng: random.Random, count: int) -> Counter[tuple[str, bool, str]]:
    """(method, with the token, how it ended) of every call."""
    ends = Counter[tuple[str, bool, str]]()
    credentials = [(bearer(TOKEN), True)] * 10 + [
        ((), False),
        (bearer(TOKEN[:-1]), False),
        (bearer(TOKEN) * 2, False),
        ((("authorization", ""),), False),
        ((("authorization", TOKEN), ("a-bin", rng.randbytes(500))), False),
    ]

    async def work(channel: grpc.aio.Channel, share: int) -> None:
        for _ in range(share):
            method = rng.choice(NOWHERE) if rng.random() < 0.02 else rng.choice([*METHODS, hostile.GENERATE, STREAM])
            metadata, known = rng.choice(credentials)
            data = hostile.payload(rng, method)
            end = await _call(channel, method, data, metadata)
            assert end.how in _stated(method, known), (method, known, end, data[:300])
            assert end.code != "CANCELLED" or end.message == CANCELLED_BY_ID, (method, end, data[:300])
            assert end.message or end.code in (OK, "NOT_FOUND"), (method, end, data[:300])
            ends[method, known, end.how] += 1

    async with grpc.aio.insecure_channel(address) as one, grpc.aio.insecure_channel(address) as two:
        await asyncio.gather(*(work((one, two)[i % 2], count // AT_ONCE) for i in range(AT_ONCE)))
    return ends


def _connect(port: int, rng: random.Random) -> socket.socket:
    """A connection that has said something wrong."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    with suppress(BrokenPipeError, ConnectionResetError):  # the server has heard enough
        connection.sendall(hostile.connection(rng))
    return connection


def _connections(port: int, rng: random.Random, count: int) -> None:
    """Each is left at once, politely or not."""
    for _ in range(count):
        with _connect(port, rng) as connection:
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def _left_open(port: int, rng: random.Random) -> Iterator[None]:
    connections = [_connect(port, rng) for _ in range(LEFT_OPEN)]
    try:
        yield
    finally:
        for connection in connections:
            connection.close()


def _ask(client: ApiClient) -> tuple[str, tuple[int, ...]]:
    """What somebody who means well is answered."""
    options = {"max_tokens": 60, "seed": 7, "ignore_eos": True, "request_id": "well-meant"}
    answer = collect(client.stream("def main(argv):\n    return ", timeout=2 * PATIENCE, **options))
    return answer.text, answer.token_ids


async def _storm(process: ServeProcess, client: ApiClient, rng: random.Random) -> int:
    """Calls and connections at once, while somebody else gets what they got alone. By how many bytes memory grew."""
    address = process.address()
    port = int(address.rsplit(":")[-1])
    alone, over = await asyncio.to_thread(_ask, client), asyncio.Event()
    before = resident_bytes(process)

    async def well_meant() -> int:
        asked = 0
        while not over.is_set():
            assert await asyncio.to_thread(_ask, client) == alone
            asked += 1
        return asked

    beside = asyncio.create_task(well_meant())
    try:
        connections = asyncio.to_thread(_connections, port, random.Random(rng.random()), CONNECTIONS)
        ends, _ = await asyncio.gather(_calls(address, rng, CALLS), connections)
    finally:
        over.set()
    assert await beside > 10
    assert {method for method, _, _ in ends} == {*METHODS, *NOWHERE}
    assert {how for _, known, how in ends if known} >= MUST_COME
    assert ends[hostile.GENERATE, True, OK] and ends[STREAM, True, OK], "nothing was generated"
    return resident_bytes(process) - before


def test_a_storm_of_hostile_bytes_changes_nothing(serve: StartServing, tmp_path: Path, seed: int) -> None:
    """Each is told its own fault, in the API's words; nobody else notices, and neither disk nor memory fills."""
    (tmp_path / "token").write_text(TOKEN)
    process = serve("--auth-token-file", str(tmp_path / "token"), "--engine.context-length", "512")
    address = process.address()
    rng = random.Random(seed)
    with ApiClient(address, token=TOKEN) as client, _left_open(int(address.rsplit(":")[-1]), rng):
        grown = asyncio.run(_storm(process, client, rng))
        wait_for(lambda: idle(client), "an idle server after the storm")
        assert client.load().recompilations == 0, "a step was compiled while serving"
        assert check_health(client.channel) == SERVING
        assert grown < MOST_GROWN, "what strangers send stays in memory"
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, process.printed
    assert "Traceback" not in process.printed, process.printed
    assert len(process.printed) < MOST_LOGGED, "strangers can fill the disk"
