"""What can't work is refused over the wire, naming the field."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from isthmus import generate_request
from isthmus.serve.prepare.request import MAX_REQUEST_ID, MAX_SALT
from isthmus.serve.prepare.sampling import MAX_STOP_TOKENS
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.harness import (
    NETWORK,
    PROMPT,
    ApiClient,
    begin,
    blamed_fields,
    collect,
    idle,
    raw_stub,
    wait_for,
)

NAN, INF = math.nan, math.inf

BAD_REQUESTS: list[tuple[str, Callable[[pb.GenerateRequest], None], str]] = [
    *(
        (f"{name} {value}", lambda r, n=name, v=value: setattr(r.sampling, n, v), f"sampling.{name}")
        for name, values in {
            "temperature": (NAN, INF, -INF, -1.0, -1e-30, 100.1, 3e38),
            "top_p": (NAN, INF, -INF, -0.5, 0.0, -0.0, 1.001),
            "min_p": (NAN, INF, -INF, -0.1, 1.001),
        }.items()
        for value in values
    ),
    ("top_k 2^31", lambda r: setattr(r.sampling, "top_k", 1 << 31), "sampling.top_k"),
    ("top_k 2^32-1", lambda r: setattr(r.sampling, "top_k", (1 << 32) - 1), "sampling.top_k"),
    ("empty text", lambda r: setattr(r.prompt, "text", ""), "prompt.text"),
    ("no prompt", lambda r: r.ClearField("prompt"), "prompt"),
    ("no kind of prompt", lambda r: r.prompt.ClearField("text"), "prompt"),
    ("no ids", lambda r: r.prompt.token_ids.SetInParent(), "prompt.token_ids.ids"),
    ("unknown id", lambda r: r.prompt.token_ids.ids.extend([1, 2, 512]), "prompt.token_ids.ids[2]"),
    ("largest id", lambda r: r.prompt.token_ids.ids.extend([(1 << 32) - 1]), "prompt.token_ids.ids[0]"),
    ("unknown stop id", lambda r: r.stop.token_ids.extend([0, 512]), "stop.token_ids[1]"),
    ("too many stop ids", lambda r: r.stop.token_ids.extend(range(MAX_STOP_TOKENS + 1)), "stop.token_ids"),
    ("too many ids", lambda r: r.prompt.token_ids.ids.extend([1] * NETWORK.context_length), "prompt.token_ids.ids"),
    ("too long a text", lambda r: setattr(r.prompt, "text", "\x00" * NETWORK.context_length), "prompt.text"),
    ("a very long text", lambda r: setattr(r.prompt, "text", "word " * 200_000), "prompt.text"),
    ("max_tokens 0", lambda r: setattr(r.stop, "max_tokens", 0), "stop.max_tokens"),
    (
        "max_tokens too big",
        lambda r: setattr(r.stop, "max_tokens", NETWORK.context_length),
        "stop.max_tokens",
    ),
    ("max_tokens 2^32-1", lambda r: setattr(r.stop, "max_tokens", (1 << 32) - 1), "stop.max_tokens"),
    ("priority 101", lambda r: setattr(r.scheduling, "priority", 101), "scheduling.priority"),
    ("priority -2^31", lambda r: setattr(r.scheduling, "priority", -(1 << 31)), "scheduling.priority"),
    ("no time", lambda r: r.scheduling.max_queue_time.SetInParent(), "scheduling.max_queue_time"),
    ("less time", lambda r: r.scheduling.max_queue_time.FromSeconds(-1), "scheduling.max_queue_time"),
    ("long salt", lambda r: setattr(r.prefix_cache, "salt", "x" * (MAX_SALT + 1)), "prefix_cache.salt"),
    ("long request_id", lambda r: setattr(r, "request_id", "x" * (MAX_REQUEST_ID + 1)), "request_id"),
    ("a line in request_id", lambda r: setattr(r, "request_id", "a\nb"), "request_id"),
    ("NUL in request_id", lambda r: setattr(r, "request_id", "a\0b"), "request_id"),
]


@pytest.mark.parametrize(
    ("spoil", "field"), [case[1:] for case in BAD_REQUESTS], ids=[case[0] for case in BAD_REQUESTS]
)
def test_a_field_that_cannot_work_is_named(
    client: ApiClient, spoil: Callable[[pb.GenerateRequest], None], field: str
) -> None:
    """In both calls. Else a typo costs an afternoon, or a NaN reaches the engine."""
    request = generate_request(PROMPT, max_tokens=2)
    spoil(request)
    stub = raw_stub(client)
    calls: list[Callable[[], object]] = [
        lambda: stub.Generate(request),
        lambda: list(stub.GenerateStream(pb.GenerateStreamRequest(request=request))),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as failure:
            call()
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert blamed_fields(failure.value) == [field]
        assert field in failure.value.details()
    assert idle(client)


def test_the_limits_themselves_are_allowed(client: ApiClient) -> None:
    request = generate_request(
        PROMPT,
        max_tokens=2,
        temperature=100.0,
        top_p=1.0,
        top_k=(1 << 31) - 1,
        min_p=1.0,
        request_id="x" * MAX_REQUEST_ID,
    )
    request.stop.token_ids.extend(range(MAX_STOP_TOKENS))
    assert raw_stub(client).Generate(request).choices[0].finished.usage.completion_tokens >= 1
    tiny = generate_request(PROMPT, max_tokens=2, temperature=1e-30, top_p=1e-30, top_k=1, min_p=0.0)
    assert raw_stub(client).Generate(tiny).choices[0].finished.usage.completion_tokens >= 1


def test_a_stream_without_its_request_is_refused(client: ApiClient) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        list(raw_stub(client).GenerateStream(pb.GenerateStreamRequest()))
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT and blamed_fields(failure.value) == ["prompt"]


def test_a_request_id_in_flight_is_refused_and_free_again_afterwards(client: ApiClient) -> None:
    events = begin(client, request_id="one")
    with pytest.raises(grpc.RpcError) as failure:
        client.generate(PROMPT, max_tokens=1, request_id="one")
    assert failure.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert blamed_fields(failure.value) == ["request_id"]
    assert next(events).WhichOneof("event") == "delta", "the one in flight was disturbed"
    events.close()
    wait_for(lambda: idle(client), "the end of the first")
    for _ in range(2):
        assert client.generate(PROMPT, max_tokens=1, request_id="one").token_ids


def test_cancel_without_ids_is_refused(client: ApiClient) -> None:
    for ids in ([], ["x"] * 1025):
        with pytest.raises(grpc.RpcError) as failure:
            client.cancel(ids)
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert blamed_fields(failure.value) == ["request_ids"]


def test_tokenize_and_detokenize_name_what_is_wrong(client: ApiClient) -> None:
    for call, field in (
        (lambda: client.tokenize(""), "text"),
        (lambda: client.detokenize([1, 512]), "token_ids[1]"),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            call()
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert blamed_fields(failure.value) == [field]


def _garbage(client: ApiClient) -> None:
    for payload in (b"\xff" * 50, b"\x12\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"):
        call = client.channel.unary_unary("/isthmus.v1.InferenceService/Generate")
        with pytest.raises(grpc.RpcError):
            call(payload)
    with pytest.raises(grpc.RpcError) as failure:
        client.generate("x" * (17 << 20))
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_bad_requests_change_nothing_for_the_streams_beside_them(client: ApiClient) -> None:
    """Everything above, again and again, while others generate: their tokens are those that they get alone."""
    options: dict[str, Any] = {"max_tokens": 1200, "seed": 5, "ignore_eos": True}
    alone = client.generate(PROMPT, **options).token_ids
    streams = [client.stream(PROMPT, **options) for _ in range(3)]
    with ThreadPoolExecutor(len(streams)) as pool:
        reading = [pool.submit(collect, events) for events in streams]
        wait_for(lambda: client.load().running == len(streams), "the streams running")
        refused = 0
        for _, spoil, _ in itertools.islice(itertools.cycle(BAD_REQUESTS), 2 * len(BAD_REQUESTS)):
            request = generate_request(PROMPT, max_tokens=2)
            spoil(request)
            with pytest.raises(grpc.RpcError):
                raw_stub(client).Generate(request)
            refused += 1
        _garbage(client)
        assert all(future.result().token_ids == alone for future in reading)
    assert refused == 2 * len(BAD_REQUESTS)
