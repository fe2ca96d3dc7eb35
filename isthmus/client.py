"""A client of a server's isthmus.v1 API: synchronous, typed, without jax."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, Unpack

import grpc

from isthmus.adapters import AdapterInfo
from isthmus.arguments import check_flag, check_within
from isthmus.errors import ConfigError, InvalidRequest, Unavailable
from isthmus.forms import check_string
from isthmus.proto import (
    API_FIELDS,
    completion_of,
    error_of,
    finish_reason_name,
    logprobs_of,
    message_of,
    response_of,
    set_ids,
)
from isthmus.proto_adapters import info_of, infos_of, load_message, unload_message
from isthmus.proto_scores import EMBED_FIELDS, SCORE_FIELDS, embed_message, embedding_of, score_message, scores_of
from isthmus.protocol import Model
from isthmus.questions import to_question
from isthmus.scores import Embedding, EmbedQuestion, Score, ScoreQuestion
from isthmus.types import (
    NO_LIMIT,
    AskOptions,
    Completion,
    Delta,
    Messages,
    Prompt,
    Question,
    TokenLogprobs,
    check_timeout,
)
from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

__all__ = ["Client", "bearer", "finish_reason_name", "generate_request", "read_token", "tls_credentials"]

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20
"""Most bytes of a response; gRPC's default is 4 MiB"""
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),  # to notice a server that is gone while waiting for its response
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)
AT_ONCE = 64
"""How many items of a list a client asks at once by default"""


def generate_request(
    prompt: Prompt | Messages,
    *,
    template_arguments: Mapping[str, object] | None = None,
    parse_special: bool = False,
    return_token_ids: bool = True,
    request_id: str = "",
    **options: Unpack[AskOptions],
) -> inference_pb2.GenerateRequest:
    """The message that `Client` sends, for programs that call the API without it.

    options: the fields of SamplingParams and Service. Raises InvalidRequest for a value that the message can't hold.
    """
    asked = to_question(prompt, None, options, arguments=template_arguments)
    message = message_of(asked, token_ids=return_token_ids)
    message.request_id = check_string("request_id", request_id)
    message.prompt.parse_special = check_flag("parse_special", parse_special)
    return message


def read_token(path: Path) -> str:
    """The auth token in a file. Raises OSError, and ConfigError for a file that isn't one line of printable ASCII."""
    data = path.read_bytes().strip()
    if not data or not data.isascii() or not data.decode("ascii").isprintable():
        raise ConfigError(f"{path} must hold one line of printable ASCII")
    return data.decode("ascii")


def tls_credentials(ca: Path | str) -> grpc.ChannelCredentials:
    """Credentials to call a server with TLS. Raises OSError, and ConfigError for what isn't a PEM file.

    ca: a PEM file with the certificate of the authority that signed the server's, or with a self-signed server's own.
    """
    data = Path(ca).read_bytes()
    if b"-----BEGIN " not in data:
        raise ConfigError(f"tls_ca: {ca} is not a PEM file, which has a line -----BEGIN CERTIFICATE-----")
    return grpc.ssl_channel_credentials(data)


_TARGET = re.compile(r"([^\s:/\[\]]+|\[[^\s/\[\]]+\]):\d{1,5}")
_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:", "vsock:")
"""How addresses begin that gRPC resolves by a scheme of its own"""


def check_target(target: str, name: str = "target") -> str:
    """The address of a server, which an error calls by this name. Raises ConfigError for a URL, for a host without a
    port, which gRPC would read as port 443, and for a port beyond 65535, which it takes modulo 2^16."""
    if isinstance(target, str) and target.startswith(_SCHEMES):
        return target
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise ConfigError(f"{name}={target!r:.200} must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    if not 1 <= int(target.rpartition(":")[2]) <= 65535:
        raise ConfigError(f"{name}={target!r} must have a port of 1 to 65535")
    return target


def choose_credentials(
    credentials: grpc.ChannelCredentials | None, tls_ca: Path | str | None
) -> grpc.ChannelCredentials | None:
    """The credentials that are given or made from tls_ca; None is plain text. Raises ConfigError if both are given,
    and what `tls_credentials` raises."""
    if tls_ca is None:
        return credentials
    if credentials is not None:
        raise ConfigError("give credentials or tls_ca, not both")
    return tls_credentials(tls_ca)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an auth token. Raises ConfigError for what metadata can't carry."""
    if token is None:
        return ()
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise ConfigError("token must be a line of printable ASCII")
    return (("authorization", f"Bearer {token}"),)


def check_at_once(at_once: int) -> int:
    """Raises ConfigError for less than one."""
    if not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1:
        raise ConfigError(f"at_once must be a whole number of at least 1, not {at_once!r:.80}")
    return at_once


def tokenize_request(text: str, parse_special: bool) -> inference_pb2.TokenizeRequest:
    """Raises InvalidRequest."""
    return inference_pb2.TokenizeRequest(
        text=check_string("text", text), parse_special=check_flag("parse_special", parse_special)
    )


def detokenize_request(token_ids: Sequence[int]) -> inference_pb2.DetokenizeRequest:
    """Raises InvalidRequest."""
    request = inference_pb2.DetokenizeRequest()
    set_ids("token_ids", token_ids, request.token_ids)
    return request


def cancel_request(request_ids: Sequence[str]) -> control_pb2.CancelRequest:
    """Raises InvalidRequest."""
    ids = [request_ids] if isinstance(request_ids, str) else request_ids
    if not isinstance(ids, Sequence) or isinstance(ids, bytes):
        raise InvalidRequest("request_ids", f"must be a sequence of strings, not {type(ids).__name__}")
    checked = [check_string(f"request_ids[{index}]", each) for index, each in enumerate(ids)]
    return control_pb2.CancelRequest(request_ids=checked)


def watch_request(interval: float) -> control_pb2.WatchLoadRequest:
    """Raises InvalidRequest."""
    request = control_pb2.WatchLoadRequest()
    request.interval.FromNanoseconds(round(1e9 * check_within("interval", interval, 0, NO_LIMIT)))
    return request


def closed() -> Unavailable:
    """What becomes of a call on a client that was closed."""
    return Unavailable("this client was closed", None)


class Client(Model):
    """Calls one server. Every method raises RequestError; `timeout` is the deadline in seconds."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        tls_ca: Path | str | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        """target: host:port. token: the server's auth token. credentials: for a server with TLS. tls_ca: in place of
        credentials, the PEM file that `tls_credentials` takes. at_once: most items of a list that are asked at once.

        Without credentials and tls_ca, calls are plain text. Raises OSError if tls_ca can't be read, and ConfigError if
        both are given, for a target without a port, for a token that isn't a line of printable ASCII, and for an
        at_once below 1.
        """
        self._at_once, self._metadata = check_at_once(at_once), bearer(token)
        check_target(target)
        chosen = choose_credentials(credentials, tls_ca)
        if chosen is not None:
            self.channel = grpc.secure_channel(target, chosen, OPTIONS)
        else:
            self.channel = grpc.insecure_channel(target, OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._control = control_pb2_grpc.ControlServiceStub(self.channel)

    @property
    def at_once(self) -> int:
        return self._at_once

    def begin(self, question: Question, timeout: float | None = None) -> _Call[Completion]:
        return self._begin(self._inference.Generate, message_of(question), timeout, response_of, API_FIELDS)

    def begin_score(self, question: ScoreQuestion, timeout: float | None = None) -> _Call[list[Score]]:
        return self._begin(self._inference.Score, score_message(question), timeout, scores_of, SCORE_FIELDS)

    def begin_embed(self, question: EmbedQuestion, timeout: float | None = None) -> _Call[Embedding]:
        return self._begin(self._inference.Embed, embed_message(question), timeout, embedding_of, EMBED_FIELDS)

    def _begin(
        self,
        method: Any,
        message: object,
        timeout: float | None,
        convert: Callable[[Any], T],
        fields: Mapping[str, str],
    ) -> _Call[T]:
        with _opened():
            return _Call(method.future(message, timeout=timeout, metadata=self._metadata), convert, fields, timeout)

    def follow(self, question: Question, timeout: float | None = None) -> Generator[Delta, None, None]:
        message = inference_pb2.GenerateStreamRequest(request=message_of(question))
        with _opened():
            call = self._inference.GenerateStream(message, timeout=timeout, metadata=self._metadata)
        gathered = Gathered(question)
        try:
            for event in call:
                if (delta := gathered.take(event)) is not None:
                    yield delta
        except grpc.RpcError as error:
            raise error_of(error, timeout=timeout) from error
        finally:
            call.cancel()

    def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        request = tokenize_request(text, parse_special)
        return list(self._call(self._inference.Tokenize, request, inference_pb2.TokenizeResponse, timeout).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        request = detokenize_request(token_ids)
        return str(self._call(self._inference.Detokenize, request, inference_pb2.DetokenizeResponse, timeout).text)

    def model_info(self, *, timeout: float | None = None) -> control_pb2.GetModelInfoResponse:
        return self._call(
            self._control.GetModelInfo, control_pb2.GetModelInfoRequest(), control_pb2.GetModelInfoResponse, timeout
        )

    def server_info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        return self._call(
            self._control.GetServerInfo, control_pb2.GetServerInfoRequest(), control_pb2.GetServerInfoResponse, timeout
        )

    def load(self, *, timeout: float | None = None) -> control_pb2.Load:
        request = control_pb2.GetLoadRequest()
        return self._call(self._control.GetLoad, request, control_pb2.GetLoadResponse, timeout).load

    def watch_load(self, interval: float = 1.0) -> Generator[control_pb2.Load, None, None]:
        """Yields how busy the server is, at once and then every `interval` seconds, until it ends. Raises RequestError,
        which is Unavailable if the server is gone."""
        request = watch_request(interval)
        with _opened():
            call = self._control.WatchLoad(request, metadata=self._metadata)
        try:
            for response in call:
                yield response.load
        except grpc.RpcError as error:
            raise error_of(error, {}) from error
        finally:
            call.cancel()

    def cancel(self, request_ids: Sequence[str], *, timeout: float | None = None) -> list[str]:
        """Ends requests by their ids, whoever made them. Returns the ids that were in flight."""
        request = cancel_request(request_ids)
        return list(
            self._call(self._control.Cancel, request, control_pb2.CancelResponse, timeout).cancelled_request_ids
        )

    def load_adapter(self, name: str, path: str | os.PathLike[str], *, timeout: float | None = None) -> AdapterInfo:
        request = load_message(name, path)
        return info_of(self._call(self._control.LoadAdapter, request, control_pb2.LoadAdapterResponse, timeout).adapter)

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        request = unload_message(name)
        return info_of(
            self._call(self._control.UnloadAdapter, request, control_pb2.UnloadAdapterResponse, timeout).adapter
        )

    def list_adapters(self, *, timeout: float | None = None) -> list[AdapterInfo]:
        request = control_pb2.ListAdaptersRequest()
        return infos_of(
            self._call(self._control.ListAdapters, request, control_pb2.ListAdaptersResponse, timeout).adapters
        )

    def _call(self, method: Callable[..., Any], request: object, kind: type[T], timeout: float | None) -> T:
        """The response of `method`, which is a `kind`. Raises RequestError."""
        timeout = check_timeout(timeout)
        try:
            with _opened():
                answer: T = method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, {}, timeout) from error
        return answer

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _opened() -> Iterator[None]:
    """Raises Unavailable where a call isn't begun because its channel is closed, which gRPC calls a ValueError."""
    try:
        yield
    except ValueError:
        raise closed() from None


class _Call(Generic[T]):
    """A call that is under way."""

    def __init__(
        self, future: Any, convert: Callable[[Any], T], fields: Mapping[str, str], timeout: float | None
    ) -> None:
        """convert: makes the result of the response. fields, timeout: as in `error_of`."""
        self._future, self._convert, self._fields, self._timeout = future, convert, fields, timeout

    def result(self) -> T:
        try:
            answer = self._future.result()
        except grpc.FutureCancelledError:
            raise error_of(self._future, self._fields, self._timeout) from None
        except grpc.RpcError as error:
            raise error_of(error, self._fields, self._timeout) from error
        finally:  # whoever stops waiting, as by Ctrl-C, doesn't want it any more
            self._future.cancel()
        return self._convert(answer)

    def cancel(self) -> None:
        self._future.cancel()

    def then(self, call: Callable[[], object]) -> None:
        self._future.add_done_callback(lambda _: call())


class Gathered:
    """Turns the events of a stream into deltas."""

    def __init__(self, question: Question) -> None:
        self._tells = question.sampling.logprobs is not None
        self._started = inference_pb2.Started()
        self._prompt: tuple[TokenLogprobs, ...] | None = None
        self._choices: defaultdict[int, list[Delta]] = defaultdict(list)

    def take(self, event: inference_pb2.GenerateStreamResponse) -> Delta | None:
        """The delta for an event; None for the event that starts the stream."""
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
                return None
            case "prompt_logprobs":
                self._prompt = logprobs_of(event.prompt_logprobs)
                return Delta("", (), prompt_logprobs=self._prompt)
            case "delta":
                told = logprobs_of(event.delta.logprobs) if event.delta.HasField("logprobs") else None
                index = event.delta.choice_index
                delta = Delta(event.delta.text, tuple(event.delta.token_ids), logprobs=told, index=index)
                self._choices[index].append(delta)
                return delta
            case _:
                return self._last(event.finished)

    def _last(self, finished: inference_pb2.Finished) -> Delta:
        deltas = self._choices.pop(finished.choice_index, [])
        completion = completion_of(
            self._started.seed,
            "".join(delta.text for delta in deltas),
            tuple(token for delta in deltas for token in delta.token_ids),
            finished,
            tuple(each for delta in deltas for each in delta.logprobs or ()) if self._tells else None,
            self._prompt,
        )
        return Delta("", (), completion, index=finished.choice_index)
