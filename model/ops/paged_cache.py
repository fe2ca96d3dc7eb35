"""The paged cache of keys and values: what it holds, and how tokens are written to it and read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.hadamard import hadamard

SCALED = 64
"""Numbers of an int8 vector that share a scale; the last ones may be fewer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """Keys and values of all layers, by page."""

    pages: Any
    """An array, or the shape of one: [pages, page_size, 2 * kv_heads, head_dim], K and V of a head side by side; [...,
    kv_heads, head_dim] where keys are values too. float32, bfloat16, or int8, whose vectors are `spread`"""
    scales: Any = None
    """float32[pages, page_size, 2 * kv_heads * `scales_of` head_dim] that the integers of int8 pages are multiplied by;
    None of other pages"""


@dataclass(frozen=True)
class PagedStep:
    """Where a step's tokens belong: first `rows` tokens, each of a sequence of its own, then equal blocks of tokens,
    each of one sequence."""

    rows: int
    tables: jax.Array
    """int32[rows + blocks, pages a sequence]: pages within a layer; entries past a sequence's end are any valid page"""
    positions: jax.Array
    """int32[tokens], in their sequences; -1 for padding"""


def spread(x: jax.Array) -> jax.Array:
    """float32, as x[..., head_dim]: each block of its last axis times the orthonormal Walsh-Hadamard matrix, a block
    being as long as the largest power of two that divides head_dim. Its own inverse.

    One large number becomes many small ones, which a common scale suits, and q·k stays what it was. Keys of real models
    have such numbers: with as many bits, their rounding costs a fifth of what it costs otherwise (QuaRot, arXiv
    2404.00456).
    """
    size = x.shape[-1]
    block = size & -size
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], size // block, block)
    # Sums of what is exact, then one rounding more: a matrix that was scaled before would be rounded itself.
    sums = jnp.matmul(parts, hadamard(block), precision=jax.lax.Precision.HIGHEST)
    return (sums * np.float32(block**-0.5)).reshape(x.shape)


def write_pages(
    cache: PagedCache, k: jax.Array, v: jax.Array | None, pages: jax.Array, offsets: jax.Array
) -> PagedCache:
    """Scatters k and v [tokens, kv_heads, head_dim] to (pages, offsets) int32[tokens] of the cache."""
    tokens, kv_heads, head_dim = k.shape
    kv = k if v is None else jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim)
    if cache.scales is None:
        return PagedCache(cache.pages.at[pages, offsets].set(kv.astype(cache.pages.dtype)))
    kv = spread(kv)
    groups = scales_of(head_dim)
    padded = jnp.pad(jnp.abs(kv), ((0, 0), (0, 0), (0, groups * SCALED - head_dim)))
    scales = padded.reshape(tokens, -1, groups, SCALED).max(axis=-1) / 127
    integers = jnp.round(kv / _each(jnp.where(scales == 0, 1, scales), head_dim)).astype(jnp.int8)
    flat = scales.reshape(tokens, *cache.scales.shape[2:])
    return PagedCache(cache.pages.at[pages, offsets].set(integers), cache.scales.at[pages, offsets].set(flat))


def scales_of(head_dim: int) -> int:
    """How many scales a vector of head_dim numbers has in an int8 cache."""
    return -(-head_dim // SCALED)


def _each(scales: jax.Array, head_dim: int) -> jax.Array:
    """[..., head_dim]: the scale of each number."""
    return jnp.repeat(scales, SCALED, axis=-1)[..., :head_dim]


def read_pages(cache: PagedCache, pages: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[*pages.shape, page_size, slots, head_dim] in `dtype`."""
    kept = cache.pages[pages]
    if cache.scales is None:
        return kept.astype(dtype)
    scales = cache.scales[pages].reshape(*kept.shape[:-1], -1)
    return (kept.astype(jnp.float32) * _each(scales, kept.shape[-1])).astype(dtype)
