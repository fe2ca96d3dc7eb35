"""Attention over the paged cache, as in serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from isthmus.model.ops.attention import MASKED, Scoring
from isthmus.model.ops.cpu import attention as cpu
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.cpu.memory import allocate
from isthmus.model.ops.operation import REFERENCE, Operation
from isthmus.model.ops.paged_cache import PagedCache, PagedStep, read_pages, spread, write_pages

CHUNK = 128
"""Keys that the reference reads at a time."""


def paged_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: PagedCache,
    first: jax.Array,
    step: PagedStep,
    scoring: Scoring,
    sinks: jax.Array | None,
    *,
    implementation: str = REFERENCE,
) -> tuple[jax.Array, PagedCache]:
    """Writes a layer's keys and values to their pages, then attends over each sequence's pages, causal by position.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], a v of None being k; first: int32[], the layer's
    first page in the cache; sinks: float32[heads]. Returns (as q, the cache).

    Written before it is read: the other order makes XLA copy the whole cache in every layer.
    """
    return PAGED_ATTENTION[implementation](q, k, v, cache, first, step, scoring, sinks)


def empty_cache(abstract: PagedCache, implementation: str) -> PagedCache:
    """A cache of these shapes and dtypes in which nothing is written yet."""
    # The CPU's kernel reads nothing that wasn't written, and memory is only taken for pages that were.
    make = allocate if implementation == "cpu" else jnp.zeros
    return jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), abstract)


def _reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: PagedCache,
    first: jax.Array,
    step: PagedStep,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> tuple[jax.Array, PagedCache]:
    sequences = step.tables.shape[0]
    blocks = sequences - step.rows
    page_size = cache.pages.shape[1]
    length = (q.shape[0] - step.rows) // blocks if blocks else 0
    sequence = jnp.concatenate([jnp.arange(step.rows), step.rows + jnp.repeat(jnp.arange(blocks), length)])
    position = jnp.maximum(step.positions, 0)
    pages = first + step.tables[sequence, position // page_size]
    cache = write_pages(cache, k, v, jnp.where(step.positions < 0, first, pages), position % page_size)
    tables, rows = step.tables + first, step.rows

    def attend(q: jax.Array, tables: jax.Array, positions: jax.Array) -> jax.Array:
        return _paged(q, cache, tables, positions, scoring, sinks, shared=v is None)

    out = [attend(q[:rows, None], tables[:rows], step.positions[:rows, None])[:, 0]]
    if blocks:
        each = (blocks, length)
        block_out = attend(q[rows:].reshape(*each, *q.shape[1:]), tables[rows:], step.positions[rows:].reshape(each))
        out.append(block_out.reshape(-1, *q.shape[1:]))
    return jnp.concatenate(out), cache


def _paged(
    q: jax.Array,
    cache: PagedCache,
    tables: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
    *,
    shared: bool,
) -> jax.Array:
    """Attention of queries over the pages of their sequence, causal by position.

    q: [rows, queries, heads, head_dim], the queries of a row belonging to one sequence; shared: keys are values too;
    tables: int32[rows, pages a sequence], entries past a sequence's end being any valid page; positions: int32[rows,
    queries], -1 for padding; sinks: float32[heads], as in `causal`. Returns as q.

    Reads CHUNK keys at a time with a running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), from the earliest
    window's beginning to the longest row's end. A chunk beyond a row's own end changes none of its bits: it multiplies
    by exp(0) and adds 0. Neither does one before its window: what it leaves is multiplied by exp(MASKED) = 0.
    """
    rows, queries, heads, head_dim = q.shape
    q = q if cache.scales is None else spread(q).astype(q.dtype)
    page_size, kv_heads = cache.pages.shape[1], cache.pages.shape[2] // (1 if shared else 2)
    chunk_pages = max(1, min(CHUNK // page_size, tables.shape[1]))
    chunk = chunk_pages * page_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % chunk_pages)), mode="edge")
    q = q.reshape(rows, queries, kv_heads, heads // kv_heads, head_dim)

    def body(i: jax.Array, state: _Softmax) -> _Softmax:
        pages = jax.lax.dynamic_slice_in_dim(tables, i * chunk_pages, chunk_pages, axis=1)
        kv = read_pages(cache, pages, q.dtype).reshape(rows, chunk, kv_heads, -1, head_dim)
        key_position = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        return _add_chunk(state, q, kv, positions, key_position, scoring)

    start = _Softmax.empty((rows, kv_heads, heads // kv_heads, queries), head_dim)
    state = jax.lax.fori_loop(*_chunk_range(positions, chunk, scoring.window), body, start)
    if sinks is not None:
        state = state.with_sinks(sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1))
    out = state.out / state.total[..., None]
    out = (out if cache.scales is None else spread(out)).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, head_dim)


class _Softmax(NamedTuple):
    """A running softmax over the keys until now, float32, of [rows, kv_heads, group, queries]."""

    top: jax.Array
    """The largest score"""
    total: jax.Array
    """The sum of exp(score - top)"""
    out: jax.Array
    """[..., head_dim]: the sum of exp(score - top) times the values"""

    @classmethod
    def empty(cls, shape: tuple[int, ...], head_dim: int) -> _Softmax:
        """Before the first key."""
        return cls(
            jnp.full(shape, MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, head_dim), jnp.float32),
        )

    def with_sinks(self, sinks: jax.Array) -> _Softmax:
        """After one more logit, which gives nothing."""
        top = jnp.maximum(self.top, sinks)
        shrink = jnp.exp(self.top - top)
        return _Softmax(top, self.total * shrink + jnp.exp(sinks - top), self.out * shrink[..., None])


def _chunk_range(positions: jax.Array, chunk: int, window: int) -> tuple[jax.Array, jax.Array]:
    """int32[] each: the first chunk of keys that some row reads, and the one after the last. positions and window are
    as in `_paged` and `Scoring`."""
    first = jnp.int32(0)
    if window:
        used = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max).min()
        first = jnp.maximum(used - window + 1, 0) // chunk
    end = jnp.maximum(positions.max(), 0) // chunk + 1
    return jnp.minimum(first, end - 1), end


def _add_chunk(
    state: _Softmax, q: jax.Array, kv: jax.Array, positions: jax.Array, key_position: jax.Array, scoring: Scoring
) -> _Softmax:
    """The softmax with a chunk of keys more.

    q: [rows, queries, kv_heads, group, head_dim]; kv: [rows, chunk, kv_heads, 1 or 2, head_dim], keys first and values
    last; positions: int32[rows, queries]; key_position: int32[chunk].
    """
    # Keys beyond a row's end are stale pages of others: whatever they hold, NaN included, must not reach it.
    ends = positions.max(axis=1)
    value = jnp.where((key_position <= ends[:, None])[:, :, None, None], kv[:, :, :, -1], 0)
    products = jnp.einsum("rqkgd,rskd->rkgqs", q, kv[:, :, :, 0], preferred_element_type=jnp.float32)
    ahead = positions[:, None, None, :, None] - key_position
    allowed = (ahead >= 0) & (ahead < scoring.window) if scoring.window else ahead >= 0
    scores = jnp.where(allowed, scoring.scores(products), MASKED)
    top = jnp.maximum(state.top, scores.max(axis=-1))
    weights = jnp.exp(scores - top[..., None])
    shrink = jnp.exp(state.top - top)
    total = state.total * shrink + weights.sum(axis=-1)
    added = jnp.einsum("rkgqs,rskd->rkgqd", weights.astype(q.dtype), value, preferred_element_type=jnp.float32)
    return _Softmax(top, total, state.out * shrink[..., None] + added)


PAGED_ATTENTION: Operation[
    Callable[
        [
            jax.Array,
            jax.Array,
            jax.Array | None,
            PagedCache,
            jax.Array,
            PagedStep,
            Scoring,
            jax.Array | None,
        ],
        tuple[jax.Array, PagedCache],
    ]
] = Operation(
    "paged_attention", _reference, (cpu_kernel(cpu.paged_step),), is_used=lambda setting: setting.page_size > 0
)
"""Called with q, k, v, the cache, the layer's first page, the step, scoring and sinks."""
