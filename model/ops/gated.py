"""The hidden layer of a gated MLP (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.config import Activation
from isthmus.model.ops.backend import cpu_kernels

KERNELS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}
"""Numbers of the activations that elementwise.cc knows"""


def gated(activation: Activation, limit: float, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, as gate. clamped_swiglu (arXiv 2508.10925) clips to `limit` and differs in more."""
    if cpu_kernels() and activation in KERNELS:
        call = jax.ffi.ffi_call("isthmus_gated_product", jax.ShapeDtypeStruct(gate.shape, gate.dtype))
        return call(gate, up, activation=np.int64(KERNELS[activation]), limit=np.float32(limit))
    match activation:
        case "silu":
            return jax.nn.silu(gate) * up
        case "gelu":
            return jax.nn.gelu(gate, approximate=False) * up
        case "gelu_tanh":
            return jax.nn.gelu(gate, approximate=True) * up
        case "clamped_swiglu":
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
