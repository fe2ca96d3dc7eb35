"""Runs plans on the device: one compiled program a bucket, cache and last tokens donated from step to step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.model.config import ModelConfig
from isthmus.model.device.compilation import compilations
from isthmus.model.layers import Attend
from isthmus.model.ops.attention import Cache, PagedStep, Scoring, paged_step, scales_of
from isthmus.model.ops.backend import use_cpu_kernels
from isthmus.model.ops.cpu import library
from isthmus.model.ops.cpu.memory import allocate
from isthmus.model.sharding import named_sharding, use_mesh
from isthmus.model.transformer import Params, Transformer, abstract_params, bind
from isthmus.model.weights.packing import is_packed, pack_params, place_matrices
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import PADDING, PlanArrays, StepPlan, plan_size, split_plan
from isthmus.serve.engine.sampling import sample


def abstract_cache(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Cache:
    """One array for all layers, so that no layer is sliced out. Split over the key heads; a latent belongs to all
    heads, and so to all devices."""
    shape = (model.layers * engine.pages, engine.page_size, model.cache_heads, model.head_dim)
    axes = ("pages", None, "latent_head" if model.latent.rank else "kv_heads", None)
    dtype = jnp.dtype(engine.cache_dtype if engine.cache_dtype != "model" else model.dtype)
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
    if dtype != jnp.int8:
        return Cache(pages)
    scales = (*shape[:2], shape[2] * scales_of(model.head_dim))
    return Cache(pages, jax.ShapeDtypeStruct(scales, jnp.float32, sharding=named_sharding(mesh, *axes[:3])))


def uses_kernels(engine: EngineConfig, mesh: Mesh) -> bool:
    """Whether steps on `mesh` run the CPU's own kernels. XLA doesn't know how to split them over devices."""
    return engine.kernels and mesh.size == 1 and _is_this_cpu(mesh) and library.why_not() is None


def _is_this_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def sequence_of_token(bucket: Bucket) -> jax.Array:
    """int32[tokens]: which row or block each token belongs to."""
    blocks = jnp.repeat(jnp.arange(bucket.blocks), bucket.block_size)
    return jnp.concatenate([jnp.arange(bucket.rows), bucket.rows + blocks])


def paged_attention(engine: EngineConfig, bucket: Bucket, arrays: PlanArrays) -> Attend:
    """The serving side of the seam."""
    step = PagedStep(bucket.rows, arrays.tables, arrays.positions)

    def attend(
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        cache: Cache,
        scoring: Scoring,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        return paged_step(q, k, v, cache, layer * engine.pages, step, scoring, sinks)

    return attend


def forward(
    model: Transformer, engine: EngineConfig, bucket: Bucket, kernels: bool, cache: Cache, arrays: PlanArrays
) -> tuple[jax.Array, Cache]:
    """Hidden states [tokens, dim] of a step's tokens, all of them known, and the cache with their keys and values."""
    # Padding is no token of the vocabulary: it stays zero all the way, and the CPU's kernels don't multiply zeros.
    tokens = jnp.where(arrays.positions < 0, model.config.vocab_size, arrays.tokens)
    attend = paged_attention(engine, bucket, arrays)
    long = arrays.long[sequence_of_token(bucket)] > 0
    with use_cpu_kernels(kernels):
        return model(tokens, jnp.maximum(arrays.positions, 0), attend, cache, long)


def engine_step(
    model_config: ModelConfig,
    engine: EngineConfig,
    bucket: Bucket,
    vocab: int,
    kernels: bool,
    params: Params,
    cache: Cache,
    last_token: jax.Array,
    packed: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """One step: (cache, last_token, drawn). Pure; the first five arguments are static.

    last_token: int32[max_sequences + 1], what each slot drew last; its last entry takes what nobody wants.
    packed: int32, see PlanArrays. drawn: int32[samples]. vocab: ids from here on are padding and never drawn.
    """
    arrays = split_plan(packed, bucket, engine.pages_per_sequence)
    singles = arrays.tokens[: bucket.rows]
    singles = jnp.where(singles < 0, last_token[arrays.row_slot], singles)
    tokens = jnp.concatenate([singles, arrays.tokens[bucket.rows :]])
    model = bind(model_config, place_matrices(params))
    hidden, cache = forward(model, engine, bucket, kernels, cache, arrays._replace(tokens=tokens))
    logits = model.logits(hidden[arrays.sample_token])
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)
    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    as_unsigned = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint32)
    drawn = sample(
        logits,
        as_float(arrays.temperature),
        arrays.top_k,
        as_float(arrays.top_p),
        as_float(arrays.min_p),
        (as_unsigned(arrays.seed_low), as_unsigned(arrays.seed_high)),
        arrays.positions[arrays.sample_token] + 1,
    )
    return cache, last_token.at[arrays.sample_slot].set(drawn), drawn


@dataclass(eq=False)
class Launched:
    """A step on its way."""

    plan: StepPlan
    drawn: jax.Array

    def read(self) -> np.ndarray:
        """int32[samples]; waits for the device. Raises what the device raised."""
        return np.asarray(self.drawn)


class Executor:
    """Device state and compiled programs of one engine. `compile` must have run before `launch`."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, params: Params, mesh: Mesh, vocab: int) -> None:
        """params: in the layout and dtypes that serving reads, packed or not; engine: resolved."""
        if uses_kernels(engine, mesh) and not model.scan_layers:
            params = params if is_packed(params) else pack_params(model, jax.tree.map(lambda leaf: leaf, params))
        self.model, self.engine, self.mesh, self._vocab = model, engine, mesh, vocab
        self._params = params
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._programs: dict[Bucket, Callable[..., Any]] = {}
        self.compile_seconds = 0.0
        self.warmup_seconds = 0.0
        self._compilations_when_ready = 0
        self._reset_state()

    def _reset_state(self) -> None:
        abstract = abstract_cache(self.model, self.engine, self.mesh)

        def empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # Nothing is read that wasn't written, and memory is only taken for pages that were.
            kernels = uses_kernels(self.engine, self.mesh)
            return (allocate if kernels else jnp.zeros)(leaf.shape, leaf.dtype)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._cache = jax.jit(lambda: jax.tree.map(empty, abstract), out_shardings=shardings)()
        self._last_token = jax.device_put(np.zeros(self.engine.max_sequences + 1, np.int32), self._replicated)

    def free(self) -> None:
        """Gives back the memory of parameters, cache and programs. No step may be under way, and none can follow."""
        for leaf in jax.tree.leaves((self._params, self._cache, self._last_token)):
            leaf.delete()
        self._programs.clear()

    def compile(self, ready: Compiled | None = None, tick: Callable[[Bucket], None] = lambda bucket: None) -> None:
        """Compiles every bucket's program unless they are `ready`, with tick(bucket) after each, and runs each once on
        padding."""
        if ready is None:
            params = abstract_like(self._params)
            ready = compile_steps(self.model, self.engine, self._vocab, self.mesh, params, tick)
        self._programs, self.compile_seconds = ready
        start = time.perf_counter()
        for bucket in self.engine.buckets:
            self._warm(bucket)
        self.warmup_seconds = time.perf_counter() - start
        self._compilations_when_ready = compilations()

    @property
    def without_kernels(self) -> str | None:
        """Why steps on a CPU run without its kernels, where they were wanted; None: they have them, or it isn't one."""
        wanted = self.engine.kernels and self.mesh.size == 1 and _is_this_cpu(self.mesh)
        return library.why_not() if wanted else None

    @property
    def recompilations(self) -> int:
        """Programs compiled in this process since `compile`: in serving, 0 is the only right value."""
        return compilations() - self._compilations_when_ready

    def _warm(self, bucket: Bucket) -> None:
        packed = np.zeros(plan_size(bucket, self.engine.pages_per_sequence), np.int32)
        arrays = split_plan(packed, bucket, self.engine.pages_per_sequence)
        arrays.positions[:] = PADDING
        arrays.sample_slot[:] = self.engine.max_sequences
        self.launch(StepPlan(bucket, packed)).read()

    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step and returns at once."""
        self._cache, self._last_token, drawn = self._programs[plan.bucket](
            self._params, self._cache, self._last_token, plan.packed
        )
        drawn.copy_to_host_async()
        return Launched(plan, drawn)


class Compiled(NamedTuple):
    """The programs of an engine."""

    programs: dict[Bucket, Callable[..., Any]]
    seconds: float


def compile_steps(
    model: ModelConfig,
    engine: EngineConfig,
    vocab: int,
    mesh: Mesh,
    params: Params,
    tick: Callable[[Bucket], None] = lambda bucket: None,
) -> Compiled:
    """Compiles every bucket's program, or reads it from JAX's persistent cache, for abstract parameters; tick(bucket)
    after each."""
    start = time.perf_counter()
    programs: dict[Bucket, Callable[..., Any]] = {}
    for bucket in engine.buckets:
        programs[bucket] = lower_step(model, engine, bucket, vocab, mesh, params).compile()
        tick(bucket)
    return Compiled(programs, time.perf_counter() - start)


def abstract_like(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)


def lower_step(
    model: ModelConfig,
    engine: EngineConfig,
    bucket: Bucket,
    vocab: int,
    mesh: Mesh,
    params: Params | None = None,
) -> jax.stages.Lowered:
    """Lowers a bucket's step for the devices of `mesh`, which may be ones that this machine doesn't have.

    params: abstract; None takes the model's parameters in its dtype.
    """
    step, args = step_and_arguments(model, engine, bucket, vocab, mesh, params)
    with use_mesh(mesh):
        return step.lower(*args)


def step_and_arguments(
    model: ModelConfig,
    engine: EngineConfig,
    bucket: Bucket,
    vocab: int,
    mesh: Mesh,
    params: Params | None = None,
) -> tuple[Any, tuple]:
    """The jitted step of a bucket and its abstract arguments on `mesh`; to be traced under use_mesh(mesh)."""
    replicated = NamedSharding(mesh, PartitionSpec())
    if params is None:
        abstract = abstract_params(model, mesh)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.dtype), sharding=x.sharding), abstract
        )

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)

    cache = abstract_cache(model, engine, mesh)
    args = (params, cache, ints(engine.max_sequences + 1), ints(plan_size(bucket, engine.pages_per_sequence)))
    step = jax.jit(
        partial(engine_step, model, engine, bucket, vocab, uses_kernels(engine, mesh)),
        donate_argnums=(1, 2),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, cache), replicated, replicated),
    )
    return step, args
