"""What goes wrong between a client and a server is an error of ours, which says what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import get_args

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from isthmus import (
    AsyncClient,
    Cancelled,
    Client,
    ConfigError,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    RequestError,
    RequestFailed,
    Unauthenticated,
    Unavailable,
)
from isthmus.proto import API_FIELDS, PROMPT_FIELDS, message_of, rename
from isthmus.serve.api.errors import invalid, plain, status_of
from isthmus.serve.api.mapping import question_of
from isthmus.types import Cache, Question, SamplingParams, Service, TextPrompt
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import LONG, PATIENCE, PROMPT, RunningServer, wait_for


class Answering(grpc.GenericRpcHandler):
    """A server that ends every call with the next of these; the last one for ever."""

    def __init__(self, *ends: Callable[[grpc.ServicerContext], bytes]) -> None:
        self._ends = list(ends)

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def end(request: bytes, context: grpc.ServicerContext) -> bytes:
            return (self._ends.pop(0) if len(self._ends) > 1 else self._ends[0])(context)

        return grpc.unary_unary_rpc_method_handler(end)


@contextmanager
def interrupted() -> Iterator[None]:
    """Interrupts the main thread inside, as Ctrl-C does, also where a shell that began this in the background has
    turned that off; and again if it came where Python drops it."""
    left = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not left.wait(0.2):
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def refuse(error: RequestError) -> Callable[[grpc.ServicerContext], bytes]:
    def end(context: grpc.ServicerContext) -> bytes:
        context.abort_with_status(rpc_status.to_status(status_of(error)))
        raise AssertionError

    return end


def answer(context: grpc.ServicerContext) -> bytes:
    choice = pb.Choice(text="b", finished=pb.Finished(finish_reason=pb.FINISH_REASON_EOS))
    return pb.GenerateResponse(choices=[choice]).SerializeToString()


@contextmanager
def answering(*ends: Callable[[grpc.ServicerContext], bytes]) -> Iterator[str]:
    """The address of a server that does."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Answering(*ends)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("seed", "must be below 2^64"),
        DuplicateRequest("request_id", "is in flight already"),
        Overloaded("256 requests wait", 2.5),
        Unavailable("the model is still loading", 1.0),
        Cancelled("the request was cancelled"),
        RequestFailed("the engine has ended on an error", "ENGINE_DEAD"),
        Unauthenticated("authorization: a valid bearer token is needed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_travels_as_it_is(error: RequestError) -> None:
    """A program must see from the client what it would see from a model in its own process."""
    with answering(refuse(error)) as address, Client(address) as client:
        with pytest.raises(RequestError) as refused:
            client.generate("a", timeout=PATIENCE)
        assert type(refused.value) is type(error) and vars(refused.value) == vars(error)
        assert isinstance(refused.value.__cause__, grpc.RpcError)

        async def work() -> None:
            async with AsyncClient(address) as other:
                await other.generate("a", timeout=PATIENCE)

        with pytest.raises(type(error)) as again:
            asyncio.run(work())
        assert vars(again.value) == vars(error)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error), "it crosses processes, too"


def test_every_field_of_a_request_has_its_name_back() -> None:
    """`sampling.temperature` is no argument that a Python program gave."""
    for ours, theirs in API_FIELDS.items():
        with answering(_blames(theirs)) as address, Client(address) as client:
            with pytest.raises(InvalidRequest) as refused:
                client.generate("a", timeout=PATIENCE)
            assert refused.value.field == ours
    assert rename("prompt[3]", {"prompt": PROMPT_FIELDS["token_ids"]}) == "prompt.token_ids.ids[3]"
    assert rename("messages[1].role", API_FIELDS) == "prompt.messages.messages[1].role"


def _blames(field: str) -> Callable[[grpc.ServicerContext], bytes]:
    def end(context: grpc.ServicerContext) -> bytes:
        context.abort_with_status(rpc_status.to_status(invalid(field, "is wrong")))
        raise AssertionError

    return end


def test_a_status_that_is_none_of_ours_keeps_its_words() -> None:
    """A proxy in between says things of its own."""

    def end(context: grpc.ServicerContext) -> bytes:
        status = plain(code_pb2.OUT_OF_RANGE, "no such place", error_details_pb2.ErrorInfo(reason="ELSEWHERE"))
        context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError

    with answering(end) as address, Client(address) as client, pytest.raises(RequestError, match="no such place"):
        client.generate("a", timeout=PATIENCE)


def test_no_server_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match="is a server running there") as refused:
        client.generate("a", timeout=PATIENCE)
    assert refused.value.retry_after is None


def test_what_can_not_be_a_client_is_told_at_once() -> None:
    """A list would wait for ever with no call at a time, and gRPC says of a token only that metadata is invalid."""
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match="target='localhost' must be HOST:PORT"):
            kind("localhost")
        with pytest.raises(ConfigError, match="target=5 must be HOST:PORT"):
            kind(5)  # type: ignore[arg-type]
        for url in ("http://127.0.0.1:50051", "127.0.0.1:", "::1", "::1:50051", "127.0.0.1:abc", ":50051", "a b:1"):
            with pytest.raises(ConfigError, match="must be HOST:PORT"):
                kind(url)
        with pytest.raises(ConfigError, match="must have a port of 1 to 65535"):
            kind("127.0.0.1:99999")
        for at_once in (0, -1, 1.5, True):
            with pytest.raises(ConfigError, match="at_once must be a whole number of at least 1"):
                kind("127.0.0.1:1", at_once=at_once)  # type: ignore[arg-type]
        for token in ("", "ü", "a\n", "a\x00"):
            with pytest.raises(ConfigError, match="token must be a line of printable ASCII"):
                kind("127.0.0.1:1", token=token)


def test_a_client_that_was_closed_says_so(server: RunningServer) -> None:
    """gRPC raises a ValueError of its own, which nobody who handles a RequestError catches."""
    client = Client(server.address)
    left = client.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
    next(left)
    waiting = client.begin(Question(TextPrompt(PROMPT), SamplingParams(max_tokens=LONG, ignore_eos=True)))
    client.close()
    calls: list[Callable[[], object]] = [
        waiting.result,
        lambda: list(left),
        lambda: client.generate("a"),
        lambda: next(client.stream("a")),
        lambda: client.tokenize("a"),
        client.model_info,
        lambda: client.cancel(["a"]),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match="this client was closed"):
            call()
    assert [type(each) for each in client.generate(["a", "b"], return_errors=True)] == [Unavailable] * 2
    wait_for(lambda: server.engine.in_flight == 0, "the requests to end")


def test_an_async_client_that_was_closed_says_so(server: RunningServer) -> None:
    """gRPC crashes the process when a stream is begun on a closed channel, and cancels tasks that nobody cancelled."""

    async def work() -> None:
        client = AsyncClient(server.address)
        left = client.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
        await anext(left)
        waiting = asyncio.create_task(client.generate(PROMPT, max_tokens=LONG, ignore_eos=True))
        await asyncio.to_thread(wait_for, lambda: server.engine.in_flight == 2, "both requests")
        await client.close()
        unused = AsyncClient(server.address)
        await unused.close()
        calls: list[Awaitable[object]] = [
            waiting,
            anext(left),
            client.generate("a"),
            anext(client.stream("a")),
            client.tokenize("a"),
            client.model_info(),
            unused.generate("a"),
        ]
        for call in calls:
            with pytest.raises(Unavailable, match="this client was closed"):
                await call
        assert [type(each) for each in await client.generate(["a"], return_errors=True)] == [Unavailable]

    asyncio.run(work())
    wait_for(lambda: server.engine.in_flight == 0, "the requests to end")


def test_an_async_client_belongs_to_one_loop(server: RunningServer) -> None:
    client = AsyncClient(server.address)
    asyncio.run(client.tokenize("a"))
    with pytest.raises(Unavailable, match="another event loop"):
        asyncio.run(client.tokenize("a"))


def test_a_call_that_is_interrupted_ends_its_request() -> None:
    """Ctrl-C in a notebook keeps the traceback, and with it a call that would run to its end."""
    ended = threading.Event()

    def hold(context: grpc.ServicerContext) -> bytes:
        context.add_callback(ended.set)
        ended.wait(PATIENCE)
        return answer(context)

    with answering(hold) as address, Client(address) as client:
        pending = client.begin(Question(TextPrompt(PROMPT), SamplingParams()))
        with pytest.raises(KeyboardInterrupt), interrupted():
            pending.result()
        assert ended.wait(PATIENCE / 2), "the call goes on"


def test_a_message_that_is_too_large_is_the_requests_fault(server: RunningServer) -> None:
    """Asked again later it would be as large."""
    with Client(server.address) as client, pytest.raises(InvalidRequest, match="larger than max"):
        client.generate("x" * (17 << 20))


def test_who_has_no_token_is_told(start_server: StartServer, tmp_path: object) -> None:
    from pathlib import Path

    token = Path(str(tmp_path)) / "token"
    token.write_text("secret")
    guarded = start_server(auth_token_file=token, load=False)
    with Client(guarded.address, token="wrong") as client, pytest.raises(Unauthenticated):
        client.generate("a", timeout=PATIENCE)
    with Client(guarded.address, token="secret") as client, pytest.raises(Unavailable, match="still loading"):
        client.generate("a", timeout=PATIENCE)


def test_a_list_goes_on_when_there_is_room_again() -> None:
    """A list longer than a server's queue would come back full of holes."""
    full = refuse(Overloaded("256 requests wait", 0.01))
    with answering(answer, full, full, answer) as address, Client(address, at_once=1) as client:
        assert [one.text for one in client.generate(["a"] * 4, timeout=PATIENCE)] == ["b"] * 4
    with answering(full) as address, Client(address) as client:
        failed = client.generate(["a"] * 4, timeout=PATIENCE, return_errors=True)
    assert [type(each) for each in failed] == [Overloaded] * 4, "a server that takes nothing is not asked for ever"


def test_what_is_cancelled_by_somebody_else_says_so(server: RunningServer) -> None:
    with Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, PROMPT, SamplingParams(max_tokens=LONG, ignore_eos=True))
        (name,) = wait_for(lambda: list(server.engine._live), "the request")
        assert client.cancel([name]) == [name]
        with pytest.raises(Cancelled):
            waiting.result(PATIENCE)


def test_how_a_request_is_served_travels_to_the_server() -> None:
    """LLM and Client must mean the same by the same keywords."""
    asked = Service(priority=-7, max_queue_time=1.5, cache_salt="s")
    for cache in get_args(Cache):
        question = Question(TextPrompt("a"), service=dataclasses.replace(asked, cache=cache))
        assert question_of(message_of(question)).service == question.service
    assert question_of(message_of(Question(TextPrompt("a")))).service == Service()


def test_values_of_service_that_cannot_be_sent_are_named() -> None:
    """What doesn't fit into a message is the caller's mistake, whichever model it asks."""
    wrong = {"priority": (1 << 40, "1"), "max_queue_time": (float("nan"), "1"), "cache": ("no",), "cache_salt": (b"s",)}
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(InvalidRequest) as failure:
                message_of(Question(TextPrompt("a"), service=Service(**{field: value})))  # type: ignore[arg-type]
            assert failure.value.field == field


@pytest.mark.parametrize("target", ["localhost:1", "[::1]:50051", "dns:///a:1", "unix:/tmp/a", "ipv4:10.0.0.1:1"])
def test_what_grpc_resolves_is_taken(target: str) -> None:
    with Client(target):
        pass
