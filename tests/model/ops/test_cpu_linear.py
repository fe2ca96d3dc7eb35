"""Products with packed matrices: every kind of numbers against sums in float64, and what the engine relies on: a row's
result is its own, to the bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from isthmus.model.ops.cpu.packed import Packed, multiply, multiply_groups, put, stack_like
from isthmus.model.ops.cpu.packed import pack as pack_eagerly
from isthmus.model.ops.linear import linears
from isthmus.model.ops.quantized import Bits, Quantized, as_bytes, shapes

pytestmark = pytest.mark.usefixtures("kernels")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF_ULP = 2.0**-24
SUBNORMAL = 2.0**-125
"""What is this small may count as zero on the way"""
KINDS = ("float32", "bfloat16", "int8-64-float16", "int8-64-rotated", "int8-256-rotated", "int6-64-rotated")
KINDS += ("int5-32-rotated",)
KINDS += ("int5-128", "int4-32-float16", "int4-128-rotated")
"""Bits and groups, with every run that activations are rounded by"""
SIZES = (
    *((1, 1), (1, 17), (2, 1), (3, 5), (7, 16), (8, 15), (15, 33), (31, 4), (32, 48), (33, 31), (63, 65), (65, 2)),
    *((96, 130), (127, 100), (129, 130), (1025, 40), (2051, 70), (2500, 37), (4200, 20), (8300, 18)),
)
"""(inputs, outputs): on both sides of every vector, line, panel, group and block"""
pack = jax.jit(pack_eagerly, static_argnums=1, static_argnames=("count", "transposed"))
pack_bytes = jax.jit(as_bytes, static_argnums=1)
ROWS = (0, 1, 2, 5, 6, 7, 12, 13, 47)


def random_x(rng: np.random.Generator, rows: int, inputs: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.normal(size=(rows, inputs)).astype(dtype)


def random_weight(rng: np.random.Generator, kind: str, inputs: int, outputs: int) -> jax.Array | Quantized:
    if not kind.startswith("int"):
        return jnp.asarray(rng.normal(size=(inputs, outputs)).astype(np.dtype(kind)))
    name, size, *options = kind.split("-")
    bits, group = cast(Bits, int(name[3:])), int(size)
    (rows, _), groups = shapes(bits, group, inputs, outputs, rotated="rotated" in options)
    integers = np.zeros((rows // bits * 8, outputs), np.int8)  # padding is zero
    integers[:inputs] = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, outputs), np.int8)
    scales = rng.uniform(0, 0.001 if "rotated" in options else 0.1, groups).astype(
        np.float16 if "float16" in options else BFLOAT16
    )
    values = pack_bytes(jnp.asarray(integers), bits)
    return Quantized(values, jnp.asarray(scales), bits, inputs, group, "rotated" in options)


def packed(rng: np.random.Generator, kind: str, inputs: int, outputs: int) -> Packed:
    return pack(random_weight(rng, kind, inputs, outputs), inputs)


def hadamard(size: int) -> np.ndarray:
    """1 and -1 by the parity of the bits that a row's and a column's number share."""
    each = np.arange(size)
    return 1 - 2 * (np.bitwise_count(each[:, None] & each) & 1).astype(np.int64)


def block_of(weight: Quantized) -> int:
    sizes = (64, 32) if weight.rotated else (32,)
    return next(size for size in sizes if weight.group % size == 0)


def integers_of(weight: Quantized) -> np.ndarray:
    """int64[padded inputs, outputs], read off the documented layout one by one."""
    rows, bits = np.asarray(weight.values, np.int64), weight.bits
    result = np.zeros((len(rows) // bits * 8, rows.shape[1]), np.int64)
    for k in range(len(result)):
        run, q, d = rows[k // 32 * 4 * bits :], k % 32 // 4, k % 4
        if bits == 8:
            result[k] = run[k % 32]
            continue
        result[k] = run[q // 2 * 4 + d] >> q % 2 * 4 & 15
        if bits == 5:
            result[k] |= (run[16 + d] >> q & 1) << 4
        if bits == 6:
            result[k] |= (run[16 + q // 4 * 4 + d] >> q % 4 * 2 & 3) << 4
    return result - 2 ** (bits - 1)


def scales_of(weight: Quantized) -> np.ndarray:
    """float64[padded inputs, outputs]."""
    integers = integers_of(weight)
    return np.repeat(np.asarray(weight.scales, np.float64), weight.group, axis=0)[: len(integers)]


def columns_of(weight: jax.Array | Quantized, inputs: int) -> np.ndarray:
    """float64[outputs, inputs]."""
    if not isinstance(weight, Quantized):
        return np.ascontiguousarray(np.asarray(weight, np.float64).T)
    matrix = integers_of(weight) * scales_of(weight)
    if weight.rotated:
        block = block_of(weight)
        matrix = np.einsum("ij,bjo->bio", hadamard(block), matrix.reshape(-1, block, matrix.shape[1])).reshape(
            matrix.shape
        )
    return np.ascontiguousarray(matrix[:inputs].T)


def product(x: np.ndarray | jax.Array, weight: Packed) -> np.ndarray:
    return np.asarray(multiply(jnp.asarray(x), [weight])[0])


def products(xs: list[np.ndarray], weight: Packed) -> list[np.ndarray]:
    """`product` of each, by one program: to compile one for each of them would take many times as long as to run it."""
    return list(map(np.asarray, _products(xs, weight)))


@jax.jit
def _products(xs: list[jax.Array], weight: Packed) -> list[jax.Array]:
    return [multiply(x, [weight])[0] for x in xs]


def columns(weight: Packed, indices: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(Packed.columns)(weight, jnp.asarray(indices)))


def assert_near_columns(got: np.ndarray, weight: jax.Array | Quantized, indices: np.ndarray) -> None:
    """One rounding of each number; turned ones are sums of a block's."""
    want = columns_of(weight, got.shape[1])[indices]
    rotated = isinstance(weight, Quantized) and weight.rotated
    np.testing.assert_allclose(got, want, rtol=0 if rotated else HALF_ULP, atol=1e-4 if rotated else 0)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


# ---- what the kernels compute, in float64


def exact_floats(x: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(products, how far float32 may be from them)."""
    rough = HALF_ULP * (2 * math.sqrt(len(matrix)) + 4)
    return x @ matrix, rough * (np.abs(x) @ np.abs(matrix)) + len(matrix) * SUBNORMAL


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(integers of at most 127, their scales float32[..., 1]) of the runs x[..., run]."""
    top = np.abs(x).max(axis=-1, keepdims=True, initial=0).astype(np.float32)
    tiny = top < 127 / np.finfo(np.float32).max  # rounds to zeros
    inverse = np.float32(127) / np.where(tiny, 1, top)
    return np.where(tiny, 0, np.rint(x * inverse)).astype(np.int64), top / np.float32(127)


def turned(x: np.ndarray) -> np.ndarray:
    """x[..., run] times a Hadamard matrix, each sum in float32 and in the kernel's order."""
    size = x.shape[-1]
    half = 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([low + high, low - high], axis=-2).reshape(x.shape)
        half *= 2
    return x


def exact_integers(x: np.ndarray, weight: Quantized) -> tuple[np.ndarray, np.ndarray]:
    run, matrix = block_of(weight), integers_of(weight)
    padded = np.pad(x, ((0, 0), (0, len(matrix) - x.shape[1]))).reshape(len(x), len(matrix) // run, run)
    integers, scales = rounded(turned(padded) if weight.rotated else padded)
    products = np.einsum("ngk,gko->ngo", integers, matrix.reshape(-1, run, matrix.shape[1]))
    terms = products * scales_of(weight)[::run] * scales
    tiny = SUBNORMAL * (run if weight.rotated else 1)  # of a run's numbers each may count as zero
    return terms.sum(axis=1), HALF_ULP * (terms.shape[1] + 4) * np.abs(terms).sum(axis=1) + tiny


def exact(x: np.ndarray, weight: jax.Array | Quantized) -> tuple[np.ndarray, np.ndarray]:
    """(x @ weight with exact sums, float64; how far float32 may be from it).

    Against integers x is rounded as it is said to be, so that what remains is the rounding of a few multiplications.
    """
    if isinstance(weight, Quantized):
        return exact_integers(x.astype(np.float32), weight)
    return exact_floats(x.astype(np.float64), np.asarray(weight, np.float64))


def assert_right(weight: jax.Array | Quantized, *xs: np.ndarray) -> None:
    want, tolerance = exact(np.concatenate([x.astype(np.float32) for x in xs]), weight)  # a row's is its own
    each = products(list(xs), pack(weight, xs[0].shape[1]))
    assert [got.dtype for got in each] == [np.float32] * len(xs) and list(map(len, each)) == list(map(len, xs))
    got = np.concatenate(each)
    assert got.shape == want.shape
    worst = np.max(np.abs(got - want) / tolerance, initial=0)
    assert worst <= 1, f"{worst:.2f} times as far from the exact product as rounding explains"


@pytest.mark.parametrize("inputs, outputs", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_the_exact_one_up_to_rounding(kind: str, inputs: int, outputs: int) -> None:
    """Sizes that fill no vector, line, panel or group: a wrong tail here is a model that talks nonsense."""
    rng = np.random.default_rng(inputs * 31 + outputs)
    weight = random_weight(rng, kind, inputs, outputs)
    index = SIZES.index((inputs, outputs))
    some, others = ROWS[index % len(ROWS)], ROWS[(index + 3) % len(ROWS)]
    assert_right(
        weight, *(random_x(rng, rows, inputs, dtype) for rows in (some, others) for dtype in (np.float32, BFLOAT16))
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(kind: str, rows: int) -> None:
    """Rows are tiled by up to six, and a batch of any size comes."""
    rng = np.random.default_rng(rows)
    x = random_x(rng, rows, 130)
    assert_right(random_weight(rng, kind, 130, 90), x)


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_numbers(kind: str) -> None:
    """Rows of very different sizes in one batch: none may be rounded by another's scale, or overflow on the way."""
    rng = np.random.default_rng(5)
    x = random_x(rng, 9, 200)
    x *= np.array([1e30, 1e-30, 1, 1e-38, 1e38, 1e-42, 1e10, 1e-10, 1], np.float32)[:, None]
    x[4] = np.clip(x[4], -1e36, 1e36)
    x[8] = -0.0
    x[2, :150] = 0
    x[6, ::2] = 0
    assert_right(random_weight(rng, kind, 200, 50), x)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_zeros(kind: str) -> None:
    """Padding: it is left out of the work, and must not shift the rows after it."""
    rng = np.random.default_rng(6)
    x = random_x(rng, 20, 70)
    x[[0, 3, 4, 5, 11, 19]] = 0
    weight = packed(rng, kind, 70, 40)
    got = product(x, weight)
    assert not got[[0, 3, 4, 5, 11, 19]].any()
    for row in (1, 2, 6, 12, 18):
        assert_same_bits(got[row], product(x[row : row + 1], weight)[0])
    assert not product(np.zeros((7, 70), np.float32), weight).any()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_at_the_end_of_their_range(kind: str) -> None:
    """Where a sum of 16 bits would overflow first."""
    signs = np.random.default_rng(7).choice([-1.0, 1.0], (3, 512)).astype(np.float32)
    x = np.concatenate([signs, np.ones((1, 512), np.float32), -np.ones((1, 512), np.float32)])
    weight = random_weight(np.random.default_rng(7), kind, 512, 20)
    if not isinstance(weight, Quantized):
        return assert_right(jnp.asarray(np.tile(x, (4, 1)).T, kind), x)
    for byte in (0, 255):  # the least or the largest everywhere
        assert_right(dataclasses.replace(weight, values=jnp.full_like(weight.values, byte)), x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int")])
def test_a_product_is_near_that_of_the_dequantized_numbers(kind: str) -> None:
    """What other backends multiply by: the kernel alone rounds activations, to one of 127 steps, which comes to a
    hundredth of a product at most, and of outliers to no more where they are turned."""
    rng = np.random.default_rng(15)
    weight = random_weight(rng, kind, 700, 60)
    assert isinstance(weight, Quantized)
    x = random_x(rng, 40, 700)
    for outliers in (False, "rotated" in kind):
        x[:, ::97] *= 30 if outliers else 1
        want = np.asarray(linears(jnp.asarray(x), [(weight, (60,))])[0])
        error = product(x, pack(weight, 700)) - want
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(want), (
            outliers,
            np.linalg.norm(error) / np.linalg.norm(want),
        )


# ---- rows are independent


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_keeps_it_to_itself(kind: str, bad: float) -> None:
    """One broken request in the batch: its own answer is visibly broken, everybody else's is what it was."""
    rng = np.random.default_rng(8)
    weight = packed(rng, kind, 100, 70)
    x = random_x(rng, 13, 100)
    clean = product(x, weight)
    x[4, 99] = x[7, 0] = bad
    got = product(x, weight)
    assert not np.isfinite(got[[4, 7]]).any()
    others = [row for row in range(13) if row not in (4, 7)]
    assert_same_bits(got[others], clean[others])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs, outputs", [(100, 70), (2500, 33), (40, 300), (8300, 18)])
def test_a_row_gives_the_same_bits_in_any_batch(kind: str, dtype: str, inputs: int, outputs: int) -> None:
    """A request's tokens must not depend on who else is being served."""
    rng = np.random.default_rng(9)
    weight = packed(rng, kind, inputs, outputs)
    x = random_x(rng, 47, inputs, np.float32 if dtype == "float32" else BFLOAT16)
    x[[5, 20]] = 0
    whole = product(x, weight)
    batches = [np.array([row]) for row in range(0, 47, 5)]
    batches += [rng.permutation(47)[:size] for size in (2, 3, 4, 5, 6, 7, 12, 13, 47)]
    for some, got in zip(batches, products([x[some] for some in batches], weight), strict=True):
        assert_same_bits(got, whole[some])


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs, outputs, transposed", [(100, 70, False), (2500, 33, True)])
def test_a_group_of_rows_is_multiplied_by_its_matrix_as_if_alone(
    inputs: int, outputs: int, transposed: bool, kind: str, dtype: Any
) -> None:
    """A token of a mixture must get its own expert, and the same bits from it whoever else goes there: empty groups,
    rows of zeros in one and rows of nobody at the end."""
    rng = np.random.default_rng(10)
    x, sizes = random_x(rng, 47, inputs, dtype), np.array([0, 1, 13, 0, 26, 2, 0], np.int32)
    x[[3, 20]] = 0
    weights = np.asarray(rng.normal(size=(len(sizes), inputs, outputs)), np.dtype(kind))
    given = jnp.asarray(weights.swapaxes(1, 2) if transposed else weights)
    got = np.asarray(jax.jit(multiply_groups)(x, pack(given, inputs, count=len(sizes), transposed=transposed), sizes))
    ends = np.cumsum(sizes)
    for weight, size, end in zip(weights, sizes, ends, strict=True):
        assert_same_bits(got[end - size : end], product(x[end - size : end], pack(jnp.asarray(weight), inputs)))
    assert not got[ends[-1] :].any()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_several_weights_at_once_are_the_same_as_one_by_one(kind: str, rows: int) -> None:
    """q, k and v, or gate and up, share one pass over x."""
    rng = np.random.default_rng(10)
    weights = [packed(rng, kind, 150, outputs) for outputs in (64, 1, 17, 200)]
    x = jnp.asarray(random_x(rng, rows, 150))
    for got, weight in zip(multiply(x, weights), weights, strict=True):
        assert_same_bits(np.asarray(got), product(x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_result_is_the_float32_one_rounded(kind: str) -> None:
    """What a layer hands on is the sum rounded once, not sums of what was rounded on the way."""
    rng = np.random.default_rng(11)
    weight = packed(rng, kind, 8300, 37)
    x = random_x(rng, 14, 8300)
    x[3, 5] = np.nan
    x[6] = 0
    got = multiply(jnp.asarray(x), [weight], jnp.bfloat16)[0]
    rounded = product(x, weight).astype(BFLOAT16)
    np.testing.assert_array_equal(np.asarray(got, np.float32), rounded.astype(np.float32))


# ---- packing


WITH_OTHERS = ("int4-32", "int4-128", "int8-128", "int4-128", "int4-64-rotated", "int8-256-rotated", "float32")


def test_weights_of_other_groups_do_not_change_a_product() -> None:
    """Rules may give a layer's query int4 by 32 and its key int4 by 128 or int8: each rounds x in its own way."""
    rng = np.random.default_rng(8)
    x = jnp.asarray(random_x(rng, 5, 200))
    weights = [packed(rng, kind, 200, 40) for kind in WITH_OTHERS]
    together = linears(x, [(weight, (40,)) for weight in weights], implementation="cpu")
    for weight, got in zip(weights, together, strict=True):
        assert_same_bits(np.asarray(got), product(x, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 17), (33, 16), (100, 31), (130, 5)])
def test_columns_are_what_was_packed(kind: str, inputs: int, outputs: int) -> None:
    """The embedding is kept packed, and its rows are read from there."""
    rng = np.random.default_rng(11)
    weight = random_weight(rng, kind, inputs, outputs)
    got = columns(pack(weight, inputs), np.arange(outputs))
    assert_near_columns(got, weight, np.arange(outputs))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_there_are_zeros(kind: str) -> None:
    """Padding has a token that no vocabulary holds; the panel's own padding and what lies behind it stay unread."""
    rng = np.random.default_rng(12)
    weight = random_weight(rng, kind, 40, 21)
    limits = np.iinfo(np.int32)
    indices = np.array([[0, -1, 20], [21, 31, 32], [1000, limits.max, limits.min]], np.int32)
    got = columns(pack(weight, 40), indices)
    assert got.shape == (3, 3, 40)
    there = (indices >= 0) & (indices < 21)
    assert not got[~there].any()
    assert_near_columns(got[there], weight, indices[there])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_transposed_matrix_packs_alike(kind: str) -> None:
    """The embedding is stored as [vocab, dim]."""
    weight = random_weight(np.random.default_rng(13), kind, 37, 50)
    assert isinstance(weight, jax.Array)
    np.testing.assert_array_equal(pack(weight.T, 37, transposed=True).lines, pack(weight, 37).lines)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_a_stack_is_the_matrix_alone(kind: str) -> None:
    """The layers of a model lie in one stack, each packed where the stack has its place: neither the others nor the
    order in which they came may be seen, and the stack is never copied."""
    rng = np.random.default_rng(14)
    weights = [random_weight(rng, kind, 100, 37) for _ in range(3)]
    stack = stack_like(3, weights[0], 100)
    memory = stack.lines.unsafe_buffer_pointer()
    for index in (2, 0, 1):
        stack = put(stack, index, weights[index])
    assert stack.lines.unsafe_buffer_pointer() == memory
    x, indices = jnp.asarray(random_x(rng, 5, 100)), np.array([36, 0, 5, 37], np.int32)
    both = jax.jit(lambda stack: multiply(x, [stack[0], stack[2]]))(stack)
    for index, weight in enumerate(weights):
        alone = pack(weight, 100)
        assert_same_bits(product(x, stack[index]), product(x, alone))
        assert_same_bits(columns(stack[index], indices), columns(alone, indices))
    for got, index in zip(both, (0, 2), strict=True):
        assert_same_bits(np.asarray(got), product(x, stack[index]))
