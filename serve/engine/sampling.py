"""Draws the next tokens, on the device. A draw depends on the row's logits, its parameters, its seed and its position,
and on nothing else in the batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

BAD_ROW = -1
"""Drawn for a row whose logits are not finite."""


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed: tuple[jax.Array, jax.Array],
    position: jax.Array,
) -> jax.Array:
    """int32[rows]: a token for each row of float32 logits [rows, vocab].

    temperature, top_p, min_p: float32[rows]; top_k, position: int32[rows]; seed: low and high 32 bits, uint32[rows].
    Temperature 0 takes the likeliest. Otherwise the filters leave a set of tokens, in the order temperature, top_k,
    top_p, min_p, and adding Gumbel noise and taking the largest draws from it (Maddison et al. 2014, arXiv 1411.0030).
    The noise comes from fold_in(fold_in(seed, 0), position): sequence 0 of the request, the token's position in it.
    """
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)  # which a maximum always shows; NaN it may lose on CPU
    top = logits.max(axis=-1, keepdims=True)
    greedy = _first_of(logits, top)

    def draw() -> jax.Array:
        # The difference first: logits over a tiny temperature overflow, and inf - inf is no number.
        scaled = (logits - top) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        kept = filter_logits(scaled, top_k, top_p, min_p)
        noise = jax.vmap(lambda low, high, at: _noise(low, high, at, logits.shape[-1]))(*seed, position)
        noisy = kept + noise
        return jnp.where(temperature > 0, _first_of(noisy, noisy.max(axis=-1, keepdims=True)), greedy)

    drawn = jax.lax.cond((temperature > 0).any(), draw, lambda: greedy)
    return jnp.where(jnp.isfinite(top[:, 0]), drawn, BAD_ROW)


def _first_of(rows: jax.Array, wanted: jax.Array) -> jax.Array:
    """int32[rows]: where `wanted` [rows, 1] first is in each row; out of range if nowhere. With a row's maximum it is
    argmax, in two reductions that XLA makes vectors of on CPU, a quarter of argmax's time."""
    size = rows.shape[-1]
    return jnp.where(rows == wanted, jnp.arange(size, dtype=jnp.int32), size).min(axis=-1)


def _noise(seed_low: jax.Array, seed_high: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    key = jax.random.wrap_key_data(jnp.stack([seed_high, seed_low]), impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, 0), position), (vocab,), jnp.float32)


def filter_logits(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """-inf where a token is filtered out of logits [rows, vocab] whose largest is 0 in each row.

    Each filter keeps the tokens at or above a threshold (ties stay in), found by bisection over the 32 bits of a float
    instead of by sorting: exact, and 32 passes over the row. A filter that no row uses costs nothing.
    """
    order = _ordered_bits(scaled)
    vocab = scaled.shape[-1]

    def by_rank(floor: jax.Array) -> jax.Array:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
        return _threshold(lambda bits: (order >= bits[:, None]).sum(axis=-1) >= k, floor)

    def by_mass(floor: jax.Array) -> jax.Array:
        weights = jnp.where(order >= floor[:, None], jnp.exp(scaled), 0.0)
        # Off (top_p >= 1) must keep all: summed in another order, the rest could fall short of the total by rounding.
        wanted = jnp.where(top_p < 1, top_p * weights.sum(axis=-1), -1.0)
        enough = lambda bits: jnp.where(order >= bits[:, None], weights, 0.0).sum(axis=-1) >= wanted  # noqa: E731
        # A top_p that rounds to 0 is met by no tokens at all: the likeliest always stays.
        most = jnp.minimum(_threshold(enough, floor), order.max(axis=-1))
        return jnp.maximum(floor, jnp.where(top_p < 1, most, 0))

    floor = jnp.zeros(scaled.shape[0], jnp.uint32)
    floor = jax.lax.cond((top_k > 0).any(), by_rank, lambda f: f, floor)
    floor = jax.lax.cond((top_p < 1).any(), by_mass, lambda f: f, floor)
    kept = (order >= floor[:, None]) & (scaled >= jnp.log(min_p)[:, None])
    return jnp.where(kept, scaled, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that sort as the floats do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest uint32 for each row at which the falling predicate `holds` is still true."""

    def try_bit(i: jax.Array, bits: jax.Array) -> jax.Array:
        candidate = bits | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, bits)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros_like(like))
