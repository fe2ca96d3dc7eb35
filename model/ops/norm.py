"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from isthmus.model.ops.cpu import elementwise
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    offset: float = 0.0,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    implementation: str = REFERENCE,
) -> jax.Array:
    """x / rms(x) * (scale + offset) over the last axis, computed in float32 and rounded once, to `dtype`; None is x's.
    scale: [x.shape[-1]]."""
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    return NORM[implementation](x, scale.astype(jnp.float32), eps, offset, dtype)


def _reference(x: jax.Array, scale: jax.Array, eps: float, offset: float, dtype: jnp.dtype) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (scale + offset if offset else scale)).astype(dtype)


NORM: Operation[Callable[[jax.Array, jax.Array, float, float, jnp.dtype], jax.Array]] = Operation(
    "norm", _reference, (cpu_kernel(elementwise.rms_norm, gradient_of=_reference),)
)
"""Called with x, float32 scale, eps, offset and the result's dtype."""
