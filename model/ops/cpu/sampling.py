"""The kernels of sampling.cc: one draw for each row of logits, or the log-probability of one token."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sample(
    logits: jax.Array,
    filters: Sequence[jax.Array],
    uniform: jax.Array,
    judged: jax.Array,
    forced: jax.Array,
    vocab: int,
    most: int,
    adjustments: Sequence[jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The draw of model/ops/sampling.py. filters, adjustments: in the order of their classes there; the result: in that
    of Drawn."""
    rows = logits.shape[0]
    results = (
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows, most), jnp.int32),
        jax.ShapeDtypeStruct((rows, most), jnp.float32),
    )
    call = jax.ffi.ffi_call("isthmus_sample" if adjustments is None else "isthmus_sample_adjusted", results)
    token, own, top, theirs = call(
        logits, *filters, uniform, judged, forced, *(adjustments or ()), vocab=np.int64(vocab)
    )
    return token, own, top, theirs


def log_probability(logits: jax.Array, tokens: jax.Array, vocab: int) -> jax.Array:
    """The log-probabilities of model/ops/log_probability.py; NaN for a token that isn't below vocab."""
    rows = logits.reshape(-1, logits.shape[-1])
    call = jax.ffi.ffi_call("isthmus_log_probability", jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32))
    return call(rows, tokens.reshape(-1), vocab=np.int64(vocab)).reshape(tokens.shape)
