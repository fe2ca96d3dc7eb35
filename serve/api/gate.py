"""The gate that every call passes before a service sees it. It checks whether there is room and what the message holds,
and turns what the service raises into a status."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError
from google.rpc import code_pb2

from isthmus.errors import InvalidRequest, RequestError
from isthmus.serve.api.errors import abort, internal, plain, retry_later, status_of
from isthmus.serve.api.wire import check_wire
from isthmus.serve.prepare.workers import SHORT, Workers

Parse = Callable[[bytes], Any]

logger = logging.getLogger("isthmus.api")

READ_SECONDS = 30.0
"""Seconds in which a call's message must come, so that a call without one doesn't keep its place"""


class Gate(grpc.aio.ServerInterceptor):
    """Reads the messages of unary calls itself, as bytes, so that a refused call's message is neither read nor parsed.

    A RequestError that a service raises becomes its status; any other exception is logged, and the call is INTERNAL.
    """

    def __init__(self, workers: Workers, limits: dict[str, int], others: int) -> None:
        """limits: most calls at once of a service, by its full name. others: most calls at once of one method of any
        other service, so that calls of Health.Watch, for example, take no places from Health.Check."""
        self._workers, self._limits, self._others = workers, limits, others
        self._calls: Counter[str] = Counter()
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self._wrap(method, handler)
        return self._handlers[method]

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """A handler for the same method that takes messages as bytes."""
        service, name = method.strip("/").split("/")
        kind = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].input_type
        parse: Parse = handler.request_deserializer or bytes
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def argument(messages: Any, context: grpc.aio.ServicerContext) -> Any:
            if handler.request_streaming:
                return self._parsed(messages, parse, kind, context)
            return await self._message(context, parse, kind)

        async def whole(messages: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._place(service, method, context):
                return await behaviour(await argument(messages, context), context)

        async def written(messages: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._place(service, method, context):
                answers = behaviour(await argument(messages, context), context)
                if hasattr(answers, "__aiter__"):
                    async for answer in answers:
                        await context.write(answer)
                else:
                    await answers

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(written, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(whole, None, handler.response_serializer)

    @asynccontextmanager
    async def _place(self, service: str, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Holds one of the service's places for calls. An exception inside ends the call with a status."""
        limit, counted = (self._limits[service], service) if service in self._limits else (self._others, method)
        if self._calls[counted] >= limit:
            await abort(
                context, retry_later(code_pb2.RESOURCE_EXHAUSTED, f"{limit} calls of {counted} are open already")
            )
        self._calls[counted] += 1
        try:
            yield
        except grpc.aio.InternalError:  # the client has gone, and gRPC would log that
            raise asyncio.CancelledError from None
        except grpc.aio.BaseError:  # the service has aborted the call
            raise
        except RequestError as error:
            await abort(context, status_of(error))
        except Exception:
            logger.exception("%s failed", method)
            await abort(context, internal("CALL_FAILED", "the server failed at this call; its log says how"))
        finally:
            self._calls[counted] -= 1

    async def _message(self, context: grpc.aio.ServicerContext, parse: Parse, kind: Any) -> Any:
        try:
            async with asyncio.timeout(READ_SECONDS):
                data = await context.read()
        except TimeoutError:
            message = f"the request didn't come within {READ_SECONDS:g} s"
            await abort(context, plain(code_pb2.DEADLINE_EXCEEDED, message))
        if data is grpc.aio.EOF:
            await abort(context, plain(code_pb2.INVALID_ARGUMENT, f"the call has no {kind.full_name}"))
        return await self._parse(context, data, parse, kind)

    async def _parsed(
        self, messages: Any, parse: Parse, kind: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        async for data in messages:
            yield await self._parse(context, data, parse, kind)

    async def _parse(self, context: grpc.aio.ServicerContext, data: bytes, parse: Parse, kind: Any) -> Any:
        try:
            return await self._workers.run(len(data), _parse, data, parse, kind)
        except InvalidRequest as error:
            await abort(context, status_of(error))
        except DecodeError:
            message = f"the {len(data)} bytes sent are not a {kind.full_name}"
            await abort(context, plain(code_pb2.INVALID_ARGUMENT, message))


def _parse(data: bytes, parse: Parse, kind: Any) -> Any:
    if len(data) > SHORT:
        check_wire(data, kind)
    return parse(data)
