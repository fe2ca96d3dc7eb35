"""Draws the next tokens, on the device. A draw depends on the row's logits, its parameters, its seed and its position,
and on nothing else in the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def uniform_numbers(seed_low: jax.Array, seed_high: jax.Array, position: jax.Array) -> jax.Array:
    """float32[rows, 2], in [0, 1): the numbers that decide each row's draw (`isthmus.model.ops.sampling`).

    seed_low, seed_high: uint32[rows]; position: int32[rows], the token's in its sequence. They come from
    fold_in(fold_in(seed, 0), position), 0 being the sample's number within its request.
    """

    def row(low: jax.Array, high: jax.Array, at: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 0), at), (2,), jnp.float32)

    return jax.vmap(row)(seed_low, seed_high, position)
