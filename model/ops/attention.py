"""Attention: over a packed batch (training) and over the paged cache (serving). Plain jnp, right on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Stands for minus infinity: a row with nothing to attend to gives a finite, meaningless average instead of NaN."""

CHUNK = 128
"""Keys that paged attention reads at a time."""


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


def write_pages(cache: jax.Array, k: jax.Array, v: jax.Array | None, pages: jax.Array, offsets: jax.Array) -> jax.Array:
    """Scatters k and v [tokens, kv_heads, head_dim] to (pages, offsets) int32[tokens] of the cache
    [pages, page_size, 2 * kv_heads, head_dim], K and V of a head side by side; without v, [..., kv_heads, head_dim]."""
    tokens, kv_heads, head_dim = k.shape
    kv = k if v is None else jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim)
    return cache.at[pages, offsets].set(kv.astype(cache.dtype))


def paged(
    q: jax.Array,
    cache: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    *,
    shared: bool = False,
) -> jax.Array:
    """Attention of queries over the pages of their sequence, causal by position.

    q: [rows, queries, heads, head_dim], the queries of a row belonging to one sequence; cache: [pages, page_size,
    2 * kv_heads, head_dim], or [..., kv_heads, head_dim] with `shared`, where keys are values too; tables: int32[rows,
    pages a sequence], entries past a sequence's end being any valid page; positions: int32[rows, queries], -1 for
    padding; sinks: float32[heads], as in `causal`. Returns as q.

    Reads CHUNK keys at a time with a running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), from the earliest
    window's beginning to the longest row's end. A chunk beyond a row's own end changes none of its bits: it multiplies
    by exp(0) and adds 0. Neither does one before its window: what it leaves is multiplied by exp(MASKED) = 0.
    """
    rows, queries, heads, head_dim = q.shape
    page_size, kv_heads = cache.shape[1], cache.shape[2] // (1 if shared else 2)
    chunk_pages = max(1, min(CHUNK // page_size, tables.shape[1]))
    chunk = chunk_pages * page_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % chunk_pages)), mode="edge")
    q = q.reshape(rows, queries, kv_heads, heads // kv_heads, head_dim)

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = state
        pages = jax.lax.dynamic_slice_in_dim(tables, i * chunk_pages, chunk_pages, axis=1)
        kv = cache[pages].reshape(rows, chunk, kv_heads, -1, head_dim)
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
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp(top - new_top)
        total, out = total * shrink + jnp.exp(sink - new_top), out * shrink[..., None]
    out = (out / total[..., None]).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, head_dim)
