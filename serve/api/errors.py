"""Statuses with google.rpc details: which field is wrong, when to come back, what broke."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from isthmus.serve.engine.request import (
    Draining,
    DuplicateId,
    EngineDead,
    EngineError,
    InvalidRequest,
    QueueFull,
    Stalled,
)

RETRY_SECONDS = 1
"""What RetryInfo says: about the time a full queue takes to move."""


def plain(code: int, message: str, *details: Message) -> status_pb2.Status:
    """A status with these google.rpc details."""
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def invalid(field: str, message: str) -> status_pb2.Status:
    """INVALID_ARGUMENT with a BadRequest that names the field."""
    return plain(code_pb2.INVALID_ARGUMENT, f"{field}: {message}", _blame(field, message))


def _blame(field: str, message: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
    return error_details_pb2.BadRequest(field_violations=[violation])


def retry_later(code: int, message: str) -> status_pb2.Status:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(RETRY_SECONDS)
    return plain(code, message, retry)


def cancelled() -> status_pb2.Status:
    return plain(code_pb2.CANCELLED, "the request was cancelled")


def closed() -> status_pb2.Status:
    return retry_later(code_pb2.UNAVAILABLE, "the server was shut down before the request was done")


def internal(reason: str, message: str) -> status_pb2.Status:
    """INTERNAL, this request's alone; reason is a constant that programs can match."""
    return plain(code_pb2.INTERNAL, message, error_details_pb2.ErrorInfo(reason=reason, domain="isthmus"))


def status_of(error: InvalidRequest | EngineError) -> status_pb2.Status:
    """What the caller is told of an error of the engine."""
    match error:
        case InvalidRequest():
            return invalid(error.field, error.message)
        case QueueFull():
            return retry_later(code_pb2.RESOURCE_EXHAUSTED, str(error))
        case DuplicateId():
            return plain(code_pb2.ALREADY_EXISTS, str(error), _blame("request_id", "is in flight already"))
        case Draining() | Stalled():
            return retry_later(code_pb2.UNAVAILABLE, str(error))
        case EngineDead():
            return internal("ENGINE_DEAD", str(error))
        case _:
            return internal("ENGINE_ERROR", str(error))


async def abort(context: grpc.aio.ServicerContext, status: status_pb2.Status) -> NoReturn:
    """Ends the call with `status` and its details, or, where nobody is there any more to be told, as cancelled."""
    try:
        await context.abort_with_status(rpc_status.to_status(status))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort returns by raising")
