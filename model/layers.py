"""The parts of a block: projection, norm, attention, gated MLP.

Every layer takes activations with any leading axes ([batch, seq] in training, [tokens] in serving) and computes in
the activations' dtype with float32 accumulation. The residual stream is float32 whatever that dtype is: what a block
adds to it is not rounded, and its norms round what they read of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from isthmus.model.config import LayerKind, LoraConfig, ModelConfig
from isthmus.model.ops.attention import Scoring
from isthmus.model.ops.cpu.packed import Packed
from isthmus.model.ops.gated import gated
from isthmus.model.ops.grouped_matmul import multiply_heads
from isthmus.model.ops.kernels import Kernels
from isthmus.model.ops.linear import linear, linears
from isthmus.model.ops.lora import Factors, add_lora
from isthmus.model.ops.norm import rms_norm
from isthmus.model.ops.rotary import rotate
from isthmus.model.ops.rounding import product
from isthmus.model.parameter import INIT_STD, Role, parameter
from isthmus.model.rotary import Angles
from isthmus.model.sharding import shard

Cache = TypeVar("Cache")
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array | None, Any, Scoring, jax.Array | None], tuple[jax.Array, Any]
]
"""The seam between training and serving: attend(layer, q, k, v, cache, scoring, sinks) -> (out, cache).

layer: int32[], traced. q and out: [..., heads, head_dim]. k and v: [..., kv_heads, head_dim]; if v is None, the keys
are the values. scoring is static; sinks: float32[heads] or None; see model/ops/attention.py. Training passes causal
attention and a cache of None, serving passes attention over the paged cache.
"""

STREAM = "float32"
"""The residual stream's dtype: it is a sum over all layers, forwards and backwards."""


class Linear(nnx.Module):
    """x[..., *inputs] @ kernel[*inputs, *outputs] (+ bias[*outputs]) (+ an adapter's output).

    `chosen`, where it is called with it: int32[...], each token's adapter, as in model/ops/lora.py.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        kernels: Kernels,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        std: float = INIT_STD,
        dtype: str | None = None,
        role: Role = Role.MATRIX,
    ) -> None:
        """dtype: of the output; None means the input's dtype. role: of the kernel."""
        shape = (*inputs.values(), *outputs.values())
        self.axes = (*inputs, *outputs)
        contracted, start = math.prod(inputs.values()), nnx.initializers.normal(std)
        self.kernel = parameter(rngs, shape, self.axes, role, inputs=contracted, initializer=start)
        self.bias = zeros(rngs, outputs) if bias else None
        self.inputs, self.outputs = len(inputs), tuple(outputs.values())
        self.lora_a: nnx.Param | None = None
        self.lora_b: nnx.Param | None = None
        self.lora = LoraConfig()
        self.dtype, self.kernels = dtype, kernels

    def add_adapter(self, lora: LoraConfig, rngs: nnx.Rngs) -> None:
        """Adds alpha / rank * (x @ lora_a[*inputs, rank]) @ lora_b[rank, *outputs] to the output: nothing at first,
        since lora_b starts as zeros. Of several adapters the factors have a leading axis."""
        inputs, outputs = self.kernel.get_value().shape[: self.inputs], self.outputs
        start = nnx.initializers.normal(1 / math.sqrt(math.prod(inputs)))
        several, rank = (lora.adapters,) if lora.adapters else (), lora.rank
        role, axis = Role.ADAPTERS if several else Role.ADAPTER, (None,) * len(several)
        a_axes, b_axes = (*axis, *self.axes[: self.inputs], None), (*axis, None, *self.axes[self.inputs :])
        a = parameter(rngs, (*several, *inputs, rank), a_axes, role, inputs=math.prod(inputs), initializer=start)
        nothing = nnx.initializers.zeros
        b = parameter(rngs, (*several, rank, *outputs), b_axes, role, inputs=rank, initializer=nothing)
        self.lora_a, self.lora_b, self.lora = nnx.data(a), nnx.data(b), lora

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> jax.Array:
        return project(x, self, chosen=chosen)[0]

    def finish(self, x: jax.Array, out: jax.Array, chosen: jax.Array | None) -> jax.Array:
        """Adds bias and adapter to `out`, the product of x and the kernel, [..., *outputs], and casts it to the
        output's dtype."""
        if self.bias is not None:
            out = out + self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            out = self._adapted(x, out, self.lora_a.get_value(), self.lora_b.get_value(), chosen)
        return out.astype(self.dtype or x.dtype)

    def _adapted(self, x: jax.Array, out: jax.Array, a: Factors, b: Factors, chosen: jax.Array | None) -> jax.Array:
        if self.lora.adapters:
            return out if chosen is None else self._add_chosen(x, out, a, b, chosen)
        multiply = partial(linear, implementation=self.kernels.linear)
        hidden = multiply(x, a, (self.lora.rank,), self.inputs).astype(x.dtype)
        return out + product(multiply(hidden, b, self.outputs), self.lora.scale)

    def _add_chosen(self, x: jax.Array, out: jax.Array, a: Factors, b: Factors, chosen: jax.Array) -> jax.Array:
        inputs, outputs, rank = math.prod(x.shape[x.ndim - self.inputs :]), math.prod(self.outputs), self.lora.rank
        if not isinstance(a, Packed) and not isinstance(b, Packed):
            a, b = a.reshape(-1, inputs, rank), b.reshape(-1, rank, outputs)
        flat = (out.reshape(-1, outputs), x.reshape(-1, inputs), a, b, chosen.reshape(-1))
        return add_lora(*flat, implementation=self.kernels.lora).reshape(out.shape)


def project(x: jax.Array, *layers: Linear, chosen: jax.Array | None = None) -> list[jax.Array]:
    """layer(x) for each of the layers, which must have the same inputs and the same output dtype. chosen: as in
    Linear."""
    weights = [(layer.kernel.get_value(), layer.outputs) for layer in layers]
    plain = all(layer.bias is None and layer.lora_a is None for layer in layers)
    dtype = (layers[0].dtype or x.dtype) if plain else jnp.float32
    products = linears(x, weights, layers[0].inputs, dtype=dtype, implementation=layers[0].kernels.linear)
    return [layer.finish(x, out, chosen) for layer, out in zip(layers, products, strict=True)]


def zeros(rngs: nnx.Rngs, sizes: dict[str, int], role: Role = Role.VECTOR) -> nnx.Param:
    """A parameter with these axes that starts as zeros; a bias unless `role` says otherwise."""
    return parameter(rngs, tuple(sizes.values()), tuple(sizes), role, initializer=nnx.initializers.zeros)


class HeadLinear(nnx.Module):
    """x[..., head, inputs] times the head's part of kernel[inputs, head, outputs]; of kernel[outputs, head, inputs] if
    `turned`."""

    def __init__(
        self, rank: dict[str, int], heads: dict[str, int], kernels: Kernels, rngs: nnx.Rngs, *, turned: bool = False
    ) -> None:
        """rank, heads: the axes of the kernel."""
        sizes = {**rank, **heads}
        shape = tuple(sizes.values())
        role, inputs = (Role.TURNED_HEADS, shape[-1]) if turned else (Role.HEADS, shape[0])
        start = nnx.initializers.normal(INIT_STD)
        self.kernel = parameter(rngs, shape, tuple(sizes), role, inputs=inputs, initializer=start)
        self.turned, self.kernels = turned, kernels

    def __call__(self, x: jax.Array) -> jax.Array:
        implementation = self.kernels.grouped_matmul
        return multiply_heads(x, self.kernel.get_value(), turned=self.turned, implementation=implementation).astype(
            x.dtype
        )


class RMSNorm(nnx.Module):
    """The RMS norm of model/ops/norm.py with a learned scale."""

    def __init__(
        self,
        size: int,
        axis: str,
        eps: float,
        kernels: Kernels,
        rngs: nnx.Rngs,
        *,
        offset: float = 0.0,
        dtype: str | None = None,
    ) -> None:
        """dtype: of the output; None means the input's dtype."""
        start = nnx.initializers.constant(1 - offset)
        self.scale = parameter(rngs, (size,), (axis,), Role.VECTOR, initializer=start)
        self.eps, self.offset, self.dtype, self.kernels = eps, offset, dtype, kernels

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps, self.offset, self.dtype, implementation=self.kernels.norm)


class Attention(nnx.Module):
    """Grouped-query attention; `attend`, which the caller passes, decides what each token attends to."""

    def __init__(self, config: ModelConfig, kernels: Kernels, rngs: nnx.Rngs) -> None:
        embed, head_dim = {"embed": config.dim}, {"head_dim": config.head_dim}
        heads, kv_heads = {"heads": config.heads, **head_dim}, {"kv_heads": config.kv_heads, **head_dim}
        bias, out_std = config.attention_bias, INIT_STD / math.sqrt(2 * config.layers)
        self.query = Linear(embed, heads, kernels, rngs, bias=bias)
        self.key = Linear(embed, kv_heads, kernels, rngs, bias=bias)
        self.value = Linear(embed, kv_heads, kernels, rngs, bias=bias)
        self.out = Linear(heads, embed, kernels, rngs, bias=config.attention_out_bias, std=out_std, dtype=STREAM)
        self.query_norm = self._norm(config, config.heads, kernels, rngs)
        self.key_norm = self._norm(config, config.kv_heads, kernels, rngs)
        self.sinks = parameter(rngs, (config.heads,), ("heads",), Role.VECTOR) if config.attention_sinks else None
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.soft_cap = config.attention_soft_cap
        self.norms_projection, self.kernels = config.qk_norm == "projection", kernels

    @staticmethod
    def _norm(config: ModelConfig, heads: int, kernels: Kernels, rngs: nnx.Rngs) -> RMSNorm | None:
        if config.qk_norm == "none":
            return None
        # A norm over all heads needs all of them on every device: its scale is small, and not split.
        size = config.head_dim * (heads if config.qk_norm == "projection" else 1)
        return RMSNorm(size, "head_dim", config.norm_eps, kernels, rngs, offset=config.norm_offset)

    def _normalize(self, norm: RMSNorm | None, x: jax.Array) -> jax.Array:
        if norm is None:
            return x
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape) if self.norms_projection else norm(x)

    def __call__(
        self,
        x: jax.Array,
        kind: LayerKind,
        angles: Angles,
        layer: jax.Array,
        attend: Attend,
        cache: Cache,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        q, k, v = project(x, self.query, self.key, self.value, chosen=chosen)
        q, k = self._normalize(self.query_norm, q), self._normalize(self.key_norm, k)
        if kind.rope != "none":
            q, k = rotate(angles[kind.rope], q, k, implementation=self.kernels.rotary)
        q = shard(q, "heads", "head_dim")
        k, v = shard(k, "kv_heads", "head_dim"), shard(v, "kv_heads", "head_dim")
        sinks = None if self.sinks is None else self.sinks[...]
        out, cache = attend(layer, q, k, v, cache, Scoring(self.scale, kind.window, self.soft_cap), sinks)
        return self.out(shard(out, "heads", "head_dim"), chosen), cache


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with one key c of rank + rope_dim for all heads.

    A head's key projection is applied to its query instead of the key, since (q·Wk)·c = q·(Wk c), and its value
    projection to the result of attention. So the cache holds one vector per token, whatever the number of heads.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, rngs: nnx.Rngs) -> None:
        latent, heads = config.latent, {"heads": config.heads}
        embed, rank = {"embed": config.dim}, {"latent": latent.rank}
        query = {**heads, "head_dim": latent.nope_dim + latent.rope_dim}
        squeezed = {"latent": latent.query_rank}
        self.query_down = Linear(embed, squeezed, kernels, rngs) if latent.query_rank else None
        self.query_norm = RMSNorm(latent.query_rank, "latent", LATENT_EPS, kernels, rngs) if latent.query_rank else None
        self.query = Linear(squeezed if latent.query_rank else embed, query, kernels, rngs)
        self.latent = Linear(embed, {"latent": latent.rank + latent.rope_dim}, kernels, rngs)
        self.latent_norm = RMSNorm(latent.rank, "latent", LATENT_EPS, kernels, rngs)
        self.key = HeadLinear(rank, {**heads, "head_dim": latent.nope_dim}, kernels, rngs, turned=True)
        self.value = HeadLinear(rank, {**heads, "head_dim": latent.value_dim}, kernels, rngs)
        out = {**heads, "head_dim": latent.value_dim}
        self.out = Linear(out, embed, kernels, rngs, std=INIT_STD / math.sqrt(2 * config.layers), dtype=STREAM)
        self.rank, self.nope_dim, self.kernels = latent.rank, latent.nope_dim, kernels
        self.scale = config.attention_scale or (latent.nope_dim + latent.rope_dim) ** -0.5

    def __call__(
        self,
        x: jax.Array,
        kind: LayerKind,
        angles: Angles,
        layer: jax.Array,
        attend: Attend,
        cache: Cache,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        squeezed = x
        if self.query_down is not None and self.query_norm is not None:
            squeezed = self.query_norm(self.query_down(x, chosen))
        q, latent = self.query(squeezed, chosen), self.latent(x, chosen)
        plain, turned = q[..., : self.nope_dim], q[..., self.nope_dim :]
        content, position = self.latent_norm(latent[..., : self.rank]), latent[..., None, self.rank :]
        if kind.rope != "none":
            turned, position = rotate(angles[kind.rope], turned, position, implementation=self.kernels.rotary)
        plain = self.key(plain)
        q = shard(jnp.concatenate([plain, turned], axis=-1), "heads", "head_dim")
        k = shard(jnp.concatenate([content[..., None, :], position], axis=-1), "latent_head", "head_dim")
        out, cache = attend(layer, q, k, None, cache, Scoring(self.scale, kind.window), None)
        out = self.value(out[..., : self.rank])
        return self.out(shard(out, "heads", "head_dim"), chosen), cache


LATENT_EPS = 1e-6
"""Epsilon of the norms inside latent attention, whatever norm_eps is; this is as DeepSeek published it"""


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, width: int, kernels: Kernels, rngs: nnx.Rngs) -> None:
        embed, mlp, bias = {"embed": config.dim}, {"mlp": width}, config.mlp_bias
        self.gate = Linear(embed, mlp, kernels, rngs, bias=bias)
        self.up = Linear(embed, mlp, kernels, rngs, bias=bias)
        self.down = Linear(
            mlp, embed, kernels, rngs, bias=bias, std=INIT_STD / math.sqrt(2 * config.layers), dtype=STREAM
        )
        self.activation, self.limit, self.kernels = config.activation, config.activation_limit, kernels

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> jax.Array:
        gate, up = project(x, self.gate, self.up, chosen=chosen)
        hidden = gated(self.activation, self.limit, gate, up, implementation=self.kernels.gated)
        return self.down(shard(hidden, "mlp"), chosen)
