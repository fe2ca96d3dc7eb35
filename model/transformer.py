"""The network: embed → blocks → norm → head. Training and serving run this same code; read it first.

Outside this room parameters are a nested dict of arrays (`Params`), so that a step is a pure function of it; `bind`
gives back the module inside a traced function. Under "blocks" lies either a dict a run of layers that are built alike,
named "first-last", whose arrays have a leading layer axis (**stacked**: what a checkpoint holds and `lax.scan` runs
over) or a dict a layer, by index (**unstacked**). Most networks are a single run; DeepSeek's dense first layers are one
of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from isthmus.model.block import Block
from isthmus.model.config import LayerKind, ModelConfig
from isthmus.model.device.compilation import same_bits
from isthmus.model.layers import STREAM, Attend, Cache, RMSNorm, parameter
from isthmus.model.ops.linear import linear, lookup, unembed
from isthmus.model.rotary import Angles, rotary_angles
from isthmus.model.sharding import named_sharding, shard, use_mesh

Params = dict[str, Any]


class Transformer(nnx.Module):
    """A decoder-only transformer; ModelConfig says of which family."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        table = (config.vocab_size, config.dim)
        self.embedding = parameter(rngs, table, ("vocab", "embed"))
        if config.scan_layers:
            self.blocks = nnx.Dict({run_name(run): _stacked_blocks(config, run, rngs) for run in runs(config)})
        else:
            self.blocks = nnx.List([Block(config, kind, rngs) for kind in config.layer_kinds])
        self.norm = RMSNorm(config.dim, "embed", config.norm_eps, rngs, offset=config.norm_offset, dtype=config.dtype)
        self.head = None if config.tie_embeddings else parameter(rngs, table[::-1], ("embed", "vocab"))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Cache,
        long: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """tokens, positions: int32[...] → (hidden states [..., dim] before the head, the cache as attend left it).

        long: as in model/rotary.py.
        """
        hidden, cache, _ = self.run(tokens, positions, attend, cache, long)
        return hidden, cache

    def run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Cache,
        long: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """As a call, with the load of the experts: float32[sparse layers, experts], tokens that each one got."""
        config = self.config
        x = lookup(self.embedding.get_value(), tokens, config.dim, STREAM)
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, config.dtype).astype(STREAM)
        x = shard(x, "residual")
        x, cache, loads = self._run_blocks(x, rotary_angles(config, positions, long), attend, cache)
        return self.norm(x), cache, jnp.concatenate(loads)

    def _run_blocks(
        self, x: jax.Array, angles: Angles, attend: Attend, cache: Cache
    ) -> tuple[jax.Array, Cache, list[jax.Array]]:
        kinds = self.config.layer_kinds
        body = self._body(attend)
        loads = [jnp.zeros((0, self.config.mixture.experts), jnp.float32)]
        if not self.config.scan_layers:
            for layer, block in enumerate(self.blocks):
                x, cache, load = body(*nnx.split(block), kinds[layer], jnp.int32(layer), angles, x, cache)
                loads.append(load)
            return x, cache, loads
        for run in runs(self.config):
            x, cache, run_loads = self._scan(run, body, angles, x, cache)
            loads += run_loads
        return x, cache, loads

    def _body(self, attend: Attend) -> Callable[..., tuple[jax.Array, Any, jax.Array]]:
        def body(
            graph: Any, state: Any, kind: LayerKind, layer: jax.Array, angles: Angles, x: jax.Array, cache: Cache
        ) -> tuple[jax.Array, Cache, jax.Array]:
            block: Block = nnx.merge(graph, state)
            return block(x, kind, angles, layer, attend, cache)

        if self.config.remat == "none":
            # Traced once for all layers that are alike; XLA inlines it.
            return body if self.config.scan_layers else jax.jit(body, static_argnums=(0, 2))
        policy = {
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "full": jax.checkpoint_policies.nothing_saveable,
        }[self.config.remat]
        return jax.checkpoint(body, policy=policy, prevent_cse=not self.config.scan_layers, static_argnums=(0, 2))

    def _scan(
        self, run: range, body: Callable[..., Any], angles: Angles, x: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache, list[jax.Array]]:
        """Scans over the repeating group of kinds in `run`; layers left over at its end follow one by one."""
        kinds = [self.config.layer_kind(layer) for layer in run]
        graph, stacked = nnx.split(self.blocks[run_name(run)])
        period = _period(kinds)
        repeats = len(run) // period

        def layer_of(state: Any, index: int) -> Any:
            return jax.tree.map(lambda array: array[index], state)

        # The cache is carried: as a scanned input and output it would be copied whole each step.
        def step(carry: tuple, first_and_state: tuple) -> tuple[tuple, jax.Array]:
            first, state = first_and_state
            loads = []
            for index in range(period):
                part = layer_of(state, index) if period > 1 else state
                *carry, load = body(graph, part, kinds[index], first + index, angles, *carry)
                loads.append(load)
            return tuple(carry), jnp.concatenate(loads)

        firsts = jnp.arange(run.start, run.start + repeats * period, period, dtype=jnp.int32)
        groups = stacked
        if period > 1:
            groups = jax.tree.map(lambda a: a[: repeats * period].reshape(repeats, period, *a.shape[1:]), stacked)
        (x, cache), scanned = jax.lax.scan(step, (x, cache), (firsts, groups))
        loads = [scanned.reshape(math.prod(scanned.shape[:-1]), scanned.shape[-1])]
        for index in range(repeats * period, len(run)):
            state, layer = layer_of(stacked, index), jnp.int32(run[index])
            x, cache, load = body(graph, state, kinds[index], layer, angles, x, cache)
            loads.append(load)
        return x, cache, loads

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., vocab_size] for hidden states [..., dim]."""
        vocab = self.config.vocab_size
        if self.head is None:
            logits = unembed(hidden, self.embedding.get_value(), vocab)
        else:
            logits = linear(hidden, self.head.get_value(), (vocab,))
        if cap := self.config.logit_soft_cap:
            logits = cap * jnp.tanh(logits / cap)
        return shard(logits, "vocab")


def _stacked_blocks(config: ModelConfig, run: range, rngs: nnx.Rngs) -> Any:
    create = nnx.vmap(
        lambda r: Block(config, config.layer_kind(run.start), r),
        transform_metadata={nnx.PARTITION_NAME: "layers"},
        in_axes=0,
        out_axes=0,
    )
    return nnx.split_rngs(splits=len(run))(create)(rngs)


def runs(config: ModelConfig) -> Iterator[range]:
    """The layers in runs that have the same parameters."""
    for _, group in groupby(range(config.layers), key=lambda layer: config.layer_kind(layer).sparse):
        layers = list(group)
        yield range(layers[0], layers[-1] + 1)


def run_name(run: range) -> str:
    return f"{run.start}-{run.stop - 1}"


def _period(kinds: list[LayerKind]) -> int:
    """The length of the shortest group that `kinds` repeat, the last time perhaps in part."""
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


@lru_cache(maxsize=32)
def _abstract(config: ModelConfig) -> tuple[Any, Any]:
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def abstract_module(config: ModelConfig) -> Transformer:
    """The module with shapes in the place of arrays."""
    return nnx.merge(*_abstract(config))


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


def kept_dtype(path: tuple[Any, ...], dtype: str | None) -> str:
    """What serving keeps the parameter at a tree path in: matrices in `dtype`, and in float32 what is small and added
    or multiplied in float32. None is float32 for all."""
    names = [entry.key for entry in path]
    small = names[-1] in ("scale", "bias", "sinks", "correction") or "router" in names
    return "float32" if dtype is None or small else dtype


def init_params(config: ModelConfig, seed: int, mesh: Mesh) -> Params:
    """Random parameters, each born in its shard. The same seed gives the same values on any mesh, scanned or not."""

    def create(key: jax.Array) -> Params:
        with nnx.use_eager_sharding(False):
            state = nnx.state(Transformer(stacked(config), nnx.Rngs(key)))
        params = _nest({path: variable.get_value() for path, variable in nnx.to_flat_state(state)})
        return params if config.scan_layers else unstack_blocks(params)

    with use_mesh(mesh):
        shardings = param_shardings(config, mesh)
        return jax.jit(create, out_shardings=shardings, compiler_options=same_bits(mesh))(jax.random.key(seed))


def stacked(config: ModelConfig) -> ModelConfig:
    """The same network with its layers scanned, which is how a checkpoint holds it."""
    return dataclasses.replace(config, scan_layers=True)


def _is_params(node: Any) -> bool:
    return isinstance(node, dict) and "blocks" in node


def _is_unstacked(node: Any) -> bool:
    return _is_params(node) and all(name.isdecimal() for name in node["blocks"])


def unstack_blocks(tree: Any) -> Any:
    """One dict a layer under every "blocks" in `tree`: parameters, or an optimizer state that mirrors them."""

    def unstack(node: Any) -> Any:
        if not _is_params(node) or _is_unstacked(node):
            return node
        blocks = {}
        for name, run in node["blocks"].items():
            first, last = map(int, name.split("-"))
            for layer in range(first, last + 1):
                blocks[str(layer)] = jax.tree.map(lambda x, i=layer - first: x[i], run)
        return {**node, "blocks": blocks}

    return jax.tree.map(unstack, tree, is_leaf=_is_params)


def stack_blocks(tree: Any, runs: Iterable[range] | None = None) -> Any:
    """The inverse of unstack_blocks. Without `runs`, neighbours with the same arrays are a run; adapters need those of
    the network, whose layers may differ in their experts alone. A run without any layer in `tree` is left out."""
    given = None if runs is None else list(runs)

    def stack(node: Any) -> Any:
        if not _is_unstacked(node):
            return node
        layers = {int(name): layer for name, layer in node["blocks"].items()}
        blocks = {}
        for run in _alike(layers) if given is None else given:
            present = [layers[layer] for layer in run if layer in layers]
            assert len(present) in (0, len(run)), (run, sorted(layers))
            if present:
                blocks[run_name(run)] = jax.tree.map(lambda *x: jnp.stack(x), *present)
        return {**node, "blocks": blocks}

    return jax.tree.map(stack, tree, is_leaf=_is_params)


def _alike(layers: dict[int, Any]) -> Iterator[range]:
    """Neighbours with the same arrays."""
    shapes = {layer: str(jax.tree.map(lambda x: (jnp.shape(x), x.dtype), layers[layer])) for layer in sorted(layers)}
    for _, group in groupby(enumerate(shapes), key=lambda each: (each[1] - each[0], shapes[each[1]])):
        run = [layer for _, layer in group]
        yield range(run[0], run[-1] + 1)
