"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.backend import cpu_kernels


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """x / rms(x) * (scale + offset) over the last axis, computed in float32 and rounded once, to `dtype`; None is x's.
    scale: [x.shape[-1]]."""
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    scale = scale.astype(jnp.float32)
    if cpu_kernels():
        call = jax.ffi.ffi_call("isthmus_rms_norm", jax.ShapeDtypeStruct(x.shape, dtype))
        return call(x, scale, eps=np.float32(eps), offset=np.float32(offset))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (scale + offset if offset else scale)).astype(dtype)
