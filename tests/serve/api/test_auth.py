"""Who may call: nobody beyond loopback by accident, and with a token nobody without it, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from isthmus.client import bearer
from isthmus.errors import ConfigError
from isthmus.serve.api.config import ServeConfig
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import NOT_SERVING, PATIENCE, SERVING, ApiClient, RunningServer, check_health

TOKEN = "correct horse battery staple"
HEALTH = "grpc.health.v1.Health"
EXPECTED = {
    "isthmus.v1.InferenceService": {"Generate", "GenerateStream", "Score", "Embed", "Tokenize", "Detokenize"},
    "isthmus.v1.ControlService": {"GetModelInfo", "GetServerInfo", "GetLoad", "WatchLoad", "Cancel"},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo"},
}
"""Methods that must be among those found: a new one is found and tested without being named here."""

VALID: dict[str, dict[str, Any]] = {
    "Generate": {"prompt": {"text": "a"}, "stop": {"max_tokens": 1}},
    "GenerateStream": {"request": {"prompt": {"text": "a"}, "stop": {"max_tokens": 1}}},
    "Score": {"prompt": {"text": "a"}, "continuations": [{"text": "b"}]},
    "Embed": {"inputs": [{"text": "a"}]},
    "Tokenize": {"text": "a"},
    "Detokenize": {"token_ids": [1]},
    "Cancel": {"request_ids": ["nobody"]},
    "ServerReflectionInfo": {"list_services": "*"},
}
"""What to ask, where an empty request would not do"""

WRONG: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "empty": (("authorization", ""),),
    "no scheme": (("authorization", TOKEN),),
    "no token": (("authorization", "Bearer "),),
    "another token": bearer("incorrect horse battery staple"),
    "a prefix": bearer(TOKEN[:-1]),
    "more": bearer(TOKEN + "x"),
    "another scheme": (("authorization", f"Basic {TOKEN}"),),
    "another header": (("x-authorization", f"Bearer {TOKEN}"),),
    "two at once": (*bearer("wrong"), *bearer(TOKEN)),
}


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auth") / "token.txt"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture(scope="module")
def guarded(start_server: StartServer, token_file: Path) -> RunningServer:
    return start_server(auth_token_file=token_file)


@pytest.fixture(scope="module")
def channel(guarded: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield channel


class _WithToken(grpc.StreamStreamClientInterceptor):
    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=bearer(TOKEN)), requests)


@pytest.fixture(scope="module")
def methods(channel: grpc.Channel) -> list[MethodDescriptor]:
    """Every method of every service that the server says it has."""
    database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, _WithToken()))
    pool = DescriptorPool(database)
    services = [pool.FindServiceByName(name) for name in database.get_services()]
    return [method for service in services for method in service.methods]


def call(channel: grpc.Channel, method: MethodDescriptor, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """The status of a valid call."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    rpc = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    request = GetMessageClass(method.input_type)(**VALID.get(method.name, {}))
    argument = iter([request]) if method.client_streaming else request
    try:
        answer = rpc(argument, metadata=metadata, timeout=PATIENCE)
        if method.server_streaming:
            assert list(islice(answer, 1)), f"{method.full_name} answered with an empty stream"
            answer.cancel()  # some have no end
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_reflection_finds_what_the_other_tests_try(methods: list[MethodDescriptor]) -> None:
    found: dict[str, set[str]] = {}
    for method in methods:
        found.setdefault(method.containing_service.full_name, set()).add(method.name)
    for service, names in EXPECTED.items():
        assert names <= found[service]
    assert set(found) == {*EXPECTED, HEALTH}


@pytest.mark.parametrize("metadata", list(WRONG.values()), ids=list(WRONG))
def test_no_method_answers_without_the_token(
    channel: grpc.Channel, methods: list[MethodDescriptor], metadata: tuple[tuple[str, str], ...]
) -> None:
    """One method that forgets to ask is a hole in all of them."""
    guarded = [method for method in methods if method.containing_service.full_name != HEALTH]
    codes = {method.full_name: call(channel, method, metadata) for method in guarded}
    assert codes == dict.fromkeys(codes, grpc.StatusCode.UNAUTHENTICATED)


def test_every_method_answers_with_the_token(channel: grpc.Channel, methods: list[MethodDescriptor]) -> None:
    guarded = [method for method in methods if method.containing_service.full_name != HEALTH]
    codes = {method.full_name: call(channel, method, bearer(TOKEN)) for method in guarded}
    expected = dict.fromkeys(codes, grpc.StatusCode.OK)
    for name in ("LoadAdapter", "UnloadAdapter"):  # this server has no --adapter-root
        expected[f"isthmus.v1.ControlService.{name}"] = grpc.StatusCode.FAILED_PRECONDITION
    assert codes == expected


def test_the_client_takes_the_token(guarded: RunningServer) -> None:
    with guarded.client(token=TOKEN) as client:
        assert client.generate("a", max_tokens=1).prompt_tokens
        assert list(client.stream("a", max_tokens=1)) and client.load() and client.server_info() and client.model_info()
        assert client.cancel(["nobody"]) == [] and client.detokenize(client.tokenize("a")) == "a"


def test_health_needs_no_token(channel: grpc.Channel) -> None:
    """A load balancer has none."""
    assert check_health(channel) == SERVING


def test_a_refused_call_costs_the_engine_nothing(guarded: RunningServer) -> None:
    before = guarded.engine.load().counters.prompt_tokens
    with ApiClient(guarded.address, token="wrong") as client, pytest.raises(grpc.RpcError) as failure:
        client.generate("a", max_tokens=1)
    assert failure.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert TOKEN not in failure.value.details()
    assert guarded.engine.load().counters.prompt_tokens == before


def test_a_server_that_still_loads_asks_for_the_token_too(start_server: StartServer, token_file: Path) -> None:
    server = start_server(load=False, auth_token_file=token_file)
    with server.client() as client:
        with pytest.raises(grpc.RpcError) as failure:
            client.tokenize("a")
        assert failure.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert check_health(client.channel) == NOT_SERVING


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "[::]", "", "192.0.2.1", "example.com", "127.0.0.1.example.com", "localhost."]
)
def test_beyond_loopback_it_needs_a_token_and_tls_or_insecure(model_folder: Path, token_file: Path, host: str) -> None:
    """Else a model is open to the network because somebody changed an address, or the token is read on its way."""
    tls = {"tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}
    for fields in ({}, {"auth_token_file": token_file}, tls):
        with pytest.raises(ConfigError, match="host="):
            ServeConfig(model=model_folder, host=host, **fields).validate()
        ServeConfig(model=model_folder, host=host, insecure=True, **fields).validate()
    ServeConfig(model=model_folder, host=host, auth_token_file=token_file, **tls).validate()


@pytest.mark.parametrize("field", ["stall_seconds", "keepalive_seconds"])
@pytest.mark.parametrize("seconds", [0.5, math.inf, math.nan, 1e7])
def test_seconds_that_grpc_cannot_count_are_named(model_folder: Path, field: str, seconds: float) -> None:
    """An infinite one, to turn pings off, was a traceback."""
    with pytest.raises(ConfigError, match=f"{field}=.* must be 1 to 1000000"):
        ServeConfig(model=model_folder, **{field: seconds}).validate()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_neither(model_folder: Path, host: str) -> None:
    ServeConfig(model=model_folder, host=host).validate()


def test_the_server_itself_refuses_to_start_open(start_server: StartServer) -> None:
    with pytest.raises(ConfigError, match=r"--auth-token-file.*--insecure"):
        start_server(host="0.0.0.0", load=False)


@pytest.mark.parametrize(
    "content", ["", "\n", "  \n\t", "two\nlines", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "a\0b"]
)
def test_a_token_file_that_holds_no_token_is_refused(start_server: StartServer, tmp_path: Path, content: str) -> None:
    """An empty secret would let everybody in that sends an empty one."""
    path = tmp_path / "token.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match="auth_token_file"):
        start_server(auth_token_file=path, load=False)


def test_a_token_file_that_cannot_be_read_is_refused(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match="auth_token_file"):
            start_server(auth_token_file=path, load=False)


def test_who_calls_is_known_by_the_token_and_only_where_one_is_needed(
    guarded: RunningServer, server: RunningServer
) -> None:
    """A name that anybody can give himself would be a share of the server, and a look into another's cache."""
    seen: list[str] = []
    for running, token in ((guarded, TOKEN), (server, None), (server, "made up")):
        with pytest.MonkeyPatch.context() as patch:
            session = running.server.session
            submitted = session.submitted
            patch.setattr(session, "submitted", lambda r, on=submitted: (seen.append(r[0].tenant), on(r))[1])
            with running.client(token=token) as client:
                client.generate("a", max_tokens=1)
    digest, *others = seen
    assert len(digest) == 64 and TOKEN not in digest and others == ["", ""]
