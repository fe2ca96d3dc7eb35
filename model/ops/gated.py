"""The hidden layer of a gated MLP (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from isthmus.model.config import Activation
from isthmus.model.ops.cpu import elementwise
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation, Setting


def gated(
    activation: Activation, limit: float, gate: jax.Array, up: jax.Array, *, implementation: str = REFERENCE
) -> jax.Array:
    """activation(gate) * up, as gate. clamped_swiglu (arXiv 2508.10925) clips to `limit` and differs in more."""
    return GATED[implementation](activation, limit, gate, up)


def _reference(activation: Activation, limit: float, gate: jax.Array, up: jax.Array) -> jax.Array:
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


def _has_no_cpu_kernel(setting: Setting) -> str | None:
    activation = setting.model.activation
    return None if activation in elementwise.ACTIVATIONS else f"it doesn't have the activation {activation}"


GATED: Operation[Callable[[Activation, float, jax.Array, jax.Array], jax.Array]] = Operation(
    "gated", _reference, (cpu_kernel(elementwise.gated_product, _has_no_cpu_kernel, gradient_of=_reference),)
)
"""Called with the activation, its limit, the gate and what it multiplies."""
