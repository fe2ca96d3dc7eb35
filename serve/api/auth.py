"""Asks for a bearer token on every call but those of health."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.rpc import code_pb2

from isthmus.serve.api.errors import abort, plain


def tenant_of(context: grpc.aio.ServicerContext) -> str:
    """Who calls, where every call needs a token: a digest of the call's token, so that it can be kept and shown."""
    given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    value = given[0] if len(given) == 1 else ""
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()


_OPEN = "/grpc.health.v1.Health/"


class TokenAuth(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED unless `authorization` is `Bearer TOKEN`, which is compared in constant time."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN) or self._allows(handler_call_details):
            return handler
        return _refusal(handler)

    def _allows(self, details: grpc.HandlerCallDetails) -> bool:
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        value = given[0] if len(given) == 1 else ""
        return hmac.compare_digest(value.encode() if isinstance(value, str) else value, self._expected)


def _refusal(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler that refuses a call without reading its message. Its requests are a stream, which no client notices."""

    async def refuse(messages: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, plain(code_pb2.UNAUTHENTICATED, "authorization: a valid bearer token is needed"))

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.stream_unary_rpc_method_handler(refuse)
