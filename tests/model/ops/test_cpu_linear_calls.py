"""Calls of the products' and packing's kernels that are wrong: an error, never a crash."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("kernels")


def call(target: str, out: Sequence[tuple[tuple[int, ...], Any]], *arguments: jax.Array, group: int = 32) -> None:
    attributes = {"group": np.int64(group), "rotated": False} if target in INTEGERS else {}
    results = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out)
    jax.block_until_ready(jax.ffi.ffi_call(f"isthmus_{target}", results)(*arguments, **attributes))


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


MATRICES = 3
WRONG = ["integers", "rank", "inner", "lines", "panels", "line", "signed", "flat", "none", "twice"]
WRONG += ["beyond", "below", "wide"]
REFUSED = (jax.errors.JaxRuntimeError, ValueError)
"""The second where the same program ran before"""


def lines(panels: int, count: int) -> jax.Array:
    return zeros(MATRICES, panels, count, 64, dtype=jnp.uint8)


OUT = [((3, 20), jnp.float32)]
LAST = jnp.int32(MATRICES - 1)
SCALES = zeros(MATRICES, 2, 1, 16, dtype=jnp.bfloat16)
RIGHT: dict[str, tuple[jax.Array, ...]] = {
    "linear_float32": (zeros(3, 8), LAST, lines(2, 8)),
    "linear_bfloat16": (zeros(3, 8), LAST, lines(2, 4)),
    "linear_int8": (zeros(3, 8), LAST, lines(2, 8), SCALES),
    "linear_int6": (zeros(3, 8), LAST, lines(2, 6), SCALES.astype(jnp.float16)),
    "linear_int5": (zeros(3, 8), LAST, lines(2, 5), SCALES),
    "linear_int4": (zeros(3, 8), LAST, lines(2, 4), SCALES),
}


INTEGERS = [target for target in RIGHT if target.startswith("linear_int")]


def replaced(target: str, index: int, argument: jax.Array) -> tuple[jax.Array, ...]:
    arguments = list(RIGHT[target])
    arguments[index] = argument
    return tuple(arguments)


@pytest.mark.parametrize("target", RIGHT)
def test_the_right_calls_are_right(target: str) -> None:
    """What the wrong calls below differ from."""
    call(target, OUT, *RIGHT[target])


@pytest.mark.parametrize("target", RIGHT)
@pytest.mark.parametrize(
    "wrong",
    [
        *[
            "integers",
            "rank",
            "inner",
            "lines",
            "panels",
            "line",
            "signed",
            "flat",
            "none",
            "twice",
            "beyond",
            "below",
            "wide",
        ]
    ],
)
def test_a_wrong_call_is_an_error(target: str, wrong: str) -> None:
    """A mistake in the Python above must not read or write beyond an array."""
    right = RIGHT[target][2]
    arguments = {
        "integers": replaced(target, 0, zeros(3, 8, dtype=jnp.int32)),
        "rank": replaced(target, 0, zeros(1, 3, 8)),
        "inner": replaced(target, 0, zeros(3, 40)),
        "lines": replaced(target, 2, lines(2, right.shape[2] * 3 + 1)),
        "panels": replaced(target, 2, lines(3, right.shape[2])),
        "line": replaced(target, 2, zeros(MATRICES, 2, right.shape[2], 32, dtype=jnp.uint8)),
        "signed": replaced(target, 2, right.astype(jnp.int8)),
        "flat": replaced(target, 2, right[0]),
        "none": RIGHT[target][:1],
        "twice": (*RIGHT[target], *RIGHT[target][1:]),
        "beyond": replaced(target, 1, jnp.int32(MATRICES)),
        "below": replaced(target, 1, jnp.int32(-1)),
        "wide": replaced(target, 1, jnp.zeros(1, jnp.int32)),
    }[wrong]
    with pytest.raises(REFUSED, match="linear:"):
        call(target, OUT, *arguments)


@pytest.mark.parametrize("out", [[((2, 20), jnp.float32)], [((3, 20), jnp.int32)], [((60,), jnp.float32)], OUT * 2])
@pytest.mark.parametrize("target", RIGHT)
def test_a_wrong_result_is_an_error(target: str, out: list[tuple[tuple[int, ...], Any]]) -> None:
    """As above, for where the kernel writes."""
    with pytest.raises(REFUSED, match="linear:"):
        call(target, out, *RIGHT[target])


@pytest.mark.parametrize(
    "scales",
    [
        zeros(MATRICES, 2, 1, 10, dtype=jnp.bfloat16),
        zeros(MATRICES, 1, 1, 16, dtype=jnp.bfloat16),
        zeros(MATRICES - 1, 2, 1, 16, dtype=jnp.bfloat16),
        zeros(MATRICES, 2, 0, 16, dtype=jnp.bfloat16),
        zeros(MATRICES, 2, 2, 16, dtype=jnp.bfloat16),
        zeros(MATRICES, 2, 16, dtype=jnp.bfloat16),
        zeros(MATRICES, 2, 1, 16),
    ],
)
@pytest.mark.parametrize("target", INTEGERS)
def test_wrong_scales_are_an_error(target: str, scales: jax.Array) -> None:
    """As above, for what integers have beside their lines."""
    with pytest.raises(REFUSED, match="linear:"):
        call(target, OUT, *replaced(target, 3, scales))


@pytest.mark.parametrize("group", [-32, 0, 31, 48])
@pytest.mark.parametrize("target", INTEGERS)
def test_a_wrong_group_is_an_error(target: str, group: int) -> None:
    """As above, for how many inputs share a scale: none, or no whole run of 32."""
    with pytest.raises(REFUSED, match="linear:"):
        call(target, OUT, *RIGHT[target], group=group)


@pytest.mark.parametrize("target", RIGHT)
def test_weights_of_other_inputs_are_an_error(target: str) -> None:
    """Of several weights, the second is checked as well."""
    other = replaced(target, 2, lines(2, RIGHT[target][2].shape[2] * 2))[1:]
    with pytest.raises(REFUSED, match="linear:"):
        call(target, OUT * 2, *RIGHT[target], *other)


GROUPS = jnp.array([1, 2], jnp.int32)


@pytest.mark.parametrize("x", [zeros(3, 8), zeros(3, 8, dtype=jnp.bfloat16)])
@pytest.mark.parametrize("kind, count", [("float32", 8), ("bfloat16", 4)])
def test_a_wrong_call_with_groups_is_an_error(kind: str, count: int, x: jax.Array) -> None:
    """As above, for rows that each have one of several matrices."""
    right = (x, GROUPS, jnp.int32(MATRICES - 2), lines(2, count))
    call(f"linear_groups_{kind}", OUT, *right)
    for index, argument in (
        (0, zeros(3, 8, dtype=jnp.int32)),
        (0, zeros(3, 10)),
        (0, zeros(1, 3, 8)),
        (1, GROUPS * 2),
        (1, GROUPS - 2),
        (1, jnp.zeros(3, jnp.int32)),
        (2, LAST),
        (2, jnp.int32(-1)),
        (3, lines(2, count + 1)),
        (3, lines(3, count)),
    ):
        with pytest.raises(REFUSED, match="linear:"):
            call(f"linear_groups_{kind}", OUT, *right[:index], argument, *right[index + 1 :])
    for out in ((2, 20), jnp.float32), ((3, 20), jnp.bfloat16), ((60,), jnp.float32):
        with pytest.raises(REFUSED, match="linear:"):
            call(f"linear_groups_{kind}", [out], *right)


@pytest.mark.parametrize(
    "matrix, panels, count, width",
    [
        (zeros(8, 20), 1, 8, 64),
        (zeros(8, 20), 2, 7, 64),
        (zeros(8, 20), 2, 9, 64),
        (zeros(8, 20), 2, 8, 32),
        (zeros(20), 2, 8, 64),
        (zeros(8, 20, dtype=jnp.int32), 2, 8, 64),
        (zeros(8, 20, dtype=jnp.float16), 2, 4, 64),
        (zeros(5, 20, dtype=jnp.uint8), 2, 1, 64),
    ],
)
def test_a_wrong_call_of_packing_is_an_error(matrix: jax.Array, panels: int, count: int, width: int) -> None:
    """As above, for packing."""
    pack_into(zeros(1, 2, 8, 64, dtype=jnp.uint8), zeros(8, 20))  # the right one
    with pytest.raises(REFUSED, match="pack:"):
        pack_into(zeros(MATRICES, panels, count, width, dtype=jnp.uint8), matrix)


@pytest.mark.parametrize("index", [-1, MATRICES, 1 << 30])
def test_packing_beyond_a_stack_is_an_error(index: int) -> None:
    """As above, for where in the stack."""
    with pytest.raises(REFUSED, match="pack:"):
        pack_into(zeros(MATRICES, 2, 8, 64, dtype=jnp.uint8), zeros(8, 20), index)


def pack_into(stack: jax.Array, matrix: jax.Array, index: int = 0) -> None:
    out = jax.ShapeDtypeStruct(stack.shape, jnp.uint8)
    call = jax.ffi.ffi_call("isthmus_pack_matrix", out, input_output_aliases={1: 0})
    jax.block_until_ready(jax.jit(partial(call, transposed=False))(matrix[None], stack, jnp.int32(index)))
