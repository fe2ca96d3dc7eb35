"""Turning pairs of dimensions by given angles; model/rotary.py says by which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from isthmus.model.ops.cpu import elementwise
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation


def rotate(angles: tuple[jax.Array, jax.Array], *xs: jax.Array, implementation: str = REFERENCE) -> list[jax.Array]:
    """Turns pairs (i, i + n / 2) of the first n dimensions of each x[..., heads, head_dim], n as wide as the angles:
    the half-split layout of Llama and Qwen.

    angles: cos and signed sin, float32[..., 1, n].
    """
    return ROTARY[implementation](angles, xs)


def _reference(angles: tuple[jax.Array, jax.Array], xs: Sequence[jax.Array]) -> list[jax.Array]:
    return [_rotate(angles, x) for x in xs]


def _rotate(angles: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    cos, sin = angles
    turned = cos.shape[-1]
    y = x[..., :turned].astype(jnp.float32)
    y = (y * cos + jnp.roll(y, turned // 2, axis=-1) * sin).astype(x.dtype)
    return y if turned == x.shape[-1] else jnp.concatenate([y, x[..., turned:]], axis=-1)


ROTARY: Operation[Callable[[tuple[jax.Array, jax.Array], Sequence[jax.Array]], list[jax.Array]]] = Operation(
    "rotary",
    _reference,
    (cpu_kernel(elementwise.rotate_pairs, gradient_of=_reference),),
    is_used=lambda setting: any(kind.rope != "none" for kind in setting.model.layer_kinds),
)
"""Called with the angles and what is turned by them."""
