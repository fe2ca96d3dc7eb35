"""Attention over whole sequences of a packed batch, as in training, and how every attention makes its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from isthmus.model.ops.cpu import attention as cpu
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation

MASKED = -1e30
"""Stands for minus infinity: a row with nothing to attend to gives a finite, meaningless average instead of NaN."""


@dataclass(frozen=True)
class Scoring:
    """How a layer's scores come from its queries and keys."""

    scale: float
    """Multiplies q·k"""
    window: int = 0
    """Last positions that a query sees, its own included; 0 is all"""
    soft_cap: float = 0.0
    """c in c * tanh(score / c); 0 is off"""

    def scores(self, products: jax.Array) -> jax.Array:
        """float32, from q·k before any mask."""
        scores = products * self.scale
        return scores if self.soft_cap == 0 else self.soft_cap * jnp.tanh(scores / self.soft_cap)


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    segments: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    *,
    implementation: str = REFERENCE,
) -> jax.Array:
    """Causal attention that never crosses a document.

    q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim], a v of None being k; segments:
    int32[batch, seq], a number for each document; sinks: float32[heads], logits that take a share of the softmax and
    give nothing. Returns as q; scores are float32.
    """
    return ATTENTION[implementation](q, k, v, segments, scoring, sinks)


def _reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    segments: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> jax.Array:
    """Queries go in up to 8 blocks, each against the keys up to its own end and from its window's beginning: without a
    window about half of the work of the full square."""
    seq = q.shape[1]
    block = max(64, -(-seq // 8))
    by_head = k.transpose(0, 2, 1, 3), (k if v is None else v).transpose(0, 2, 1, 3)
    out = []
    for start in range(0, seq, block):
        end = min(start + block, seq)
        first = max(0, start + 1 - scoring.window) if scoring.window else 0
        keys, values = (x[:, :, first:end] for x in by_head)
        ahead = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
        seen = (ahead >= 0) & (ahead < scoring.window) if scoring.window else ahead >= 0
        allowed = seen & (segments[:, start:end, None] == segments[:, None, first:end])
        out.append(_attend_block(q[:, start:end], keys, values, allowed, scoring, sinks))
    return jnp.concatenate(out, axis=1)


def _attend_block(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scoring: Scoring, sinks: jax.Array | None
) -> jax.Array:
    """q: [batch, queries, heads, head_dim]; k, v: [batch, kv_heads, keys, head_dim]; allowed: [batch, queries, keys]"""
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    # The queries of a group lie side by side, so that both products are plain batched matrix products.
    q = q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * queries, head_dim)
    scores = scoring.scores(jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32))
    scores = scores.reshape(batch, kv_heads, group, queries, keys)
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(1, kv_heads, group, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink.astype(jnp.float32)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :keys].astype(q.dtype)
    weights = weights.reshape(batch, kv_heads, group * queries, keys)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    out = out.reshape(batch, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, head_dim)


ATTENTION: Operation[
    Callable[[jax.Array, jax.Array, jax.Array | None, jax.Array, Scoring, jax.Array | None], jax.Array]
] = Operation(
    "attention",
    _reference,
    (cpu_kernel(cpu.causal, gradient_of=_reference),),
    is_used=lambda setting: setting.page_size == 0,
)
"""Called with q, k, v, segments, scoring and sinks."""
