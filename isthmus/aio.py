"""A client of a server's isthmus.v1 API: for asyncio, typed, without jax."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import grpc

from isthmus.client import AT_ONCE, OPTIONS, Gathered, bearer, choose_credentials
from isthmus.proto import error_of, fitting, message_of, response_of
from isthmus.protocol import AsyncModel
from isthmus.types import Completion, Delta, Question
from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

T = TypeVar("T")


class AsyncClient(AsyncModel):
    """Calls one server, on the event loop that it is first used on. Every method raises RequestError; `timeout` is
    the deadline in seconds."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        tls_ca: Path | str | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        """Takes the arguments of `Client`, and raises the same errors."""
        self._target, self._at_once = target, at_once
        self._credentials = choose_credentials(credentials, tls_ca)
        self._metadata = bearer(token)

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """The gRPC channel, made at first use, on the event loop that is then running."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, OPTIONS)
        return grpc.aio.secure_channel(self._target, self._credentials, OPTIONS)

    @cached_property
    def _inference(self) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @cached_property
    def _control(self) -> control_pb2_grpc.ControlServiceStub:
        return control_pb2_grpc.ControlServiceStub(self.channel)

    @property
    def at_once(self) -> int:
        return self._at_once

    async def ask(self, question: Question, timeout: float | None = None) -> Completion:
        answer = await self._call(
            self._inference.Generate, message_of(question), inference_pb2.GenerateResponse, timeout
        )
        return response_of(answer)

    async def follow(self, question: Question, timeout: float | None = None) -> AsyncGenerator[Delta, None]:
        message = inference_pb2.GenerateStreamRequest(request=message_of(question))
        call = self._inference.GenerateStream(message, timeout=timeout, metadata=self._metadata)
        gathered = Gathered()
        try:
            async for event in call:
                if (delta := gathered.take(event)) is not None:
                    yield delta
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        request = fitting("text", lambda: inference_pb2.TokenizeRequest(text=text, parse_special=parse_special))
        return list(
            (await self._call(self._inference.Tokenize, request, inference_pb2.TokenizeResponse, timeout)).token_ids
        )

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        request = fitting("token_ids", lambda: inference_pb2.DetokenizeRequest(token_ids=token_ids))
        return str(
            (await self._call(self._inference.Detokenize, request, inference_pb2.DetokenizeResponse, timeout)).text
        )

    async def model_info(self, *, timeout: float | None = None) -> control_pb2.GetModelInfoResponse:
        return await self._call(
            self._control.GetModelInfo, control_pb2.GetModelInfoRequest(), control_pb2.GetModelInfoResponse, timeout
        )

    async def server_info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        return await self._call(
            self._control.GetServerInfo, control_pb2.GetServerInfoRequest(), control_pb2.GetServerInfoResponse, timeout
        )

    async def load(self, *, timeout: float | None = None) -> control_pb2.GetLoadResponse:
        return await self._call(
            self._control.GetLoad, control_pb2.GetLoadRequest(), control_pb2.GetLoadResponse, timeout
        )

    async def cancel(self, request_ids: Sequence[str], *, timeout: float | None = None) -> list[str]:
        """Ends requests by their ids, whoever made them. Returns the ids that were in flight."""
        request = control_pb2.CancelRequest(request_ids=request_ids)
        return list(
            (await self._call(self._control.Cancel, request, control_pb2.CancelResponse, timeout)).cancelled_request_ids
        )

    async def _call(self, method: Callable[..., Any], request: object, kind: type[T], timeout: float | None) -> T:
        """The response of `method`, which is a `kind`. Raises RequestError."""
        try:
            answer: T = await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, generating=isinstance(request, inference_pb2.GenerateRequest)) from error
        return answer

    async def close(self) -> None:
        if "channel" in vars(self):
            await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
