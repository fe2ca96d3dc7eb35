"""Statuses with google.rpc details, which say which field is wrong, when to try again, or what failed."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from isthmus.errors import (
    RETRY_SECONDS,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    RequestError,
    RequestFailed,
    Unavailable,
)


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


def retry_later(code: int, message: str, seconds: float | None = RETRY_SECONDS) -> status_pb2.Status:
    """A status with RetryInfo. seconds: until it may be worth asking again; None leaves RetryInfo out."""
    if seconds is None:
        return plain(code, message)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(round(1000 * seconds))
    return plain(code, message, retry)


def internal(reason: str, message: str) -> status_pb2.Status:
    """INTERNAL with ErrorInfo, for this request alone. reason: a constant that programs can match."""
    return plain(code_pb2.INTERNAL, message, error_details_pb2.ErrorInfo(reason=reason, domain="isthmus"))


def status_of(error: RequestError) -> status_pb2.Status:
    """The status that tells a caller of an error."""
    code = code_pb2.Code.Value(error.code)
    match error:
        case DuplicateRequest():
            return plain(code, str(error), _blame(error.field, "is in flight already"))
        case InvalidRequest():
            return plain(code, f"{error.field}: {error.message}", _blame(error.field, error.message))
        case Overloaded() | Unavailable():
            return retry_later(code, str(error), error.retry_after)
        case RequestFailed():
            return internal(error.reason, str(error))
        case _:
            return plain(code, str(error))


async def abort(context: grpc.aio.ServicerContext, status: status_pb2.Status) -> NoReturn:
    """Ends the call with `status` and its details. Raises CancelledError if the client has gone already."""
    try:
        await context.abort_with_status(rpc_status.to_status(status))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort returns by raising")
