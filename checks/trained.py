"""The log-probabilities that training gives to texts, to be compared with those that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from isthmus.model.config import LoraConfig
from isthmus.model.execution import Execution
from isthmus.model.ops.kernels import choose
from isthmus.model.ops.operation import Setting
from isthmus.model.transformer import Params, parameter_specs
from isthmus.serve.engine.programs import Served
from isthmus.train.data import Batch
from isthmus.train.step import log_probabilities, multiplied

Learner = Callable[[Sequence[int]], np.ndarray]
"""Gives the log-probability of each token of a text but the first, float32[tokens - 1]."""


def why_not_trained(served: Served, numbers_are_integers: bool) -> str | None:
    """Why training can't compute what is served, to the bit; None where it can."""
    if numbers_are_integers:
        return "training has no integers"
    if served.cache_dtype != served.execution.dtype:
        return f"training keeps keys in {served.execution.dtype}, the cache in {served.cache_dtype}"
    if not served.execution.kernels.packs_weights:
        return "XLA's sums have an order that depends on the program"
    return None


def learner(served: Served, params: Params) -> Learner:
    """The forward pass of a training step on one CPU with the kernels that serve, without the adapters that requests
    choose among. params: float32."""
    config, size = replace(served.model, lora=LoraConfig()), served.engine.context_length
    dtype = served.execution.dtype
    kernels = choose("cpu", Setting(config, dtype, "cpu", takes_gradients=True))
    execution = Execution(dtype, kernels=kernels)
    base = {path: params[path] for path in parameter_specs(config)}

    @jax.jit
    def forward(params: Params, batch: Batch) -> jax.Array:
        return log_probabilities(config, execution, multiplied(config, execution, params), batch, served.vocab)[0]

    def learned(text: Sequence[int]) -> np.ndarray:
        """The text is the second document of a sequence, after zeros."""
        before = size - len(text) + 1
        tokens, targets, positions = (np.zeros((1, size), np.int32) for _ in range(3))
        tokens[0, before:], targets[0, before:] = text[:-1], text[1:]
        positions[0] = [*range(before), *range(len(text) - 1)]
        segments = (np.arange(size)[None] >= before).astype(np.int32)
        batch = Batch(tokens, targets, positions, segments, segments.astype(np.float32))
        return np.asarray(forward(base, batch))[0, before:]

    return learned
