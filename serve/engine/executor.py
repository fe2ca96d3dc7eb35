"""Runs plans on the device, each step by two programs: the forward pass, one for each bucket, and the draws, one for
each number of samples. The cache and the last tokens are donated from step to step."""

from __future__ import annotations

import dataclasses
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
from isthmus.model.device.hardware import platform_of
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.layers import Attend
from isthmus.model.ops.attention import Scoring
from isthmus.model.ops.kernels import choose
from isthmus.model.ops.operation import Setting
from isthmus.model.ops.paged_attention import empty_cache, paged_step
from isthmus.model.ops.paged_cache import PagedCache, PagedStep, scales_of
from isthmus.model.ops.sampling import Drawn
from isthmus.model.sharding import named_sharding, use_mesh
from isthmus.model.transformer import Params, Transformer, abstract_params, bind, parameter_specs
from isthmus.model.weights.packing import is_packed, pack_params
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import PADDING, PlanArrays, StepPlan, plan_size, split_plan
from isthmus.serve.engine.sampling import DRAW, draw, words


@dataclass(frozen=True)
class Served:
    """All that decides the programs of an engine but its devices."""

    model: ModelConfig
    engine: EngineConfig
    """Resolved for the model"""
    vocab: int
    """Ids from here on are padding of the vocabulary and never drawn"""
    execution: Execution = DEFAULT_EXECUTION

    @property
    def cache_dtype(self) -> str:
        """The dtype of the cache's pages."""
        return self.execution.dtype if self.engine.cache_dtype == "model" else self.engine.cache_dtype

    def setting(self, mesh: Mesh) -> Setting:
        """What kernels are chosen by, on these devices."""
        return Setting(
            self.model,
            self.execution.dtype,
            platform_of(mesh.devices.flat[0]),
            mesh.size,
            scans_layers=self.execution.scan_layers,
            page_size=self.engine.page_size,
            cache_dtype=self.cache_dtype,
        )

    def with_kernels(self, wish: str, mesh: Mesh) -> Served:
        """The same with the kernels that `wish` gives on these devices, as in `isthmus.model.ops.kernels.choose`.
        Raises ConfigError."""
        kernels = choose(wish, self.setting(mesh))
        return dataclasses.replace(self, execution=dataclasses.replace(self.execution, kernels=kernels))


def abstract_cache(served: Served, mesh: Mesh) -> PagedCache:
    """One array for all layers, so that no layer is sliced out. Split over the key heads; a latent belongs to all
    heads, and so to all devices."""
    model, engine = served.model, served.engine
    shape = (model.layers * engine.pages, engine.page_size, model.cache_heads, model.head_dim)
    axes = ("pages", None, "latent_head" if model.latent.rank else "kv_heads", None)
    dtype = jnp.dtype(served.cache_dtype)
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
    if dtype != jnp.int8:
        return PagedCache(pages)
    scales = (*shape[:2], shape[2] * scales_of(model.head_dim))
    return PagedCache(pages, jax.ShapeDtypeStruct(scales, jnp.float32, sharding=named_sharding(mesh, *axes[:3])))


def sequence_of_token(bucket: Bucket) -> jax.Array:
    """int32[tokens]: which row or block each token belongs to."""
    blocks = jnp.repeat(jnp.arange(bucket.blocks), bucket.block_size)
    return jnp.concatenate([jnp.arange(bucket.rows), bucket.rows + blocks])


def paged_attention(engine: EngineConfig, bucket: Bucket, arrays: PlanArrays, implementation: str) -> Attend:
    """The serving side of the seam, by an implementation of model/ops/paged_attention.py."""
    step = PagedStep(bucket.rows, arrays.tables, arrays.positions)

    def attend(
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        cache: PagedCache,
        scoring: Scoring,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, PagedCache]:
        first = layer * engine.pages
        return paged_step(q, k, v, cache, first, step, scoring, sinks, implementation=implementation)

    return attend


def forward(
    model: Transformer, engine: EngineConfig, bucket: Bucket, cache: PagedCache, arrays: PlanArrays
) -> tuple[jax.Array, PagedCache]:
    """Hidden states [tokens, dim] of a step's tokens, all of them known, and the cache with their keys and values."""
    # Padding is no token of the vocabulary: it stays zero all the way, and the CPU's kernels don't multiply zeros.
    tokens = jnp.where(arrays.positions < 0, model.config.vocab_size, arrays.tokens)
    attend = paged_attention(engine, bucket, arrays, model.execution.kernels.paged_attention)
    uses_long_rope = arrays.uses_long_rope[sequence_of_token(bucket)] > 0
    return model(tokens, jnp.maximum(arrays.positions, 0), attend, cache, uses_long_rope)


def forward_step(
    served: Served, bucket: Bucket, params: Params, cache: PagedCache, last_token: jax.Array, packed: jax.Array
) -> tuple[PagedCache, jax.Array]:
    """A step's forward pass: the cache with its tokens, and float32 logits [samples, ids]. Pure; the first two
    arguments are static.

    last_token: int32[max_sequences + 1], what each slot drew last. packed: int32, see PlanArrays.
    """
    arrays = split_plan(packed, bucket, served.engine.pages_per_sequence)
    singles = arrays.tokens[: bucket.rows]
    singles = jnp.where(singles < 0, last_token[arrays.row_slot], singles)
    tokens = jnp.concatenate([singles, arrays.tokens[bucket.rows :]])
    model = bind(served.model, served.execution, params)
    hidden, cache = forward(model, served.engine, bucket, cache, arrays._replace(tokens=tokens))
    return cache, model.logits(hidden[arrays.sample_token])


@dataclass(eq=False)
class Launched:
    """A step on its way."""

    plan: StepPlan
    logits: jax.Array
    """float32[samples, ids]"""
    drawn: Drawn | None = None
    """None until the step is sampled"""

    @property
    def tells(self) -> bool:
        """Whether somebody asked for more than the token."""
        return bool((self.plan.draws["logprobs"] >= 0).any())

    def read(self) -> Drawn:
        """What was drawn, as numpy's arrays where somebody asked for it; waits for the device. Raises what the device
        raised."""
        assert self.drawn is not None, "read before it was sampled"
        read: Drawn = jax.device_get(self.drawn if self.tells else self.drawn[:1])
        return read if self.tells else self.drawn._replace(token=read[0])


class Executor:
    """Device state and compiled programs of one engine. `warm_up` must have run before `launch`."""

    def __init__(self, served: Served, params: Params, mesh: Mesh) -> None:
        """served: with its kernels chosen. params: in the layout and dtypes that serving reads, packed or not."""
        if served.execution.kernels.packs_weights and not is_packed(params):
            params = pack_params(parameter_specs(served.model), dict(params))
        self.served, self.model, self.engine, self.mesh = served, served.model, served.engine, mesh
        self.params = params
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._programs = Compiled({}, {}, 0.0)
        self.warmup_seconds = 0.0
        self._compilations_when_ready = 0
        self._reset_state()

    def _reset_state(self) -> None:
        abstract = abstract_cache(self.served, self.mesh)
        implementation = self.served.execution.kernels.paged_attention
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._cache = jax.jit(lambda: empty_cache(abstract, implementation), out_shardings=shardings)()
        self._last_token = jax.device_put(np.zeros(self.engine.max_sequences + 1, np.int32), self._replicated)

    def free(self) -> None:
        """Gives back the memory of parameters, cache and programs. No step may be under way, and none can follow."""
        for leaf in jax.tree.leaves((self.params, self._cache, self._last_token)):
            leaf.delete()
        self._programs = Compiled({}, {}, 0.0)

    def warm_up(
        self, ready: Compiled | None = None, on_progress: Callable[[Bucket], None] = lambda bucket: None
    ) -> None:
        """Compiles all programs unless they are `ready`, with on_progress(bucket) after each bucket's, and runs each
        once on padding."""
        if ready is None:
            ready = compile_steps(self.served, self.mesh, abstract_like(self.params), on_progress)
        self._programs = ready
        start = time.perf_counter()
        for bucket in self.engine.buckets:
            self._warm(bucket)
        self.warmup_seconds = time.perf_counter() - start
        self._compilations_when_ready = compilations()

    @property
    def compile_seconds(self) -> float:
        """How long compiling the programs took, or reading them from JAX's cache."""
        return self._programs.seconds

    @property
    def recompilations(self) -> int:
        """Programs compiled in this process since `warm_up`: in serving, 0 is the only right value."""
        return compilations() - self._compilations_when_ready

    def _warm(self, bucket: Bucket) -> None:
        packed = np.zeros(plan_size(bucket, self.engine.pages_per_sequence), np.int32)
        arrays = split_plan(packed, bucket, self.engine.pages_per_sequence)
        arrays.positions[:] = PADDING
        draws = np.zeros(bucket.samples, DRAW)
        draws["slot"], draws["logprobs"] = self.engine.max_sequences, -1
        launched = self.launch(StepPlan(bucket, packed, draws))
        self.sample(launched)
        launched.read()

    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step's forward pass and returns at once. The step must be sampled before the next is launched."""
        forward = self._programs.forward[plan.bucket]
        self._cache, logits = forward(self.params, self._cache, self._last_token, plan.packed)
        return Launched(plan, logits)

    def sample(self, launched: Launched) -> None:
        """Starts a step's draws and returns at once."""
        draw = self._programs.draw[launched.plan.bucket.samples]
        self._last_token, launched.drawn = draw(launched.logits, self._last_token, words(launched.plan.draws))
        for part in launched.drawn if launched.tells else launched.drawn[:1]:
            part.copy_to_host_async()


class Compiled(NamedTuple):
    """The programs of an engine, and how long they took."""

    forward: dict[Bucket, Callable[..., Any]]
    draw: dict[int, Callable[..., Any]]
    """By the number of samples"""
    seconds: float


def compile_steps(
    served: Served, mesh: Mesh, params: Params, on_progress: Callable[[Bucket], None] = lambda bucket: None
) -> Compiled:
    """Compiles every program, or reads it from JAX's persistent cache, for abstract parameters; on_progress(bucket)
    after each bucket's."""
    start = time.perf_counter()
    compiled = Compiled({}, {}, 0.0)
    for bucket in served.engine.buckets:
        compiled.forward[bucket] = lower_forward(served, bucket, mesh, params).compile()
        if bucket.samples not in compiled.draw:
            compiled.draw[bucket.samples] = lower_draw(served, bucket.samples, mesh).compile()
        on_progress(bucket)
    return compiled._replace(seconds=time.perf_counter() - start)


def abstract_like(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)


def lower_forward(served: Served, bucket: Bucket, mesh: Mesh, params: Params | None = None) -> jax.stages.Lowered:
    """Lowers a bucket's forward pass for the devices of `mesh`, which may be ones that this machine doesn't have.

    params: abstract; None takes the model's parameters in its dtype.
    """
    step, args = forward_and_arguments(served, bucket, mesh, params)
    with use_mesh(mesh):
        return step.lower(*args)


def lower_draw(served: Served, samples: int, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the draws of so many samples, in the same way as `lower_forward`."""
    step, args = draw_and_arguments(served, samples, mesh)
    with use_mesh(mesh):
        return step.lower(*args)


def forward_and_arguments(
    served: Served, bucket: Bucket, mesh: Mesh, params: Params | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted `forward_step` of a bucket and its abstract arguments on `mesh`; to be traced under use_mesh(mesh)."""
    engine, execution = served.engine, served.execution
    if params is None:
        params = abstract_params(served.model, mesh, stacked=execution.scan_layers, dtype=execution.dtype)
    cache = abstract_cache(served, mesh)
    numbers = plan_size(bucket, engine.pages_per_sequence)
    args = (params, cache, _whole(mesh, jnp.int32, engine.max_sequences + 1), _whole(mesh, jnp.int32, numbers))
    step = jax.jit(
        partial(forward_step, served, bucket),
        donate_argnums=1,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, cache), _logits_sharding(mesh)),
    )
    return step, args


def draw_and_arguments(served: Served, samples: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The jitted `isthmus.serve.engine.sampling.draw` of so many samples and its abstract arguments on `mesh`."""
    slots = served.engine.max_sequences + 1
    args = (
        jax.ShapeDtypeStruct((samples, served.model.vocab_size), jnp.float32, sharding=_logits_sharding(mesh)),
        _whole(mesh, jnp.int32, slots),
        _whole(mesh, jnp.int32, samples, len(DRAW.names or ())),
    )
    run = partial(draw, vocab=served.vocab, implementation=served.execution.kernels.sampling)
    return jax.jit(run, donate_argnums=1, out_shardings=NamedSharding(mesh, PartitionSpec())), args


def _logits_sharding(mesh: Mesh) -> NamedSharding:
    """Each device keeps the logits of its part of the vocabulary, so that a draw moves a few numbers for each row and
    not the row."""
    return named_sharding(mesh, None, "vocab")


def _whole(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array that every device of `mesh` holds whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
