"""The parts of a block: projection, norm, rotary embedding, attention, SwiGLU.

Every layer takes activations with any leading axes ([batch, seq] in training, [tokens] in serving) and computes in
the activations' dtype with float32 accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.sharding import shard

Cache = TypeVar("Cache")
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""The seam between training and serving: attend(layer, q, k, v, cache) -> (out, cache).

layer: int32[], traced. q: [..., heads, head_dim]; k and v: [..., kv_heads, head_dim]; out: as q. Training passes causal
attention and a cache of None, serving attention over the paged cache.
"""

INIT_STD = 0.02
NORMAL = nnx.initializers.normal(INIT_STD)


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    initializer: Callable = NORMAL,
) -> nnx.Param:
    """A float32 parameter that knows its logical axes."""
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32), out_sharding=axes)


class Linear(nnx.Module):
    """x[..., *inputs] @ kernel[*inputs, *outputs] (+ bias[*outputs])."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        std: float = INIT_STD,
    ) -> None:
        shape = (*inputs.values(), *outputs.values())
        self.kernel = parameter(rngs, shape, (*inputs, *outputs), nnx.initializers.normal(std))
        self.bias = parameter(rngs, tuple(outputs.values()), tuple(outputs), nnx.initializers.zeros) if bias else None
        self.inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        out = contract(x, kernel, self.inputs)
        if self.bias is not None:
            out = out + self.bias[...]
        return out.astype(x.dtype)


def contract(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """Contracts the last `axes` axes of x with the first of kernel, in float32.

    As a product of two matrices: with more axes, XLA transposes the weight gradient's operands before its product.
    """
    leading, inner, outer = x.shape[: x.ndim - axes], kernel.shape[:axes], kernel.shape[axes:]
    size = math.prod(inner)
    out = jnp.matmul(x.reshape(-1, size), kernel.reshape(size, -1), preferred_element_type=jnp.float32)
    return out.reshape(*leading, *outer)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, axis: str, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = parameter(rngs, (size,), (axis,), nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and signed sin, float32[..., 1, head_dim], for int32 positions [...] (Su et al. 2021, arXiv 2104.09864)."""
    half = head_dim // 2
    frequency = jnp.float32(theta) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns pairs (i, i + head_dim / 2) of x[..., heads, head_dim]: the half-split layout of Llama and Qwen."""
    cos, sin = angles
    y = x.astype(jnp.float32)
    return (y * cos + jnp.roll(y, y.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; what is attended to is the caller's business (`attend`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        embed, head_dim = {"embed": config.dim}, {"head_dim": config.head_dim}
        heads, kv_heads = {"heads": config.heads, **head_dim}, {"kv_heads": config.kv_heads, **head_dim}
        bias = config.attention_bias
        self.query = Linear(embed, heads, rngs, bias=bias)
        self.key = Linear(embed, kv_heads, rngs, bias=bias)
        self.value = Linear(embed, kv_heads, rngs, bias=bias)
        self.out = Linear(heads, embed, rngs, std=INIT_STD / math.sqrt(2 * config.layers))
        norm = (config.head_dim, "head_dim", config.norm_eps, rngs)
        self.query_norm = RMSNorm(*norm) if config.qk_norm else None
        self.key_norm = RMSNorm(*norm) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        layer: jax.Array,
        attend: Attend,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        q = shard(q, "heads", "head_dim")
        k, v = shard(k, "kv_heads", "head_dim"), shard(v, "kv_heads", "head_dim")
        out, cache = attend(layer, q, k, v, cache)
        return self.out(shard(out, "heads", "head_dim")), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        embed, mlp, bias = {"embed": config.dim}, {"mlp": config.mlp_dim}, config.mlp_bias
        self.gate = Linear(embed, mlp, rngs, bias=bias)
        self.up = Linear(embed, mlp, rngs, bias=bias)
        self.down = Linear(mlp, embed, rngs, bias=bias, std=INIT_STD / math.sqrt(2 * config.layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(shard(jax.nn.silu(self.gate(x)) * self.up(x), "mlp"))


class Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.dim, "embed", config.norm_eps, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.dim, "embed", config.norm_eps, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        layer: jax.Array,
        attend: Attend,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        out, cache = self.attention(self.attention_norm(x), angles, layer, attend, cache)
        x = shard(x + out, "residual")
        return shard(x + self.mlp(self.mlp_norm(x)), "residual"), cache
