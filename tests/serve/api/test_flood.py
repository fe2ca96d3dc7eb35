"""What strangers send: bytes that are no message, more calls than there is room for, and the same id twice."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from isthmus import generate_request
from isthmus.client import bearer
from isthmus.errors import InvalidRequest
from isthmus.model.text.text_stream import TextStream
from isthmus.serve.api.logs import A_MINUTE, Bounded
from isthmus.serve.api.server import MAX_REQUEST_BYTES, SERVICES, SPARE_CALLS
from isthmus.serve.api.wire import MAX_FIELDS, MAX_NUMBERS_BYTES, MAX_TEXT_BYTES, check_wire
from isthmus.types import Question, SamplingParams, TextPrompt
from isthmus.v1 import control_pb2, inference_pb2_grpc
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import (
    ENGINE,
    LONG,
    PATIENCE,
    PROMPT,
    ApiClient,
    Held,
    RunningServer,
    begin,
    blamed_fields,
    details,
    idle,
    raw_stub,
    wait_for,
)

INFERENCE, CONTROL, HEALTH = "/isthmus.v1.InferenceService/", "/isthmus.v1.ControlService/", "/grpc.health.v1.Health/"
UNARY = [
    *(INFERENCE + name for name in ("Generate", "Tokenize", "Detokenize")),
    *(CONTROL + name for name in ("GetModelInfo", "GetServerInfo", "GetLoad", "Cancel")),
    HEALTH + "Check",
]
STREAMED = [INFERENCE + "GenerateStream", HEALTH + "Watch"]
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GARBAGE = {
    "no field at all": b"\xff" * 50,
    "a length past the end": b"\x0a\xff\xff\xff\xff\x0f",
    "cut short": pb.GenerateRequest(prompt=pb.Prompt(text="abc")).SerializeToString()[:-1],
    "an open group": b"\x0b\x0b",
    "long": b"\xff" * 100_000,
}
TOKEN = "correct horse battery staple"


def calls_of(channel: grpc.Channel) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every method, taking bytes."""
    for method in UNARY:
        yield method, channel.unary_unary(method)
    for method in STREAMED:
        yield method, lambda data, m=method, **options: list(channel.unary_stream(m)(data, **options))
    yield REFLECTION, lambda data, **options: list(channel.stream_stream(REFLECTION)(iter([data]), **options))


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as failure:
        call(*arguments, timeout=PATIENCE, **options)
    return failure.value


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_bytes_that_are_no_message_are_the_callers_fault(
    data: bytes, client: ApiClient, caplog: pytest.LogCaptureFixture
) -> None:
    """UNKNOWN would say that the server is broken, and a traceback for each fills its disk."""
    with caplog.at_level(logging.DEBUG):
        for method, call in calls_of(client.channel):
            assert refused(call, data).code() == grpc.StatusCode.INVALID_ARGUMENT, method
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_text_that_is_no_utf8_is_the_callers_fault(client: ApiClient) -> None:
    """proto3: a string must be UTF-8."""
    for method, data in ((INFERENCE + "Generate", b"\x12\x02\xff\xfe"), (INFERENCE + "Tokenize", b"\x0a\x02\xff\xfe")):
        error = refused(client.channel.unary_unary(method), data)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "isthmus.v1" in error.details()


@pytest.fixture(scope="module")
def guarded(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    path = tmp_path_factory.mktemp("auth") / "token.txt"
    path.write_text(TOKEN)
    return start_server(auth_token_file=path)


@pytest.mark.parametrize("data", [*GARBAGE.values(), b"x" * (MAX_REQUEST_BYTES + 1)], ids=[*GARBAGE, "too long"])
def test_a_stranger_hears_only_that_they_are_one(
    data: bytes, guarded: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What they sent isn't even read: else anybody can keep the server busy parsing."""
    with guarded.client() as client:
        for method, call in calls_of(client.channel):
            if method.startswith(HEALTH):
                continue
            assert refused(call, data).code() == grpc.StatusCode.UNAUTHENTICATED, method
            if len(data) <= MAX_REQUEST_BYTES:
                known = refused(call, data, metadata=bearer(TOKEN))
                assert known.code() == grpc.StatusCode.INVALID_ARGUMENT, method
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_error_of_a_service_is_told_without_its_traceback(
    client: ApiClient, server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One call fails; the log says how, and the caller learns nothing of the inside."""

    class Broken:
        def ByteSize(self) -> int:
            raise RuntimeError("a secret")

    monkeypatch.setattr(type(server.server.session.model.tokenizer), "encode", lambda *_, **__: Broken().ByteSize())
    error = refused(client.tokenize, "a")
    assert error.code() == grpc.StatusCode.INTERNAL and "secret" not in error.details()
    assert details(error, error_details_pb2.ErrorInfo).reason == "CALL_FAILED"
    assert "a secret" in caplog.text and "Tokenize" in caplog.text


def test_text_that_cannot_be_decoded_ends_one_request_alone(
    client: ApiClient, server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer that fails at one sequence of ids must not leave its request running for nobody."""
    options = {"max_tokens": 60, "seed": 1, "ignore_eos": True}
    alone = client.generate(PROMPT, **options)
    kind = type(server.server.session.model.tokenizer.stream())
    push, streams = kind.push, list[TextStream]()

    def fail_in_the_second(stream: TextStream, ids: Sequence[int]) -> str:
        if stream not in streams:
            streams.append(stream)
        if len(streams) > 1 and stream is streams[1]:
            raise ValueError("no such text")
        return push(stream, ids)

    first = begin(client)
    monkeypatch.setattr(kind, "push", fail_in_the_second)
    assert next(first).WhichOneof("event") == "delta"
    error = refused(lambda **_: list(client.stream(PROMPT, max_tokens=LONG, ignore_eos=True)))
    assert error.code() == grpc.StatusCode.INTERNAL and "no such text" in caplog.text
    assert client.generate(PROMPT, **options).token_ids == alone.token_ids
    assert next(first).WhichOneof("event") == "delta"
    first.close()
    wait_for(lambda: idle(client), "the pages of the request that failed")


def test_watching_what_is_not_there_leaves_nothing_behind(server: RunningServer, client: ApiClient) -> None:
    """Anybody may ask for health, under as many names as they like."""
    known = set(server.server._health._server_watchers)
    stub = health_pb2_grpc.HealthStub(client.channel)
    for index in range(50):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=f"nobody.{index}"), timeout=PATIENCE)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
    assert set(server.server._health._server_watchers) <= known | {"", *SERVICES}


def test_who_watches_health_takes_no_place_from_who_asks(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may watch for as long as they like; an orchestrator that gets no answer ends the server."""
    monkeypatch.setattr("isthmus.serve.api.server.OTHER_CALLS", 3)
    server = start_server(load=False)
    with server.client() as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE) for _ in range(3)]
        assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 3
        with pytest.raises(grpc.RpcError, match=r"3 calls of /grpc.health.v1.Health/Watch are open already"):
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE))
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
        for watch in watches:
            watch.cancel()


def test_the_log_is_bounded() -> None:
    """A minute's records are counted for each logger, and what was left out is said."""
    now = 100.0
    bounded = Bounded(most=3, clock=lambda: now)

    def record(name: str, text: str = "%s failed") -> logging.LogRecord:
        return logging.LogRecord(name, logging.ERROR, "file", 1, text, ("it",), None)

    assert [bounded.filter(record("a")) for _ in range(10)] == [True] * 3 + [False] * 7
    assert bounded.filter(record("b")), "one logger's flood must not hide another's errors"
    now += A_MINUTE
    first, second = record("a"), record("a")
    assert bounded.filter(first) and bounded.filter(second)
    assert first.getMessage() == "it failed (7 more records were left out)" and second.getMessage() == "it failed"


# How much


LIMITS: dict[str, tuple[Any, int, Callable[[int], Any], str]] = {
    "a text": (
        pb.GenerateRequest,
        MAX_TEXT_BYTES,
        lambda n: pb.GenerateRequest(prompt=pb.Prompt(text="a" * n)),
        "prompt.text",
    ),
    "a streamed text": (
        pb.GenerateStreamRequest,
        MAX_TEXT_BYTES,
        lambda n: pb.GenerateStreamRequest(request=pb.GenerateRequest(prompt=pb.Prompt(text="a" * n))),
        "prompt.text",
    ),
    "a text to tokenize": (pb.TokenizeRequest, MAX_TEXT_BYTES, lambda n: pb.TokenizeRequest(text="a" * n), "text"),
    "ids": (
        pb.GenerateRequest,
        MAX_NUMBERS_BYTES,
        lambda n: pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * n))),
        "prompt.token_ids.ids",
    ),
    "ids to detokenize": (
        pb.DetokenizeRequest,
        MAX_NUMBERS_BYTES,
        lambda n: pb.DetokenizeRequest(token_ids=[1] * n),
        "token_ids",
    ),
    "ids to stop at": (
        pb.GenerateRequest,
        MAX_NUMBERS_BYTES,
        lambda n: pb.GenerateRequest(stop=pb.StopConditions(token_ids=[1] * n)),
        "stop.token_ids",
    ),
    "messages together": (
        pb.GenerateRequest,
        MAX_TEXT_BYTES,
        lambda n: pb.GenerateRequest(
            prompt=pb.Prompt(
                messages=pb.Messages(
                    messages=[pb.ChatMessage(content="a" * (n // 2)), pb.ChatMessage(content="a" * (n - n // 2))]
                )
            )
        ),
        "prompt.messages.messages.content",
    ),
    "ids to cancel": (
        control_pb2.CancelRequest,
        MAX_FIELDS,
        lambda n: control_pb2.CancelRequest(request_ids=["a"] * n),
        "CancelRequest",
    ),
}


@pytest.mark.parametrize("case", LIMITS.values(), ids=LIMITS)
def test_a_limit_is_what_it_says(case: Any) -> None:
    """The largest message passes, one byte or one field more is refused by the name of its field."""
    kind, limit, build, field = case
    check_wire(build(limit).SerializeToString(), kind.DESCRIPTOR)
    with pytest.raises(InvalidRequest) as error:
        check_wire(build(limit + 1).SerializeToString(), kind.DESCRIPTOR)
    assert error.value.field == field and str(limit) in error.value.message


def test_lists_of_numbers_are_counted_together() -> None:
    """Each is parsed number by number, so several of them hold up the loop as long as one does."""
    half = [1] * (MAX_NUMBERS_BYTES // 2)
    request = pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=half)), resume_token_ids=half)
    check_wire(request.SerializeToString(), request.DESCRIPTOR)
    request.stop.token_ids.append(1)
    with pytest.raises(InvalidRequest, match=str(MAX_NUMBERS_BYTES)):
        check_wire(request.SerializeToString(), request.DESCRIPTOR)


def test_values_inside_values_are_counted() -> None:
    """Short turns in a row take far longer to parse than a long one; each is a field, and has two."""
    request = pb.GenerateRequest()
    turns = request.prompt.messages.messages
    turns.extend([pb.ChatMessage(role="a", content="b")] * ((MAX_FIELDS - 1) // 3))
    check_wire(request.SerializeToString(), request.DESCRIPTOR)
    turns.add(role="a", content="b")
    with pytest.raises(InvalidRequest, match=r"messages\.messages"):
        check_wire(request.SerializeToString(), request.DESCRIPTOR)


def test_what_comes_before_a_broken_end_is_counted() -> None:
    """The parser reads it before it finds the end: a last byte that is wrong must not lift the limit."""
    request = pb.GenerateRequest()
    request.prompt.messages.messages.extend([pb.ChatMessage()] * (MAX_FIELDS + 1))
    for broken in (b"\xff", b"\x12\x05a"):
        with pytest.raises(InvalidRequest, match=r"messages"):
            check_wire(request.SerializeToString() + broken, request.DESCRIPTOR)
        check_wire(broken, request.DESCRIPTOR)


def test_a_field_that_nobody_knows_is_named_by_its_message() -> None:
    data = b"\x7a\x81\x80\x80\x02" + b"a" * (MAX_TEXT_BYTES + 1)  # field 15
    with pytest.raises(InvalidRequest) as error:
        check_wire(data, pb.GenerateRequest.DESCRIPTOR)
    assert error.value.field == "GenerateRequest"


def test_above_four_mebibytes_the_field_is_named(client: ApiClient) -> None:
    """gRPC's own limit is 4 MiB, and says nothing of what was too long."""
    for size in (MAX_TEXT_BYTES + 1, 3 * MAX_TEXT_BYTES):
        for call, field in ((client.tokenize, "text"), (client.generate, "prompt.text")):
            error = refused(call, "a" * size)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and blamed_fields(error) == [field]
            assert str(MAX_TEXT_BYTES) in error.details()
    error = refused(client.detokenize, [1] * (MAX_NUMBERS_BYTES + 1))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and blamed_fields(error) == ["token_ids"]


def test_the_largest_message_is_read_and_one_byte_more_is_not(client: ApiClient) -> None:
    call = client.channel.unary_unary(INFERENCE + "Tokenize")
    payload = pb.TokenizeRequest(text="a" * (MAX_REQUEST_BYTES - 5)).SerializeToString()
    assert len(payload) == MAX_REQUEST_BYTES
    assert refused(call, payload).code() == grpc.StatusCode.INVALID_ARGUMENT
    error = refused(call, payload + b"\x00")
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and str(MAX_REQUEST_BYTES) in error.details()


def test_the_client_reads_answers_above_four_mebibytes() -> None:
    """A long context spells more than gRPC's clients read by themselves."""
    text = "a" * (20 << 20)

    class Long(inference_pb2_grpc.InferenceServiceServicer):
        def Detokenize(self, request: pb.DetokenizeRequest, context: grpc.ServicerContext) -> pb.DetokenizeResponse:
            return pb.DetokenizeResponse(text=text)

    server = grpc.server(ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Long(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with ApiClient(f"127.0.0.1:{port}") as client:
        assert client.detokenize([1], timeout=PATIENCE) == text
    server.stop(None)


# How many


CALLS = 4000
"""More than gRPC keeps waiting by itself, which is 3000"""


async def _flood(address: str, ends: list[str]) -> None:
    """Opens CALLS streams at once, and notes how each ends: what its status says, or how many tokens it had."""
    request = pb.GenerateStreamRequest(request=generate_request(PROMPT, max_tokens=3, ignore_eos=True))

    async def stream(channel: grpc.aio.Channel) -> None:
        call = channel.unary_stream(
            INFERENCE + "GenerateStream",
            request_serializer=pb.GenerateStreamRequest.SerializeToString,
            response_deserializer=pb.GenerateStreamResponse.FromString,
        )(request, timeout=2 * PATIENCE)
        try:
            ids = [token async for event in call for token in event.delta.token_ids]
            ends.append(f"{len(ids)} tokens")
        except grpc.aio.AioRpcError as error:
            status = await rpc_status.aio.from_call(call)
            named = [] if status is None else [detail.type_url.split(".")[-1] for detail in status.details]
            ends.append(f"{error.code().name} {named}")

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(stream(channel) for _ in range(CALLS)))


def test_a_flood_of_streams_is_refused_with_a_reason(server: RunningServer, client: ApiClient) -> None:
    """CANCELLED, which gRPC says by itself, is what a client takes for its own doing."""
    most = ENGINE.max_sequences + ENGINE.max_waiting
    held, ends = Held(server), list[str]()
    flood = asyncio.run_coroutine_threadsafe(_flood(server.address, ends), server._loop)
    try:
        wait_for(lambda: len(ends) >= CALLS - most, "everybody whom there is no room for")
        assert Counter(ends) == {"RESOURCE_EXHAUSTED ['RetryInfo']": CALLS - most}
    finally:
        held.let_go()
        flood.result(PATIENCE)
    assert Counter(ends[CALLS - most :]) == {"3 tokens": most}, "those who were taken"
    wait_for(lambda: idle(client), "an idle server after the flood")


def test_calls_that_never_send_their_message_are_counted_and_given_back(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client that opens calls and says nothing shuts everybody else out."""
    monkeypatch.setattr("isthmus.serve.api.gate.READ_SECONDS", 0.5)
    server = start_server(engine=dataclasses.replace(ENGINE, max_waiting=1))
    places = ENGINE.max_sequences + 1 + SPARE_CALLS

    async def silent() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            calls = [channel.stream_unary(INFERENCE + "Generate")() for _ in range(places)]
            codes = Counter([await call.code() for call in calls])
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED: places}

    with server.client() as client:
        server.on_loop(silent())
        assert client.generate(PROMPT, max_tokens=1).token_ids


# The same id twice


def _generate(client: ApiClient, **options: Any) -> Any:
    return client.generate(PROMPT, request_id="mine", max_tokens=1, timeout=PATIENCE, **options)


@pytest.mark.parametrize("round_", range(20))
def test_a_retry_after_a_cancel_is_taken(client: ApiClient, round_: int) -> None:
    """A client that gives up and asks again under its id must not hear that it is still there."""
    begin(client, request_id="mine").close()
    assert _generate(client).token_ids


def test_a_retry_that_is_heard_before_the_cancel_waits_for_it(server: RunningServer) -> None:
    """A cancellation and the call after it come by different ways, and either may be heard first."""
    session = server.server.session

    async def in_turn() -> None:
        preparation = session.preparation(await session.ready_engine(None))  # type: ignore[arg-type]
        sampling = SamplingParams(max_tokens=LONG, ignore_eos=True)
        first, second = (preparation.requests(Question(TextPrompt("a"), sampling, "mine")) for _ in range(2))

        async def retry() -> None:
            async with session.submitted(second):
                pass

        async with session.submitted(first):
            waiting = asyncio.ensure_future(retry())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting

    server.on_loop(in_turn())


@pytest.mark.parametrize("round_", range(5))
def test_a_retry_after_a_deadline_is_taken(client: ApiClient, round_: int) -> None:
    options = {"request_id": "mine", "max_tokens": LONG, "ignore_eos": True}
    error = None
    with pytest.raises(grpc.RpcError) as failure:
        client.generate(PROMPT, timeout=0.1, **options)
    error = failure.value
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert _generate(client).token_ids


def test_a_retry_after_the_cancel_call_is_taken(client: ApiClient) -> None:
    events = begin(client, request_id="mine")
    assert client.cancel(["mine"]) == ["mine"]
    assert _generate(client).token_ids
    assert refused(lambda **_: list(events)).code() == grpc.StatusCode.CANCELLED


def test_an_id_in_flight_already_exists(client: ApiClient) -> None:
    """INVALID_ARGUMENT would say that the id is malformed, and that no retry can help."""
    events = begin(client, request_id="mine")
    message = generate_request(PROMPT, max_tokens=1, request_id="mine")
    stream = pb.GenerateStreamRequest(request=message)
    for call in (
        raw_stub(client).Generate,
        lambda _, **options: list(raw_stub(client).GenerateStream(stream, **options)),
    ):
        error = refused(call, message)
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS and blamed_fields(error) == ["request_id"]
    events.close()
