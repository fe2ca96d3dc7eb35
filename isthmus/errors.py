"""The errors that Isthmus raises for what its user asked of it. Imports nothing of the package.

What becomes of a request is said by the subclasses of RequestError, alike by LLM, Client and AsyncClient. Each has the
name of the gRPC status that it travels as.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from isthmus.types import Completion

RETRY_SECONDS = 1.0
"""About the time that a full queue takes to move"""


class ConfigError(ValueError):
    """A configuration that can't work; the message names the field and the limit."""


class RequestError(Exception):
    """A request that has no result. The subclasses say why; this class itself is a status that has none of them."""

    code: ClassVar[str] = "UNKNOWN"
    """The gRPC status that says the same"""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(RequestError, ValueError):
    """A request that could never be run. `field` names the argument at fault, as `prompt`, `temperature` or
    `stop_token_ids[2]`; it is empty where no single one is. `message` says what is wrong with it."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.message = field, message

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str]]:
        return type(self), (self.field, self.message)


class DuplicateRequest(InvalidRequest):
    """A request of this id is in flight already."""

    code = "ALREADY_EXISTS"


class Overloaded(RequestError):
    """Too much waits already."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float | None = RETRY_SECONDS) -> None:
        """retry_after: seconds until it may be worth asking again; None is not known."""
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(RequestError):
    """There is nobody who could take the request: not reached, still loading, shutting down, or closed."""

    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after: float | None = RETRY_SECONDS) -> None:
        """retry_after: seconds until it may be worth asking again; None is not known."""
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(RequestError):
    """The request was cancelled by somebody else than who waits for it."""

    code = "CANCELLED"


class DeadlineExceeded(RequestError, TimeoutError):
    """The request took longer than its timeout."""

    code = "DEADLINE_EXCEEDED"


class Unauthenticated(RequestError):
    """The server wants a token, or another one."""

    code = "UNAUTHENTICATED"


class RequestFailed(RequestError):
    """The request failed by no fault of its own. `reason` is a constant that programs can match: ENGINE_DEAD,
    REQUEST_FAILED, NON_FINITE_LOGITS or CALL_FAILED; empty where the server gave none."""

    code = "INTERNAL"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class BatchError(RequestError):
    """Some items of a list failed, and the others didn't. `results` has what became of each, in the order of the list;
    `errors` has those that failed, by their index."""

    def __init__(self, results: Sequence[Completion | RequestError]) -> None:
        self.results = list(results)
        self.errors: Mapping[int, RequestError] = {
            index: result for index, result in enumerate(results) if isinstance(result, RequestError)
        }
        first, error = next(iter(self.errors.items()))
        super().__init__(
            f"{len(self.errors)} of {len(self.results)} failed, first the one at {first}: {error} "
            "(`results` of this error has the others; return_errors=True returns all)"
        )

    def __reduce__(self) -> tuple[type[BatchError], tuple[list[Completion | RequestError]]]:
        return type(self), (self.results,)
