"""The kernels of attention.cc: a step's attention over the paged cache, and a packed batch's over its documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.paged_cache import PagedCache, PagedStep

if TYPE_CHECKING:
    from isthmus.model.ops.attention import Scoring


def paged_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: PagedCache,
    first: jax.Array,
    step: PagedStep,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> tuple[jax.Array, PagedCache]:
    """The step of model/ops/paged_attention.py. What it gives a token depends on that token's sequence alone, to the
    bit."""
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
    return out, PagedCache(pages, None if cache.scales is None else new_scales)


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    segments: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> jax.Array:
    """The attention of model/ops/attention.py, of documents that each lie in one piece. A token gets the bits that
    `paged_step` gives it where the cache has the dtype of q."""
    kv = k if v is None else jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3])
    out: jax.Array = jax.ffi.ffi_call("isthmus_causal_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q,
        kv,
        segments,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(scoring.scale),
        soft_cap=np.float32(scoring.soft_cap),
        window=np.int64(scoring.window),
        shared=v is None,
    )
    return out
