"""The training step: a pure function of (state, batch), compiled with donated state. It never waits for the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.model.config import ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.experts import balanced
from isthmus.model.layers import Attend
from isthmus.model.ops.attention import Scoring, causal
from isthmus.model.ops.log_probability import log_probability
from isthmus.model.ops.operation import REFERENCE
from isthmus.model.ops.rounding import narrowed
from isthmus.model.parameter import Role
from isthmus.model.sharding import partition_spec, use_mesh
from isthmus.model.transformer import Params, abstract_params, bind, parameter_specs
from isthmus.model.weights import lora
from isthmus.model.weights.layout import layers_of, unstack_params
from isthmus.model.weights.load import load_params
from isthmus.model.weights.random import RandomSource
from isthmus.train.data import Batch
from isthmus.train.optimizer import abstract_optimizer


class TrainState(NamedTuple):
    params: Params
    """The parameters that are trained: all of them, or the adapters alone"""
    optimizer: Any


class Metrics(NamedTuple):
    """Figures of a step, float32 scalars on the device."""

    loss: Any
    """Mean nats per target"""
    grad_norm: Any
    """Norm of the whole gradient before clipping"""
    expert_load: Any
    """Tokens of the busiest expert divided by the mean of all experts, averaged over layers; 1 means balanced, 0 that
    there are no experts"""


def packed_attention(segments: jax.Array, implementation: str = REFERENCE) -> Attend:
    """The training side of the seam: causal attention within each document, without a cache, by an implementation of
    model/ops/attention.py."""

    def attend(
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        cache: None,
        scoring: Scoring,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        return causal(q, k, v, segments, scoring, sinks, implementation=implementation), cache

    return attend


def long_sequences(config: ModelConfig, batch: Batch) -> jax.Array | None:
    """bool[sequences, seq]: whether a token's document is longer than the model's rope_switch; None if it has none."""
    if not config.rope_switch:
        return None

    def longest(positions: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions, segments, num_segments=positions.shape[0])[segments]

    return jax.vmap(longest)(batch.positions, jnp.maximum(batch.segments, 0)) >= config.rope_switch


def log_probabilities(
    config: ModelConfig, execution: Execution, params: Params, batch: Batch, vocab: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target, float32[sequences, seq], of a batch whose arrays are that, and the
    experts' load, float32[sparse layers, experts]. Differentiable.

    params: as `multiplied` rounds them. vocab: how many ids can be drawn, which serving takes the softmax over; None is
    all that the network has logits for. Where all of `execution.kernels` are "cpu", the log-probabilities are those
    that serving by these kernels tells of the same tokens of the same weights, to the bit.
    """
    model, kernels = bind(config, execution, params), execution.kernels
    attend = packed_attention(batch.segments, kernels.attention)
    uses_long_rope = long_sequences(config, batch)
    hidden, _, load = model.run(batch.tokens, batch.positions, attend, None, uses_long_rope)
    vocab = config.vocab_size if vocab is None else vocab
    logits = model.logits(hidden)
    return log_probability(logits, batch.targets, vocab, implementation=kernels.log_probability), load


def loss_sum(config: ModelConfig, execution: Execution, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the cross-entropies in nats, float32[], and the load, as `log_probabilities` does."""
    log_likelihoods, load = log_probabilities(config, execution, params, batch)
    return -(log_likelihoods * batch.weights).sum(), load


class Gradients(NamedTuple):
    """What a batch says about the parameters."""

    loss: jax.Array
    """float32[]: mean nats per target"""
    grads: Params
    load: jax.Array
    """float32[sparse layers, experts]: how many tokens each expert got"""


def join_adapters(params: Params, base: Params | None) -> Params:
    """All parameters of the network: `params` or, if there is a `base`, that with `params` as its adapters."""
    return params if base is None else {**base, **params}


def multiplied(config: ModelConfig, execution: Execution, params: Params) -> Params:
    """float32 `params`, rounded as the network multiplies by them, and as serving in the same dtype keeps them."""
    specs = parameter_specs(config, stacked=execution.scan_layers)
    return {path: narrowed(x, specs[path].storage_dtype(execution.dtype)) for path, x in params.items()}


def gradients(
    config: ModelConfig, execution: Execution, params: Params, batch: Batch, base: Params | None = None
) -> Gradients:
    """The gradients, float32, of the mean loss over all targets in [accumulate, sequences, seq], taken at the rounded
    `params`.

    The sums of all parts are added and divided once, so any division of the same sequences into parts gives the same
    mean. base: the parameters that `params` are adapters of, or None.
    """
    rounded = multiplied(config, execution, params)

    def part_of(part: Batch) -> Gradients:
        def loss_of(rounded: Params) -> tuple[jax.Array, jax.Array]:
            return loss_sum(config, execution, join_adapters(rounded, base), part)

        (loss, load), grads = jax.value_and_grad(loss_of, has_aux=True)(rounded)
        return Gradients(loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), load)

    if batch.tokens.shape[0] == 1:
        total = part_of(jax.tree.map(lambda x: x[0], batch))
    else:

        def add(total: Gradients, part: Batch) -> tuple[Gradients, None]:
            return jax.tree.map(jnp.add, total, part_of(part)), None

        load = jnp.zeros((config.sparse_layers, config.mixture.experts), jnp.float32)
        zero = Gradients(jnp.float32(0), jax.tree.map(jnp.zeros_like, params), load)
        total, _ = jax.lax.scan(add, zero, batch)
    weight = jnp.maximum(batch.weights.sum(), 1)
    return Gradients(total.loss / weight, jax.tree.map(lambda g: g / weight, total.grads), total.load)


def balance_experts(config: ModelConfig, params: Params, load: jax.Array, rate: float) -> Params:
    """`params` with every router's correction moved by `rate` towards an even load, float32[sparse layers, experts]."""
    specs = {**parameter_specs(config), **parameter_specs(config, stacked=True)}
    row = {layer: n for n, layer in enumerate(i for i, kind in enumerate(config.layer_kinds) if kind.sparse)}
    moved = {}
    for path, correction in params.items():
        if specs[path].role is Role.CORRECTION and (found := layers_of(path)):
            mine = load[jnp.array([row[layer] for layer in found[0]])]
            moved[path] = balanced(correction, mine.reshape(correction.shape), rate)
    return {**params, **moved}


class Trainer:
    """The compiled programs of a run: init, step, evaluate. With LoRA, the state is that of the adapters alone."""

    def __init__(
        self,
        config: ModelConfig,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        execution: Execution = DEFAULT_EXECUTION,
        correction_rate: float = 0.001,
    ) -> None:
        """correction_rate: how far each step moves the corrections of routers."""
        self.config, self.execution, self.mesh = config, execution, mesh
        self._optimizer, self._correction_rate = optimizer, correction_rate
        self.base: Params | None = None
        """The parameters that adapters are trained on, set before the first step; never donated"""
        self.abstract = self.abstract_state(stacked=execution.scan_layers)
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self._batch_sharding = NamedSharding(mesh, PartitionSpec(None, *partition_spec(("batch", "seq"))))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.shardings, Metrics(replicated, replicated, replicated)),
        )
        self._evaluate = jax.jit(self._nats)

    def abstract_state(self, *, stacked: bool) -> TrainState:
        """Shapes and shardings of the state in the stacked or the unstacked layout."""
        params = abstract_params(self.config, self.mesh, stacked=stacked)
        if self.config.lora.rank:
            params = lora.split(self.config, params)[1]
        return TrainState(params, abstract_optimizer(self._optimizer, params))

    def init(self, seed: int) -> TrainState:
        """The state before the first step, with random parameters, or with new adapters, which change nothing yet."""
        return self.state_from_params(load_params(RandomSource(self.config, seed, self.mesh), self.abstract.params))

    def state_from_params(self, params: Params) -> TrainState:
        """The state before the first step, with `params`, which must be in this run's layout and shardings."""
        with use_mesh(self.mesh):
            return TrainState(params, jax.jit(self._optimizer.init, out_shardings=self.shardings.optimizer)(params))

    def reshard(self, state: TrainState) -> TrainState:
        """`state`, which is stacked, converted to this run's layout and shardings."""

        def convert(state: TrainState) -> TrainState:
            return state if self.execution.scan_layers else unstack_params(state)

        with use_mesh(self.mesh):
            return jax.jit(convert, out_shardings=self.shardings)(state)

    def put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self._batch_sharding)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Launches a step and returns at once; `state` is donated."""
        with use_mesh(self.mesh):
            return self._step(state, self.put(batch), self.base)

    def evaluate(self, params: Params, batch: Batch) -> jax.Array:
        """The sum of nats, float32[], over a batch [1, sequences, seq]."""
        with use_mesh(self.mesh):
            return self._evaluate(params, self.put(batch), self.base)

    def lower(self, state: TrainState, batch: Batch, base: Params | None = None) -> jax.stages.Lowered:
        """The step's program for abstract or real arguments, for compiling it or exporting it elsewhere."""
        with use_mesh(self.mesh):
            return self._step.lower(state, batch, base)

    def _nats(self, params: Params, batch: Batch, base: Params | None) -> jax.Array:
        rounded = join_adapters(multiplied(self.config, self.execution, params), base)
        return loss_sum(self.config, self.execution, rounded, jax.tree.map(lambda x: x[0], batch))[0]

    def _train_step(self, state: TrainState, batch: Batch, base: Params | None = None) -> tuple[TrainState, Metrics]:
        loss, grads, load = gradients(self.config, self.execution, state.params, batch, base)
        updates, optimizer = self._optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if base is None:
            params = balance_experts(self.config, params, load, self._correction_rate)
        busiest = load.max(axis=-1) / load.mean(axis=-1) if load.size else jnp.zeros(1)
        return TrainState(params, optimizer), Metrics(loss, optax.global_norm(grads), busiest.mean())
