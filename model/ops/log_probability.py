"""The log-probabilities of tokens that are known, as training takes them from logits."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from isthmus.model.ops.cpu import sampling as cpu
from isthmus.model.ops.cpu.kernel import cpu_kernel
from isthmus.model.ops.operation import REFERENCE, Operation


def log_probability(logits: jax.Array, tokens: jax.Array, vocab: int, *, implementation: str = REFERENCE) -> jax.Array:
    """float32[...]: each token's in the softmax of its logits, float32[..., ids], of which those from `vocab` on count
    for nothing. tokens: int32[...], below vocab. By the kernel, it has the bits that a draw of the token tells."""
    return LOG_PROBABILITY[implementation](logits, tokens, vocab)


def _reference(logits: jax.Array, tokens: jax.Array, vocab: int) -> jax.Array:
    logits = logits[..., :vocab]
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


LOG_PROBABILITY: Operation[Callable[[jax.Array, jax.Array, int], jax.Array]] = Operation(
    "log_probability",
    _reference,
    (cpu_kernel(cpu.log_probability, gradient_of=_reference),),
    is_used=lambda setting: setting.page_size == 0,
)
"""Called as `log_probability` is. Serving gets them with its draws."""
