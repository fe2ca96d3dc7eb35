"""How numbers are rounded: products, and float32 to a narrower type: up or down as often as a number lies near either.

A trained matrix is kept in float32 and multiplied in bfloat16. Rounded to the nearest, a number of bfloat16 that
training has moved by less than half of the way to the next one comes out as if it had never moved: for a weight of 0.1
that is 2.4e-4, a dozen steps at a fine-tuning rate of 2e-5. Here it goes up with the probability that makes it right on
average (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551), so that what many numbers moved by together is kept.
Chance is a hash of the number itself and its place: the same matrix always comes out the same, on every backend, in
training, in serving and on disk.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames="dtype")
def narrowed(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x in `dtype`; float32 [..., rows, columns] to bfloat16 by the rounding above, any other pair of types to the
    nearest. What bfloat16 holds already stays as it is; the result doesn't depend on leading axes, so a stack of
    matrices comes out as each alone."""
    if x.dtype != jnp.float32 or jnp.dtype(dtype) != jnp.bfloat16 or x.ndim < 2:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rows, columns = x.shape[-2:]
    place = jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), 0) * jnp.uint32(columns)
    place += jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), 1)
    chance = _mixed((place * jnp.uint32(0x9E3779B9)) ^ (bits * jnp.uint32(0x85EBCA6B))) >> 16
    kept = (bits + jnp.where(jnp.isfinite(x), chance, 0)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(dtype)


def product(x: jax.Array, y: jax.typing.ArrayLike) -> jax.Array:
    """x * y, rounded before anything is added to it. XLA makes one rounding of a product and a sum after it, or two, by
    what else a program computes: serving and training would get other bits."""
    return jax.lax.optimization_barrier(x * y)


def _mixed(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby, public domain): every bit of uint32 depends on all of them."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
