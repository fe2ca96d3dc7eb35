"""The adapters of a model that is running: what is told of each, and the calls that every model has for them."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

from isthmus.errors import InvalidRequest
from isthmus.forms import check_string


@dataclass(frozen=True)
class AdapterInfo:
    """A LoRA adapter of a model that is running."""

    name: str
    """What a question's `model` calls it"""
    rank: int
    targets: tuple[str, ...]
    """The projections that it adapts, by their paths in a block, such as attention/query"""
    key: str
    """SHA-256 of its scale and factors, in hexadecimal digits"""
    requests: int
    """The requests in flight that have it"""
    unloading: bool = False
    """Whether it is unloaded: no new request can have it, and its place is free when none in flight has it"""


class HasAdapters(Protocol):
    """The calls for adapters of a model with synchronous calls."""

    @abstractmethod
    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Lets calls have the adapter in a folder by the name that their `model` gives; requests in flight go on. What
        is loaded already under that name, from the same numbers, is left as it is, so the call may be repeated.

        path: of a model in this process, a folder or a name like Org/Name in the local Hugging Face cache; of a
        server, a folder in its --adapter-root. Raises InvalidRequest for a name or a folder that can't be used,
        ModelNotFound if there is no such folder, FailedPrecondition if no place is free, if the name is another
        adapter's, or if the server lets nobody load, and any other RequestError.
        """

    @abstractmethod
    def unload_adapter(self, name: str) -> AdapterInfo:
        """Lets no further call have an adapter. Requests in flight that have it go on, and its place is free for
        another when the last has ended. Raises ModelNotFound if none is loaded under the name, and RequestError."""

    @abstractmethod
    def list_adapters(self) -> list[AdapterInfo]:
        """The adapters that calls may have, and those that are unloaded while requests in flight have them. Raises
        RequestError."""


class HasAsyncAdapters(Protocol):
    """The same for asyncio. A call that is cancelled may have been carried out."""

    @abstractmethod
    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """As `HasAdapters.load_adapter`."""

    @abstractmethod
    async def unload_adapter(self, name: str) -> AdapterInfo:
        """As `HasAdapters.unload_adapter`."""

    @abstractmethod
    async def list_adapters(self) -> list[AdapterInfo]:
        """As `HasAdapters.list_adapters`."""


def check_path(path: str | os.PathLike[str]) -> str:
    """The path as text. Raises InvalidRequest for what is none."""
    try:
        text = os.fspath(path)
    except TypeError:
        raise InvalidRequest("path", f"must be a path, not {type(path).__name__}") from None
    if not check_string("path", text) or "\0" in text:
        raise InvalidRequest("path", "must name a folder")
    return text
