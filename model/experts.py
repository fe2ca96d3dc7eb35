"""Mixture of experts: a router sends each token to a few of many MLPs. No token is ever dropped, so a token's output
doesn't depend on the others in its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
from flax import nnx

from isthmus.model.config import MixtureConfig, ModelConfig
from isthmus.model.layers import MLP, Linear, zeros
from isthmus.model.ops.cpu.packed import Packed
from isthmus.model.ops.gated import gated
from isthmus.model.ops.grouped_matmul import Matrices, grouped_matmul
from isthmus.model.ops.kernels import Kernels
from isthmus.model.ops.routing import scores as router_scores
from isthmus.model.parameter import INIT_STD, Role, parameter
from isthmus.model.sharding import mesh_axes, partition_spec


class Router(nnx.Module):
    """Chooses each token's experts and their weights; always in float32."""

    def __init__(self, config: ModelConfig, kernels: Kernels, rngs: nnx.Rngs) -> None:
        mixture = config.mixture
        routes = {"routes": mixture.experts}
        self.linear = Linear({"embed": config.dim}, routes, kernels, rngs, bias=mixture.router_bias, role=Role.ROUTER)
        self.correction = zeros(rngs, routes, Role.CORRECTION) if mixture.correction else None
        self.mixture, self.kernels = mixture, kernels

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns weights float32[tokens, per_token] and experts int32[tokens, per_token] for x [tokens, dim]."""
        mixture = self.mixture
        logits = self.linear(x.astype(jnp.float32))
        scores = router_scores(mixture.scores, logits, implementation=self.kernels.routing)
        wanted = scores if self.correction is None else scores + self.correction[...].astype(jnp.float32)
        wanted = jax.lax.stop_gradient(best_groups(mixture, wanted))
        _, experts = jax.lax.top_k(wanted, mixture.per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if mixture.normalize:
            weights = weights / (total(weights) + 1e-20)
        return weights * mixture.scale, experts.astype(jnp.int32)


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, which stays with a size of 1, in one order of additions. XLA's own sum over that axis
    takes an order that depends on how many rows there are, so a token's weights would on what else is in the batch."""
    while (size := x.shape[-1]) > 1:
        half = size // 2
        x = jnp.concatenate([x[..., :half] + x[..., half : 2 * half], x[..., 2 * half :]], axis=-1)
    return x


def best_groups(mixture: MixtureConfig, scores: jax.Array) -> jax.Array:
    """scores [tokens, experts] with -inf outside each token's best groups (DeepSeek-V2, arXiv 2405.04434)."""
    if mixture.groups == 1:
        return scores
    grouped = scores.reshape(-1, mixture.groups, mixture.experts // mixture.groups)
    best = grouped.max(axis=-1) if mixture.group_score == "max" else jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    _, chosen = jax.lax.top_k(best, mixture.groups_per_token)
    kept = (chosen[..., None] == jnp.arange(mixture.groups)).any(axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


class Mixture(nnx.Module):
    """The experts' MLPs, kept as [experts, ...] arrays, and perhaps an MLP that every token goes to as well."""

    def __init__(self, config: ModelConfig, kernels: Kernels, rngs: nnx.Rngs) -> None:
        mixture, bias = config.mixture, config.mlp_bias
        experts, embed, mlp = {"experts": mixture.experts}, {"embed": config.dim}, {"mlp": mixture.dim}
        self.router = Router(config, kernels, rngs)
        self.gate = ExpertLinear(experts, embed, mlp, rngs, bias=bias)
        self.up = ExpertLinear(experts, embed, mlp, rngs, bias=bias)
        self.down = ExpertLinear(experts, mlp, embed, rngs, bias=bias, std=INIT_STD / math.sqrt(2 * config.layers))
        self.shared = MLP(config, mixture.shared_dim, kernels, rngs) if mixture.shared_dim else None
        self.config, self.kernels = config, kernels

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns the output, float32[..., dim], and how many tokens went to each expert, float32[experts]. chosen: as
        in Linear, for the MLP that every token goes to."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(tokens)
        out = self._experts(tokens, weights, experts).reshape(x.shape)
        load = jnp.zeros(self.config.mixture.experts, jnp.float32).at[experts.reshape(-1)].add(1.0)
        return (out if self.shared is None else out + self.shared(x, chosen)), load

    def _experts(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """float32[tokens, dim]. Over a mesh each device computes its own experts (and its part of their width) for all
        tokens of its data shard, and the parts are added up."""
        layers = (self.gate, self.up, self.down)
        arrays = [(layer.matrices(x.dtype), layer.bias_or_none()) for layer in layers]
        mesh, count = jax.sharding.get_abstract_mesh(), self.config.mixture.experts
        if mesh.empty or mesh.size == 1:
            return self._compute(x, weights, experts, arrays, lambda total, axes: total, 0, count)

        # A training batch is split, and joined over "ep" for this alone. Serving has all its tokens on every device.
        splits = x.shape[0] % math.prod(mesh.shape[axis] for axis in mesh_axes("routed")) == 0
        data = partition_spec(("routed", None) if splits else ())
        specs = [(partition_spec(layer.axes_here), layer.bias_spec()) for layer in layers]
        (experts_axis,) = mesh_axes("experts")

        def local(x: jax.Array, weights: jax.Array, experts: jax.Array, arrays: list) -> jax.Array:
            mine = arrays[0][0].shape[0]
            first = jax.lax.axis_index(experts_axis) * mine
            return self._compute(x, weights, experts, arrays, jax.lax.psum, first, mine)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(data, data, data, specs),
            out_specs=data,
            check_vma=False,
        )(x, weights, experts, arrays)

    def _compute(
        self,
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        arrays: list[tuple[Matrices, jax.Array | None]],
        add_up: Callable[[jax.Array, tuple[str, ...]], jax.Array],
        first: jax.Array | int,
        mine: int,
    ) -> jax.Array:
        """The output's part that comes from the experts in `arrays`, which are `mine` whose numbers begin at `first`:
        sorts tokens by expert, multiplies each group by its expert's matrices, and restores the order."""
        (gate, gate_bias), (up, up_bias), (down, down_bias) = arrays
        local = experts.reshape(-1) - first
        local = jnp.where((local >= 0) & (local < mine), local, mine)  # others' tokens go last, and give 0
        order = jnp.argsort(local, stable=True)
        sizes = jnp.zeros(mine + 1, jnp.int32).at[local].add(1)[:mine]
        group = jnp.minimum(local[order], mine - 1)
        rows = x[order // experts.shape[1]]

        multiply = partial(grouped_matmul, implementation=self.kernels.grouped_matmul)

        def layer(x: jax.Array, kernel: Matrices, bias: jax.Array | None) -> jax.Array:
            out = multiply(x, kernel, sizes)
            return (out if bias is None else out + bias[group]).astype(x.dtype)

        gates, ups = layer(rows, gate, gate_bias), layer(rows, up, up_bias)
        activation, limit = self.config.activation, self.config.activation_limit
        hidden = gated(activation, limit, gates, ups, implementation=self.kernels.gated)
        out = add_up(multiply(hidden, down, sizes), mesh_axes("mlp"))
        out = out if down_bias is None else out + down_bias[group]
        out = jnp.where((local[order] < mine)[:, None], out, 0) * weights.reshape(-1)[order][:, None]
        # Rounded before they are added, as by isthmus.model.ops.rounding.product, and added in one order.
        back = jax.lax.optimization_barrier(jnp.zeros_like(out).at[order].set(out)).reshape(*experts.shape, -1)
        return add_up(reduce(add, (back[:, index] for index in range(experts.shape[1]))), mesh_axes("experts"))


class ExpertLinear(nnx.Module):
    """A linear layer per expert, all in one array [experts, inputs, outputs]."""

    def __init__(
        self,
        experts: dict[str, int],
        inputs: dict[str, int],
        outputs: dict[str, int],
        rngs: nnx.Rngs,
        *,
        bias: bool,
        std: float = INIT_STD,
    ) -> None:
        sizes = {**experts, **inputs, **outputs}
        axes, start = tuple(sizes), nnx.initializers.normal(std)
        contracted = math.prod(inputs.values())
        self.kernel = parameter(rngs, tuple(sizes.values()), axes, Role.EXPERTS, inputs=contracted, initializer=start)
        self.axes_here = tuple(None if axis == "embed" else axis for axis in axes)
        """The kernel's logical axes where it is multiplied: every device has all numbers of the stream"""
        self.bias = zeros(rngs, {**experts, **outputs}) if bias else None

    def matrices(self, dtype: jax.typing.DTypeLike) -> Matrices:
        """The experts' matrices: packed, or an array in `dtype`."""
        kernel: Matrices = self.kernel.get_value()
        return kernel if isinstance(kernel, Packed) else kernel.astype(dtype)

    def bias_or_none(self) -> jax.Array | None:
        return None if self.bias is None else self.bias[...]

    def bias_spec(self) -> jax.sharding.PartitionSpec | None:
        """How the bias lies where the kernel is multiplied."""
        experts, _, outputs = self.axes_here
        return None if self.bias is None else partition_spec((experts, outputs))


def balanced(correction: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """The router's correction after a step in which each expert got `load` tokens, both float32[..., experts]. It grows
    by `rate` for experts with less than the mean load and falls by `rate` for those with more (Wang et al. 2024, arXiv
    2408.15664)."""
    return correction + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
