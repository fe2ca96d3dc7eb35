"""The errors that Isthmus raises for what its user asked of it. Imports nothing of the package.

A request without a result raises a subclass of RequestError, the same from LLM, Client and AsyncClient. Its `code` is
the name of the gRPC status that a server answers with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

RETRY_SECONDS = 1.0
"""Seconds to wait before asking again: about the time that a full queue takes to move"""


class ConfigError(ValueError):
    """A configuration that can't work; the message names the field and the limit."""


class RequestError(Exception):
    """A request that has no result. Subclasses say why; this class itself stands for every other gRPC status."""

    code: ClassVar[str] = "UNKNOWN"
    """The name of the gRPC status that means the same"""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(RequestError, ValueError):
    """A request that could never be run. `field` names the argument at fault, such as `prompt`, `temperature`
    or `stop_token_ids[2]`; it is empty if no single one is. `message` says what is wrong with it."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.message = field, message

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str]]:
        return type(self), (self.field, self.message)


class DuplicateRequest(InvalidRequest):
    """A request with this id is in flight already."""

    code = "ALREADY_EXISTS"


class ModelNotFound(InvalidRequest):
    """There is no model with the name that was asked."""

    code = "NOT_FOUND"


class FailedPrecondition(RequestError):
    """What is asked for can't be done as things are; the message says what has to change first."""

    code = "FAILED_PRECONDITION"


class Overloaded(RequestError):
    """Too many requests, or too much text, are waiting already."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float | None = RETRY_SECONDS) -> None:
        """retry_after: seconds until it may be worth asking again; None if that isn't known."""
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(RequestError):
    """The model can't take the request: it can't be reached, is still loading, is shutting down, or was closed."""

    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after: float | None = RETRY_SECONDS) -> None:
        """retry_after: seconds until it may be worth asking again; None if that isn't known."""
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(RequestError):
    """The request was cancelled by somebody other than its caller."""

    code = "CANCELLED"


class DeadlineExceeded(RequestError, TimeoutError):
    """The request took longer than its timeout."""

    code = "DEADLINE_EXCEEDED"

    @classmethod
    def after(cls, timeout: float | None) -> DeadlineExceeded:
        """What becomes of a request that hasn't ended within its timeout. timeout: in seconds."""
        return cls(f"the request hasn't ended within its timeout of {timeout} s")


class Unauthenticated(RequestError):
    """The server needs an auth token, and the call had none or a wrong one."""

    code = "UNAUTHENTICATED"


class RequestFailed(RequestError):
    """The request failed by no fault of its own. `reason` is a constant that programs can match: ENGINE_DEAD,
    REQUEST_FAILED, CONSTRAINT_FAILED, NON_FINITE_LOGITS or CALL_FAILED; it is empty if the server gave none."""

    code = "INTERNAL"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class BatchError(RequestError):
    """At least one item of a list failed. `results` has the outcome of each, in the order of the list; `errors` has the
    errors alone, by index."""

    def __init__(self, results: Sequence[Any]) -> None:
        self.results = list(results)
        self.errors: Mapping[int, RequestError] = {
            index: result for index, result in enumerate(results) if isinstance(result, RequestError)
        }
        first, error = next(iter(self.errors.items()))
        super().__init__(
            f"{len(self.errors)} of {len(self.results)} failed, the first at index {first}: {error} "
            "(this error's `results` has all outcomes)"
        )

    def __reduce__(self) -> tuple[type[BatchError], tuple[list[Any]]]:
        return type(self), (self.results,)
