"""Matrices in the layout that linear.cc multiplies by: made once, when a model is loaded.

A panel holds 16 columns; a line of it, 64 bytes, holds 4 bytes of each: 1 float32, 2 bfloat16, 4 int8 or 8 int4 numbers
along the inputs, so that a product needs no rearrangement whatever the width of the machine's vectors. Of the two int4
numbers in a byte the low one comes 4 inputs before the high one.
"""

from __future__ import annotations

import math
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
    bfloat16[groups, padded outputs]"""
    kind: Kind = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})

    def multiply(self, x: jax.Array) -> jax.Array:
        """x[rows, inputs], float32 or bfloat16 → float32[rows, outputs]. A row's result depends on that row alone.

        Against integers, x is rounded to int8: over each row, or over 32 or 64 numbers of it for int4.
        """
        assert x.shape[1] == self.inputs, (x.shape, self.inputs)
        out = jax.ShapeDtypeStruct((x.shape[0], self.outputs), jnp.float32)
        return jax.ffi.ffi_call(f"isthmus_linear_{self.kind}", out)(x, self.lines, *self.extra)

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
            scales = jnp.moveaxis(self.extra[0][:, index], 0, -1).astype(jnp.float32)
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


def pack(matrix: jax.Array | Quantized, inputs: int) -> Packed:
    """A matrix [inputs, outputs] of float32, bfloat16 or integers, whose own inputs may be padded."""
    if isinstance(matrix, Quantized):
        return _pack_quantized(matrix, inputs)
    kind: Kind = "float32" if matrix.dtype == jnp.float32 else "bfloat16"
    assert matrix.dtype == kind, matrix.dtype
    return Packed(_lines(matrix, NUMBERS[kind]), (), kind, *matrix.shape)


@partial(jax.jit, static_argnums=1)
def _pack_quantized(matrix: Quantized, inputs: int) -> Packed:
    integers = matrix.integers()
    outputs = integers.shape[1]
    right = (0, -outputs % PANEL)
    scales = jnp.pad(matrix.scales, ((0, 0), right))
    if matrix.bits == 8:
        sums = jnp.pad(integers.sum(axis=0, dtype=jnp.int32), right)
        return Packed(_lines(integers, 4), (scales[0], sums), "int8", inputs, outputs)
    nibbles = jnp.pad((integers + 8).astype(jnp.uint8), ((0, 0), right))
    quads = nibbles.reshape(-1, 2, 4, nibbles.shape[1] // PANEL, PANEL).transpose(1, 3, 0, 4, 2)
    lines = (quads[0] | quads[1] << 4).reshape(*quads.shape[1:3], 4 * PANEL)
    return Packed(lines, (scales,), "int4", inputs, outputs)


@partial(jax.jit, static_argnums=1)
def _lines(matrix: jax.Array, numbers: int) -> jax.Array:
    """uint8[panels, lines, 64], columns and inputs padded with zeros."""
    inputs, outputs = matrix.shape
    lines, panels = math.ceil(inputs / numbers), math.ceil(outputs / PANEL)
    matrix = jnp.pad(matrix, ((0, lines * numbers - inputs), (0, panels * PANEL - outputs)))
    turned = matrix.reshape(lines, numbers, panels, PANEL).transpose(2, 0, 3, 1)
    return jax.lax.bitcast_convert_type(turned, jnp.uint8).reshape(panels, lines, 64)
