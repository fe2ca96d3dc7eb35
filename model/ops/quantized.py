"""Matrices of int8 or int4 numbers. What they mean, in jnp: every backend can run it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

Bits = Literal[8, 4]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix [inputs, outputs] whose numbers are small integers times a scale.

    int8: one scale an output. int4: one scale an output for every group of inputs; two numbers a byte along the
    inputs, the even one in the low half, each 8 too large. Inputs that don't fill a group are padded with zeros.
    """

    values: jax.Array
    """int8[inputs, outputs], or uint8[padded inputs / 2, outputs]"""
    scales: jax.Array
    """float32[1, outputs], or bfloat16[groups, outputs]"""

    @property
    def bits(self) -> Bits:
        return 8 if self.values.dtype == jnp.int8 else 4

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.values.shape[0] * (8 // self.bits) // self.scales.shape[0]

    @property
    def integers_shape(self) -> tuple[int, int]:
        """(inputs, padding included; outputs)."""
        return self.values.shape[0] * (8 // self.bits), self.values.shape[1]

    def integers(self) -> jax.Array:
        """int8[inputs, outputs], padding included."""
        if self.bits == 8:
            return self.values
        low, high = self.values & 15, self.values >> 4
        both = jnp.stack([low, high], axis=1).reshape(-1, self.values.shape[1])
        return both.astype(jnp.int8) - 8

    def dequantize(self, inputs: int) -> jax.Array:
        """float32[inputs, outputs]."""
        integers = self.integers()
        groups = integers.reshape(self.scales.shape[0], -1, integers.shape[1]).astype(jnp.float32)
        return (groups * self.scales[:, None].astype(jnp.float32)).reshape(integers.shape)[:inputs]

    def columns(self, indices: jax.Array, inputs: int) -> jax.Array:
        """float32[*indices.shape, inputs]: some of the columns, without the others being dequantized."""
        flat = indices.reshape(-1)
        some = Quantized(self.values[:, flat], self.scales[:, flat])
        return some.dequantize(inputs).T.reshape(*indices.shape, inputs)


def quantize(matrix: jax.Array, bits: Bits, group: int = 64) -> Quantized:
    """The nearest integers to matrix[inputs, outputs] over scales that take its largest numbers to 127 or 7.

    Symmetric round-to-nearest (Dettmers et al. 2022, arXiv 2208.07339, without its outliers). group: of int4, a
    multiple of 32.
    """
    matrix = matrix.astype(jnp.float32)
    if bits == 8:
        scales = jnp.abs(matrix).max(axis=0, keepdims=True) / 127
        return Quantized(_nearest(matrix, scales, 127).astype(jnp.int8), scales)
    assert group % 32 == 0, group
    inputs, outputs = matrix.shape
    groups = math.ceil(inputs / group)
    matrix = jnp.pad(matrix, ((0, groups * group - inputs), (0, 0))).reshape(groups, group, outputs)
    scales = (jnp.abs(matrix).max(axis=1) / 7).astype(jnp.bfloat16)
    integers = _nearest(matrix, scales[:, None].astype(jnp.float32), 7).reshape(groups * group, outputs) + 8
    pairs = integers.astype(jnp.uint8).reshape(-1, 2, outputs)
    return Quantized(pairs[:, 0] | pairs[:, 1] << 4, scales)


def _nearest(matrix: jax.Array, scales: jax.Array, limit: int) -> jax.Array:
    return jnp.clip(jnp.round(matrix / jnp.where(scales == 0, 1, scales)), -limit, limit)
