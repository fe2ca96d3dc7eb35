"""The kernel of sampling.cc: one draw for each row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sample(logits: jax.Array, filters: Sequence[jax.Array], uniform: jax.Array, vocab: int) -> jax.Array:
    """The draw of model/ops/sampling.py. filters: in the order of its Filters."""
    call = jax.ffi.ffi_call("isthmus_sample", jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32))
    return call(logits, *filters, uniform, vocab=np.int64(vocab))
