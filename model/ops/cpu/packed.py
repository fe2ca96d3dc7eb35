"""Matrices in the layout that linear.cc multiplies by: made once, when a model is loaded.

A panel holds 16 columns; a line of it, 64 bytes, holds 4 bytes of each: 1 float32, 2 bfloat16, 4 int8 or 8 int4 numbers
along the inputs, so that a product needs no rearrangement whatever the width of the machine's vectors. Of the two int4
numbers in a byte the low one comes 4 inputs before the high one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from model.ops.cpu.memory import allocate
from model.ops.quantized import Quantized

PANEL = 16
Kind = Literal["float32", "bfloat16", "int8", "int4"]
NUMBERS: dict[str, int] = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}
"""Along the inputs in one line"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A matrix [inputs, outputs] for the CPU's kernels: one of a stack of matrices alike, since a step's launch costs
    for every array that it is given."""

    lines: jax.Array
    """uint8[matrices, panels, lines, 64]"""
    extra: tuple[jax.Array, ...]
    """Of int8: scales float32[matrices, padded outputs], sums over the inputs int32[matrices, padded outputs]; of int4:
    scales bfloat16[matrices, panels, groups, 16]"""
    index: jax.Array | None
    """int32[]: its place in the stack; None is the whole stack"""
    kind: Kind = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})

    @property
    def layout(self) -> tuple[str, int, int]:
        """What weights have in common that one call can multiply: kind, lines, and groups of int4."""
        return (self.kind, self.lines.shape[2], self.extra[0].shape[2] if self.kind == "int4" else 0)

    def __getitem__(self, index: int) -> Packed:
        """A matrix of the stack."""
        return dataclasses.replace(self, index=jnp.int32(index))

    def columns(self, indices: jax.Array) -> jax.Array:
        """float32[*indices.shape, inputs]; zeros for an index that isn't there."""
        known = (indices >= 0) & (indices < self.outputs)
        index = jnp.where(known, indices, 0)
        by_column = self.lines.reshape(*self.lines.shape[:3], PANEL, 4)
        numbers = self._decode(by_column[self.index, index // PANEL, :, index % PANEL])
        if self.kind == "int8":
            numbers = numbers * self.extra[0][self.index, index][..., None]
        if self.kind == "int4":
            scales = self.extra[0][self.index, index // PANEL, :, index % PANEL].astype(jnp.float32)
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
    arguments = [array for weight in weights for array in (weight.index, weight.lines, *weight.extra)]
    return list(jax.ffi.ffi_call(f"isthmus_linear_{kind}", out)(x, *arguments))


def pack(matrix: jax.Array | Quantized, inputs: int, *, transposed: bool = False) -> Packed:
    """An array [*inputs, *outputs] of float32 or bfloat16, or integers [padded inputs, outputs].

    transposed: an array is given as [outputs, inputs].
    """
    return put(stack_like(1, matrix, inputs, transposed=transposed), 0, matrix, transposed=transposed)[0]


def stack_like(matrices: int, matrix: jax.Array | Quantized, inputs: int, *, transposed: bool = False) -> Packed:
    """A stack for as many as `matrices` like this one, which is as `pack` takes it, with nothing in it yet. A matrix's
    part of the memory is only taken when it is put there."""
    kind: Kind
    if not isinstance(matrix, Quantized):
        kind, padded, outputs = "float32" if matrix.dtype == jnp.float32 else "bfloat16", inputs, matrix.size // inputs
        assert matrix.dtype == kind, matrix.dtype
        assert not transposed or matrix.shape == (outputs, inputs), matrix.shape
    else:
        kind, padded, outputs = "int8" if matrix.bits == 8 else "int4", *matrix.integers_shape
    panels = math.ceil(outputs / PANEL)
    extra: tuple[jax.Array, ...] = ()
    if kind == "int8":
        columns = (matrices, panels * PANEL)
        extra = (jnp.zeros(columns, jnp.float32), jnp.zeros(columns, jnp.int32))
    if isinstance(matrix, Quantized) and kind == "int4":
        extra = (allocate((matrices, panels, matrix.scales.shape[0], PANEL), "bfloat16"),)
    shape = (matrices, panels, math.ceil(padded / NUMBERS[kind]), 64)
    return Packed(allocate(shape, "uint8"), extra, None, kind, inputs, outputs)


@partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def put(stack: Packed, index: int, matrix: jax.Array | Quantized, *, transposed: bool = False) -> Packed:
    """The stack, in the same memory, with a matrix at a place of it."""
    place = jnp.asarray(index, jnp.int32)
    if isinstance(matrix, Quantized):
        values = matrix.values
    else:
        values = matrix if transposed else matrix.reshape(stack.inputs, stack.outputs)
    out = jax.ShapeDtypeStruct(stack.lines.shape, jnp.uint8)
    call = jax.ffi.ffi_call("isthmus_pack_matrix", out, input_output_aliases={1: 0})
    lines = call(values, stack.lines, place, transposed=transposed)
    extra = (was.at[place].set(now) for was, now in zip(stack.extra, _extra(matrix), strict=True))
    return dataclasses.replace(stack, lines=lines, extra=tuple(extra))


def _extra(matrix: jax.Array | Quantized) -> tuple[jax.Array, ...]:
    """Of one matrix."""
    if not isinstance(matrix, Quantized):
        return ()
    padding = -matrix.values.shape[1] % PANEL
    scales = jnp.pad(matrix.scales, ((0, 0), (0, padding)))
    if matrix.bits == 4:
        return (scales.reshape(scales.shape[0], -1, PANEL).swapaxes(0, 1),)
    return scales[0], jnp.pad(matrix.values.sum(axis=0, dtype=jnp.int32), (0, padding))
