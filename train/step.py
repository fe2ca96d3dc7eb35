"""The training step: one pure function of (state, batch), compiled with donated state and no host sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.layers import Attend
from model.ops import attention
from model.sharding import partition_spec, use_mesh
from model.transformer import Params, abstract_params, bind, init_params
from train.data import Batch
from train.optimizer import abstract_optimizer


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


class Metrics(NamedTuple):
    """Device scalars of a step, float32."""

    loss: Any
    """Mean nats a target"""
    grad_norm: Any
    """Before clipping"""


def packed_attention(segments: jax.Array) -> Attend:
    """The training side of the seam: causal within a document, no cache."""

    def attend(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None]:
        return attention.causal(q, k, v, segments), cache

    return attend


def loss_sum(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Weighted sum of cross-entropies, float32[], of a batch whose arrays are [sequences, seq]."""
    model = bind(config, params)
    hidden, _ = model(batch.tokens, batch.positions, packed_attention(batch.segments), None)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), batch.targets)
    return (losses * batch.weights).sum()


def gradients(config: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    """Mean loss over all targets of [accumulate, sequences, seq], and its gradient.

    The parts' sums are added and divided once, so any split of the same sequences gives the same mean.
    """
    grad = jax.value_and_grad(loss_sum, argnums=1)

    if batch.tokens.shape[0] == 1:
        loss, grads = grad(config, params, jax.tree.map(lambda x: x[0], batch))
    else:

        def add(total: tuple[jax.Array, Params], part: Batch) -> tuple[tuple[jax.Array, Params], None]:
            return jax.tree.map(jnp.add, total, grad(config, params, part)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), _ = jax.lax.scan(add, zero, batch)
    weight = jnp.maximum(batch.weights.sum(), 1)
    return loss / weight, jax.tree.map(lambda g: g / weight, grads)


class Trainer:
    """The compiled programs of a run: init, step, evaluate."""

    def __init__(self, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
        self.config, self.mesh, self._optimizer = config, mesh, optimizer
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(config))
        self._batch_sharding = NamedSharding(mesh, PartitionSpec(None, *partition_spec(("batch", "seq"))))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.shardings, Metrics(replicated, replicated)),
        )
        self._evaluate = jax.jit(lambda params, batch: loss_sum(config, params, jax.tree.map(lambda x: x[0], batch)))

    def abstract_state(self, config: ModelConfig) -> TrainState:
        """Shapes and shardings of the state in the layout of `config`."""
        params = abstract_params(config, self.mesh)
        return TrainState(params, abstract_optimizer(self._optimizer, params))

    def init(self, seed: int) -> TrainState:
        params = init_params(self.config, seed, self.mesh)
        with use_mesh(self.mesh):
            return TrainState(params, jax.jit(self._optimizer.init, out_shardings=self.shardings.optimizer)(params))

    def adopt(self, state: TrainState, layout: Callable[[Any], Any]) -> TrainState:
        """`state` in this run's layout and shardings; `layout` stacks or unstacks."""
        with use_mesh(self.mesh):
            return jax.jit(layout, out_shardings=self.shardings)(state)

    def put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self._batch_sharding)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Launches a step and returns at once; `state` is donated."""
        with use_mesh(self.mesh):
            return self._step(state, self.put(batch))

    def evaluate(self, params: Params, batch: Batch) -> jax.Array:
        """Summed nats of a batch [1, sequences, seq], float32[]."""
        with use_mesh(self.mesh):
            return self._evaluate(params, self.put(batch))

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step's program for abstract or real arguments, to compile or export elsewhere."""
        with use_mesh(self.mesh):
            return self._step.lower(state, batch)

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = gradients(self.config, state.params, batch)
        updates, optimizer = self._optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer), Metrics(loss, optax.global_norm(grads))
