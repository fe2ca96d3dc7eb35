"""The tensors of a GGUF file as arrays of numbers, with the names and the order of rows that Hugging Face uses."""

from __future__ import annotations

import mmap
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.process.files import shortened
from isthmus.model.weights.gguf.architectures import Architecture, published_name
from isthmus.model.weights.gguf.blocks import EXACT, dequantize, integers
from isthmus.model.weights.gguf.header import BlockTensor, Header, read_header
from isthmus.model.weights.huggingface.files import Exact, Integers, View, WeightFiles

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAX_PARTS = 1000
MAX_EXPERTS = 4096


@dataclass(frozen=True)
class Tensor:
    """One of Hugging Face's tensors: all of a stored tensor, or some of its rows."""

    stored: BlockTensor
    shape: tuple[int, ...]
    first: int = 0
    """The first of its rows in the stored tensor"""
    pairs: int = 0
    """The number of heads whose rows lie in pairs in the file; 0 means that no rows do"""
    offset: float = 0.0
    """The number that the file adds to every value, which is subtracted on reading"""

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """The size in the file, in bytes."""
        return self.rows * self.stored.row_bytes

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds the tensor without loss."""
        return self.stored.kind.dtype or np.dtype(np.float32)


class GgufFiles(WeightFiles):
    """The tensors of a GGUF file."""

    says = "its metadata"

    def __init__(self, header: Header, architecture: Architecture, heads: int, kv_heads: int) -> None:
        """Raises ConfigError where tensors have the same name or a shape that can't be right."""
        self.folder = header.path
        self._heads = {"attn_q": heads, "attn_k": kv_heads} if architecture.pairs else {}
        self._architecture = architecture
        self.tensors: dict[str, Tensor] = {}
        for name, stored in header.tensors.items():
            for published, tensor in self._tensors(name, stored):
                if published in self.tensors:
                    raise ConfigError(f"{self.folder}: two tensors become {published}; one of them is {name}")
                self.tensors[published] = tensor
        self._thread = threading.local()

    def _tensors(self, name: str, stored: BlockTensor) -> Iterator[tuple[str, Tensor]]:
        published = published_name(self._architecture, name)
        part = name.split(".")[2] if name.startswith("blk.") and name.count(".") > 2 else ""
        if not published:
            return
        if stored.kind.dtype is None and len(stored.shape) < 2:
            raise ConfigError(f"{self.folder}: the tensor {name} has one axis, and is kept as {stored.kind.name}")
        if "{expert}" in published:
            if len(stored.shape) != 3 or stored.shape[0] > MAX_EXPERTS:
                raise ConfigError(f"{self.folder}: the tensor {name} has the shape {list(stored.shape)}; [experts, "
                                  f"outputs, inputs] of at most {MAX_EXPERTS} are read")  # fmt: skip
            rows = int(np.prod(stored.shape[1:-1], dtype=np.int64))
            for expert in range(stored.shape[0]):
                yield published.format(expert=expert), Tensor(stored, stored.shape[1:], expert * rows)
            return
        shape = stored.shape
        heads = self._heads.get(part, 0)
        rows = shape[0]
        if heads and (len(shape) > 2 or rows % (2 * heads)):
            raise ConfigError(f"{self.folder}: the tensor {name} has {rows} rows, which are not {heads} heads")
        yield (
            published,
            Tensor(
                stored,
                shape,
                pairs=heads,
                offset=self._architecture.norm_offset if name.endswith("norm.weight") else 0.0,
            ),
        )

    def array(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.stored.kind.dtype is None:
            return self._dequantized(tensor, np.dtype(np.float32), name, reuse=False)
        return self._plain(tensor)

    def read(self, name: str, view: View, dtype: np.dtype) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.stored.kind.dtype is None:
            return view(self._dequantized(tensor, dtype, name, reuse=True))
        return view(self._plain(tensor))

    def _plain(self, tensor: Tensor) -> np.ndarray:
        count = int(np.prod(tensor.shape, dtype=np.int64))
        start = tensor.stored.start + tensor.first * tensor.stored.row_bytes
        plain = np.frombuffer(tensor.stored.memory, tensor.dtype, count, start).reshape(tensor.shape)
        if tensor.pairs:
            plain = plain[_halves(tensor)]
        return plain - plain.dtype.type(tensor.offset) if tensor.offset else plain

    def exact(self, name: str) -> Exact | None:
        bits = EXACT.get(self.tensors[name].stored.kind.name)
        return None if bits is None else Exact(bits, 32, "float16")

    def integers(self, name: str) -> Integers:
        tensor = self.tensors[name]
        found = integers(self._blocks(tensor), tensor.stored.kind, _halves(tensor) if tensor.pairs else None)
        if not np.isfinite(found.scales).all():
            raise ConfigError(f"{self.folder}: {name} holds scales that are not finite")
        return found

    def described(self, whole: Collection[str]) -> str:
        matrices = {name: tensor for name, tensor in self.tensors.items() if len(tensor.shape) > 1}
        stay = Counter(matrices[name].stored.kind.name for name in whole)
        become = Counter(tensor.stored.kind.name for name, tensor in matrices.items() if name not in whole)
        said = [f"{count} in {kind} stay integers" for kind, count in stay.most_common()]
        said += [f"{count} in {kind} are read as floats" for kind, count in become.most_common()]
        return f"matrices: {', '.join(said)}"

    def _blocks(self, tensor: Tensor) -> np.ndarray:
        """The blocks of a tensor, uint8[rows, bytes]."""
        size = tensor.stored.row_bytes
        start = tensor.stored.start + tensor.first * size
        return np.frombuffer(tensor.stored.memory, np.uint8, tensor.rows * size, start).reshape(tensor.rows, size)

    def _dequantized(self, tensor: Tensor, dtype: np.dtype, name: str, *, reuse: bool) -> np.ndarray:
        """Dequantizes a tensor to bfloat16 where that is `dtype` and there is no offset to subtract, and else to
        float32. reuse: writes to memory of this thread, which its next call overwrites."""
        dtype = dtype if dtype.name == "bfloat16" and not tensor.offset else np.dtype(np.float32)
        held = getattr(self._thread, "held", None)
        if reuse and held is not None and held[:2] == (name, dtype):  # another shard of the same tensor
            found: np.ndarray = held[2]
            return found
        out = self._memory(tensor.rows * tensor.shape[-1] * dtype.itemsize, reuse).view(dtype)
        out = out.reshape(tensor.rows, tensor.shape[-1])
        dequantize(self._blocks(tensor), tensor.stored.kind, _halves(tensor) if tensor.pairs else None, out)
        if tensor.offset:
            out -= dtype.type(tensor.offset)
        out = out.reshape(tensor.shape)
        if reuse:
            self._thread.held = (name, dtype, out)
        return out

    def _memory(self, size: int, reuse: bool) -> np.ndarray:
        if not reuse:
            return np.empty(size, np.uint8)
        if getattr(self._thread, "memory", np.empty(0, np.uint8)).nbytes < size:
            self._thread.memory = np.empty(size, np.uint8)
        memory: np.ndarray = self._thread.memory[:size]
        return memory

    def advise(self, name: str, advice: int) -> None:
        tensor = self.tensors[name]
        if tensor.nbytes:
            first = tensor.stored.start + tensor.first * tensor.stored.row_bytes
            start = first // mmap.PAGESIZE * mmap.PAGESIZE
            tensor.stored.memory.madvise(advice, start, first + tensor.nbytes - start)


def _halves(tensor: Tensor) -> np.ndarray:
    """int64[rows]: for each row of a tensor in which the rows of a head lie in halves, its row in the file, where they
    lie in pairs."""
    return np.arange(tensor.shape[0]).reshape(tensor.pairs, -1, 2).swapaxes(1, 2).reshape(-1)


def read_headers(path: Path) -> Header:
    """Reads the header of a file. Where `path` is a part of a split model, the result holds the tensors of all parts.
    Raises ConfigError."""
    header = read_header(path)
    count = _count(header, "split.count", 1)
    if count <= 1:  # a file that was merged from parts says 0
        return header
    match = _PART.fullmatch(path.name)
    if count > MAX_PARTS or match is None or int(match[3]) != count:
        raise ConfigError(
            f"{path} is a part of a model in {count} files: they must lie side by side, and be called NAME-00001-of-"
            "0000N.gguf"
        )
    parts = [read_header(path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf")) for n in range(1, count + 1)]
    tensors: dict[str, BlockTensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise ConfigError(f"{part.path}: the tensor {min(twice)} is in another part already")
        tensors |= part.tensors
    whole = _count(parts[0], "split.tensors.count", len(tensors))
    if whole != len(tensors):
        raise ConfigError(f"{parts[0].path}: its parts hold {len(tensors)} tensors, and it says {whole}")
    return Header(parts[0].path, parts[0].metadata, tensors)


def _count(header: Header, name: str, default: int) -> int:
    """Reads a number from the metadata of a part. `Metadata` can't do this, because a part may lack
    general.architecture."""
    value = header.metadata.get(name, default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{header.path}: {name}={shortened(repr(value))} must be a whole number that is not negative")
    return value
