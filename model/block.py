"""A block of the network: attention, then an MLP; each adds its output to the residual stream."""

from __future__ import annotations

from operator import attrgetter

import jax
import jax.numpy as jnp
from flax import nnx

from isthmus.model.config import LayerKind, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.experts import Mixture
from isthmus.model.layers import MLP, STREAM, Attend, Attention, Cache, LatentAttention, RMSNorm
from isthmus.model.rotary import Angles
from isthmus.model.sharding import shard


class Block(nnx.Module):
    """x + norm(attention(norm(x))), then the same with the MLP; config.norm_placement says which of the norms exist."""

    def __init__(self, config: ModelConfig, execution: Execution, kind: LayerKind, rngs: nnx.Rngs) -> None:
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        kernels = execution.kernels

        def norm(wanted: bool, dtype: str) -> RMSNorm | None:
            if not wanted:
                return None
            return RMSNorm(config.dim, "embed", config.norm_eps, kernels, rngs, offset=config.norm_offset, dtype=dtype)

        self.attention_norm = norm(before, execution.dtype)
        self.attention = (LatentAttention if config.latent.rank else Attention)(config, kernels, rngs)
        self.attention_out_norm = norm(after, STREAM)
        self.mlp_norm = norm(before, execution.dtype)
        self.mlp = Mixture(config, kernels, rngs) if kind.sparse else MLP(config, config.mlp_dim, kernels, rngs)
        self.mlp_out_norm = norm(after, STREAM)
        self.experts, self.dtype = config.mixture.experts, execution.dtype
        for path in config.adapted(kind):
            attrgetter(path.replace("/", "."))(self).add_adapter(config.lora, rngs)

    def __call__(
        self,
        x: jax.Array,
        kind: LayerKind,
        angles: Angles,
        layer: jax.Array,
        attend: Attend,
        cache: Cache,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Returns the stream, float32[..., dim], the cache, and the experts' load: float32[1, experts], or
        float32[0, experts] in a dense layer. chosen: as in Linear."""
        inner = _normalized(self.attention_norm, x).astype(self.dtype)
        out, cache = self.attention(inner, kind, angles, layer, attend, cache, chosen)
        x = shard(x + _normalized(self.attention_out_norm, out), "residual")
        inner = _normalized(self.mlp_norm, x).astype(self.dtype)
        load = jnp.zeros((0, self.experts), jnp.float32)
        if isinstance(self.mlp, Mixture):
            out, expert_load = self.mlp(inner, chosen)
            load = expert_load[None]
        else:
            out = self.mlp(inner, chosen)
        return shard(x + _normalized(self.mlp_out_norm, out), "residual"), cache, load


def _normalized(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
