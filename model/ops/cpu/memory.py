"""Arrays in large pages: see memory.cc."""

from __future__ import annotations

from functools import partial

import jax


@partial(jax.jit, static_argnames=("shape", "dtype", "zeros"))
def allocate(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, zeros: bool) -> jax.Array:
    """An array of zeros; or, without them, of anything, which takes memory as it is written."""
    return jax.ffi.ffi_call("isthmus_allocate_array", jax.ShapeDtypeStruct(shape, dtype))(zeros=zeros)
