"""Drawing a token from a distribution over the vocabulary: temperature, filters, and one draw for each row.

A draw is by inversion: two uniform numbers decide it, of which the first chooses a block of BLOCK neighbouring ids by
the blocks' probabilities, and the second an id within the block. A row costs a few passes over its logits; the Gumbel
trick (Maddison et al. 2014, arXiv 1411.0030), which needs a random number for each id, costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from isthmus.model.ops.adjustments import Adjustments, adjust
from isthmus.model.ops.cpu import sampling as cpu
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation

BAD_ROW = -1
"""Drawn for a row whose largest logit is not finite, or that holds a NaN; and where nothing may be drawn."""
FREE = -1
"""In the place of a token that a draw is forced to be: it is free."""
BLOCK = 512
"""Ids in a block."""


class Filters(NamedTuple):
    """What is left to draw from. Filters apply in the order top_k, top_p, min_p, after the temperature; tokens with the
    same logit stay or go together."""

    temperature: jax.Array
    """float32[rows]; 0 takes the likeliest token"""
    top_k: jax.Array
    """int32[rows]: the k likeliest tokens stay; 0 is off"""
    top_p: jax.Array
    """float32[rows]: the likeliest tokens stay, as many as have this share of the probability that top_k left; 1 is
    off"""
    min_p: jax.Array
    """float32[rows]: tokens stay that have at least this share of the likeliest one's probability; 0 is off"""


class Drawn(NamedTuple):
    """What came of a draw, for each row."""

    token: jax.Array
    """int32[rows]; BAD_ROW where the logits are no distribution"""
    log_probability: jax.Array
    """float32[rows]: the token's in the distribution before temperature and filters; 0 where it wasn't asked for"""
    top_tokens: jax.Array
    """int32[rows, most]: the likeliest tokens there, the likeliest first and of equal ones the first, as many as were
    asked for"""
    top_log_probabilities: jax.Array
    """float32[rows, most]: theirs; -inf in the places after them"""


def sample(
    logits: jax.Array,
    filters: Filters,
    uniform: jax.Array,
    judged: jax.Array,
    forced: jax.Array,
    vocab: int,
    most: int,
    adjustments: Adjustments | None = None,
    *,
    implementation: str = REFERENCE,
) -> Drawn:
    """Draws a token for each row of float32 logits [rows, ids]. A row's draw depends on that row alone.

    uniform: float32[rows, 2], in [0, 1). judged: int32[rows]: how many of the likeliest tokens to tell; -1 also spares
    the log-probability of the one that is drawn. forced: int32[rows]: the token that is drawn, whatever the filters and
    adjustments say, unless the row is a bad one; FREE lets them. vocab: ids from here on are never drawn. most: the
    largest number in `judged`, and the width of what is told. adjustments: what a draw sees instead of the logits, of
    which alone is told.
    """
    return Drawn(*SAMPLING[implementation](logits, filters, uniform, judged, forced, vocab, most, adjustments))


def _reference(
    logits: jax.Array,
    filters: Filters,
    uniform: jax.Array,
    judged: jax.Array,
    forced: jax.Array,
    vocab: int,
    most: int,
    adjustments: Adjustments | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    logits = logits[:, :vocab]
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)  # which a maximum always shows; NaN it may lose on CPU
    top = logits.max(axis=-1, keepdims=True)
    seen = logits if adjustments is None else adjust(logits, adjustments)
    best = top if adjustments is None else seen.max(axis=-1, keepdims=True)
    greedy = _first_of(seen, best)
    free = forced < 0

    def draw() -> jax.Array:
        # The difference first: logits over a tiny temperature overflow, and inf - inf is no number.
        scaled = (seen - best) / jnp.where(filters.temperature > 0, filters.temperature, 1.0)[:, None]
        kept = filter_logits(scaled, filters.top_k, filters.top_p, filters.min_p)
        return jnp.where(filters.temperature > 0, _invert(jnp.exp(kept), uniform), greedy)

    drawn = jnp.where(free, jax.lax.cond((free & (filters.temperature > 0)).any(), draw, lambda: greedy), forced)
    possible = jnp.where(free, jnp.isfinite(best)[:, 0], forced < vocab)
    token = jnp.where(jnp.isfinite(top)[:, 0] & possible, drawn, BAD_ROW)
    asked = jnp.where(token == BAD_ROW, -1, judged)

    def judge() -> tuple[jax.Array, jax.Array, jax.Array]:
        total = jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
        likeliest, ids = jax.lax.top_k(logits, min(most, vocab))
        pad = ((0, 0), (0, most - ids.shape[1]))
        told = jnp.arange(most) < asked[:, None]
        own = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=1) - top - total
        return (
            jnp.where(asked >= 0, own[:, 0], 0.0),
            jnp.where(told, jnp.pad(ids, pad), 0),
            jnp.where(told, jnp.pad(likeliest - top - total, pad, constant_values=-jnp.inf), -jnp.inf),
        )

    def spare() -> tuple[jax.Array, jax.Array, jax.Array]:
        shape = (len(token), most)
        return jnp.zeros(len(token)), jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf)

    return token, *jax.lax.cond((asked >= 0).any(), judge, spare)


def _first_of(rows: jax.Array, wanted: jax.Array) -> jax.Array:
    """int32[rows]: where `wanted` [rows, 1] first is in each row; out of range if nowhere. With a row's maximum it is
    argmax, in two reductions that XLA makes vectors of on CPU, a quarter of argmax's time."""
    size = rows.shape[-1]
    return jnp.where(rows == wanted, jnp.arange(size, dtype=jnp.int32), size).min(axis=-1)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[rows]: an id of each row, with a probability in proportion to its weight, from float32[rows, vocab]."""
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    block = _pick(blocks.sum(axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _pick(within, uniform[:, 1])


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[rows]: the first place at which the sum of the weights so far exceeds its share `uniform` of the whole."""
    sums = jnp.cumsum(weights, axis=-1)
    place = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    positive = jnp.where(weights > 0, place, -1)
    exceeds = (sums > uniform[:, None] * sums[:, -1:]) & (weights > 0)
    # Rounding may leave nothing that exceeds it: then it is the last that can be drawn at all.
    return jnp.minimum(jnp.where(exceeds, place, weights.shape[-1]).min(axis=-1), positive.max(axis=-1))


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


Draw = Callable[
    [jax.Array, Filters, jax.Array, jax.Array, jax.Array, int, int, Adjustments | None],
    tuple[jax.Array, jax.Array, jax.Array, jax.Array],
]
SAMPLING: Operation[Draw] = Operation(
    "sampling", _reference, (cpu_kernel(cpu.sample),), is_used=lambda setting: setting.page_size > 0
)
"""Called as `sample` is. Only serving draws."""
