"""The safetensors files of a model folder, checked and mapped into memory. Pickles are refused: they can run code."""

from __future__ import annotations

import json
import mmap
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from model.config import ConfigError
from model.files import MAX_INDEX_BYTES, check_file, present, read_json, shortened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
"""What weights may be stored in."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Bytes from the file's beginning"""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class StoredTensor(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...


class Integers(NamedTuple):
    """A matrix of integers as it is published."""

    values: np.ndarray
    """int8[inputs, outputs]"""
    scales: np.ndarray
    """float16[groups, outputs]: of as many inputs in turn as there are to a group"""
    bits: int
    """That the integers need"""


class WeightFiles(ABC):
    """The tensors of a published model, by the names that Hugging Face gives them."""

    folder: Path
    """Where they lie, for errors"""
    says: str
    """What describes the model"""
    tensors: Mapping[str, StoredTensor]

    @abstractmethod
    def array(self, name: str, dtype: np.dtype | None = None, *, reuse: bool = False) -> np.ndarray:
        """A tensor: as it is stored, or, where it is stored as no numbers, in `dtype` or float32 (the default). Not to
        be written to. reuse: it may be written over by this thread's next call."""

    @abstractmethod
    def advise(self, name: str, advice: int) -> None:
        """Tells the kernel about a tensor's bytes: mmap.MADV_WILLNEED before, MADV_DONTNEED after reading."""

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())


class TensorFiles(WeightFiles):
    """Every tensor of a folder, by name, as arrays that read the file where they are read."""

    says = "config.json"

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        """Raises ConfigError for a folder without safetensors, or files that are damaged or not what the index says.

        single: the name of the only file, where it isn't a model's.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        # Of a folder with both, transformers takes the single file.
        indexed = single == SINGLE and present(folder / INDEX) and not present(folder / SINGLE)
        for file in _files(folder, single, indexed):
            for name, stored in _read_header(file).items():
                if name in self.tensors:
                    raise ConfigError(f"{file}: the tensor {name} is in {self.tensors[name].file.name} already")
                self.tensors[name] = stored
        if indexed:
            self._check_index(_read_index(folder / INDEX))
        self._maps: dict[Path, mmap.mmap] = {}

    def _check_index(self, placed: dict[str, str]) -> None:
        for name, file in placed.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ConfigError(f"{self.folder / INDEX} says that {shortened(name)} is in {file}, and it isn't")

    def array(self, name: str, dtype: np.dtype | None = None, *, reuse: bool = False) -> np.ndarray:
        """A read-only view of the file."""
        stored = self.tensors[name]
        count = int(np.prod(stored.shape, dtype=np.int64))
        return np.frombuffer(self._mapped(stored.file), stored.dtype, count, stored.start).reshape(stored.shape)

    def advise(self, name: str, advice: int) -> None:
        stored = self.tensors[name]
        if stored.nbytes:
            start = stored.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped(stored.file).madvise(advice, start, stored.start + stored.nbytes - start)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                # Two threads may come first together; both get the mapping that is kept.
                self._maps.setdefault(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[path]


def _files(folder: Path, single: str, indexed: bool) -> list[Path]:
    if indexed:
        names = sorted(set(_read_index(folder / INDEX).values()))
    elif present(folder / single):
        names = [single]
    else:
        found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        if found:
            raise ConfigError(
                f"{folder} holds {found[0]}, a pickle, which can run code when it is read; convert it to safetensors"
            )
        wanted = f"neither {SINGLE} nor {INDEX}" if single == SINGLE else f"no {single}"
        raise ConfigError(f"{folder} holds {wanted}")
    for name in names:
        # A link may lead elsewhere (that is how the hub's cache is built); a name may not.
        if not _FILE_NAME.fullmatch(name):
            quoted = shortened(repr(name))
            raise ConfigError(f"{folder / INDEX}: {quoted} is not the name of a .safetensors file in the folder")
        check_file(folder / name)
    return [folder / name for name in names]


def _read_index(path: Path) -> dict[str, str]:
    placed = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()) or not placed:
        raise ConfigError(f"{path}: weight_map must map names of tensors to names of files")
    return placed


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library checks header, offsets and size
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise ConfigError(f"{path} is not a whole safetensors file: {error}") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(DTYPES)} are supported")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        tensors[name] = Stored(path, dtype, tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return tensors
