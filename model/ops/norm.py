"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.ops.backend import cpu_kernels


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (scale + offset) over the last axis, in float32; as x. scale: [x.shape[-1]]."""
    scale = scale.astype(jnp.float32)
    if cpu_kernels():
        call = jax.ffi.ffi_call("isthmus_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
        return call(x, scale, eps=np.float32(eps), offset=np.float32(offset))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (scale + offset if offset else scale)).astype(x.dtype)
