"""What an engine keeps on its devices from step to step. Every program takes it, donated, and gives it back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from isthmus.model.config import ModelConfig
from isthmus.model.ops.paged_attention import empty_cache
from isthmus.model.ops.paged_cache import PagedCache, scales_of
from isthmus.model.sharding import named_sharding
from isthmus.serve.engine.config import EngineConfig


class State(NamedTuple):
    """Slots are rows; the last one, `EngineConfig.nobody`, is for padding."""

    cache: PagedCache
    tables: Any
    """int32[slots, pages_per_sequence]: each sequence's pages; all of nobody's are the null page"""
    tokens: Any
    """int32[slots, context_length]: each token that was drawn, at its position. The prompt is there only where a draw
    looks at it"""


def abstract_state(model: ModelConfig, engine: EngineConfig, cache_dtype: str, mesh: Mesh) -> State:
    """The shapes, dtypes and shardings of the state. engine: resolved."""
    slots, whole = engine.nobody + 1, named_sharding(mesh)
    return State(
        abstract_cache(model, engine, cache_dtype, mesh),
        jax.ShapeDtypeStruct((slots, engine.pages_per_sequence), jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct((slots, engine.context_length), jnp.int32, sharding=whole),
    )


def abstract_cache(model: ModelConfig, engine: EngineConfig, cache_dtype: str, mesh: Mesh) -> PagedCache:
    """One array for all layers, so that no layer is sliced out. Split over the key heads; a latent belongs to all
    heads, and so to all devices."""
    shape = (model.layers * engine.pages, engine.page_size, model.cache_heads, model.head_dim)
    axes = ("pages", None, "latent_head" if model.latent.rank else "kv_heads", None)
    dtype = jnp.dtype(cache_dtype)
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
    if dtype != jnp.int8:
        return PagedCache(pages)
    scales = (*shape[:2], shape[2] * scales_of(model.head_dim))
    return PagedCache(pages, jax.ShapeDtypeStruct(scales, jnp.float32, sharding=named_sharding(mesh, *axes[:3])))


def empty_state(abstract: State, paged_attention: str) -> State:
    """A state without sequences. paged_attention: the implementation that will read the cache."""

    def make() -> State:
        return State(
            empty_cache(abstract.cache, paged_attention),
            jnp.zeros(abstract.tables.shape, jnp.int32),
            jnp.zeros(abstract.tokens.shape, jnp.int32),
        )

    made: State = jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    return made


def place(rows: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
    """An array of the state, [slots, n], with `row` in a slot."""
    return rows.at[slot].set(row)
