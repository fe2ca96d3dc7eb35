"""A client of a server's isthmus.v1 API: for asyncio, typed, without jax."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import grpc

from isthmus.adapters import AdapterInfo
from isthmus.client import (
    AT_ONCE,
    OPTIONS,
    Gathered,
    bearer,
    cancel_request,
    check_at_once,
    check_target,
    choose_credentials,
    closed,
    detokenize_request,
    tokenize_request,
    watch_request,
)
from isthmus.errors import Unavailable
from isthmus.proto import API_FIELDS, error_of, message_of, response_of
from isthmus.proto_adapters import info_of, infos_of, load_message, unload_message
from isthmus.proto_scores import EMBED_FIELDS, SCORE_FIELDS, embed_message, embedding_of, score_message, scores_of
from isthmus.protocol import AsyncModel
from isthmus.scores import Embedding, EmbedQuestion, Score, ScoreQuestion
from isthmus.types import Completion, Delta, Question, check_timeout
from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

T = TypeVar("T")

_FIELDS: dict[type, Mapping[str, str]] = {
    inference_pb2.GenerateRequest: API_FIELDS,
    inference_pb2.ScoreRequest: SCORE_FIELDS,
    inference_pb2.EmbedRequest: EMBED_FIELDS,
}
"""The library's arguments for the fields of requests whose errors name them"""


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
        self._target, self._at_once = check_target(target), check_at_once(at_once)
        self._credentials = choose_credentials(credentials, tls_ca)
        self._metadata = bearer(token)
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """The gRPC channel, made at first use, on the event loop that is then running."""
        self._check_open()
        self._loop = asyncio.get_running_loop()
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

    async def ask_score(self, question: ScoreQuestion, timeout: float | None = None) -> list[Score]:
        message = score_message(question)
        return scores_of(await self._call(self._inference.Score, message, inference_pb2.ScoreResponse, timeout))

    async def ask_embed(self, question: EmbedQuestion, timeout: float | None = None) -> Embedding:
        message = embed_message(question)
        return embedding_of(await self._call(self._inference.Embed, message, inference_pb2.EmbedResponse, timeout))

    async def follow(self, question: Question, timeout: float | None = None) -> AsyncGenerator[Delta, None]:
        message = inference_pb2.GenerateStreamRequest(request=message_of(question))
        self._check_open()
        call = self._inference.GenerateStream(message, timeout=timeout, metadata=self._metadata)
        gathered = Gathered(question)
        try:
            async for event in call:
                if (delta := gathered.take(event)) is not None:
                    yield delta
        except grpc.RpcError as error:
            raise error_of(error, timeout=timeout) from error
        except asyncio.CancelledError as error:
            raise self._reason(error) from None
        finally:
            call.cancel()

    async def tokenize(self, text: str, *, parse_special: bool = False, timeout: float | None = None) -> list[int]:
        request = tokenize_request(text, parse_special)
        return list(
            (await self._call(self._inference.Tokenize, request, inference_pb2.TokenizeResponse, timeout)).token_ids
        )

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        request = detokenize_request(token_ids)
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

    async def load(self, *, timeout: float | None = None) -> control_pb2.Load:
        request = control_pb2.GetLoadRequest()
        return (await self._call(self._control.GetLoad, request, control_pb2.GetLoadResponse, timeout)).load

    async def watch_load(self, interval: float = 1.0) -> AsyncGenerator[control_pb2.Load, None]:
        """Yields how busy the server is, at once and then every `interval` seconds, until it ends. Raises RequestError,
        which is Unavailable if the server is gone."""
        request = watch_request(interval)
        self._check_open()
        call = self._control.WatchLoad(request, metadata=self._metadata)
        try:
            async for response in call:
                yield response.load
        except grpc.RpcError as error:
            raise error_of(error, {}) from error
        except asyncio.CancelledError as error:
            raise self._reason(error) from None
        finally:
            call.cancel()

    async def cancel(self, request_ids: Sequence[str], *, timeout: float | None = None) -> list[str]:
        """Ends requests by their ids, whoever made them. Returns the ids that were in flight."""
        request = cancel_request(request_ids)
        return list(
            (await self._call(self._control.Cancel, request, control_pb2.CancelResponse, timeout)).cancelled_request_ids
        )

    async def load_adapter(
        self, name: str, path: str | os.PathLike[str], *, timeout: float | None = None
    ) -> AdapterInfo:
        request = load_message(name, path)
        return info_of(
            (await self._call(self._control.LoadAdapter, request, control_pb2.LoadAdapterResponse, timeout)).adapter
        )

    async def unload_adapter(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        request = unload_message(name)
        return info_of(
            (await self._call(self._control.UnloadAdapter, request, control_pb2.UnloadAdapterResponse, timeout)).adapter
        )

    async def list_adapters(self, *, timeout: float | None = None) -> list[AdapterInfo]:
        request = control_pb2.ListAdaptersRequest()
        return infos_of(
            (await self._call(self._control.ListAdapters, request, control_pb2.ListAdaptersResponse, timeout)).adapters
        )

    async def _call(self, method: Callable[..., Any], request: object, kind: type[T], timeout: float | None) -> T:
        """The response of `method`, which is a `kind`. Raises RequestError."""
        self._check_open()
        timeout = check_timeout(timeout)
        try:
            answer: T = await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, _FIELDS.get(type(request), {}), timeout) from error
        except asyncio.CancelledError as error:
            raise self._reason(error) from None
        return answer

    def _check_open(self) -> None:
        """Raises Unavailable once it is closed, where gRPC may crash, and on another event loop than its own."""
        if self._closed:
            raise closed()
        if self._loop not in (None, asyncio.get_running_loop()):
            raise Unavailable("this client belongs to another event loop: open one on each", None)

    def _reason(self, error: asyncio.CancelledError) -> BaseException:
        """Why a call was cancelled: closing cancels those under way, though nobody has cancelled their tasks."""
        task = asyncio.current_task()
        return closed() if self._closed and task is not None and not task.cancelling() else error

    async def close(self) -> None:
        """Ends what is under way, as Unavailable. Every later call raises that, too."""
        self._closed = True
        if "channel" in vars(self):
            await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
