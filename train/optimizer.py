"""AdamW, clipping and the learning-rate schedule, from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from isthmus.model.config import ModelConfig
from isthmus.model.transformer import Params, parameter_specs
from isthmus.train.config import OptimizerConfig


def build_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then cosine decay, or a constant rate and linear decay (WSD, arXiv
    2404.06395)."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    last = config.lr * config.final_lr
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(steps, warmup + 1), last)
    decay = max(1, min(round(steps * config.decay_fraction), steps - warmup))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.lr, warmup),
            optax.constant_schedule(config.lr),
            optax.linear_schedule(config.lr, last, decay),
        ],
        [warmup, steps - decay],
    )


class LearningRates:
    """The schedule's values by step, on the host. They are computed for many steps at once, so that reading one doesn't
    wait for the device."""

    BLOCK = 1 << 12

    def __init__(self, config: OptimizerConfig, steps: int) -> None:
        self._schedule = build_schedule(config, steps)
        self._first, self._values = -1, np.empty(0, np.float32)

    def __call__(self, step: int) -> float:
        return float(self.block(step - step % self.BLOCK)[step % self.BLOCK])

    def block(self, first: int) -> np.ndarray:
        """The learning rates of the steps from `first` on, float32[BLOCK]."""
        if first != self._first:
            steps = first + jnp.arange(self.BLOCK)
            self._first, self._values = first, np.broadcast_to(np.asarray(self._schedule(steps)), steps.shape)
        return self._values


def first_difference(config: OptimizerConfig, before: int, after: int, done: int) -> int | None:
    """The first of `done` steps whose learning rate differs between runs of `before` and of `after` steps, or None."""
    old, new = LearningRates(config, before), LearningRates(config, after)
    for first in range(0, done, LearningRates.BLOCK):
        (differ,) = np.nonzero((old.block(first) != new.block(first))[: done - first])
        if len(differ):
            return first + int(differ[0])
    return None


def build_optimizer(config: OptimizerConfig, steps: int, model: ModelConfig) -> optax.GradientTransformation:
    """AdamW for the parameters of `model` in either layout, without weight decay on norms and biases."""
    specs = {**parameter_specs(model), **parameter_specs(model, stacked=True)}

    def mask(params: Params) -> Any:
        return {path: specs[path].role.decays for path in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            build_schedule(config, steps),
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            mask=mask,
        ),
    )


def abstract_optimizer(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """The shapes of the optimizer state for abstract `params`. Each moment is sharded like its parameter."""
    state = jax.eval_shape(optimizer.init, params)
    replicated = jax.sharding.NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, jax.sharding.PartitionSpec())

    def like(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return optax.tree_map_params(
        optimizer,
        lambda leaf, param: like(leaf, param.sharding),
        state,
        params,
        transform_non_params=lambda leaf: like(leaf, replicated),
    )
