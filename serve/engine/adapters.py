"""The adapters that an engine has: their names, and their places among the factors that its programs read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isthmus.model.weights.lora import Adapter

KEY_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Resident:
    """An adapter in an engine."""

    name: str
    """What requests call it"""
    place: int
    """Which of the engine's adapters it is, from 1 on"""
    key: bytes
    """SHA-256 of all that it computes, by which the prefix cache tells it from others"""


def residents(adapters: Mapping[str, Adapter]) -> dict[str, Resident]:
    """The adapters by their names, placed in their order."""
    return {name: Resident(name, place, key_of(each)) for place, (name, each) in enumerate(adapters.items(), 1)}


def key_of(adapter: Adapter) -> bytes:
    """SHA-256 of an adapter's scale and factors."""
    digest = hashlib.sha256(np.float64(adapter.lora.scale).tobytes())
    for path, factor in sorted(adapter.factors.items()):
        digest.update(f"{path} {factor.shape} ".encode())
        digest.update(np.ascontiguousarray(factor).tobytes())
    return digest.digest()
