"""Memory that isn't written to yet: see memory.cc."""

from __future__ import annotations

from functools import partial

import jax


@partial(jax.jit, static_argnames=("shape", "dtype"))
def allocate(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array that holds anything, and takes memory as it is written."""
    return jax.ffi.ffi_call("isthmus_allocate_array", jax.ShapeDtypeStruct(shape, dtype))()
