"""Converts between the library's own types and the messages of isthmus.v1 for adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable

from isthmus.adapters import AdapterInfo, check_path
from isthmus.forms import check_string
from isthmus.v1 import control_pb2


def load_message(name: str, path: str | os.PathLike[str]) -> control_pb2.LoadAdapterRequest:
    """Raises InvalidRequest."""
    return control_pb2.LoadAdapterRequest(name=check_string("name", name), path=check_path(path))


def unload_message(name: str) -> control_pb2.UnloadAdapterRequest:
    """Raises InvalidRequest."""
    return control_pb2.UnloadAdapterRequest(name=check_string("name", name))


def adapter_message(info: AdapterInfo) -> control_pb2.Adapter:
    return control_pb2.Adapter(
        name=info.name,
        rank=info.rank,
        targets=info.targets,
        key=info.key,
        requests=info.requests,
        unloading=info.unloading,
    )


def info_of(message: control_pb2.Adapter) -> AdapterInfo:
    return AdapterInfo(
        message.name, message.rank, tuple(message.targets), message.key, message.requests, message.unloading
    )


def infos_of(messages: Iterable[control_pb2.Adapter]) -> list[AdapterInfo]:
    return [info_of(message) for message in messages]
