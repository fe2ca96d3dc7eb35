"""The kinds of tensors in a GGUF file, and the conversion of their blocks to numbers."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from isthmus.model.ops.quantized import Bits
from isthmus.model.weights.huggingface.files import Integers


class Kind(NamedTuple):
    """How the numbers of a tensor are stored."""

    number: int
    """The kind's number in the file"""
    name: str
    numbers: int
    """The count of numbers in a block, which are neighbours along the last axis"""
    size: int
    """The size of a block in bytes"""

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of numbers that are stored one by one; None for blocks."""
        return _PLAIN.get(self.name)


_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

KINDS: dict[int, Kind] = {
    kind.number: kind
    for kind in (
        Kind(0, "F32", 1, 4), Kind(1, "F16", 1, 2), Kind(30, "BF16", 1, 2), Kind(8, "Q8_0", 32, 34),
        Kind(2, "Q4_0", 32, 18), Kind(3, "Q4_1", 32, 20), Kind(6, "Q5_0", 32, 22), Kind(7, "Q5_1", 32, 24),
        Kind(10, "Q2_K", 256, 84), Kind(11, "Q3_K", 256, 110), Kind(12, "Q4_K", 256, 144), Kind(13, "Q5_K", 256, 176),
        Kind(14, "Q6_K", 256, 210), Kind(20, "IQ4_NL", 32, 18), Kind(39, "MXFP4", 32, 17),
    )
}  # fmt: skip
"""The kinds that can be read, by their number in the file."""


def dequantize(rows: np.ndarray, kind: Kind, order: np.ndarray | None, out: np.ndarray) -> None:
    """Writes the numbers of blocks to `out`.

    rows: uint8[rows, bytes], contiguous. order: int64[rows], which of `rows` each row of `out` comes from; None keeps
    their order. out: float32 or bfloat16[rows, numbers], contiguous; bfloat16 is rounded to the nearest. Products and
    sums are float32, as in llama.cpp, so that float32 results equal those of the package gguf to the bit.
    """
    assert rows.flags.c_contiguous and out.flags.c_contiguous and rows.shape[1] % kind.size == 0
    assert out.shape == (len(rows), rows.shape[1] // kind.size * kind.numbers)
    function = _kernel()
    if function is None:
        return _dequantize_slowly(rows, kind, order, out)
    function(
        kind.number, int(out.dtype == ml_dtypes.bfloat16), rows.ctypes.data, rows.shape[0], rows.shape[1] // kind.size,
        None if order is None else order.ctypes.data, out.ctypes.data,
    )  # fmt: skip


EXACT: dict[str, Bits] = {"Q8_0": 8, "Q5_0": 5, "Q4_0": 4}
"""The kinds that are integers with one scale for each group of 32, and the bits of their integers."""


def integers(rows: np.ndarray, kind: Kind, order: np.ndarray | None) -> Integers:
    """Returns the integers and the scales of blocks, bit for bit. kind: one of EXACT. The arguments are those of
    `dequantize`."""
    blocks = (rows if order is None else rows[order]).reshape(len(rows), -1, kind.size)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    values = blocks[..., 2:]
    if kind.name != "Q8_0":  # the first half of a block lies in the low halves of its bytes
        low = values[..., -16:]
        values = np.concatenate([low & 15, low >> 4], axis=-1)
        if kind.name == "Q5_0":
            values |= np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little") << np.uint8(4)
        values = values - np.uint8(2 ** (EXACT[kind.name] - 1))
    across = np.ascontiguousarray(values).view(np.int8).reshape(len(rows), -1)
    return Integers(across.T, scales.T)


@cache
def _kernel() -> Any | None:
    """The compiled kernel; None without a compiler."""
    from isthmus.model.ops.cpu import library

    if library.why_not() is not None:
        return None
    function = library.function("isthmus_dequantize")
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [number, number, pointer, number, number, pointer, pointer]
    function.restype = None
    return function


def _dequantize_slowly(rows: np.ndarray, kind: Kind, order: np.ndarray | None, out: np.ndarray) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    few = max(1, (1 << 20) // out.shape[1])
    for start in range(0, len(rows), few):
        chosen = slice(start, start + few) if order is None else order[start : start + few]
        out[start : start + few] = dequantize(rows[chosen], GGMLQuantizationType(kind.number))
