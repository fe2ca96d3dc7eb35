"""Attention: over a packed batch (training) and over the paged cache (serving). Plain jnp, right on every backend."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Stands for minus infinity: a row with nothing to attend to gives a finite, meaningless average instead of NaN."""

CHUNK = 128
"""Keys that paged attention reads at a time."""


def causal(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention that never crosses a document.

    q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim]; segments: int32[batch, seq], a number for
    each document. Returns as q; scores are float32.

    Queries go in up to 8 blocks, each against the keys up to its own end: about half of the work of the full square.
    """
    seq = q.shape[1]
    block = max(64, -(-seq // 8))
    by_head = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out = []
    for start in range(0, seq, block):
        end = min(start + block, seq)
        keys, values = (x[:, :, :end] for x in by_head)
        causal_mask = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        allowed = causal_mask & (segments[:, start:end, None] == segments[:, None, :end])
        out.append(_attend_block(q[:, start:end], keys, values, allowed))
    return jnp.concatenate(out, axis=1)


def _attend_block(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """q: [batch, queries, heads, head_dim]; k, v: [batch, kv_heads, keys, head_dim]; allowed: [batch, queries, keys]"""
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    # The queries of a group lie side by side, so that both products are plain batched matrix products.
    q = q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * queries, head_dim)
    scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    scores = scores.reshape(batch, kv_heads, group, queries, keys)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED), axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, kv_heads, group * queries, keys)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    out = out.reshape(batch, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, head_dim)


def write_pages(cache: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, offsets: jax.Array) -> jax.Array:
    """Scatters k and v [tokens, kv_heads, head_dim] to (pages, offsets) int32[tokens] of the cache
    [pages, page_size, 2 * kv_heads, head_dim], K and V of a head side by side."""
    tokens, kv_heads, head_dim = k.shape
    kv = jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim)
    return cache.at[pages, offsets].set(kv.astype(cache.dtype))


def paged(q: jax.Array, cache: jax.Array, tables: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of queries over the pages of their sequence, causal by position.

    q: [rows, queries, heads, head_dim], the queries of a row belonging to one sequence; cache: [pages, page_size,
    2 * kv_heads, head_dim]; tables: int32[rows, pages a sequence], entries past a sequence's end being any valid page;
    positions: int32[rows, queries], -1 for padding. Returns as q.

    Reads CHUNK keys at a time with a running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) and stops after
    the longest row. A chunk beyond a row's own end changes none of its bits: it multiplies by exp(0) and adds 0.
    """
    rows, queries, heads, head_dim = q.shape
    page_size, kv_heads = cache.shape[1], cache.shape[2] // 2
    chunk_pages = max(1, min(CHUNK // page_size, tables.shape[1]))
    chunk = chunk_pages * page_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % chunk_pages)), mode="edge")
    q = q.reshape(rows, queries, kv_heads, heads // kv_heads, head_dim)
    scale = 1 / math.sqrt(head_dim)

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = state
        pages = jax.lax.dynamic_slice_in_dim(tables, i * chunk_pages, chunk_pages, axis=1)
        kv = cache[pages].reshape(rows, chunk, kv_heads, 2, head_dim)
        key_position = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # Keys beyond a row's end are stale pages of others: whatever they hold, NaN included, must not reach it.
        ends = positions.max(axis=1)
        value = jnp.where((key_position <= ends[:, None])[:, :, None, None], kv[:, :, :, 1], 0)
        scores = jnp.einsum("rqkgd,rskd->rkgqs", q, kv[:, :, :, 0], preferred_element_type=jnp.float32) * scale
        allowed = key_position <= positions[:, None, None, :, None]
        scores = jnp.where(allowed, scores, MASKED)
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
    chunks = jnp.maximum(positions.max(), 0) // chunk + 1
    _, total, out = jax.lax.fori_loop(0, chunks, body, start)
    out = (out / total[..., None]).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, head_dim)
