"""Attention: over a packed batch (training) and over the paged cache (serving). Plain jnp, right on every backend; for
the paged cache on CPU there is a kernel as well (model/ops/cpu/attention.cc)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.backend import cpu_kernels
from isthmus.model.ops.hadamard import hadamard

MASKED = -1e30
"""Stands for minus infinity: a row with nothing to attend to gives a finite, meaningless average instead of NaN."""

CHUNK = 128
"""Keys that paged attention reads at a time."""

SCALED = 64
"""Numbers of an int8 vector that share a scale; the last ones may be fewer."""


@dataclass(frozen=True)
class Scoring:
    """How a layer's scores come from its queries and keys."""

    scale: float
    """Multiplies q·k"""
    window: int = 0
    """Last positions that a query sees, its own included; 0 is all"""
    soft_cap: float = 0.0
    """c in c * tanh(score / c); 0 is off"""

    def scores(self, products: jax.Array) -> jax.Array:
        """float32, from q·k before any mask."""
        scores = products * self.scale
        return scores if self.soft_cap == 0 else self.soft_cap * jnp.tanh(scores / self.soft_cap)


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    segments: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention that never crosses a document.

    q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim], a v of None being k; segments:
    int32[batch, seq], a number for each document; sinks: float32[heads], logits that take a share of the softmax and
    give nothing. Returns as q; scores are float32.

    Queries go in up to 8 blocks, each against the keys up to its own end and from its window's beginning: without a
    window about half of the work of the full square.
    """
    seq = q.shape[1]
    block = max(64, -(-seq // 8))
    by_head = k.transpose(0, 2, 1, 3), (k if v is None else v).transpose(0, 2, 1, 3)
    out = []
    for start in range(0, seq, block):
        end = min(start + block, seq)
        first = max(0, start + 1 - scoring.window) if scoring.window else 0
        keys, values = (x[:, :, first:end] for x in by_head)
        ahead = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
        seen = (ahead >= 0) & (ahead < scoring.window) if scoring.window else ahead >= 0
        allowed = seen & (segments[:, start:end, None] == segments[:, None, first:end])
        out.append(_attend_block(q[:, start:end], keys, values, allowed, scoring, sinks))
    return jnp.concatenate(out, axis=1)


def _attend_block(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scoring: Scoring, sinks: jax.Array | None
) -> jax.Array:
    """q: [batch, queries, heads, head_dim]; k, v: [batch, kv_heads, keys, head_dim]; allowed: [batch, queries, keys]"""
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    # The queries of a group lie side by side, so that both products are plain batched matrix products.
    q = q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * queries, head_dim)
    scores = scoring.scores(jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32))
    scores = scores.reshape(batch, kv_heads, group, queries, keys)
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(1, kv_heads, group, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink.astype(jnp.float32)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :keys].astype(q.dtype)
    weights = weights.reshape(batch, kv_heads, group * queries, keys)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    out = out.reshape(batch, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, head_dim)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, by page."""

    pages: Any
    """An array, or the shape of one: [pages, page_size, 2 * kv_heads, head_dim], K and V of a head side by side; [...,
    kv_heads, head_dim] where keys are values too. float32, bfloat16, or int8, whose vectors are `spread`"""
    scales: Any = None
    """float32[pages, page_size, 2 * kv_heads * `scales_of` head_dim] of int8 pages: what the integers are times"""


@dataclass(frozen=True)
class PagedStep:
    """Where a step's tokens belong: first `rows` tokens, each of a sequence of its own, then equal blocks of tokens,
    each of one sequence."""

    rows: int
    tables: jax.Array
    """int32[rows + blocks, pages a sequence]: pages within a layer; entries past a sequence's end are any valid page"""
    positions: jax.Array
    """int32[tokens], in their sequences; -1 for padding"""


def paged_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache,
    first: jax.Array,
    step: PagedStep,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """Writes a layer's keys and values to their pages, then attends over each sequence's pages, causal by position.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], a v of None being k; first: int32[], the layer's
    first page in the cache; sinks: float32[heads]. Returns (as q, the cache).

    Written before it is read: the other order makes XLA copy the whole cache in every layer.
    """
    if cpu_kernels():
        return _paged_step_cpu(q, k, v, cache, first, step, scoring, sinks)
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
        return paged(q, cache, tables, positions, scoring, sinks, shared=v is None)

    out = [attend(q[:rows, None], tables[:rows], step.positions[:rows, None])[:, 0]]
    if blocks:
        each = (blocks, length)
        block_out = attend(q[rows:].reshape(*each, *q.shape[1:]), tables[rows:], step.positions[rows:].reshape(each))
        out.append(block_out.reshape(-1, *q.shape[1:]))
    return jnp.concatenate(out), cache


def _paged_step_cpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache,
    first: jax.Array,
    step: PagedStep,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """What it gives a token depends on that token's sequence alone, to the bit."""
    scales = jnp.zeros(0, jnp.float32) if cache.scales is None else cache.scales
    none = jnp.zeros((0,), q.dtype)
    out, pages, new_scales = jax.ffi.ffi_call(
        "isthmus_paged_attention",
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, cache.pages, scales)),
        input_output_aliases={3: 1, 4: 2},
    )(
        q,
        k,
        none if v is None else v,
        cache.pages,
        scales,
        step.tables,
        step.positions,
        first,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        rows=np.int64(step.rows),
        scale=np.float32(scoring.scale),
        soft_cap=np.float32(scoring.soft_cap),
        window=np.int64(scoring.window),
        shared=v is None,
    )
    return out, Cache(pages, None if cache.scales is None else new_scales)


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


def write_pages(cache: Cache, k: jax.Array, v: jax.Array | None, pages: jax.Array, offsets: jax.Array) -> Cache:
    """Scatters k and v [tokens, kv_heads, head_dim] to (pages, offsets) int32[tokens] of the cache."""
    tokens, kv_heads, head_dim = k.shape
    kv = k if v is None else jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim)
    if cache.scales is None:
        return Cache(cache.pages.at[pages, offsets].set(kv.astype(cache.pages.dtype)))
    kv = spread(kv)
    groups = scales_of(head_dim)
    padded = jnp.pad(jnp.abs(kv), ((0, 0), (0, 0), (0, groups * SCALED - head_dim)))
    scales = padded.reshape(tokens, -1, groups, SCALED).max(axis=-1) / 127
    integers = jnp.round(kv / _each(jnp.where(scales == 0, 1, scales), head_dim)).astype(jnp.int8)
    flat = scales.reshape(tokens, *cache.scales.shape[2:])
    return Cache(cache.pages.at[pages, offsets].set(integers), cache.scales.at[pages, offsets].set(flat))


def scales_of(head_dim: int) -> int:
    """Scales of a vector in an int8 cache."""
    return -(-head_dim // SCALED)


def _each(scales: jax.Array, head_dim: int) -> jax.Array:
    """[..., head_dim]: the scale of each number."""
    return jnp.repeat(scales, SCALED, axis=-1)[..., :head_dim]


def _read_pages(cache: Cache, pages: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[*pages.shape, page_size, slots, head_dim] in `dtype`."""
    kept = cache.pages[pages]
    if cache.scales is None:
        return kept.astype(dtype)
    scales = cache.scales[pages].reshape(*kept.shape[:-1], -1)
    return (kept.astype(jnp.float32) * _each(scales, kept.shape[-1])).astype(dtype)


def paged(
    q: jax.Array,
    cache: Cache,
    tables: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    *,
    shared: bool = False,
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

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = state
        pages = jax.lax.dynamic_slice_in_dim(tables, i * chunk_pages, chunk_pages, axis=1)
        kv = _read_pages(cache, pages, q.dtype).reshape(rows, chunk, kv_heads, -1, head_dim)
        key_position = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # Keys beyond a row's end are stale pages of others: whatever they hold, NaN included, must not reach it.
        ends = positions.max(axis=1)
        value = jnp.where((key_position <= ends[:, None])[:, :, None, None], kv[:, :, :, -1], 0)
        products = jnp.einsum("rqkgd,rskd->rkgqs", q, kv[:, :, :, 0], preferred_element_type=jnp.float32)
        ahead = positions[:, None, None, :, None] - key_position
        allowed = (ahead >= 0) & (ahead < scoring.window) if scoring.window else ahead >= 0
        scores = jnp.where(allowed, scoring.scores(products), MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(axis=-1)
        added = jnp.einsum("rkgqs,rskd->rkgqd", weights.astype(q.dtype), value, preferred_element_type=jnp.float32)
        return new_top, total, out * shrink[..., None] + added

    shape = (rows, kv_heads, heads // kv_heads, queries)
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    first = jnp.int32(0)
    if scoring.window:
        used = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max).min()
        first = jnp.maximum(used - scoring.window + 1, 0) // chunk
    chunks = jnp.maximum(positions.max(), 0) // chunk + 1
    top, total, out = jax.lax.fori_loop(jnp.minimum(first, chunks - 1), chunks, body, start)
    if sinks is not None:
        total, out = _with_sinks(top, total, out, sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1))
    out = out / total[..., None]
    out = (out if cache.scales is None else spread(out)).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, head_dim)


def _with_sinks(top: jax.Array, total: jax.Array, out: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(total, out) of a running softmax after one more logit, which gives nothing."""
    new_top = jnp.maximum(top, sinks)
    shrink = jnp.exp(top - new_top)
    return total * shrink + jnp.exp(sinks - new_top), out * shrink[..., None]
