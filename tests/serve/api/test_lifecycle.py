"""Requests among others, over the wire: ended from outside, refused, queued, preempted, and what each of them gets."""

from __future__ import annotations

import dataclasses
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from isthmus import generate_request
from isthmus.serve.engine.config import EngineConfig
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import (
    ENGINE,
    LONG,
    PROMPT,
    ApiClient,
    RunningServer,
    begin,
    collect,
    details,
    idle,
    raw_stub,
    wait_for,
)

# Ending a request from outside


def _assert_pages_come_back(client: ApiClient, steps_before: int) -> None:
    """Idle, and of what isn't counted in `steps_before` only the launch in flight has run, all of whose steps are
    counted when it is read, or two single steps: the one in flight and the one being planned."""
    wait_for(lambda: idle(client), "the pages of the request that was ended")
    assert client.load().steps <= steps_before + max(2, ENGINE.steps_per_launch)


def test_cancel_ends_the_stream_and_frees_its_pages_at_once(client: ApiClient) -> None:
    events = begin(client, request_id="mine")
    assert client.load().pages_in_use > 0
    assert client.cancel(["unknown", "mine", "mine"]) == ["mine"]
    _assert_pages_come_back(client, client.load().steps)
    with pytest.raises(grpc.RpcError) as failure:
        list(events)
    assert failure.value.code() == grpc.StatusCode.CANCELLED
    assert client.cancel(["mine"]) == []


def test_cancel_ends_a_unary_call(client: ApiClient) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, PROMPT, max_tokens=LONG, ignore_eos=True, request_id="unary")
        wait_for(lambda: client.cancel(["unary"]), "the request in flight")
        with pytest.raises(grpc.RpcError) as failure:
            call.result()
    assert failure.value.code() == grpc.StatusCode.CANCELLED
    wait_for(lambda: idle(client), "its pages")


def test_closing_a_stream_frees_its_pages(client: ApiClient) -> None:
    """Else every browser tab that is closed keeps computing."""
    before = client.load().completion_tokens
    begin(client).close()
    wait_for(lambda: idle(client), "the pages of the stream that was closed")
    assert client.load().completion_tokens - before < LONG / 2


def test_cancelled_twice_before_the_engine_looks(start_server: StartServer) -> None:
    """Two callers may cancel one request at the same moment; that must not end the engine for everybody."""
    server = start_server()
    with server.client() as client:
        events = begin(client, request_id="twice")
        with server.engine._wake:  # the engine can't look at its inbox between the two
            assert server.engine.cancel("twice") and not server.engine.cancel("twice")
        with pytest.raises(grpc.RpcError) as failure:
            list(events)
        assert failure.value.code() == grpc.StatusCode.CANCELLED
        assert client.generate(PROMPT, max_tokens=3, ignore_eos=True).finish_reason == "LENGTH"


def test_streams_dropped_as_soon_as_they_are_opened_leave_nothing_running(client: ApiClient) -> None:
    """A call can end before its first message is out. Else its request runs to the end for nobody."""
    stub, dice = raw_stub(client), random.Random(0)
    message = pb.GenerateStreamRequest(request=generate_request(PROMPT, max_tokens=LONG, ignore_eos=True))
    for _ in range(200):
        call = stub.GenerateStream(message)
        for _ in range(dice.randrange(400)):
            call.is_active()
        call.cancel()
    client.generate(PROMPT, max_tokens=1)
    before = client.load().completion_tokens
    wait_for(lambda: idle(client), "an idle server")
    assert client.load().completion_tokens - before < LONG / 2, "a request went on after its call had ended"


def test_a_deadline_ends_the_request(client: ApiClient) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        client.generate(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.2)
    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    before = client.load().completion_tokens
    wait_for(lambda: idle(client), "the pages of the request that was late")
    assert client.load().completion_tokens - before < LONG / 2


def test_a_deadline_ends_a_request_that_waits(client: ApiClient) -> None:
    running = [begin(client) for _ in range(ENGINE.max_sequences)]
    with pytest.raises(grpc.RpcError) as failure:
        client.generate(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.1)
    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: client.load().waiting == 0, "an empty queue")
    for events in running:
        events.close()


# Overload


def test_overload_refuses_the_newcomer_and_nobody_else(start_server: StartServer) -> None:
    """With a full queue one more is told when to come back, and those accepted get what they get alone."""
    room, tokens = 3, 1500
    server = start_server(engine=_with(max_waiting=room))
    with server.client() as client:
        alone = client.generate(PROMPT, max_tokens=tokens, seed=0, ignore_eos=True)
        running = [begin(client, seed=0, max_tokens=tokens) for _ in range(ENGINE.max_sequences)]
        wait_for(lambda: client.load().waiting == 0, "everybody running")
        waiting = [client.stream(PROMPT, seed=0, max_tokens=20, ignore_eos=True) for _ in range(room)]
        assert [next(events).WhichOneof("event") for events in waiting] == ["started"] * room
        assert client.load().waiting == room, "the test is slower than its streams"
        with pytest.raises(grpc.RpcError) as failure:
            client.generate(PROMPT, max_tokens=1)
        assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(failure.value, error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1
        for events in running:
            ids = [token for event in events for token in event.delta.token_ids]
            assert tuple(ids) == alone.token_ids[-len(ids) :] and len(ids) > tokens / 2
        for events in waiting:
            ids = [token for event in events for token in event.delta.token_ids]
            assert tuple(ids) == alone.token_ids[:20]
        assert client.generate(PROMPT, max_tokens=1).token_ids, "the queue did not open again"


# Many at once


def test_sixty_four_clients_each_get_what_they_get_alone(server: RunningServer, client: ApiClient) -> None:
    """Eight run at a time and the others queue; greedy, in float32, no batch may change a token."""
    clients, tokens = 64, 40
    prompts = [f"def function_{i}({', '.join('abcdefgh'[: i % 8])}):" for i in range(clients)]
    barrier = threading.Barrier(clients)

    def call(prompt: str) -> tuple[int, ...]:
        with server.client() as own:
            barrier.wait(60)
            return own.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True).token_ids

    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(call, prompts))
    alone = [client.generate(p, max_tokens=tokens, temperature=0, ignore_eos=True).token_ids for p in prompts]
    assert together == alone
    assert len(set(alone)) > clients // 2, "the model says the same to everybody: this test shows nothing"


def test_preempted_requests_still_get_what_they_get_alone(start_server: StartServer) -> None:
    """Too few pages for everybody: some are put back and computed again, and no client can tell by the tokens."""
    tokens = 700
    server = start_server(engine=_with(prefix_cache=False, pages=1025))
    with server.client() as client:
        prompts = [[10 + i, *(1 + token % 200 for token in range(2000))] for i in range(ENGINE.max_sequences)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            calls = [
                pool.submit(collect, client.stream(p, max_tokens=tokens, seed=3, ignore_eos=True)) for p in prompts
            ]
            together = [call.result() for call in calls]
        assert client.load().preemptions > 0, "there were pages for all: this test shows nothing"
        assert sum(t.finished.usage.recomputed_tokens for t in together) > 0
        preempted = [i for i, t in enumerate(together) if t.finished.timings.preemptions]
        for i in preempted[:1]:
            alone = client.generate(prompts[i], max_tokens=tokens, seed=3, ignore_eos=True)
            assert together[i].token_ids == alone.token_ids
        assert client.load().pages_in_use == 0


def _with(**fields: Any) -> EngineConfig:
    return dataclasses.replace(ENGINE, **fields)
