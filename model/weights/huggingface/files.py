"""The safetensors files of a model folder, checked and mapped into memory. Pickles are refused, because they can run
code."""

from __future__ import annotations

import json
import mmap
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from isthmus.errors import ConfigError
from isthmus.model.ops.quantized import Bits
from isthmus.model.process.files import MAX_INDEX_BYTES, check_file, present, read_json, shortened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
"""The dtypes that weights may be stored in."""

CODES: dict[str, Any] = {
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""The dtypes that the parts of a matrix may be stored in if it is stored as codes and scales."""

View = Callable[[np.ndarray], np.ndarray]
"""Returns a part of an array, with its axes transposed, split or joined. It copies nothing."""


class StoredTensor(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """The offset from the beginning of the file, in bytes"""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Exact(NamedTuple):
    """The format of ours that holds a published matrix of integers bit for bit."""

    bits: Bits
    group: int
    """The number of inputs that share a scale"""
    scales: Literal["bfloat16", "float16"]


class Integers(NamedTuple):
    """A matrix of integers as it is published."""

    values: np.ndarray
    """int8[inputs, outputs]"""
    scales: np.ndarray
    """bfloat16 or float16[groups, outputs]"""


class WeightFiles(ABC):
    """The tensors of a published model, by the names that Hugging Face gives them."""

    folder: Path
    """The folder or file that holds them, which errors name"""
    says: str
    """The name of what describes the model, for errors"""
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @abstractmethod
    def array(self, name: str) -> np.ndarray:
        """Returns a whole tensor, read-only. A tensor that is stored as codes or blocks is decoded to float32."""

    @abstractmethod
    def read(self, name: str, view: View, dtype: np.dtype) -> np.ndarray:
        """Returns view(the tensor), valid until this thread's next call. dtype: the one that the caller will convert it
        to. A tensor that is stored as codes or blocks may be decoded to it directly."""

    @abstractmethod
    def advise(self, name: str, advice: int) -> None:
        """Tells the kernel how a tensor's bytes will be used: mmap.MADV_WILLNEED before reading them, MADV_DONTNEED
        after."""

    def means_nothing(self, name: str) -> bool:
        """Whether a tensor has no effect, so that a model without such a parameter may have it."""
        return False

    def exact(self, name: str) -> Exact | None:
        """Returns the format of ours that holds a matrix of integers exactly; None where there is none."""
        return None

    def integers(self, name: str) -> Integers:
        """Returns the integers of a matrix for which `exact` returns a format. Raises ConfigError for scales that are
        not finite."""
        raise AssertionError(f"{name} is no matrix of integers")

    def described(self, whole: Collection[str]) -> str | None:
        """Says how many matrices are stored in which way, and what becomes of them; None where all are plain numbers.
        whole: the names of those that stay integers."""
        return None


class TensorFiles(WeightFiles):
    """The tensors of a folder's safetensors files by name. Their arrays are views of the mapped files."""

    says = "config.json"
    tensors: dict[str, Stored]

    def __init__(self, folder: Path, single: str = SINGLE, *, codes: bool = False) -> None:
        """Raises ConfigError for a folder without safetensors, or with files that are damaged or don't match the index.

        single: the name of the only file, in a folder that isn't a model's. codes: whether tensors may be stored in
        CODES.
        """
        self.folder = folder
        self.tensors = {}
        # Where a folder has both, transformers reads the single file.
        indexed = single == SINGLE and present(folder / INDEX) and not present(folder / SINGLE)
        for file in _files(folder, single, indexed):
            for name, stored in _read_header(file, {**DTYPES, **CODES} if codes else DTYPES).items():
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

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the file."""
        stored = self.tensors[name]
        count = int(np.prod(stored.shape, dtype=np.int64))
        return np.frombuffer(self._mapped(stored.file), stored.dtype, count, stored.start).reshape(stored.shape)

    def copy(self, name: str) -> np.ndarray:
        """A whole tensor, read from the file without mapping it. Who reads a mapping of a file that is cut short
        meanwhile ends the process; here that is a ConfigError."""
        stored = self.tensors[name]
        try:
            with stored.file.open("rb") as file:
                file.seek(stored.start)
                read = file.read(stored.nbytes)
        except OSError as error:
            raise ConfigError(f"{stored.file} can't be read: {error.strerror}") from None
        if len(read) < stored.nbytes:
            raise ConfigError(f"{stored.file} was cut short while it was read")
        return np.frombuffer(read, stored.dtype).reshape(stored.shape)

    def read(self, name: str, view: View, dtype: np.dtype) -> np.ndarray:
        """view(array(name)), in the file's own dtype."""
        return view(self.array(name))

    def advise(self, name: str, advice: int) -> None:
        stored = self.tensors[name]
        if stored.nbytes:
            start = stored.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped(stored.file).madvise(advice, start, stored.start + stored.nbytes - start)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    # Two threads may map the file at the same time. Both get the mapping that is kept.
                    self._maps.setdefault(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                raise ConfigError(f"{path} can't be read: {error.strerror}") from None
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
        # A link may lead out of the folder, as in the hub's cache, but a name may not.
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


def _read_header(path: Path, dtypes: dict[str, Any]) -> dict[str, Stored]:
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
        if entry["dtype"] not in dtypes:
            raise ConfigError(f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(dtypes)} are supported")
        dtype = np.dtype(dtypes[entry["dtype"]])
        tensors[name] = Stored(path, dtype, tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return tensors
