"""The header of a GGUF file (llama.cpp, ggml/docs/gguf.md): metadata, and where each tensor lies.

The package gguf reads it number by number. That takes 20 s for a vocabulary of 256k, and never ends for some damaged
files. This module takes a fraction of a second, and reads nothing that the file has no room for.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.process.files import check_file, shortened
from isthmus.model.weights.gguf.blocks import KINDS, Kind

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 512 << 20
"""The most bytes of a header, which consists of metadata and a list of tensors. A vocabulary of 256k takes 7 MB."""
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 16

_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
"""The types of metadata that are numbers, by their number in the file."""


@dataclass(frozen=True)
class BlockTensor:
    """One tensor in a file."""

    kind: Kind
    shape: tuple[int, ...]
    """The sizes of the axes, the slowest axis first, as in numpy"""
    memory: mmap.mmap
    """The mapped file"""
    start: int
    """The offset from the beginning of the file, in bytes"""

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.kind.numbers * self.kind.size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    """The part of a GGUF file that precedes the weights."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, strings, lists of strings, and arrays of numbers. A float32 becomes the shortest decimal that stands for
    it, such as 1e-05, which is what config.json had"""
    tensors: dict[str, BlockTensor]


def read_header(path: Path) -> Header:
    """Reads a header. Raises ConfigError for a file that isn't GGUF, is damaged or cut short, or holds tensors of an
    unknown kind."""
    check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise ConfigError(f"{path} is not a GGUF file: it begins with {shortened(repr(start))}")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    return _Reader(path, memory).header()


class _Reader:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self._path, self._memory = path, memory
        self._place, self._end = len(MAGIC), min(len(memory), MAX_HEADER_BYTES)

    def header(self) -> Header:
        version = int(self._number(np.dtype("<u4")))
        if version & 0xFFFF == 0 and version:
            raise self._error("it is big-endian; convert it with gguf_convert_endian of package gguf")
        if version not in VERSIONS:
            raise self._error(f"it is of version {version}; {' and '.join(map(str, VERSIONS))} are read")
        tensors, entries = (int(self._number(np.dtype("<u8"))) for _ in range(2))
        self._check_count("entries of metadata", entries, 13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self._string(MAX_NAME_BYTES)
            if name in metadata:
                raise self._error(f"{shortened(repr(name))} is in its metadata twice")
            metadata[name] = self._value(name)
        self._check_count("tensors", tensors, 32)
        listed = [self._tensor() for _ in range(tensors)]
        return Header(self._path, metadata, self._placed(listed, metadata))

    def _placed(self, listed: list[tuple[str, Kind, tuple[int, ...], int]], metadata: dict) -> dict[str, BlockTensor]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._error(f"general.alignment={shortened(repr(alignment))} must be a power of two")
        base = -(-self._place // alignment) * alignment
        tensors: dict[str, BlockTensor] = {}
        for name, kind, shape, offset in listed:
            stored = BlockTensor(kind, shape, self._memory, base + offset)
            if name in tensors:
                raise self._error(f"the tensor {shortened(name)} is in it twice")
            if stored.start + stored.nbytes > len(self._memory):
                raise self._error(
                    f"the tensor {shortened(name)} ends at byte {stored.start + stored.nbytes:,}, and the file at "
                    f"{len(self._memory):,}: it is cut short, or damaged"
                )
            tensors[name] = stored
        return tensors

    def _tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name = self._string(MAX_NAME_BYTES)
        axes = int(self._number(np.dtype("<u4")))
        if not 1 <= axes <= MAX_DIMENSIONS:
            raise self._error(f"the tensor {shortened(name)} has {axes} axes; 1 to {MAX_DIMENSIONS} are read")
        shape = tuple(int(self._number(np.dtype("<u8"))) for _ in range(axes))[::-1]
        number = int(self._number(np.dtype("<u4")))
        offset = int(self._number(np.dtype("<u8")))
        if number not in KINDS:
            raise self._error(
                f"the tensor {shortened(name)} is of {_kind_name(number)}, which is not read here; quantize the model "
                f"to one of {', '.join(kind.name for kind in KINDS.values())}"
            )
        if not all(0 < size < 1 << 40 for size in shape) or math.prod(shape) >= 1 << 48 or offset >= 1 << 60:
            raise self._error(f"the tensor {shortened(name)} can't be {list(shape)} at {offset}: it is damaged")
        if shape[-1] % KINDS[number].numbers:
            raise self._error(f"the tensor {shortened(name)} has rows of {shape[-1]}, which are no whole blocks of "
                              f"{KINDS[number].name}")  # fmt: skip
        return name, KINDS[number], shape, offset

    def _value(self, name: str) -> Any:
        kind = int(self._number(np.dtype("<u4")))
        if kind == _STRING:
            return self._string(self._end)
        if kind == _ARRAY:
            return self._array(name)
        if kind not in _SCALARS:
            raise self._error(f"{shortened(repr(name))} in its metadata is of the unknown type {kind}")
        number = self._number(_SCALARS[kind])
        return float(str(number)) if kind == _FLOAT32 else number.item()

    def _array(self, name: str) -> Any:
        kind, count = int(self._number(np.dtype("<u4"))), int(self._number(np.dtype("<u8")))
        if kind == _STRING:
            self._check_count(f"strings in {name}", count, 8)
            return [self._string(self._end) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._error(f"{shortened(repr(name))} in its metadata is a list of type {kind}, which isn't read")
        self._check_count(f"numbers in {name}", count, _SCALARS[kind].itemsize)
        return np.frombuffer(self._take(count * _SCALARS[kind].itemsize), _SCALARS[kind])

    def _string(self, most: int) -> str:
        size = int.from_bytes(self._take(8), "little")
        if size > most:
            raise self._error(f"a string of {size:,} bytes is in its header: it is damaged")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"a string in its header is no UTF-8: {error}") from None

    def _number(self, dtype: np.dtype) -> Any:
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0]

    def _take(self, size: int) -> bytes:
        if size > self._end - self._place:
            raise self._error(
                "its header goes on beyond its end: it is cut short, or damaged"
                if self._end == len(self._memory)
                else f"its header has more than {MAX_HEADER_BYTES >> 20} MiB, the most that one may have"
            )
        taken = self._memory[self._place : self._place + size]
        self._place += size
        return taken

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count * least_bytes > self._end - self._place:
            raise self._error(f"{count:,} {shortened(what)} don't fit into it: it is cut short, or damaged")

    def _error(self, why: str) -> ConfigError:
        return ConfigError(f"{self._path}: {why}")


def _kind_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    known = {each.value: each.name for each in GGMLQuantizationType}
    return f"the kind {known.get(number, number)}"
