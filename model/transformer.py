"""The network: embed → blocks → norm → head. Training and serving run this same code; read it first.

Outside this room, parameters are a dict from paths to arrays (`Params`), so that a step is a pure function of them;
`bind` makes the module from them inside a traced function. There are two layouts. In the **unstacked** one each layer
has its own arrays: "blocks/3/attention/query/kernel" belongs to layer 3. In the **stacked** one, which a checkpoint
holds and `lax.scan` runs over, neighbouring layers that are built alike share an array with a leading axis of layers,
and its path names the first and the last of them: "blocks/0-11/attention/query/kernel". Most networks are a single run
of such layers; DeepSeek's dense first layers are a run of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from isthmus.model.block import Block
from isthmus.model.config import LayerKind, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.layers import STREAM, Attend, Cache, RMSNorm
from isthmus.model.ops.linear import linear, lookup, unembed, unpacked
from isthmus.model.ops.rounding import product
from isthmus.model.parameter import NoNumbers, Role, Spec, parameter
from isthmus.model.rotary import Angles, rotary_angles
from isthmus.model.sharding import named_sharding, shard

Params = dict[str, Any]
"""Parameters by their paths; a value is an array or what stands for one: integers, a packed matrix, a shape"""


class Transformer(nnx.Module):
    """A decoder-only transformer of any family that ModelConfig can describe."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution
        dim, table = config.dim, (config.vocab_size, config.dim)
        self.embedding = parameter(rngs, table, ("vocab", "embed"), Role.EMBEDDING, inputs=dim)
        if execution.scan_layers:
            blocks = {run_name(run): _stacked_blocks(config, execution, run, rngs) for run in runs(config)}
            self.blocks = nnx.Dict(blocks)
        else:
            self.blocks = nnx.List([Block(config, execution, kind, rngs) for kind in config.layer_kinds])
        self.norm = RMSNorm(
            dim, "embed", config.norm_eps, execution.kernels, rngs, offset=config.norm_offset, dtype=execution.dtype
        )
        axes = ("embed", "vocab")
        self.head = None if config.tie_embeddings else parameter(rngs, table[::-1], axes, Role.MATRIX, inputs=dim)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Cache,
        uses_long_rope: jax.Array | None = None,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns the hidden states before the head, [..., dim], and the cache as `attend` left it.

        tokens, positions: int32[...]. uses_long_rope: as in `rotary_angles`. chosen: int32[...], each token's adapter
        where config.lora.adapters are served, as in model/ops/lora.py; None is none of them.
        """
        hidden, cache, _ = self.run(tokens, positions, attend, cache, uses_long_rope, chosen)
        return hidden, cache

    def run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Cache,
        uses_long_rope: jax.Array | None = None,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Returns what __call__ does, and how many tokens each expert got, float32[sparse layers, experts]."""
        config = self.config
        x = lookup(self.embedding.get_value(), tokens, config.dim, STREAM)
        if config.embedding_scale != 1:
            x = product(x, jnp.asarray(config.embedding_scale, self.execution.dtype).astype(STREAM))
        x = shard(x, "residual")
        angles = rotary_angles(config, positions, uses_long_rope)
        x, cache, loads = self._run_blocks(x, angles, attend, cache, chosen)
        return self.norm(x), cache, jnp.concatenate(loads)

    def _run_blocks(
        self, x: jax.Array, angles: Angles, attend: Attend, cache: Cache, chosen: jax.Array | None
    ) -> tuple[jax.Array, Cache, list[jax.Array]]:
        kinds = self.config.layer_kinds
        body = self._body(attend)
        loads = [jnp.zeros((0, self.config.mixture.experts), jnp.float32)]
        if not self.execution.scan_layers:
            for layer, block in enumerate(self.blocks):
                x, cache, load = body(*nnx.split(block), kinds[layer], jnp.int32(layer), angles, x, cache, chosen)
                loads.append(load)
            return x, cache, loads
        for run in runs(self.config):
            x, cache, run_loads = self._scan(run, body, angles, x, cache, chosen)
            loads += run_loads
        return x, cache, loads

    def _body(self, attend: Attend) -> Callable[..., tuple[jax.Array, Any, jax.Array]]:
        def body(
            graph: Any,
            state: Any,
            kind: LayerKind,
            layer: jax.Array,
            angles: Angles,
            x: jax.Array,
            cache: Cache,
            chosen: jax.Array | None,
        ) -> tuple[jax.Array, Cache, jax.Array]:
            block: Block = nnx.merge(graph, state)
            return block(x, kind, angles, layer, attend, cache, chosen)

        scanned, remat = self.execution.scan_layers, self.execution.remat
        if remat == "none":
            # jit traces the body once for all layers that are alike; XLA inlines it.
            return body if scanned else jax.jit(body, static_argnums=(0, 2))
        policy = {
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "full": jax.checkpoint_policies.nothing_saveable,
        }[remat]
        return jax.checkpoint(body, policy=policy, prevent_cse=not scanned, static_argnums=(0, 2))

    def _scan(
        self,
        run: range,
        body: Callable[..., Any],
        angles: Angles,
        x: jax.Array,
        cache: Cache,
        chosen: jax.Array | None,
    ) -> tuple[jax.Array, Cache, list[jax.Array]]:
        """Scans over the repetitions of a group of kinds in `run`; layers left over at its end follow one by one."""
        kinds = [self.config.layer_kind(layer) for layer in run]
        graph, stacked = nnx.split(self.blocks[run_name(run)])
        period = _period(kinds)
        repeats = len(run) // period

        def layer_of(state: Any, index: int) -> Any:
            return jax.tree.map(lambda array: array[index], state)

        # The cache is carried. As a scanned input and output it would be copied as a whole in each step.
        def step(carry: tuple, first_and_state: tuple) -> tuple[tuple, jax.Array]:
            first, state = first_and_state
            loads = []
            for index in range(period):
                part = layer_of(state, index) if period > 1 else state
                *carry, load = body(graph, part, kinds[index], first + index, angles, *carry, chosen)
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
            x, cache, load = body(graph, state, kinds[index], layer, angles, x, cache, chosen)
            loads.append(load)
        return x, cache, loads

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The logits, float32[..., vocab_size], for hidden states [..., dim]."""
        vocab, implementation = self.config.vocab_size, self.execution.kernels.linear
        if self.head is None:
            logits = unembed(hidden, self.embedding.get_value(), vocab, implementation=implementation)
        else:
            logits = linear(hidden, self.head.get_value(), (vocab,), implementation=implementation)
        if cap := self.config.logit_soft_cap:
            logits = cap * jnp.tanh(logits / cap)
        return shard(logits, "vocab")


def _stacked_blocks(config: ModelConfig, execution: Execution, run: range, rngs: nnx.Rngs) -> Any:
    create = nnx.vmap(
        lambda r: Block(config, execution, config.layer_kind(run.start), r),
        transform_metadata={nnx.PARTITION_NAME: "layers"},
        in_axes=0,
        out_axes=0,
    )
    return nnx.split_rngs(splits=len(run))(create)(rngs)


def runs(config: ModelConfig) -> Iterator[range]:
    """Divides the layers into runs of neighbours whose parameters have the same shapes."""
    for _, group in groupby(range(config.layers), key=lambda layer: config.layer_kind(layer).sparse):
        layers = list(group)
        yield range(layers[0], layers[-1] + 1)


def run_name(run: range) -> str:
    return f"{run.start}-{run.stop - 1}"


def _period(kinds: list[LayerKind]) -> int:
    """The length of the shortest group that `kinds` repeats; the last repetition may be incomplete."""
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


@lru_cache(maxsize=32)
def _abstract(config: ModelConfig, execution: Execution) -> tuple[Any, Any]:
    with nnx.use_eager_sharding(False):
        if execution.scan_layers:  # the stacks come out of a transformation, which traces
            return nnx.split(nnx.eval_shape(lambda: Transformer(config, execution, nnx.Rngs(0))))
        return nnx.split(Transformer(config, execution, NoNumbers()))


def by_path(state: Any) -> dict[str, Any]:
    """The variables in a module's state, by their paths."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def bind(config: ModelConfig, execution: Execution, params: Params) -> Transformer:
    """The module over `params`; cheap, for use inside a traced function. Raises KeyError when a path is missing, as it
    is in the wrong layout."""
    graph, state = _abstract(config, execution)
    placed = unpacked(params)
    leaves = [placed[path] for path in by_path(state)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


@lru_cache(maxsize=64)
def parameter_specs(config: ModelConfig, *, stacked: bool = False) -> Mapping[str, Spec]:
    """The description of every parameter of a network, by its path in the unstacked or the stacked layout."""
    return MappingProxyType(_stacked_specs(config) if stacked else _unstacked(config, _stacked_specs(config)))


def _stacked_specs(config: ModelConfig) -> dict[str, Spec]:
    _, state = _abstract(config, Execution(scan_layers=True))

    def spec(variable: nnx.Param) -> Spec:
        told = variable.get_metadata()
        return Spec(variable.get_value().shape, tuple(told["out_sharding"]), told["role"], told["inputs"])

    return {path: spec(variable) for path, variable in by_path(state).items()}


def _unstacked(config: ModelConfig, stacked: Mapping[str, Spec]) -> dict[str, Spec]:
    """The specs of each layer, from those of the runs: building the stacked network takes equally long at any depth."""
    found: dict[str, Spec] = {}
    for run in runs(config):
        prefix = f"blocks/{run_name(run)}/"
        layer = {path.removeprefix(prefix): spec.layer for path, spec in stacked.items() if path.startswith(prefix)}
        found.update({f"blocks/{index}/{path}": spec for index in run for path, spec in layer.items()})
    return found | {path: spec for path, spec in stacked.items() if not path.startswith("blocks/")}


def abstract_params(
    config: ModelConfig, mesh: Mesh | None = None, *, stacked: bool = False, dtype: str | None = None
) -> Params:
    """The shape and dtype of every parameter, and its sharding when a mesh is given; makes no array.

    dtype: in which the network computes when it serves; it decides each parameter's dtype. None means float32 for all.
    """

    def leaf(spec: Spec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, *spec.axes)
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.storage_dtype(dtype)), sharding=sharding)

    return {path: leaf(spec) for path, spec in parameter_specs(config, stacked=stacked).items()}
