"""What int8 keys and values cost: how far attention over them is from attention over what was written, whatever the
keys look like, and how far the CPU's kernel and the reference are from each other."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from isthmus.model.ops.attention import Scoring
from isthmus.model.ops.paged_attention import paged_step
from isthmus.model.ops.paged_cache import PagedCache, PagedStep, scales_of, spread

BLOCKS = {1: 1, 24: 8, 41: 1, 64: 64, 80: 16, 96: 32, 128: 128, 192: 64, 256: 256, 576: 64}
"""By head_dim: the numbers that are mixed with each other."""
LENGTH, PAGE, HEADS = 256, 16, 4

head_dims = pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 192, 256])
paths = pytest.mark.parametrize("kernel", [True, False], ids=["kernels", "reference"])


@partial(jax.jit, static_argnames=("implementation", "cache"))
def prefill(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array | None, cache: str) -> jax.Array:
    """float32[tokens, heads, head_dim]: a prompt of one sequence, over a cache that it writes itself."""
    tokens, kv_heads, head_dim = k.shape
    shape = (1 + tokens // PAGE, PAGE, kv_heads * (1 if v is None else 2), head_dim)
    integers = cache == "int8"
    scales = jnp.zeros((*shape[:3], scales_of(head_dim)), jnp.float32) if integers else None
    pages = PagedCache(jnp.zeros(shape, jnp.int8 if integers else jnp.float32), scales)
    tables = jnp.tile(jnp.arange(1, shape[0], dtype=jnp.int32), (2, 1))
    step = PagedStep(1, tables, jnp.arange(tokens, dtype=jnp.int32))  # its first token alone, then the others
    scoring = Scoring(head_dim**-0.5)
    return paged_step(q, k, v, pages, jnp.int32(0), step, scoring, None, implementation=implementation)[0]


def attend(kernel: bool, q: np.ndarray, k: np.ndarray, v: np.ndarray | None, cache: str) -> np.ndarray:
    return np.asarray(prefill("cpu" if kernel else "reference", q, k, v, cache))


def prompt(head_dim: int, outlier: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q, k, v) in float32; two dimensions of the keys are `outlier` times as large, and the same for every token, as
    biases and norms make them."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(LENGTH, HEADS, head_dim))
    k, v = rng.normal(size=(2, LENGTH, HEADS // 2, head_dim))
    k[..., [1, head_dim // 2]] = outlier * (1 + 0.05 * k[..., [1, head_dim // 2]])
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def error(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """(largest, mean) |got - want| of a token's heads (Euclidean), relative to |want|."""
    errors = np.linalg.norm(got.astype(np.float64) - want, axis=-1) / np.linalg.norm(want.astype(np.float64), axis=-1)
    return float(errors.max()), float(errors.mean())


@pytest.mark.parametrize("head_dim", BLOCKS)
def test_spreading_is_a_hadamard_matrix_and_undoes_itself(head_dim: int) -> None:
    """A transformation that isn't orthonormal would change every score."""
    block = BLOCKS[head_dim]
    matrix = np.kron(np.eye(head_dim // block), hadamard(block)) / np.sqrt(block)
    x = np.random.default_rng(0).normal(size=(3, 2, head_dim)).astype(np.float32)
    np.testing.assert_allclose(spread(jnp.asarray(x)), x @ matrix, atol=3e-6)
    np.testing.assert_allclose(spread(spread(jnp.asarray(x))), x, atol=3e-6)


@pytest.mark.usefixtures("kernels")
@paths
@head_dims
def test_integers_cost_little_attention(head_dim: int, kernel: bool) -> None:
    """Half a step of 127 in every number of keys and values, and what the softmax makes of it."""
    q, k, v = prompt(head_dim)
    largest, mean = error(attend(kernel, q, k, v, "int8"), attend(kernel, q, k, v, "float32"))
    assert largest < 0.03 and mean < 0.012


@pytest.mark.usefixtures("kernels")
@paths
@head_dims
def test_large_dimensions_of_keys_cost_no_others_their_bits(head_dim: int, kernel: bool) -> None:
    """Gemma's keys have dimensions 26 times as large as the usual one. Rounded as they are, they leave the others five
    bits, and answers go wrong."""
    q, k, v = prompt(head_dim, outlier=26.0)
    q[..., [1, head_dim // 2]] *= 0.05  # what such dimensions add is a matter of ones, or nothing else would count
    want = attend(kernel, q, k, v, "float32")
    step = np.abs(k).max(axis=-1, keepdims=True) / 127
    as_they_are = attend(kernel, q, np.round(k / step) * step, v, "float32")
    assert error(attend(kernel, q, k, v, "int8"), want)[1] < 0.6 * error(as_they_are, want)[1]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shared", [False, True], ids=["keys and values", "keys are values"])
@pytest.mark.parametrize("head_dim", [24, 41, 64, 96, 256, 576])
def test_kernel_and_reference_hardly_differ(head_dim: int, shared: bool) -> None:
    """A number that is half-way between two integers may be rounded either way. Of a token that sees few keys, that one
    step is up to 0.02 / sqrt(head_dim); over all tokens it is a small part of what the integers cost."""
    q, k, v = prompt(head_dim, outlier=5.0)
    each = [attend(kernel, q, k, None if shared else v, "int8") for kernel in (True, False)]
    largest, mean = error(*each)
    assert largest < 3e-3 and mean < 2e-4
