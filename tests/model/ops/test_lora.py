"""What adapters add, each row with its own: against a loop over rows in float64, and each row alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.model.ops.cpu import library
from isthmus.model.ops.cpu.packed import pack
from isthmus.model.ops.lora import Factors, add_lora
from isthmus.model.ops.operation import REFERENCE

IMPLEMENTATIONS = [REFERENCE, "cpu"]
ADAPTERS = 3


def case(rows: int, inputs: int, rank: int, outputs: int, dtype: Any) -> tuple[jax.Array, ...]:
    """base, x, a, b and each row's choice."""
    rng = np.random.default_rng(rows + inputs + rank + outputs)
    shapes = ((rows, inputs), (ADAPTERS, inputs, rank), (ADAPTERS, rank, outputs))
    x, a, b = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    base = jnp.asarray(rng.standard_normal((rows, outputs)), jnp.float32)
    return base, x, a, b, jnp.asarray(rng.integers(0, ADAPTERS + 1, rows), jnp.int32)


def kept(implementation: str, a: jax.Array, b: jax.Array) -> tuple[Factors, Factors]:
    """The factors as an implementation wants them. Skips the test where it isn't there."""
    if implementation == REFERENCE:
        return a, b
    if reason := library.why_not():
        pytest.skip(reason)
    return pack(a, a.shape[1], count=ADAPTERS), pack(b, b.shape[1], count=ADAPTERS)


def expected(base: Any, x: Any, a: Any, b: Any, chosen: Any) -> np.ndarray:
    out = np.asarray(base, np.float64)
    for row, adapter in enumerate(np.asarray(chosen)):
        if adapter:
            inner = np.asarray(x[row], np.float64) @ np.asarray(a[adapter - 1], np.float64)
            inner = np.asarray(jnp.asarray(inner, x.dtype), np.float64)
            out[row] += inner @ np.asarray(b[adapter - 1], np.float64)
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 5), (7, 33, 3, 20), (40, 64, 16, 96), (130, 1100, 17, 40)])
def test_each_row_gets_its_own(sizes: tuple[int, int, int, int], dtype: str, implementation: str) -> None:
    """A row with another's adapter speaks in another's voice."""
    base, x, a, b, chosen = case(*sizes, dtype)
    got = jax.jit(lambda *args: add_lora(*args, implementation=implementation))(
        base, x, *kept(implementation, a, b), chosen
    )
    assert got.dtype == jnp.float32
    want = expected(base, x, a, b, chosen)
    scale = np.abs(want).max()
    # The inner product is rounded to bfloat16: a sum in another order may round to its other neighbour.
    assert np.abs(np.asarray(got) - want).max() <= (2e-6 if dtype == "float32" else 1e-2) * scale
    nobody = np.asarray(chosen) == 0
    np.testing.assert_array_equal(np.asarray(got)[nobody], np.asarray(base)[nobody])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_beside_any_others(dtype: str) -> None:
    """The promise of the house: who else is in a batch, and with which adapters, changes no bit."""
    base, x, a, b, chosen = case(40, 100, 8, 50, dtype)
    factors = kept("cpu", a, b)
    whole = np.asarray(add_lora(base, x, *factors, chosen, implementation="cpu"))
    for row in range(len(x)):
        one = slice(row, row + 1)
        alone = add_lora(base[one], x[one], *factors, chosen[one], implementation="cpu")
        np.testing.assert_array_equal(np.asarray(alone)[0], whole[row])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_others_overflow_stays_theirs(implementation: str) -> None:
    """An adapter whose numbers overflow ends its own requests, and no others."""
    base, x, a, b, _ = case(6, 32, 4, 20, "float32")
    a = a.at[1].set(3e38)
    chosen = jnp.asarray([0, 1, 2, 3, 1, 0], jnp.int32)
    got = np.asarray(add_lora(base, x, *kept(implementation, a, b), chosen, implementation=implementation))
    assert np.isfinite(got).all(axis=1).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_smaller_rank_padded_with_zeros_is_the_same(implementation: str) -> None:
    """Adapters of several ranks lie in one stack."""
    *numbers, chosen = case(20, 48, 5, 30, "float32")
    base, x, a, b = (jnp.round(2 * each) for each in numbers)  # small whole numbers, whose sums are exact in any order
    padded = jnp.pad(a, ((0, 0), (0, 0), (0, 11))), jnp.pad(b, ((0, 0), (0, 11), (0, 0)))
    narrow = add_lora(base, x, *kept(implementation, a, b), chosen, implementation=implementation)
    wide = add_lora(base, x, *kept(implementation, *padded), chosen, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(wide), np.asarray(narrow))


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, jnp.zeros((3, 8), jnp.bfloat16)),
        (0, jnp.zeros((4, 8))),
        (0, jnp.zeros((3, 9))),
        (2, jnp.asarray([0, 1, ADAPTERS + 1], jnp.int32)),
        (2, jnp.asarray([0, 1, -1], jnp.int32)),
        (2, jnp.zeros(4, jnp.int32)),
        (3, jnp.int32(1)),
        (3, jnp.int32(-1)),
        (4, jnp.zeros((ADAPTERS, 2, 8, 64), jnp.uint8)),
        (5, jnp.int32(1)),
        (6, jnp.zeros((ADAPTERS, 1, 4, 64), jnp.uint8)),
        (6, jnp.zeros((ADAPTERS, 2, 5, 64), jnp.uint8)),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_a_wrong_call_is_an_error(place: int, wrong: jax.Array) -> None:
    """A mistake in the Python above must not read or write beyond an array."""

    def call(x: jax.Array, *arguments: jax.Array) -> jax.Array:
        out, sizes = jax.ShapeDtypeStruct((3, 20), jnp.float32), {"adapters": np.int64(ADAPTERS), "rank": np.int64(4)}
        made = jax.ffi.ffi_call("isthmus_lora_float32", out, input_output_aliases={1: 0})
        return made(x, *arguments, **sizes).block_until_ready()

    a, b = pack(jnp.zeros((ADAPTERS, 8, 4)), 8, count=ADAPTERS), pack(jnp.zeros((ADAPTERS, 4, 20)), 4, count=ADAPTERS)
    zero, chosen = jnp.int32(0), jnp.asarray([0, 1, ADAPTERS], jnp.int32)
    arguments = [jnp.zeros((3, 8)), jnp.zeros((3, 20)), chosen, zero, a.lines, zero, b.lines]
    call(*arguments)
    arguments[place] = wrong
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="linear:"):
        call(*arguments)
