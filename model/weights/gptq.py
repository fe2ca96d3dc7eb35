"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounds a matrix to integers whose errors make up for one another on the
activations that the matrix is multiplied by."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.quantized import Bits, Quantized, as_bytes, best_scales, block_of, nearest, rotate, turned

DAMPING = 0.01
"""The part of the mean second moment that is added to every diagonal entry, because inputs may come that calibration
never saw."""


def quantize_by_moments(
    matrix: jax.Array,
    moments: jax.Array,
    bits: Bits,
    group: int,
    *,
    rotated: bool = True,
    scales: jax.typing.DTypeLike = jnp.bfloat16,
) -> Quantized:
    """Quantizes matrix[inputs, outputs] by GPTQ. moments: float32[inputs, inputs], the sum of x.T @ x over the
    activations x that the matrix was multiplied by.

    The matrix is rounded one input after the other. The inputs that follow are changed to make up for each rounding
    error, as far as they correlate with that input. `best_scales` chooses the scales of a group from the numbers that
    it has by then.
    """
    inputs, block = len(matrix), block_of(group, rotated=rotated)
    factor = _factor(np.asarray(_turned_moments(moments, block, rotated)))
    matrix = turned(matrix, block, rotated=rotated)
    integers, found = _feed_errors(matrix, jnp.asarray(factor), bits, group, jnp.dtype(scales))
    return Quantized(as_bytes(integers, bits), found, bits, inputs, group, rotated)


def _turned_moments(moments: jax.Array, block: int, rotated: bool) -> jax.Array:
    padding = -len(moments) % block
    moments = jnp.pad(moments, ((0, padding), (0, padding)))
    if rotated:
        moments = rotate(rotate(moments, block, len(moments)).T, block, len(moments))
    return moments


def _factor(moments: np.ndarray) -> np.ndarray:
    """float32[inputs, inputs]: the upper Cholesky factor of the inverse of the damped moments."""
    damped = moments.astype(np.float64)
    damped = (damped + damped.T) / 2
    damped[np.diag_indices_from(damped)] += DAMPING * np.diagonal(damped).mean() + 1e-12
    inverse = np.linalg.inv(np.linalg.cholesky(damped))
    return np.linalg.cholesky(inverse.T @ inverse).T.astype(np.float32)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _feed_errors(
    matrix: jax.Array, factor: jax.Array, bits: Bits, group: int, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns the integers, int8[inputs, outputs], and the scales, dtype[groups, outputs]."""
    inputs, outputs = matrix.shape
    groups = math.ceil(inputs / group)
    padding = groups * group - inputs
    matrix = jnp.pad(matrix, ((0, padding), (0, 0)))
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag((jnp.arange(len(matrix)) >= inputs) * 1.0)

    def step(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        matrix, integers, scales = state
        first = index * group
        rows = jax.lax.dynamic_slice_in_dim(factor, first, group)
        own = jax.lax.dynamic_slice_in_dim(rows, first, group, axis=1)
        numbers = jax.lax.dynamic_slice_in_dim(matrix, first, group)
        scale = best_scales(numbers, 1 / jnp.diagonal(own) ** 2, bits, dtype)
        rounded, errors = _round_group(numbers, own, scale, bits)
        later = jnp.where(jnp.arange(len(matrix)) >= first + group, rows, 0)
        matrix = matrix - jnp.matmul(later.T, errors)
        return matrix, jax.lax.dynamic_update_slice_in_dim(integers, rounded, first, 0), scales.at[index].set(scale)

    start = matrix, jnp.zeros(matrix.shape, jnp.int8), jnp.zeros((groups, outputs), dtype)
    _, integers, scales = jax.lax.fori_loop(0, groups, step, start)
    return integers[:inputs], scales


def _round_group(numbers: jax.Array, factor: jax.Array, scale: jax.Array, bits: Bits) -> tuple[jax.Array, jax.Array]:
    """Returns the integers (int8) and the errors (float32) of one group, both [group, outputs]."""
    wide = scale.astype(jnp.float32)

    def step(row: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        numbers, integers, errors = state
        integer = nearest(numbers[row], scale, bits)
        error = (numbers[row] - integer * wide) / factor[row, row]
        later = jnp.where(jnp.arange(len(numbers)) > row, factor[row], 0)
        numbers = numbers - later[:, None] * error
        return numbers, integers.at[row].set(integer), errors.at[row].set(error)

    start = numbers, jnp.zeros(numbers.shape, jnp.int8), jnp.zeros_like(numbers)
    return jax.lax.fori_loop(0, len(numbers), step, start)[1:]
