"""Matrices of integers of 8 bits or fewer. What they mean, in jnp: every backend can run it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from isthmus.model.ops.hadamard import hadamard

Bits = Literal[8, 6, 5, 4]
RUN = 32
"""Inputs whose integers are kept together"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix [inputs, outputs] whose numbers are small integers times a scale.

    In the column of an output, every `group` inputs share a scale; the last group may be shorter. If `rotated`, the
    integers are those of the matrix with each `block` of its inputs turned by a Hadamard matrix: outliers are spread
    over the block, so that the scale fits all of it, and so are those of the activations that are multiplied by it (as
    QuaRot does with whole rows: Ashkboos et al. 2024, arXiv 2404.00456).
    """

    values: jax.Array
    """uint8[runs * 4 * bits, outputs]: for every 32 inputs, the last of them filled up with zeros, 4 * bits rows.

    An integer is kept with 2^(bits - 1) added. With 8 bits, a row is an input. With fewer, 16 rows hold the low four
    bits: row 4 * a + b has input 8 * a + b in its low half and input 8 * a + b + 4 in its high half. The other rows
    hold the bits above: those of input 4 * c + d are bit c of row d (5 bits), or the two bits from 2 * (c % 4) of row
    4 * (c // 4) + d (6 bits).
    """
    scales: jax.Array
    """bfloat16 or float16[groups, outputs]"""
    bits: Bits = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    group: int = field(metadata={"static": True})
    """A multiple of 32"""
    rotated: bool = field(default=False, metadata={"static": True})

    @property
    def outputs(self) -> int:
        return self.values.shape[1]

    @property
    def block(self) -> int:
        """Inputs that are turned together."""
        return block_of(self.group, rotated=self.rotated)

    def integers(self) -> jax.Array:
        """int8[inputs, outputs]."""
        return _integers(self.values, self.bits)[: self.inputs]

    def dequantize(self) -> jax.Array:
        """float32[inputs, outputs]."""
        numbers = self.kept()
        return rotate(numbers, self.block, self.inputs) if self.rotated else numbers[: self.inputs]

    def kept(self) -> jax.Array:
        """float32[padded inputs, outputs]: integers times scales, turned if they are."""
        numbers = _integers(self.values, self.bits).astype(jnp.float32)
        return numbers * jnp.repeat(self.scales.astype(jnp.float32), self.group, axis=0)[: len(numbers)]

    def columns(self, indices: jax.Array) -> jax.Array:
        """float32[*indices.shape, inputs]: some of the columns, without the others being dequantized."""
        flat = indices.reshape(-1)
        some = Quantized(
            self.values[:, flat], self.scales[:, flat], self.bits, self.inputs, self.group, rotated=self.rotated
        )
        return some.dequantize().T.reshape(*indices.shape, self.inputs)


def block_of(group: int, *, rotated: bool) -> int:
    """Inputs that are turned together, and that share a scale where activations are rounded to int8: 64, or what
    groups divide by. What isn't turned has outliers, and 32."""
    return math.gcd(group, 64) if rotated else RUN


def runs_of(inputs: int, group: int, *, rotated: bool) -> int:
    """Runs of 32 that a column's inputs take, filled up to whole blocks."""
    block = block_of(group, rotated=rotated)
    return math.ceil(inputs / block) * (block // RUN)


def shapes(
    bits: Bits, group: int, inputs: int, outputs: int, *, rotated: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of a Quantized's values and scales."""
    rows = runs_of(inputs, group, rotated=rotated) * 4 * bits
    return (rows, outputs), (math.ceil(inputs / group), outputs)


def rotate(matrix: jax.Array, block: int, inputs: int) -> jax.Array:
    """float32[inputs, outputs] of float32[padded inputs, outputs]: each block of the inputs times a Hadamard matrix."""
    blocks = matrix.reshape(-1, block, matrix.shape[1])
    return jax.vmap(lambda each: _rotated(each, block))(blocks).reshape(matrix.shape)[:inputs]


def _rotated(each: jax.Array, block: int) -> jax.Array:
    return jnp.matmul(hadamard(block), each, precision=jax.lax.Precision.HIGHEST)


def _integers(values: jax.Array, bits: int) -> jax.Array:
    """int8[padded inputs, outputs] of a Quantized's values."""
    outputs = values.shape[1]
    if bits == 8:
        return jax.lax.bitcast_convert_type(values ^ 128, jnp.int8)
    rows = values.reshape(-1, 4 * bits, outputs)
    low = rows[:, :16].reshape(-1, 4, 1, 4, outputs)
    numbers = jnp.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 8, 4, outputs)
    if bits > 4:
        each = bits - 4
        high = rows[:, 16:].reshape(-1, each, 1, 4, outputs)
        shifts = jnp.arange(0, 8, each, dtype=jnp.uint8)[:, None, None]
        numbers |= ((high >> shifts) & (2**each - 1)).reshape(numbers.shape) << 4
    return numbers.reshape(-1, outputs).astype(jnp.int8) - jnp.int8(2 ** (bits - 1))


@partial(jax.jit, static_argnums=(2, 3))
def from_integers(integers: jax.Array, scales: jax.Array, bits: Bits, group: int) -> Quantized:
    """The matrix of int8[inputs, outputs] within -2^(bits - 1) and 2^(bits - 1) - 1, and scales, bfloat16 or
    float16[groups, outputs], as they are."""
    inputs = len(integers)
    padded = jnp.pad(integers, ((0, -(-inputs // RUN) * RUN - inputs), (0, 0)))
    return Quantized(as_bytes(padded, bits), scales, bits, inputs, group)


def as_bytes(integers: jax.Array, bits: Bits) -> jax.Array:
    """uint8[runs * 4 * bits, outputs], as `Quantized.values`, of int8[padded inputs, outputs]."""
    outputs = integers.shape[1]
    numbers = (integers.astype(jnp.int16) + 2 ** (bits - 1)).astype(jnp.uint8)
    if bits != 8:
        fours = numbers.reshape(-1, 4, 2, 4, outputs)
        rows = ((fours[:, :, 0] & 15) | fours[:, :, 1] << 4).reshape(-1, 16, outputs)
        if bits > 4:
            each = bits - 4
            shifts = jnp.arange(0, 8, each, dtype=jnp.uint8)[:, None, None]
            above = (numbers >> 4).reshape(-1, each, 8 // each, 4, outputs) << shifts
            rows = jnp.concatenate([rows, above.sum(axis=2, dtype=jnp.uint8).reshape(-1, 4 * each, outputs)], axis=1)
        numbers = rows.reshape(-1, outputs)
    return numbers


def quantize(
    matrix: jax.Array, bits: Bits, group: int, *, rotated: bool = True, scales: jax.typing.DTypeLike = jnp.bfloat16
) -> Quantized:
    """matrix[inputs, outputs] as integers, to the nearest over scales, of a dtype, that `best_scales` finds."""
    inputs, outputs = matrix.shape
    matrix = turned(matrix, block_of(group, rotated=rotated), rotated=rotated)
    padding = math.ceil(inputs / group) * group - len(matrix)
    groups = jnp.pad(matrix, ((0, padding), (0, 0))).reshape(-1, group, outputs)
    importance = jnp.pad(jnp.ones(len(matrix)), (0, padding)).reshape(-1, group)
    found = jax.lax.map(lambda each: best_scales(each[0], each[1], bits, scales), (groups, importance))
    integers = nearest(groups, found[:, None], bits).reshape(-1, outputs)[: len(matrix)]
    return Quantized(as_bytes(integers, bits), found, bits, inputs, group, rotated)


def turned(matrix: jax.Array, block: int, *, rotated: bool) -> jax.Array:
    """float32[padded inputs, outputs]: what a Quantized's integers times their scales are to come near to."""
    inputs = len(matrix)
    padded = jnp.pad(matrix.astype(jnp.float32), ((0, -inputs % block), (0, 0)))
    if not rotated:
        return padded
    # One product a block: in a batch of them, which `rotate` is, XLA takes twice as long on a CPU.
    blocks = jax.lax.map(lambda each: _rotated(each, block), padded.reshape(-1, block, matrix.shape[1]))
    return blocks.reshape(padded.shape) / block


def best_scales(
    numbers: jax.Array, importance: jax.Array, bits: Bits, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """[outputs] of a dtype: the scales that numbers[group, outputs] are nearest to integers over.

    8 bits: what takes the largest number to 127. Fewer: of 6 that take the largest to the end of the range on its own
    side or beyond, each fitted by least squares to the integers that it gives, the one with the least error; an error
    counts by importance[group].
    """
    if bits == 8:
        return (jnp.abs(numbers).max(axis=0) / 127).astype(dtype)
    largest = jnp.take_along_axis(numbers, jnp.abs(numbers).argmax(axis=0)[None], axis=0)[0]
    weights = importance[:, None]

    def attempt(share: jax.Array) -> tuple[jax.Array, jax.Array]:
        integers = nearest(numbers, (largest * share).astype(dtype), bits).astype(jnp.float32)
        square = (weights * integers**2).sum(axis=0)
        fitted = (weights * numbers * integers).sum(axis=0) / jnp.where(square == 0, 1, square)
        scale = fitted.astype(dtype)
        error = numbers - nearest(numbers, scale, bits) * scale.astype(jnp.float32)
        return scale, (weights * error**2).sum(axis=0)

    scales, errors = jax.lax.map(attempt, jnp.linspace(0.72, 1.07, 6) / -(2 ** (bits - 1)))
    return jnp.take_along_axis(scales, errors.argmin(axis=0)[None], axis=0)[0]


def nearest(numbers: jax.Array, scales: jax.Array, bits: Bits) -> jax.Array:
    """int8, numbers over scales."""
    scales = scales.astype(jnp.float32)
    most = 2 ** (bits - 1) - 1
    least = -127 if bits == 8 else -most - 1
    return jnp.clip(jnp.round(numbers / jnp.where(scales == 0, 1, scales)), least, most).astype(jnp.int8)
