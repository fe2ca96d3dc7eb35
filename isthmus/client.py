"""A client for the isthmus.v1 API: synchronous, typed, without jax."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, its token ids, or the messages of a conversation: {"role": …, "content": …}"""

MAX_MESSAGE_BYTES = 64 << 20
"""Of an answer; gRPC's own limit is 4 MiB"""
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),  # a server that is gone is noticed while an answer is waited for
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True)
class Completion:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]
    """Without the token that ended the sequence"""
    finish_reason: str
    """EOS, STOP_TOKEN, LENGTH or CONTEXT_LENGTH"""
    seed: int
    """Draws the same tokens again"""
    prompt_tokens: int
    cached_prompt_tokens: int
    """0 unless the server runs with --report-cached-tokens"""
    time_to_first_token: float
    """Seconds, as the server measured it"""


def generate_request(
    prompt: Prompt,
    *,
    template_arguments: Mapping[str, Any] | None = None,
    parse_special: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    return_token_ids: bool = True,
    request_id: str = "",
) -> inference_pb2.GenerateRequest:
    """The request message; None takes the server's default: as the model's makers recommend, or as the API says.

    prompt: messages need a model with a chat template. template_arguments: the template's variables, such as
    {"enable_thinking": False}, which reach it in this order; only for messages. parse_special: whether a special token
    spelt out in a text is that token. Raises ValueError for a number too big for its field, for a key that messages
    don't have, for template_arguments without messages, and for what JSON can't hold in them.
    """
    request = inference_pb2.GenerateRequest(request_id=request_id)
    _set_prompt(request, prompt, template_arguments)
    request.parse_special = parse_special
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
    }
    for name, value in sampling.items():
        if value is not None:
            setattr(request.sampling, name, value)
    if max_tokens is not None:
        request.stop.max_tokens = max_tokens
    request.stop.token_ids.extend(stop_token_ids)
    request.stop.ignore_eos = ignore_eos
    request.output.token_ids = return_token_ids
    return request


def _set_prompt(
    request: inference_pb2.GenerateRequest, prompt: Prompt, template_arguments: Mapping[str, Any] | None
) -> None:
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        turns = cast(Sequence[Mapping[str, str]], prompt)
        request.messages.messages.extend(inference_pb2.ChatMessage(**turn) for turn in turns)
        if template_arguments:
            request.messages.template_arguments_json = _json(template_arguments)
    elif template_arguments is not None:
        raise ValueError("template_arguments are for messages")
    elif isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(cast(Sequence[int], prompt))


def _json(arguments: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"template_arguments: {error}") from None


def read_token(path: Path) -> str:
    """The auth token that a file holds. Raises OSError, and ValueError for what isn't one line of printable ASCII."""
    data = path.read_bytes().strip()
    if not data or not data.isascii() or not data.decode("ascii").isprintable():
        raise ValueError(f"{path} must hold one line of printable ASCII")
    return data.decode("ascii")


def tls_credentials(ca: Path | str) -> grpc.ChannelCredentials:
    """ca: a file in PEM with the certificate of who signed the server's, or a self-signed server's own. Raises
    OSError."""
    return grpc.ssl_channel_credentials(Path(ca).read_bytes())


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an auth token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


class Client:
    """Calls one server. Every method raises grpc.RpcError; `timeout` is the deadline in seconds."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        tls_ca: Path | str | None = None,
    ) -> None:
        """target: host:port. token: what --auth-token-file holds. credentials: for TLS; None is plain text. tls_ca: for
        TLS too, as tls_credentials takes it.

        Raises OSError when tls_ca can't be read, and ValueError when both are given.
        """
        if tls_ca is not None:
            if credentials is not None:
                raise ValueError("give credentials or tls_ca")
            credentials = tls_credentials(tls_ca)
        if credentials is not None:
            self.channel = grpc.secure_channel(target, credentials, _OPTIONS)
        else:
            self.channel = grpc.insecure_channel(target, _OPTIONS)
        self._metadata = bearer(token)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._control = control_pb2_grpc.ControlServiceStub(self.channel)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Any) -> Completion:
        """The whole completion. options: as generate_request takes."""
        answer = self._inference.Generate(generate_request(prompt, **options), timeout=timeout, metadata=self._metadata)
        usage = answer.finished.usage
        return Completion(
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            finish_reason=finish_reason_name(answer.finished.finish_reason),
            seed=answer.started.seed,
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            time_to_first_token=answer.finished.timings.time_to_first_token.ToNanoseconds() / 1e9,
        )

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Any
    ) -> Generator[inference_pb2.GenerateStreamResponse, None, None]:
        """Started, Deltas, Finished, as they come. Closing the iterator cancels the request."""
        call = self._inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(request=generate_request(prompt, **options)),
            timeout=timeout,
            metadata=self._metadata,
        )
        try:
            yield from call
        finally:
            call.cancel()

    def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, parse_special=parse_special)
        return list(self._inference.Tokenize(request, timeout=timeout, metadata=self._metadata).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids)
        return self._inference.Detokenize(request, timeout=timeout, metadata=self._metadata).text

    def model_info(self, *, timeout: float | None = None) -> control_pb2.GetModelInfoResponse:
        return self._control.GetModelInfo(control_pb2.GetModelInfoRequest(), timeout=timeout, metadata=self._metadata)

    def server_info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        return self._control.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=timeout, metadata=self._metadata)

    def load(self, *, timeout: float | None = None) -> control_pb2.GetLoadResponse:
        return self._control.GetLoad(control_pb2.GetLoadRequest(), timeout=timeout, metadata=self._metadata)

    def cancel(self, request_ids: Sequence[str], *, timeout: float | None = None) -> list[str]:
        """The ids that were found in flight."""
        request = control_pb2.CancelRequest(request_ids=request_ids)
        return list(self._control.Cancel(request, timeout=timeout, metadata=self._metadata).cancelled_request_ids)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finish_reason_name(reason: int) -> str:
    return inference_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_")
