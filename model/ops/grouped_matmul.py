"""Grouped matmul: rows sorted by group, each group with a matrix of its own. What a mixture of experts is made of.

The reference is `jax.lax.ragged_dot`, except on CPU, where XLA expands that to a product with every group's matrix:
there a loop over blocks of rows reads the matrices of those groups only that have rows, in place. Matrices that
model/ops/cpu/packed.py has packed are multiplied by its C++ kernel, which is the implementation "cpu".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from isthmus.model.ops.cpu.kernel import cpu_kernel, is_not_packed
from isthmus.model.ops.cpu.packed import Packed, multiply_groups, pack
from isthmus.model.ops.operation import REFERENCE, Operation, Setting, with_gradient_of

MAX_BLOCK = 64
"""Rows that the CPU multiplies at a time: more fills the last block of a small group with others' rows for nothing."""


Matrices = jax.Array | Packed
"""One for each group: an array [groups, inputs, outputs], or packed"""


def grouped_matmul(x: jax.Array, weights: Matrices, sizes: jax.Array, *, implementation: str = REFERENCE) -> jax.Array:
    """x[row] @ weights[group of row], float32[rows, outputs].

    x: [rows, inputs], sorted by group; weights: of x's dtype, if they aren't packed; sizes: int32[groups], the rows of
    each group; rows past their sum give 0. A row's result depends on that row alone; by the kernel, to the bit.
    """
    return GROUPED_MATMUL[implementation](x, weights, sizes)


def multiply_heads(x: jax.Array, kernel: Matrices, *, turned: bool, implementation: str) -> jax.Array:
    """float32[..., heads, outputs] of x[..., heads, inputs], by a matrix for each head.

    kernel: [inputs, heads, outputs], or [outputs, heads, inputs] if `turned`; or packed. implementation: of
    `grouped_matmul`, where the reference is one product for all heads.
    """
    if implementation == REFERENCE:
        assert not isinstance(kernel, Packed), "packed matrices are multiplied by the implementation cpu alone"
        return _heads(x, kernel, turned)
    return with_gradient_of(_heads, partial(_heads_by_groups, implementation))(x, kernel, turned)


def _heads(x: jax.Array, kernel: Any, turned: bool) -> jax.Array:
    equation = "...hd,rhd->...hr" if turned else "...hr,rhd->...hd"
    return jnp.einsum(equation, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _heads_by_groups(implementation: str, x: jax.Array, kernel: Matrices, turned: bool) -> jax.Array:
    *leading, heads, inputs = x.shape
    by_head = x.reshape(-1, heads, inputs).swapaxes(0, 1)
    if not isinstance(kernel, Packed):
        kernel = kernel.astype(x.dtype).transpose((1, 2, 0) if turned else (1, 0, 2))
    rows = by_head.shape[1]
    sizes = jnp.full(heads, rows, jnp.int32)
    out = grouped_matmul(by_head.reshape(-1, inputs), kernel, sizes, implementation=implementation)
    return out.reshape(heads, rows, -1).swapaxes(0, 1).reshape(*leading, heads, -1)


@jax.custom_vjp
def _reference(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return _multiply(x, weights, sizes)


def _multiply(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    def ragged(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        out = jax.lax.ragged_dot(x, weights, sizes, preferred_element_type=jnp.float32)
        return _zero_past(out, sizes.sum())

    return jax.lax.platform_dependent(x, weights, sizes, cpu=_multiply_blocks, default=ragged)


def _outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """float32[groups, inputs, outputs]: the sum over each group's rows of x[row]ᵀ y[row]."""

    def ragged(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(x, y, sizes, dimensions, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(x, y, sizes, cpu=_outer_blocks, default=ragged)


def _forward(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _multiply(x, weights, sizes), (x, weights, sizes)


def _backward(saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[Any, Any, None]:
    x, weights, sizes = saved
    cotangent = cotangent.astype(x.dtype)
    dx = _multiply(cotangent, weights.swapaxes(1, 2), sizes)
    return dx.astype(x.dtype), _outer(x, cotangent, sizes).astype(weights.dtype), None


_reference.defvjp(_forward, _backward)


def _cpu(x: jax.Array, weights: Matrices, sizes: jax.Array) -> jax.Array:
    """Arrays are packed first, as serving does once."""
    packed = weights if isinstance(weights, Packed) else pack(weights, x.shape[1], count=len(weights))
    return multiply_groups(x, packed, sizes)


def _is_used(setting: Setting) -> bool:
    return setting.model.mixture.experts > 0 or setting.model.latent.rank > 0


GROUPED_MATMUL: Operation[Callable[..., jax.Array]] = Operation(
    "grouped_matmul", _reference, (cpu_kernel(_cpu, is_not_packed, gradient_of=_reference),), is_used=_is_used
)
"""Called with x, the groups' matrices and their sizes."""


def _zero_past(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[0])[:, None] < rows, x, 0)


def _block_size(rows: int, groups: int) -> int:
    """A power of two from 8 near the mean size of a group."""
    return min(MAX_BLOCK, 1 << max(3, (-(-rows // groups) - 1).bit_length()))


def _blocks(sizes: jax.Array, block: int) -> tuple[jax.Array, Any]:
    """How many blocks hold all rows when none is shared, and place(i) → (group, first row, end of the group)."""
    blocks = -(-sizes // block)
    last_block, ends = jnp.cumsum(blocks), jnp.cumsum(sizes)

    def place(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.searchsorted(last_block, i, side="right").astype(jnp.int32)
        first = ends[group] - sizes[group] + (i - last_block[group] + blocks[group]) * block
        return group, first, ends[group]

    return last_block[-1], place


def _multiply_blocks(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """Blocks go in order, so what a group's last block writes past its end is written anew by the next group."""
    (rows, _), (groups, _, outputs) = x.shape, weights.shape
    block = _block_size(rows, groups)
    count, place = _blocks(sizes, block)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        group, first, _ = place(i)
        part = jax.lax.dynamic_slice_in_dim(padded, first, block)
        matrix = jax.lax.dynamic_index_in_dim(weights, group, keepdims=False)
        product = jnp.matmul(part, matrix, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0)

    out = jax.lax.fori_loop(0, count, step, jnp.zeros((rows + block, outputs), jnp.float32))
    return _zero_past(out[:rows], sizes.sum())


def _outer_blocks(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    (rows, inputs), outputs, groups = x.shape, y.shape[1], sizes.shape[0]
    block = _block_size(rows, groups)
    count, place = _blocks(sizes, block)
    pad = partial(jnp.pad, pad_width=((0, block), (0, 0)))
    x, y = pad(x), pad(y)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        group, first, end = place(i)
        mine = (first + jnp.arange(block) < end)[:, None]
        left = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, first, block), 0)
        right = jax.lax.dynamic_slice_in_dim(y, first, block)
        product = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
        total = jax.lax.dynamic_index_in_dim(out, group, keepdims=False) + product
        return jax.lax.dynamic_update_index_in_dim(out, total, group, 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((groups, inputs, outputs), jnp.float32))
