"""x @ weight for every kind of weight, and the lookup of an embedding. How a weight is kept decides how it is
multiplied: an array by XLA, integers by the jnp below, and what model/ops/cpu/packed.py has packed by its C++
kernel, which is the implementation "cpu"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from isthmus.model.ops.cpu.kernel import cpu_kernel, is_not_packed
from isthmus.model.ops.cpu.packed import Packed, multiply, pack
from isthmus.model.ops.operation import REFERENCE, Operation
from isthmus.model.ops.quantized import Quantized, rotate
from isthmus.model.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observed:
    """A matrix whose inputs are to be known: the gradient with respect to `moments`, of anything, is the sum of x.T @ x
    over the rows x that it multiplied. It costs what computing the inputs does: nothing else of the gradient is needed,
    and XLA drops it."""

    weight: jax.Array
    moments: jax.Array
    """Zeros, float32[inputs, inputs]"""


Weight = jax.Array | Quantized | Packed


def unpacked(params: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights by name, with each matrix of a packed stack in its place."""
    named = {name: weight for name, weight in params.items() if not (isinstance(weight, Packed) and weight.names)}
    for weight in params.values():
        if isinstance(weight, Packed):
            named |= {name: weight[index] for index, name in enumerate(weight.names)}
    return named


def linear(
    x: jax.Array, weight: Weight, outputs: tuple[int, ...], axes: int = 1, *, implementation: str = REFERENCE
) -> jax.Array:
    """Contracts the last `axes` axes of x with the inputs of a weight: float32[leading axes of x, *outputs].

    weight: an array [*inputs, *outputs], cast to x's dtype; or integers, or packed, of a matrix of as many inputs and
    outputs.
    """
    return linears(x, [(weight, outputs)], axes, implementation=implementation)[0]


def linears(
    x: jax.Array,
    weights: Sequence[tuple[Weight, tuple[int, ...]]],
    axes: int = 1,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str = REFERENCE,
) -> list[jax.Array]:
    """`linear` of the same x with each weight and its outputs, rounded to `dtype`. A kernel multiplies weights of one
    layout in one pass."""
    leading, inputs = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    products = LINEAR[implementation](x.reshape(-1, inputs), [weight for weight, _ in weights], dtype)
    return [
        product.astype(dtype).reshape(*leading, *outputs)
        for product, (_, outputs) in zip(products, weights, strict=True)
    ]


def _reference(x: jax.Array, weights: Sequence[Weight], dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    return [_product(x, weight) for weight in weights]


def _cpu(x: jax.Array, weights: Sequence[Weight], dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """Matrices of one layout in one pass of the kernel, in `dtype`; arrays are packed first, as serving does once, and
    what is neither is multiplied as the reference does."""
    packed = {
        place: _packed(x, weight) for place, weight in enumerate(weights) if isinstance(weight, Packed | jax.Array)
    }
    products = {place: _product(x, weight) for place, weight in enumerate(weights) if place not in packed}
    alike: dict[tuple[str, int, int, bool], list[int]] = {}
    for place, weight in packed.items():
        alike.setdefault(weight.layout, []).append(place)
    for places in alike.values():
        together = multiply(x, [packed[place] for place in places], dtype)
        products.update(zip(places, together, strict=True))
    return [products[place] for place in range(len(weights))]


def _packed(x: jax.Array, weight: jax.Array | Packed) -> Packed:
    return weight if isinstance(weight, Packed) else pack(weight.astype(x.dtype), x.shape[1])


def _product(x: jax.Array, weight: Weight | Observed) -> jax.Array:
    """float32[rows, outputs] of x[rows, inputs]."""
    match weight:
        case Packed():
            raise AssertionError("packed matrices are multiplied by the implementation cpu alone")
        case Quantized():
            return multiply_quantized(x, weight)
        case Observed():
            return _product(_observe(x, weight.moments), weight.weight)
        case _:
            # A product of two matrices: with more axes, XLA transposes the weight gradient's operands before its
            # product.
            return _matmul(x, weight.reshape(x.shape[1], -1).astype(x.dtype))


LINEAR: Operation[Callable[[jax.Array, Sequence[Weight], jax.typing.DTypeLike], list[jax.Array]]] = Operation(
    "linear", _reference, (cpu_kernel(_cpu, is_not_packed, gradient_of=_reference),)
)
"""Called with x[rows, inputs], the weights and the dtype that is wanted; a product may be float32 as well."""


@jax.custom_vjp
def _observe(x: jax.Array, moments: jax.Array) -> jax.Array:
    return x


def _observe_forward(x: jax.Array, moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


def _observe_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent, jnp.matmul(x.T, x, preferred_element_type=jnp.float32)


_observe.defvjp(_observe_forward, _observe_backward)


@jax.custom_vjp
def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """float32[rows, outputs]. In its gradient as well, both operands of a product are of x's dtype and sums are
    float32: left to itself, a float32 cotangent makes a float32 product of it."""
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def _matmul_forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, matrix), (x, matrix)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = saved
    cotangent = cotangent.astype(x.dtype)
    dx = jax.lax.dot_general(cotangent, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dmatrix = jax.lax.dot_general(x, cotangent, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dmatrix.astype(matrix.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def multiply_quantized(x: jax.Array, weight: Quantized) -> jax.Array:
    """float32[rows, outputs], of integers times their scales in x's dtype; x is turned as they are, and not rounded to
    integers here."""
    matrix = weight.kept().astype(x.dtype)
    x = jnp.pad(x, ((0, 0), (0, len(matrix) - x.shape[1])))
    if weight.rotated:
        x = rotate(x.astype(jnp.float32).T, weight.block, len(matrix)).T.astype(x.dtype)
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def lookup(table: Weight, tokens: jax.Array, dim: int, dtype: str) -> jax.Array:
    """[*tokens.shape, dim] in `dtype`: the row of each token; zeros for one that isn't in the table.

    table: an array [vocab, dim]; or integers, or packed, of its transpose, which is how the head multiplies by it.
    """
    match table:
        case Packed():
            return table.columns(tokens).astype(dtype)
        case Quantized():
            known = (tokens >= 0) & (tokens < table.outputs)
            return jnp.where(known[..., None], table.columns(jnp.where(known, tokens, 0)), 0).astype(dtype)
        case _:
            # Gathering rows of a table that is sharded on both axes makes XLA replicate it row by row: gather whole
            # ones.
            return _rows(constrain(table, "vocab", None), tokens).astype(dtype)


@jax.custom_vjp
def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """table[tokens], zeros for a token past its end. A row's gradient is summed in float32: in the table's dtype, a
    token that comes thousands of times would stop counting after hundreds."""
    return table.at[tokens].get(mode="fill", fill_value=0)


def _rows_forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows(table, tokens), (table, tokens)


def _rows_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    summed = jnp.zeros_like(table, jnp.float32).at[tokens].add(cotangent.astype(jnp.float32), mode="drop")
    return summed.astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def unembed(hidden: jax.Array, table: Weight, vocab: int, *, implementation: str = REFERENCE) -> jax.Array:
    """float32[..., vocab]: hidden states against every row of an embedding table as `lookup` takes it."""
    matrix = table.T if isinstance(table, jax.Array) else table
    return linear(hidden, matrix, (vocab,), implementation=implementation)
