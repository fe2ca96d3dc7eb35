"""The scores that a mixture's router gives its experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

from isthmus.model.ops.cpu import elementwise
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation

Scores = Literal["softmax", "sigmoid"]


def scores(kind: Scores, logits: jax.Array, *, implementation: str = REFERENCE) -> jax.Array:
    """The softmax or the sigmoid of logits, float32[tokens, experts]."""
    return ROUTING[implementation](kind, logits)


def _reference(kind: Scores, logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits, axis=-1) if kind == "softmax" else jax.nn.sigmoid(logits)


ROUTING: Operation[Callable[[Scores, jax.Array], jax.Array]] = Operation(
    "routing",
    _reference,
    (cpu_kernel(elementwise.router_scores, gradient_of=_reference),),
    is_used=lambda setting: setting.model.mixture.experts > 0,
)
"""Called with the kind of scores and the logits. XLA's softmax of a row differs with how many rows there are."""
