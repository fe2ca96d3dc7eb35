"""Floats of 8 and 4 bits with scales: DeepSeek's fp8 in blocks, fp8 with one scale per matrix, and gpt-oss's mxfp4."""

from __future__ import annotations

import math
from functools import partial

from isthmus.errors import ConfigError
from isthmus.model.weights.huggingface.coded.matrix import (
    Coded,
    Find,
    Found,
    OutputsFirst,
    fits,
    fits_tiles,
    scales_of,
    two_axes,
    wanted,
)
from isthmus.model.weights.huggingface.coded.numbers import float4, float8
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import TensorFiles

SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
"""The dtypes that scales may have. The last two are exponents."""
_ACTIVATIONS = (".activation_scale", ".input_scale")
"""Suffixes of the scales of activations, which are not rounded here."""


def fp8(fields: Fields) -> Find:
    """Reads the settings of fp8: a Linear's `weight` in float8_e4m3fn is multiplied by `weight_scale_inv` or
    `weight_scale`. There is one scale for each tile of `weight_block_size` (DeepSeek-V3, inference/kernel.py:
    weight_dequant_kernel), one for each row, or one for all."""
    for name in ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "ignore", "kv_cache_scheme"):
        fields.raw(name, None)
    fields.among("activation_scheme", ("dynamic", "static", None), "dynamic")
    fields.among("fmt", ("e4m3", None), None)
    fields.among("scale_fmt", ("float", "ue8m0", None), None)
    fields.among("dequantize", (False, True), False)
    fields.among("expert_dtype", ("fp8", None), None)
    tile = fields.integers("weight_block_size", (), null=())
    if tile and (len(tile) != 2 or min(tile) < 1):
        raise fields.error("weight_block_size", "must be two whole numbers, at least 1")
    return partial(_find_fp8, tile=tile)


def _find_fp8(files: TensorFiles, tile: tuple[int, ...]) -> Found:
    names = sorted(name for name, stored in files.tensors.items() if stored.dtype.name == "float8_e4m3fn")
    idle = {name for name in files.tensors if name.endswith(_ACTIVATIONS)}
    coded = [each for name in names for each in _fp8(files, name, tile)]
    return Found(coded, idle)


def _fp8(files: TensorFiles, name: str, tile: tuple[int, ...]) -> list[Coded]:
    scale = next(
        (each for each in (f"{name}_scale", f"{name}_scale_inv") if each in files.tensors), f"{name}_scale_inv"
    )
    stored = wanted(files, scale, name, SCALES)
    shape = two_axes(files, name, files.tensors[name].shape)
    tiled = _tile(files, scale, shape, tile)
    down, across = (math.ceil(size / part) for size, part in zip(shape, tiled, strict=True))
    fits_tiles(files, scale, stored, (down, across), f"tiles of {list(tiled)} make it")
    what = f"fp8, one scale per {_tile_name(shape, tiled)}"
    return [tiles(files, name, (name, scale), shape, what, scale, tiled)]


def _tile(files: TensorFiles, scale: str, shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, int]:
    """The numbers of rows and columns that share a scale. Raises ConfigError where the scales have no shape that says
    so."""
    scales = files.tensors[scale].shape
    if math.prod(scales) == 1:
        return shape[0], shape[1]
    if tile:
        return tile[0], tile[1]
    if math.prod(scales) == shape[0]:
        return 1, shape[1]
    raise ConfigError(f"{files.folder}: {scale} has the shape {list(scales)}, and a matrix of {list(shape)} without "
                      f"weight_block_size has one scale, or {shape[0]}")  # fmt: skip


def _tile_name(shape: tuple[int, ...], tile: tuple[int, int]) -> str:
    if tile == shape:
        return "matrix"
    return "row" if tile == (1, shape[1]) else f"tile of {tile[0]} x {tile[1]}"


def tiles(
    files: TensorFiles,
    name: str,
    parts: tuple[str, ...],
    shape: tuple[int, ...],
    what: str,
    scale: str,
    tile: tuple[int, int],
) -> Coded:
    """A matrix of fp8 in tiles that share a scale."""

    def grid() -> OutputsFirst:
        across = math.ceil(shape[1] / tile[1])
        scales = scales_of(files, scale).reshape(-1, across)
        return OutputsFirst(files.array(name), float8(), (shape[0], shape[1]), scales, tile)

    return Coded(name, shape, parts, sum(files.tensors[part].nbytes for part in parts), what, grid)


def mxfp4(fields: Fields) -> Find:
    """Reads the settings of gpt-oss's experts: `*_blocks` uint8[experts, outputs, groups, 16] of two e2m1 per byte, and
    `*_scales` uint8[experts, outputs, groups] of exponents (OCP Microscaling Formats 1.0; transformers,
    integrations/mxfp4.py: convert_moe_packed_tensors). Each expert becomes a tensor [inputs, outputs] of its own."""
    fields.raw("modules_to_not_convert", None)
    fields.among("dequantize", (False, True), False)
    return _find_mxfp4


def _find_mxfp4(files: TensorFiles) -> Found:
    names = sorted(name.removesuffix("_blocks") for name in files.tensors if name.endswith("_blocks"))
    return Found([each for name in names for each in _mxfp4(files, name)])


def _mxfp4(files: TensorFiles, name: str) -> list[Coded]:
    parts = (f"{name}_blocks", f"{name}_scales")
    blocks, scales = (wanted(files, part, f"{name}_blocks", ("uint8",)) for part in parts)
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or min(blocks.shape) < 1:
        raise ConfigError(f"{files.folder}: {name}_blocks has the shape {list(blocks.shape)}, and [experts, outputs, "
                          "groups, 16] is expected")  # fmt: skip
    experts, outputs, groups, _ = blocks.shape
    fits(files, f"{name}_scales", scales, (experts, outputs, groups), f"{name}_blocks makes it")
    head, _, tail = name.rpartition(".")

    def expert(index: int) -> Coded:
        def grid() -> OutputsFirst:
            raw = files.array(f"{name}_blocks")[index].reshape(outputs, groups * 16)
            found = scales_of(files, f"{name}_scales", index)
            return OutputsFirst(raw, float4(), (outputs, groups * 32), found, (1, 32))

        size = (blocks.nbytes + scales.nbytes) // experts
        what = "mxfp4, 4 bits in groups of 32"
        return Coded(f"{head}.{index}.{tail}", (groups * 32, outputs), parts, size, what, grid, transposed=True)

    return [expert(index) for index in range(experts)]
