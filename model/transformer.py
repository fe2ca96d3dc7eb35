"""The network: embed → blocks → norm → head. Training and serving run this same code; read it first.

Outside this room parameters are a nested dict of arrays (`Params`), so that a step is a pure function of it; `bind`
gives back the module inside a traced function. Under "blocks" lies either one dict whose arrays have a leading layer
axis (**stacked**: what a checkpoint holds and `lax.scan` runs over) or a dict a layer, by index (**unstacked**).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from model.config import ModelConfig
from model.layers import Attend, Block, Cache, RMSNorm, contract, parameter, rotary_angles
from model.sharding import named_sharding, shard, use_mesh

Params = dict[str, Any]


class Transformer(nnx.Module):
    """A decoder-only transformer (Llama's and Qwen's family)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        table = (config.vocab_size, config.dim)
        self.embedding = parameter(rngs, table, ("vocab", "embed"))
        if config.scan_layers:
            stacked = nnx.vmap(
                lambda r: Block(config, r),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
                in_axes=0,
                out_axes=0,
            )
            self.blocks = nnx.split_rngs(splits=config.layers)(stacked)(rngs)
        else:
            self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.dim, "embed", config.norm_eps, rngs)
        self.head = None if config.tie_embeddings else parameter(rngs, table[::-1], ("embed", "vocab"))

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """tokens, positions: int32[...] → (hidden states [..., dim] before the head, the cache as attend left it)."""
        # Gathering rows of a table that is sharded on both axes makes XLA replicate it row by row: gather whole rows.
        table = self.embedding[...].astype(self.config.dtype)
        if not jax.sharding.get_abstract_mesh().empty:
            table = jax.lax.with_sharding_constraint(table, jax.sharding.PartitionSpec("tp", None))
        x = shard(table[tokens], "residual")
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x, cache = self._run_blocks(x, angles, attend, cache)
        return self.norm(x), cache

    def _run_blocks(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        def run_block(graph: Any, state: Any, layer: jax.Array, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            return nnx.merge(graph, state)(x, angles, layer, attend, cache)

        body: Callable[..., tuple[jax.Array, Cache]] = run_block
        if self.config.remat != "none":
            policy = {
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                "full": jax.checkpoint_policies.nothing_saveable,
            }[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.config.scan_layers, static_argnums=0)
        if not self.config.scan_layers:
            for layer, block in enumerate(self.blocks):
                x, cache = body(*nnx.split(block), jnp.int32(layer), x, cache)
            return x, cache

        graph, stacked = nnx.split(self.blocks)

        # The cache is carried: as a scanned input and output it would be copied whole each step.
        def step(carry: tuple, layer_and_state: tuple) -> tuple[tuple, None]:
            layer, state = layer_and_state
            return body(graph, state, layer, *carry), None

        layers = jnp.arange(self.config.layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(step, (x, cache), (layers, stacked))
        return x, cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., vocab_size] for hidden states [..., dim]."""
        table = self.embedding[...].T if self.head is None else self.head[...]
        return shard(contract(hidden, table.astype(hidden.dtype), 1), "vocab")


@lru_cache(maxsize=32)
def _abstract(config: ModelConfig) -> tuple[Any, Any]:
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The module over `params`; cheap, meant for inside a traced function. Raises KeyError on a wrong layout."""
    graph, state = _abstract(config)
    leaves = [_lookup(params, path) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _lookup(params: Params, path: tuple) -> Any:
    for key in path:
        params = params[str(key)]
    return params


def _nest(leaves: dict[tuple, Any]) -> Params:
    nested: Params = {}
    for path, leaf in leaves.items():
        *parents, last = map(str, path)
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Params:
    """Shapes and dtypes of every parameter, with its sharding when a mesh is given; no array is made."""
    _, state = _abstract(config)

    def leaf(variable: nnx.Param) -> jax.ShapeDtypeStruct:
        axes = variable.get_metadata("out_sharding")
        sharding = None if mesh is None else named_sharding(mesh, *axes)
        return jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype, sharding=sharding)

    return _nest({path: leaf(variable) for path, variable in nnx.to_flat_state(state)})


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))


def init_params(config: ModelConfig, seed: int, mesh: Mesh) -> Params:
    """Random parameters, each born in its shard. The same seed gives the same values on any mesh, scanned or not."""

    def create(key: jax.Array) -> Params:
        with nnx.use_eager_sharding(False):
            state = nnx.state(Transformer(stacked(config), nnx.Rngs(key)))
        params = _nest({path: variable.get_value() for path, variable in nnx.to_flat_state(state)})
        return params if config.scan_layers else unstack_blocks(params)

    with use_mesh(mesh):
        return jax.jit(create, out_shardings=param_shardings(config, mesh))(jax.random.key(seed))


def stacked(config: ModelConfig) -> ModelConfig:
    """The same network with its layers scanned, which is how a checkpoint holds it."""
    return dataclasses.replace(config, scan_layers=True)


def _is_params(node: Any) -> bool:
    return isinstance(node, dict) and "blocks" in node


def _is_unstacked(node: Any) -> bool:
    return _is_params(node) and "0" in node["blocks"]


def unstack_blocks(tree: Any) -> Any:
    """One dict a layer under every "blocks" in `tree`: parameters, or an optimizer state that mirrors them."""

    def unstack(node: Any) -> Any:
        if not _is_params(node) or _is_unstacked(node):
            return node
        layers = jax.tree.leaves(node["blocks"])[0].shape[0]
        blocks = {str(i): jax.tree.map(lambda x, i=i: x[i], node["blocks"]) for i in range(layers)}
        return {**node, "blocks": blocks}

    return jax.tree.map(unstack, tree, is_leaf=_is_params)


def stack_blocks(tree: Any) -> Any:
    """The inverse of unstack_blocks."""

    def stack(node: Any) -> Any:
        if not _is_unstacked(node):
            return node
        layers = [node["blocks"][str(i)] for i in range(len(node["blocks"]))]
        return {**node, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}

    return jax.tree.map(stack, tree, is_leaf=_is_params)
