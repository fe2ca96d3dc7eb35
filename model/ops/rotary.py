"""Turning pairs of dimensions by given angles; model/rotary.py says by which."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from isthmus.model.ops.backend import cpu_kernels


def rotate(angles: tuple[jax.Array, jax.Array], *xs: jax.Array) -> list[jax.Array]:
    """Turns pairs (i, i + n / 2) of the first n dimensions of each x[..., heads, head_dim], n as wide as the angles:
    the half-split layout of Llama and Qwen.

    angles: cos and signed sin, float32[..., 1, n].
    """
    if cpu_kernels():
        cos, sin = (part.reshape(-1, part.shape[-1]) for part in angles)
        out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)
        return list(jax.ffi.ffi_call("isthmus_rotate_pairs", out)(cos, sin, *xs))
    return [_rotate(angles, x) for x in xs]


def _rotate(angles: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    cos, sin = angles
    turned = cos.shape[-1]
    y = x[..., :turned].astype(jnp.float32)
    y = (y * cos + jnp.roll(y, turned // 2, axis=-1) * sin).astype(x.dtype)
    return y if turned == x.shape[-1] else jnp.concatenate([y, x[..., turned:]], axis=-1)
