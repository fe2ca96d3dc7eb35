"""Blocks of integers become the numbers that package gguf, and so llama.cpp, makes of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from isthmus.model.weights.gguf import blocks
from isthmus.model.weights.gguf.blocks import KINDS, Kind

BLOCKS = [kind for kind in KINDS.values() if kind.dtype is None]


def random_blocks(kind: Kind, rows: int, across: int) -> np.ndarray:
    """Any bytes, but for those that make numbers which are not finite."""
    found = np.random.default_rng(kind.number).integers(0, 256, (8 * rows, across * kind.size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        finite = np.isfinite(dequantize(found, GGMLQuantizationType(kind.number))).all(axis=1)
    chosen = found[finite][:rows]
    assert len(chosen) == rows, "too few are finite"
    return np.ascontiguousarray(chosen)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_sizes_are_those_of_package_gguf(kind: Kind) -> None:
    number = GGMLQuantizationType(kind.number)
    assert (number.name, GGML_QUANT_SIZES[number]) == (kind.name, (kind.numbers, kind.size))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("compiled", [True, False])
def test_numbers_are_package_ggufs_to_the_bit(kind: Kind, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a compiler is there or not; scales at the ends of their range, subnormal ones too; rows in any order."""
    if not compiled:
        monkeypatch.setattr(blocks, "_kernel", lambda: None)
    rows = random_blocks(kind, 24, 3)
    order = np.random.default_rng(1).permutation(24)
    want = dequantize(rows, GGMLQuantizationType(kind.number))
    got = np.empty(want.shape, np.float32)
    blocks.dequantize(rows, kind, order, got)
    np.testing.assert_array_equal(got, want[order])
    narrow = np.empty(want.shape, ml_dtypes.bfloat16)
    blocks.dequantize(rows, kind, None, narrow)
    np.testing.assert_array_equal(narrow, want.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", blocks.EXACT)
def test_integers_stay_as_they_are(name: str) -> None:
    """Times their scales they are package gguf's numbers, exactly: nothing was rounded again."""
    kind = next(kind for kind in KINDS.values() if kind.name == name)
    rows, order = random_blocks(kind, 24, 3), np.random.default_rng(2).permutation(24)
    found, bits = blocks.integers(rows, kind, order), blocks.EXACT[name]
    assert found.values.dtype == np.int8 and found.scales.dtype == np.float16
    assert found.values.min() >= -(2 ** (bits - 1)) and found.values.max() < 2 ** (bits - 1)
    numbers = found.values.astype(np.float32) * found.scales.astype(np.float32).repeat(32, axis=0)
    np.testing.assert_array_equal(numbers, dequantize(rows, GGMLQuantizationType(kind.number))[order].T)
