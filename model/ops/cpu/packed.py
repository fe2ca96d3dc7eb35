"""Matrices in the layout that linear.cc multiplies by: made once, when a model is loaded.

A panel holds 16 columns; a line of it, 64 bytes, holds 4 bytes of each: 1 float32, 2 bfloat16, 4 int8 or 8 int4 numbers
along the inputs, so that a product needs no rearrangement whatever the width of the machine's vectors. Of the two int4
numbers in a byte the low one comes 4 inputs before the high one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from model.ops.quantized import Quantized

PANEL = 16
Kind = Literal["float32", "bfloat16", "int8", "int4"]
NUMBERS: dict[str, int] = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}
"""Along the inputs in one line"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A matrix [inputs, outputs] for the CPU's kernels."""

    lines: jax.Array
    """uint8[panels, lines, 64]"""
    extra: tuple[jax.Array, ...]
    """Of int8: scales float32[padded outputs], sums over the inputs int32[padded outputs]; of int4: scales
    bfloat16[panels, groups, 16]"""
    kind: Kind = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})

    @property
    def layout(self) -> tuple[str, int, int]:
        """What weights have in common that one call can multiply: kind, lines, and groups of int4."""
        return (self.kind, self.lines.shape[1], self.extra[0].shape[1] if self.kind == "int4" else 0)

    def columns(self, indices: jax.Array) -> jax.Array:
        """float32[*indices.shape, inputs]; zeros for an index that isn't there."""
        known = (indices >= 0) & (indices < self.outputs)
        index = jnp.where(known, indices, 0)
        panels, lines, _ = self.lines.shape
        by_column = self.lines.reshape(panels, lines, PANEL, 4)
        numbers = self._decode(by_column[index // PANEL, :, index % PANEL])
        if self.kind == "int8":
            numbers = numbers * self.extra[0][index][..., None]
        if self.kind == "int4":
            scales = self.extra[0][index // PANEL, :, index % PANEL].astype(jnp.float32)
            numbers = numbers * jnp.repeat(scales, numbers.shape[-1] // scales.shape[-1], axis=-1)
        return jnp.where(known[..., None], numbers[..., : self.inputs], 0)

    def _decode(self, quads: jax.Array) -> jax.Array:
        """float32[..., lines * numbers] of uint8[..., lines, 4]."""
        flat = quads.shape[:-2]
        match self.kind:
            case "float32":
                return jax.lax.bitcast_convert_type(quads, jnp.float32)
            case "bfloat16":
                pairs = jax.lax.bitcast_convert_type(quads.reshape(*quads.shape[:-1], 2, 2), jnp.bfloat16)
                return pairs.astype(jnp.float32).reshape(*flat, -1)
            case "int8":
                return jax.lax.bitcast_convert_type(quads, jnp.int8).astype(jnp.float32).reshape(*flat, -1)
            case "int4":
                both = jnp.stack([quads & 15, quads >> 4], axis=-2)
                return both.astype(jnp.float32).reshape(*flat, -1) - 8


def multiply(x: jax.Array, weights: Sequence[Packed], dtype: jax.typing.DTypeLike = jnp.float32) -> list[jax.Array]:
    """x[rows, inputs], float32 or bfloat16 → [rows, outputs] for each of the weights, which have one layout.

    dtype: float32 or bfloat16, of the results, which are computed in float32.

    A row's result depends on that row alone. Against integers, x is rounded to int8: over each row, or over 32 or 64
    numbers of it for int4.
    """
    kind = weights[0].kind
    assert len({weight.layout for weight in weights}) == 1, [weight.layout for weight in weights]
    assert all(weight.inputs == x.shape[1] for weight in weights), x.shape
    out = tuple(jax.ShapeDtypeStruct((x.shape[0], weight.outputs), dtype) for weight in weights)
    arguments = [array for weight in weights for array in (weight.lines, *weight.extra)]
    return list(jax.ffi.ffi_call(f"isthmus_linear_{kind}", out)(x, *arguments))


def pack(matrix: jax.Array | Quantized, inputs: int, *, transposed: bool = False) -> Packed:
    """A matrix [inputs, outputs] of float32, bfloat16 or integers, whose own inputs may be padded.

    transposed: an array is given as [outputs, inputs].
    """
    if isinstance(matrix, Quantized):
        return _pack_quantized(matrix, inputs)
    kind: Kind = "float32" if matrix.dtype == jnp.float32 else "bfloat16"
    assert matrix.dtype == kind, matrix.dtype
    outputs = matrix.shape[0 if transposed else 1]
    return Packed(_lines(matrix, inputs, outputs, kind, transposed), (), kind, inputs, outputs)


def _pack_quantized(matrix: Quantized, inputs: int) -> Packed:
    outputs = matrix.values.shape[1]
    kind: Kind = "int8" if matrix.bits == 8 else "int4"
    padded = inputs if kind == "int8" else matrix.group * matrix.scales.shape[0]
    lines = _lines(matrix.values, padded, outputs, kind, False)
    scales = jnp.pad(matrix.scales, ((0, 0), (0, -outputs % PANEL)))
    if kind == "int4":
        scales = scales.reshape(scales.shape[0], -1, PANEL).swapaxes(0, 1)
        return Packed(lines, (scales,), kind, inputs, outputs)
    sums = jnp.pad(matrix.values.sum(axis=0, dtype=jnp.int32), (0, -outputs % PANEL))
    return Packed(lines, (scales[0], sums), kind, inputs, outputs)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _lines(values: jax.Array, inputs: int, outputs: int, kind: Kind, transposed: bool) -> jax.Array:
    """uint8[panels, lines, 64], columns and inputs padded with zeros."""
    shape = (math.ceil(outputs / PANEL), math.ceil(inputs / NUMBERS[kind]), 64)
    out = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return jax.ffi.ffi_call("isthmus_pack_matrix", out)(values, transposed=transposed)
