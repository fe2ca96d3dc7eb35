"""Norms, rotary embedding and gates on the CPU: against sums in float64, and a row's result is its own, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from isthmus.model.config import Activation
from isthmus.model.ops import gated as gates
from isthmus.model.ops import norm, rotary, routing
from isthmus.model.ops.routing import Scores

pytestmark = pytest.mark.usefixtures("kernels")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16]
SIZES = (1, 3, 7, 8, 15, 16, 17, 64, 100, 768, 2050)
gated = partial(gates.gated, implementation="cpu")
rms_norm = partial(norm.rms_norm, implementation="cpu")
rotate = partial(rotary.rotate, implementation="cpu")
scores = partial(routing.scores, implementation="cpu")
ROUNDING = {DTYPES[0]: 2e-6, BFLOAT16: 2.0**-8 * 1.001}
"""Relative: of float32, what a sum of 2,050 squares loses in plain C++'s four lanes, 512 additions each; of bfloat16,
one rounding"""


def with_kernels(run: Callable[..., Any], *arguments: Any) -> Any:
    """run(*arguments) in one program, so that nothing but the kernel can have computed it."""
    arrays = [jnp.asarray(x) for x in arguments]
    text = str(jax.make_jaxpr(run)(*arrays))
    assert "ffi_call" in text, text
    return jax.tree.map(np.asarray, jax.jit(run)(*arrays))


def random(rng: np.random.Generator, *shape: int, dtype: np.dtype, spread: float = 1.0) -> np.ndarray:
    return (rng.normal(size=shape) * spread).astype(dtype)


def assert_near(got: np.ndarray, want: np.ndarray, dtype: np.dtype) -> None:
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=ROUNDING[dtype], atol=1e-37)


def exact_norm(x: np.ndarray, scale: np.ndarray, eps: float, offset: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * (scale.astype(np.float64) + offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4)], ids=str)
def test_a_norm_is_the_exact_one(shape: tuple[int, ...], size: int, dtype: np.dtype) -> None:
    """Widths that fill no vector, rows over any axes (heads have norms too), and Gemma's offset."""
    rng = np.random.default_rng(size)
    x, scale = random(rng, *shape, size, dtype=dtype), random(rng, size, dtype=DTYPES[0])
    got = with_kernels(lambda x, scale: rms_norm(x, scale, 1e-5, 1.0), x, scale)
    assert_near(got, exact_norm(x, scale, 1e-5, 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_norm_is_rounded_once_to_the_type_that_is_asked_for(size: int, source: np.dtype, dtype: np.dtype) -> None:
    """The stream is float32, and what a layer reads of it bfloat16: rounded before as well, it would be off by more."""
    rng = np.random.default_rng(size)
    x, scale = random(rng, 5, size, dtype=source), random(rng, size, dtype=DTYPES[0])
    got = with_kernels(lambda x, scale: rms_norm(x, scale, 1e-5, 1.0, dtype), x, scale)
    assert_near(got, exact_norm(x, scale, 1e-5, 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_extremes(dtype: np.dtype) -> None:
    """Zeros, which padding is, stay zeros; what is tiny or large is scaled; a row that is no number stays alone."""
    x = np.ones((6, 40), dtype)
    x[0], x[1], x[2], x[3, 7], x[4, 39] = 0, 1e-18, 1e17, np.nan, np.inf
    got = with_kernels(lambda x, scale: rms_norm(x, scale, 1e-6), x, np.ones(40, np.float32)).astype(np.float64)
    assert not got[0].any()
    np.testing.assert_allclose(got[1], 1e-15, rtol=1e-2)
    np.testing.assert_allclose(got[[2, 5]], 1, rtol=1e-2)
    assert np.isnan(got[3]).all() and np.isnan(got[4, 39])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned, size", [(2, 2), (6, 6), (16, 24), (32, 32), (34, 40), (64, 64), (128, 128)])
def test_rotation_is_the_exact_one(turned: int, size: int, dtype: np.dtype) -> None:
    """Heads of any width, turned in part too; queries and keys at once, of different numbers of heads."""
    rng = np.random.default_rng(turned)
    angle = rng.uniform(-3, 3, (5, 1, turned // 2))
    cos, sin = np.concatenate([np.cos(angle)] * 2, -1), np.concatenate([-np.sin(angle), np.sin(angle)], -1)
    xs = [random(rng, 5, heads, size, dtype=dtype) for heads in (3, 1)]
    got = with_kernels(lambda cos, sin, *xs: rotate((cos, sin), *xs), cos.astype("f"), sin.astype("f"), *xs)
    for x, y in zip(xs, got, strict=True):
        wide = x[..., :turned].astype(np.float64)
        want = wide * cos + np.roll(wide, turned // 2, axis=-1) * sin
        assert y.dtype == dtype
        np.testing.assert_allclose(y[..., :turned].astype(np.float64), want, rtol=ROUNDING[dtype], atol=5e-7)
        np.testing.assert_array_equal(y[..., turned:], x[..., turned:])


def expit(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def exact_gate(activation: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    match activation:
        case "silu":
            return gate * expit(gate) * up
        case "gelu_tanh":
            # 1/2 (1 + tanh u) without the difference of almost equal numbers far below zero.
            return gate * expit(2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)) * up
        case _:
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            return (up + 1) * gate * expit(1.702 * gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_swiglu"])
def test_a_gate_is_the_exact_one(activation: Activation, size: int, dtype: np.dtype) -> None:
    """On both sides of zero, where one formula for both would overflow, and past clamped_swiglu's limit."""
    rng = np.random.default_rng(size)
    gate, up = (random(rng, 4, size, dtype=dtype, spread=5) for _ in range(2))
    gate[0, 0], gate[1, -1], up[2, 0], gate[3] = 60, -60, -30, 0
    got = with_kernels(lambda gate, up: gated(activation, 7.0, gate, up), gate, up)
    want = exact_gate(activation, gate, up)
    assert got.dtype == dtype
    # An exponential's argument of up to 87 is rounded to float32 first, where it is made by a formula.
    rtol = ROUNDING[dtype] + (0 if activation == "silu" else 87 * 2.0**-23)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=rtol, atol=1e-35)


def test_a_gate_that_is_no_number_stays_alone() -> None:
    """One broken request shows in its own row only."""
    gate = np.ones((3, 20), np.float32)
    gate[1, 3] = np.nan
    got = with_kernels(lambda gate, up: gated("silu", 0.0, gate, up), gate, np.ones_like(gate))
    assert np.argwhere(~np.isfinite(got)).tolist() == [[1, 3]]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [1, 4, 17, 60, 256])
def test_a_routers_scores_are_the_exact_ones(size: int, kind: Scores) -> None:
    """A score that is off weighs a token's experts wrongly, or sends it to others."""
    logits = random(np.random.default_rng(5), 9, size, dtype=DTYPES[0], spread=1.5)
    x = logits.astype(np.float64)
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    want = powers / powers.sum(axis=-1, keepdims=True) if kind == "softmax" else expit(x)
    assert_near(with_kernels(lambda logits: scores(kind, logits), logits), want, DTYPES[0])


def all_of(x: jax.Array, cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    """Every operation, of rows of 96."""
    heads = rotate((cos, sin), x.reshape(-1, 3, 32))[0]
    return [rms_norm(x, jnp.ones(96), 1e-5), gated("silu", 0.0, x, x), heads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_in_any_batch(dtype: np.dtype) -> None:
    """700 rows go to all threads, one to none: a request must not see which."""
    rng = np.random.default_rng(3)
    x = random(rng, 700, 96, dtype=dtype)
    cos, sin = (random(rng, 700, 1, 32, dtype=DTYPES[0]) for _ in range(2))
    whole = with_kernels(all_of, x, cos, sin)
    for row in (0, 1, 350, 699):
        part = slice(row, row + 1)
        for got, want in zip(with_kernels(all_of, x[part], cos[part], sin[part]), whole, strict=True):
            np.testing.assert_array_equal(got.view(np.uint8), want[part].view(np.uint8))


F32, I32 = jnp.float32, jnp.int32


@pytest.mark.parametrize(
    "target, shapes, out, attributes",
    [
        ("rms_norm", [((3, 8), F32), ((7,), F32)], ((3, 8), F32), {"eps": 0.0, "offset": 0.0}),
        ("rms_norm", [((3, 8), F32), ((8,), F32)], ((3, 9), F32), {"eps": 0.0, "offset": 0.0}),
        ("rms_norm", [((3, 8), I32), ((8,), F32)], ((3, 8), I32), {"eps": 0.0, "offset": 0.0}),
        ("rotate_pairs", [((3, 8), F32), ((3, 8), F32), ((4, 2, 8), F32)], ((4, 2, 8), F32), {}),
        ("rotate_pairs", [((3, 8), F32), ((3, 6), F32), ((3, 2, 8), F32)], ((3, 2, 8), F32), {}),
        ("rotate_pairs", [((3, 7), F32), ((3, 7), F32), ((3, 2, 8), F32)], ((3, 2, 8), F32), {}),
        ("rotate_pairs", [((3, 8), F32), ((3, 8), F32), ((3, 2, 6), F32)], ((3, 2, 6), F32), {}),
        ("router_scores", [((3, 8), F32)], ((3, 9), F32), {"softmax": 1}),
        ("gated_product", [((3, 8), F32), ((3, 7), F32)], ((3, 8), F32), {"activation": 0, "limit": 0.0}),
        ("gated_product", [((3, 8), F32), ((3, 8), F32)], ((3, 8), F32), {"activation": 3, "limit": 0.0}),
    ],
)
def test_a_wrong_call_is_an_error(
    target: str, shapes: list[tuple[tuple[int, ...], Any]], out: tuple[tuple[int, ...], Any], attributes: dict[str, Any]
) -> None:
    """A mistake in the Python above must not read or write beyond an array."""
    kinds = {"activation": np.int64, "eps": np.float32, "offset": np.float32, "limit": np.float32, "softmax": bool}
    typed = {name: kinds[name](value) for name, value in attributes.items()}
    result: Any = jax.ShapeDtypeStruct(*out)
    if target == "rotate_pairs":
        result = (result,)
    with pytest.raises(jax.errors.JaxRuntimeError, match="elementwise:"):
        jax.block_until_ready(
            jax.ffi.ffi_call(f"isthmus_{target}", result)(*(jnp.zeros(*shape) for shape in shapes), **typed)
        )
