"""Matrices in the layout that linear_product.h multiplies by: made once, when a model is loaded.

A panel holds 16 columns; a line of it, 64 bytes, holds 4 bytes of each: 1 float32 or 2 bfloat16 along the inputs, or
four rows of the bytes that integers are kept in (model/ops/quantized.py), so that a product needs no rearrangement
whatever the width of the machine's vectors.
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
import numpy as np

from isthmus.model.ops.cpu.memory import allocate
from isthmus.model.ops.quantized import Bits, Quantized

PANEL = 16
Kind = Literal["float32", "bfloat16", "int8", "int6", "int5", "int4"]
KINDS: dict[Bits, Kind] = {8: "int8", 6: "int6", 5: "int5", 4: "int4"}
BITS: dict[Kind, Bits] = {kind: bits for bits, kind in KINDS.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A matrix [inputs, outputs] for the CPU's kernels: one of a stack of matrices alike, since a step's launch costs
    for every array that it is given."""

    lines: jax.Array
    """uint8[matrices, panels, lines, 64]"""
    scales: jax.Array | None
    """What integers are multiplied by, bfloat16 or float16[matrices, panels, groups, 16]; None of other kinds"""
    index: jax.Array | None
    """int32[]: the place of it, or of its first matrix, in the stack; None is the whole stack"""
    kind: Kind = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})
    group: int = field(default=0, metadata={"static": True})
    rotated: bool = field(default=False, metadata={"static": True})
    """Whether integers are turned, as in Quantized"""
    count: int = field(default=1, metadata={"static": True})
    """How many matrices, one after the other, a weight has: one an expert, or one a head"""
    names: tuple[str, ...] = field(default=(), metadata={"static": True})
    """The names of the weights, where this is a whole stack among a network's parameters"""

    @property
    def layout(self) -> tuple[str, int, int, bool]:
        """What weights must have in common for one call to multiply by them."""
        return (self.kind, self.lines.shape[2], self.group, self.rotated)

    def __getitem__(self, index: int) -> Packed:
        """A weight of the stack."""
        return dataclasses.replace(self, index=jnp.int32(index * self.count), names=())

    def columns(self, indices: jax.Array) -> jax.Array:
        """float32[*indices.shape, inputs]; zeros for an index that isn't there."""
        known = (indices >= 0) & (indices < self.outputs)
        index = jnp.where(known, indices, 0).reshape(-1)
        by_column = self.lines.reshape(*self.lines.shape[:3], PANEL, 4)
        quads = by_column[self.index, index // PANEL, :, index % PANEL]
        if self.scales is not None:
            scales = self.scales[self.index, index // PANEL, :, index % PANEL]
            bits = BITS[self.kind]
            some = Quantized(quads.reshape(len(index), -1).T, scales.T, bits, self.inputs, self.group, self.rotated)
            numbers = some.dequantize().T
        elif self.kind == "float32":
            numbers = jax.lax.bitcast_convert_type(quads, jnp.float32)
        else:
            pairs = jax.lax.bitcast_convert_type(quads.reshape(*quads.shape[:-1], 2, 2), jnp.bfloat16)
            numbers = pairs.astype(jnp.float32).reshape(len(index), -1)
        numbers = numbers[:, : self.inputs].reshape(*indices.shape, self.inputs)
        return jnp.where(known[..., None], numbers, 0)


def multiply(x: jax.Array, weights: Sequence[Packed], dtype: jax.typing.DTypeLike = jnp.float32) -> list[jax.Array]:
    """x[rows, inputs], float32 or bfloat16 → [rows, outputs] for each of the weights, which have one layout.

    dtype: float32 or bfloat16, of the results, which are computed in float32.

    A row's result depends on that row alone. Where the weights are integers, x is rounded to int8: as many numbers of a
    row share a scale as `block_of` the weights' group says.
    """
    kind = weights[0].kind
    assert len({weight.layout for weight in weights}) == 1, [weight.layout for weight in weights]
    assert all(weight.count == 1 for weight in weights), "a product of groups is multiply_groups'"
    assert all(weight.inputs == x.shape[1] for weight in weights), x.shape
    out = tuple(jax.ShapeDtypeStruct((x.shape[0], weight.outputs), dtype) for weight in weights)
    call = jax.ffi.ffi_call(f"isthmus_linear_{kind}", out)
    if kind not in BITS:
        return list(call(x, *(array for weight in weights for array in (weight.index, weight.lines))))
    arguments = [array for weight in weights for array in (weight.index, weight.lines, weight.scales)]
    return list(call(x, *arguments, group=np.int64(weights[0].group), rotated=weights[0].rotated))


def multiply_groups(x: jax.Array, weight: Packed, sizes: jax.Array) -> jax.Array:
    """float32[rows, outputs] of x[rows, inputs], float32 or bfloat16: each group of rows times its matrix.

    sizes: int32[matrices of the weight], the rows of each group, in their order; rows past their sum give 0. A row's
    result depends on that row and its matrix alone.
    """
    assert weight.kind not in BITS and sizes.shape == (weight.count,) and weight.inputs == x.shape[1], x.shape
    out = jax.ShapeDtypeStruct((x.shape[0], weight.outputs), jnp.float32)
    return jax.ffi.ffi_call(f"isthmus_linear_groups_{weight.kind}", out)(x, sizes, weight.index, weight.lines)


def pack(matrix: jax.Array | Quantized, inputs: int, *, count: int = 1, transposed: bool = False) -> Packed:
    """An array [*inputs, *outputs] of float32 or bfloat16, or integers [padded inputs, outputs].

    count: the array is [count, *inputs, *outputs]. transposed: it is [*outputs, *inputs] for each of `count`.
    """
    stack = stack_like(1, matrix, inputs, count=count, transposed=transposed)
    return put(stack, 0, matrix, transposed=transposed)[0]


def stack_like(
    weights: int, matrix: jax.Array | Quantized, inputs: int, *, count: int = 1, transposed: bool = False
) -> Packed:
    """A stack for as many as `weights` like this one, which is as `pack` takes it, with nothing in it yet. A weight's
    part of the memory is only taken when it is put there."""
    if isinstance(matrix, Quantized):
        panels = math.ceil(matrix.outputs / PANEL)
        lines = allocate((weights, panels, matrix.values.shape[0] // 4, 64), "uint8")
        scales = allocate((weights, panels, matrix.scales.shape[0], PANEL), matrix.scales.dtype.name)
        kind = KINDS[matrix.bits]
        return Packed(lines, scales, None, kind, inputs, matrix.outputs, matrix.group, matrix.rotated)
    kind, outputs = "float32" if matrix.dtype == jnp.float32 else "bfloat16", matrix.size // inputs // count
    assert matrix.dtype == kind, matrix.dtype
    assert not transposed or matrix.shape[-1] == inputs, matrix.shape
    shape = (weights * count, math.ceil(outputs / PANEL), math.ceil(inputs * matrix.dtype.itemsize / 4), 64)
    return Packed(allocate(shape, "uint8"), None, None, kind, inputs, outputs, count=count)


@partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def put(stack: Packed, index: int, matrix: jax.Array | Quantized, *, transposed: bool = False) -> Packed:
    """The stack, in the same memory, with a weight at a place of it."""
    place = jnp.asarray(index, jnp.int32) * stack.count
    if isinstance(matrix, Quantized):
        values = matrix.values[None]
    else:
        sides = (stack.outputs, stack.inputs) if transposed else (stack.inputs, stack.outputs)
        values = matrix.reshape(stack.count, *sides)
    out = jax.ShapeDtypeStruct(stack.lines.shape, jnp.uint8)
    call = jax.ffi.ffi_call("isthmus_pack_matrix", out, input_output_aliases={1: 0})
    lines = call(values, stack.lines, place, transposed=transposed)
    if not isinstance(matrix, Quantized):
        return dataclasses.replace(stack, lines=lines)
    assert stack.scales is not None
    padded = jnp.pad(matrix.scales, ((0, 0), (0, -matrix.outputs % PANEL)))
    scales = padded.reshape(padded.shape[0], -1, PANEL).swapaxes(0, 1)
    return dataclasses.replace(stack, lines=lines, scales=stack.scales.at[place].set(scales))


def put_each(stack: Packed, index: jax.Array, matrices: jax.Array) -> Packed:
    """A whole stack with other numbers in one of the matrices of each of its weights. index: int32[], which of the
    `count` matrices; matrices: [weights, inputs, outputs], float32 or bfloat16 as the stack's kind is."""
    assert stack.kind not in BITS and matrices.dtype == stack.kind, (stack.kind, matrices.dtype)
    some, panel = matrices.shape[0], stack.lines.shape[1:]
    call = jax.ffi.ffi_call(
        "isthmus_pack_matrix", jax.ShapeDtypeStruct((some, *panel), jnp.uint8), input_output_aliases={1: 0}
    )
    packed = call(matrices, jnp.zeros((some, *panel), jnp.uint8), jnp.int32(0), transposed=False)
    by_weight = stack.lines.reshape(some, stack.count, *panel)
    lines = jax.lax.dynamic_update_slice_in_dim(by_weight, packed[:, None], index, 1)
    return dataclasses.replace(stack, lines=lines.reshape(stack.lines.shape))
