"""The kernels of elementwise.cc, called as the operations' references are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.config import Activation

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}
"""The numbers of the activations that elementwise.cc has"""


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float, dtype: jnp.dtype) -> jax.Array:
    """The norm of model/ops/norm.py."""
    call = jax.ffi.ffi_call("isthmus_rms_norm", jax.ShapeDtypeStruct(x.shape, dtype))
    return call(x, scale, eps=np.float32(eps), offset=np.float32(offset))


def rotate_pairs(angles: tuple[jax.Array, jax.Array], xs: Sequence[jax.Array]) -> list[jax.Array]:
    """The rotation of model/ops/rotary.py, all of xs in one call."""
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in angles)
    rows = [x.reshape(-1, *x.shape[-2:]) for x in xs]
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rows)
    turned = jax.ffi.ffi_call("isthmus_rotate_pairs", out)(cos, sin, *rows)
    return [y.reshape(x.shape) for x, y in zip(xs, turned, strict=True)]


def gated_product(activation: Activation, limit: float, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The gate of model/ops/gated.py, of an activation that is among ACTIVATIONS."""
    call = jax.ffi.ffi_call("isthmus_gated_product", jax.ShapeDtypeStruct(gate.shape, gate.dtype))
    return call(gate, up, activation=np.int64(ACTIVATIONS[activation]), limit=np.float32(limit))


def router_scores(kind: Literal["softmax", "sigmoid"], logits: jax.Array) -> jax.Array:
    """The scores of model/ops/routing.py."""
    call = jax.ffi.ffi_call("isthmus_router_scores", jax.ShapeDtypeStruct(logits.shape, logits.dtype))
    return call(logits, softmax=kind == "softmax")
