"""The kernel of sampling.cc: one draw for each row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sample(
    logits: jax.Array, filters: Sequence[jax.Array], uniform: jax.Array, judged: jax.Array, vocab: int, most: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The draw of model/ops/sampling.py. filters: in the order of its Filters; the result: in that of its Drawn."""
    rows = logits.shape[0]
    results = (
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows, most), jnp.int32),
        jax.ShapeDtypeStruct((rows, most), jnp.float32),
    )
    call = jax.ffi.ffi_call("isthmus_sample", results)
    token, own, top, theirs = call(logits, *filters, uniform, judged, vocab=np.int64(vocab))
    return token, own, top, theirs
