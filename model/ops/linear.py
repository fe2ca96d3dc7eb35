"""x @ weight for every kind of weight, and the lookup of an embedding. How a weight is kept decides how it is
multiplied: an array by XLA, integers by the jnp below, and what model/ops/cpu/packed.py has packed by its C++
kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from model.ops.cpu.packed import Packed, multiply
from model.ops.quantized import Quantized

Weight = jax.Array | Quantized | Packed


def linear(x: jax.Array, weight: Weight, outputs: tuple[int, ...], axes: int = 1) -> jax.Array:
    """Contracts the last `axes` axes of x with the inputs of a weight: float32[leading axes of x, *outputs].

    weight: an array [*inputs, *outputs], cast to x's dtype; or integers, or packed, of a matrix of as many inputs and
    outputs.
    """
    return linears(x, [(weight, outputs)], axes)[0]


def linears(
    x: jax.Array,
    weights: Sequence[tuple[Weight, tuple[int, ...]]],
    axes: int = 1,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> list[jax.Array]:
    """`linear` of the same x with each weight and its outputs, which a kernel does in one pass; rounded to `dtype`."""
    leading, inputs = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    rows = x.reshape(-1, inputs)
    packed = [weight for weight, _ in weights if isinstance(weight, Packed)]
    if len(packed) == len(weights) and len({weight.layout for weight in packed}) == 1:
        products = multiply(rows, packed, dtype)
    else:
        products = [_product(rows, weight) for weight, _ in weights]
    return [
        product.astype(dtype).reshape(*leading, *outputs)
        for product, (_, outputs) in zip(products, weights, strict=True)
    ]


def _product(x: jax.Array, weight: Weight) -> jax.Array:
    """float32[rows, outputs] of x[rows, inputs]."""
    match weight:
        case Packed():
            return multiply(x, [weight])[0]
        case Quantized():
            return multiply_quantized(x, weight)
        case _:
            # A product of two matrices: with more axes, XLA transposes the weight gradient's operands before its
            # product.
            matrix = weight.reshape(x.shape[1], -1).astype(x.dtype)
            return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def multiply_quantized(x: jax.Array, weight: Quantized) -> jax.Array:
    """float32[rows, outputs], the integers turned back to x's dtype first: x itself is never rounded here."""
    matrix = weight.dequantize(x.shape[1]).astype(x.dtype)
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def lookup(table: Weight, tokens: jax.Array, dim: int, dtype: str) -> jax.Array:
    """[*tokens.shape, dim] in `dtype`: the row of each token; zeros for one that isn't in the table.

    table: an array [vocab, dim]; or integers, or packed, of its transpose, which is how the head multiplies by it.
    """
    match table:
        case Packed():
            return table.columns(tokens).astype(dtype)
        case Quantized():
            known = (tokens >= 0) & (tokens < table.values.shape[1])
            return jnp.where(known[..., None], table.columns(jnp.where(known, tokens, 0), dim), 0).astype(dtype)
        case _:
            rows = table.astype(dtype)
            # Gathering rows of a table that is sharded on both axes makes XLA replicate it row by row: gather whole
            # ones.
            if not jax.sharding.get_abstract_mesh().empty:
                rows = jax.lax.with_sharding_constraint(rows, jax.sharding.PartitionSpec("tp", None))
            return rows.at[tokens].get(mode="fill", fill_value=0)


def unembed(hidden: jax.Array, table: Weight, vocab: int) -> jax.Array:
    """float32[..., vocab]: hidden states against every row of an embedding table as `lookup` takes it."""
    return linear(hidden, table.T if isinstance(table, jax.Array) else table, (vocab,))
