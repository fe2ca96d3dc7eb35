"""Decodes small numbers that are packed in published tensors along the last or the first axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""The numbers that the codes of e2m1 without their sign stand for (OCP Microscaling Formats 1.0, table 5)."""


@dataclass(frozen=True)
class Numbers:
    """A way to pack numbers along the last axis of an array: `items` of its items hold `values` numbers."""

    values: int
    items: int
    decode: Callable[[np.ndarray], np.ndarray]
    """Decodes [..., items * n] to [..., values * n], small integers or float32"""

    def held(self, items: int) -> int:
        """How many numbers so many items hold."""
        return items * self.values // self.items

    def items_for(self, values: int) -> int:
        """How many items so many numbers take."""
        return math.ceil(values * self.items / self.values)


def packed(bits: int) -> Numbers:
    """Unsigned numbers that follow one another from the lowest bit of each int32. They run across words where 32 isn't
    a multiple of `bits`."""
    if bits == 4:
        return Numbers(8, 1, lambda raw: _nibbles(_contiguous(raw).view(np.uint8)))
    if bits == 8:
        return Numbers(4, 1, lambda raw: _contiguous(raw).view(np.uint8))
    return Numbers(*_unit(bits), lambda raw: _dense(_contiguous(raw).view(np.uint32), bits))


def awq_words() -> Numbers:
    """Numbers of 4 bits in AutoAWQ's order: from the lowest bits on, a word holds those of columns 0, 2, 4, 6, 1, 3, 5,
    7 (awq/utils/packing_utils.py: AWQ_ORDER)."""
    return Numbers(8, 1, lambda raw: _awq_nibbles(_contiguous(raw).view(np.uint32)))


def float8() -> Numbers:
    """Numbers in float8_e4m3fn, one per byte."""
    return Numbers(1, 1, lambda raw: _float8(raw.view(np.uint8)))


def float4() -> Numbers:
    """Numbers in e2m1, two in each byte of uint8, the even one in the low half."""
    pairs = np.concatenate([FP4, -FP4])
    table = np.stack([np.tile(pairs, 16), np.repeat(pairs, 16)], axis=1).view(np.uint64)[:, 0]
    return Numbers(2, 1, lambda raw: table[raw].view(np.float32))


def exponents(codes: np.ndarray) -> np.ndarray:
    """The numbers that scales in e8m0 stand for, as float32. They are powers of two; 255 is NaN (OCP Microscaling
    Formats 1.0, 5.4.1)."""
    codes = codes.view(np.uint8).astype(np.int32)
    return np.where(codes == 255, np.float32(np.nan), np.ldexp(np.float32(1), np.minimum(codes, 254) - 127))


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks int32[words, columns], in which unsigned numbers lie one below the other, to int32[numbers, columns]. The
    padding in the last words is returned as well."""
    values, items = _unit(bits)
    if cut := -len(words) % items:  # the last numbers don't fill a unit, whose missing words are padded
        words = np.pad(words, ((0, cut), (0, 0)))
    units = words.view(np.uint32).reshape(-1, items, words.shape[1])
    found = np.empty((len(units), values, words.shape[1]), np.uint32)
    for number in range(values):
        word, shift = divmod(number * bits, 32)
        np.right_shift(units[:, word], shift, out=found[:, number])
        if shift + bits > 32:
            found[:, number] |= units[:, word + 1] << np.uint32(32 - shift)
    found &= np.uint32((1 << bits) - 1)
    return found.view(np.int32).reshape(-1, words.shape[1])


def _unit(bits: int) -> tuple[int, int]:
    """Returns the fewest numbers that fill whole words, and the number of these words."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def _dense(words: np.ndarray, bits: int) -> np.ndarray:
    flat = words.reshape(-1, words.shape[-1])
    return unpack_rows(np.ascontiguousarray(flat.T), bits).T.reshape(*words.shape[:-1], -1)


def _contiguous(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Splits each byte into its low half and, after it, its high half."""
    pairs = raw.astype(np.uint16)
    pairs |= pairs << np.uint16(4)
    pairs &= np.uint16(0x0F0F)
    return pairs.astype("<u2", copy=False).view(np.uint8)


def _awq_nibbles(words: np.ndarray) -> np.ndarray:
    wide = words.astype("<u8")
    even, odd = (_spread(half) for half in (wide & np.uint64(0xFFFF), wide >> np.uint64(16)))
    odd <<= np.uint64(8)
    return (even | odd).view(np.uint8)


def _spread(words: np.ndarray) -> np.ndarray:
    """Puts the four numbers of 4 bits in the low 16 bits into every other byte."""
    words = (words | words << np.uint64(24)) & np.uint64(0x000000FF000000FF)
    return (words | words << np.uint64(12)) & np.uint64(0x000F000F000F000F)


def _float8(codes: np.ndarray) -> np.ndarray:
    """Decodes float8_e4m3fn by moving its bits to their places in a float32, which makes a number 2^-120 of what it is.
    This takes a tenth of the time of a conversion number by number."""
    bits = codes.view(np.int8).astype(np.int32)
    bits <<= 20
    bits &= np.int32(-0x78100000)  # sign, and the 7 bits below it at float32's exponent and mantissa
    numbers = bits.view(np.float32)
    numbers *= np.float32(2.0**120)
    nan = (codes & 0x7F) == 0x7F
    if nan.any():
        numbers[nan] = np.nan
    return numbers
