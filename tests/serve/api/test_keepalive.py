"""Who is still there: clients may ask, and are asked."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from isthmus.serve.api.server import PING_SECONDS
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import LONG, PATIENCE, PROMPT, ApiClient, Held, RunningServer, wait_for

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1
ENHANCE_YOUR_CALM = 11


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """RFC 9113, 4.1: 24 bits of length, type, flags, and stream 0."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload


class Http2:
    """As much of a client as pings."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._socket = socket.create_connection((host, int(port)), PATIENCE)
        self._socket.sendall(PREFACE + frame(SETTINGS))
        self._unread = b""
        self._count = 0

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _next(self) -> tuple[int, int, bytes]:
        while len(self._unread) < 9 or len(self._unread) < 9 + int.from_bytes(self._unread[:3], "big"):
            received = self._socket.recv(1 << 16)
            if not received:
                return GOAWAY, 0, bytes(8)
            self._unread += received
        size = int.from_bytes(self._unread[:3], "big")
        kind, flags, payload = self._unread[3], self._unread[4], self._unread[9 : 9 + size]
        self._unread = self._unread[9 + size :]
        if kind == SETTINGS and not flags & ACK:
            self._socket.sendall(frame(SETTINGS, ACK))
        return kind, flags, payload

    def ping(self) -> int | None:
        """None when the server answers, the error code of its GOAWAY when it has had enough."""
        self._count += 1
        mark = self._count.to_bytes(8, "big")
        with contextlib.suppress(OSError):
            self._socket.sendall(frame(PING, 0, mark))
        while True:
            kind, flags, payload = self._next()
            if kind == GOAWAY:
                return int.from_bytes(payload[4:8], "big")
            if kind == PING and flags & ACK and payload == mark:
                return None


def test_a_client_may_ask_as_often_as_is_stated(server: RunningServer) -> None:
    """Clients that wait for a long prompt ping every 10 s; gRPC's servers end the connection at the third."""
    with Http2(server.address) as client:
        for _ in range(6):
            assert client.ping() is None
            time.sleep(PING_SECONDS * 1.1)  # what is tested is a rate


def test_a_flood_of_pings_is_ended(server: RunningServer) -> None:
    with Http2(server.address) as client:
        answers = [client.ping() for _ in range(6)]
    assert ENHANCE_YOUR_CALM in answers


class Wire:
    """Forwards a connection to the server, until it is cut: then nothing goes through, and neither side hears why."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def _forward(self) -> None:
        self._ends = [self._listener.accept()[0], socket.create_connection(self._target)]
        other = dict(zip(self._ends, self._ends[::-1], strict=True))
        while not self._cut.is_set():
            for end in select.select(self._ends, [], [], 0.01)[0]:
                other[end].sendall(end.recv(1 << 16))

    def cut(self) -> None:
        self._cut.set()
        self._thread.join(PATIENCE)

    def close(self) -> None:
        self.cut()
        for end in (*self._ends, self._listener):
            end.close()


@pytest.fixture
def wire_to() -> Iterator[Callable[[RunningServer], Wire]]:
    wires: list[Wire] = []

    def start(server: RunningServer) -> Wire:
        wires.append(Wire(server.address))
        return wires[-1]

    yield start
    for wire in wires:
        wire.close()


def test_a_client_that_is_gone_is_noticed(
    start_server: StartServer, wire_to: Callable[[RunningServer], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop that is shut says nothing; its requests would hold their places until they are done."""
    monkeypatch.setattr("isthmus.serve.api.server.PING_TIMEOUT_SECONDS", 1.0)
    server = start_server(keepalive_seconds=1.0)
    wire = wire_to(server)
    client = ApiClient(wire.address)
    with contextlib.closing(client):
        held = Held(server)
        try:
            events = client.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
            next(events)
            assert held.entered.wait(PATIENCE)
            assert server.engine.in_flight == 1
            wire.cut()
            wait_for(lambda: server.engine.in_flight == 0, "the end of the dead client's request")
        finally:
            held.let_go()
