"""Runs plans on the device, each step by two programs: the forward pass, one for each bucket, and the draws, one for
each number of samples, plain or adjusted. The state is donated from program to program."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
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
from isthmus.model.ops.paged_attention import paged_step
from isthmus.model.ops.paged_cache import PagedCache, PagedStep
from isthmus.model.ops.sampling import Drawn
from isthmus.model.sharding import named_sharding, use_mesh
from isthmus.model.transformer import Params, Transformer, abstract_params, bind, parameter_specs
from isthmus.model.weights.packing import is_packed, pack_params
from isthmus.serve.engine.adapters import Resident
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import FROM_DEVICE, StepPlan, empty_plan, plan_size, split_plan
from isthmus.serve.engine.sampling import DRAW, Adjusting, Bias, abstract_adjusting, draw, no_draws, words
from isthmus.serve.engine.state import State, abstract_state, empty_state, place


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

    def abstract_state(self, mesh: Mesh) -> State:
        """The shapes, dtypes and shardings of what the engine keeps on these devices."""
        return abstract_state(self.model, self.engine, self.cache_dtype, mesh)

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


def sequence_of_token(bucket: Bucket) -> jax.Array:
    """int32[tokens]: which row or block each token belongs to."""
    blocks = jnp.repeat(jnp.arange(bucket.blocks), bucket.block_size)
    return jnp.concatenate([jnp.arange(bucket.rows), bucket.rows + blocks])


def paged_attention(engine: EngineConfig, step: PagedStep, implementation: str) -> Attend:
    """The serving side of the seam, by an implementation of model/ops/paged_attention.py."""

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
    model: Transformer, engine: EngineConfig, bucket: Bucket, state: State, packed: jax.Array
) -> tuple[jax.Array, State]:
    """Hidden states [tokens, dim] of a step's tokens, and the state with their keys and values and the rows' pages.

    packed: int32[plan_size], see PlanArrays.
    """
    arrays = split_plan(packed, bucket)
    known, singles, slots = arrays.positions >= 0, arrays.positions[: bucket.rows], arrays.slots[: bucket.rows]
    at = jnp.maximum(arrays.positions, 0)
    drawn = state.tokens[slots, at[: bucket.rows]]
    rows = jnp.where(arrays.tokens[: bucket.rows] == FROM_DEVICE, drawn, arrays.tokens[: bucket.rows])
    # Padding is no token of the vocabulary: it stays zero all the way, and the CPU's kernels don't multiply zeros.
    tokens = jnp.where(known, jnp.concatenate([rows, arrays.tokens[bucket.rows :]]), model.config.vocab_size)
    page = jnp.where(singles < 0, 0, singles // engine.page_size)
    tables = state.tables.at[slots, page].set(arrays.row_page)
    held = state.tokens.at[slots, at[: bucket.rows]].set(rows)  # drafts, too, which later rows' draws look back at
    step = PagedStep(bucket.rows, tables[arrays.slots], arrays.positions)
    attend = paged_attention(engine, step, model.execution.kernels.paged_attention)
    sequence = sequence_of_token(bucket)
    chosen = arrays.adapters[sequence] if model.config.lora.adapters else None
    hidden, cache = model(tokens, at, attend, state.cache, arrays.uses_long_rope[sequence] > 0, chosen)
    return hidden, State(cache, tables, held)


def forward_step(
    served: Served, bucket: Bucket, params: Params, state: State, packed: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """A step's forward pass: the state after it, float32 logits [samples, ids], and the hidden states [tokens, dim].
    Pure; the first two arguments are static. packed: as in `forward`."""
    model = bind(served.model, served.execution, params)
    hidden, state = forward(model, served.engine, bucket, state, packed)
    return state, model.logits(hidden[split_plan(packed, bucket).sample_token]), hidden


@dataclass(eq=False)
class Launched:
    """A step on its way."""

    plan: StepPlan
    logits: jax.Array
    """float32[samples, ids]"""
    hidden: jax.Array
    """[tokens, dim], in the dtype of the execution: the hidden states after the model's last norm"""
    drawn: Drawn | None = None
    """None until the step is sampled"""

    @property
    def tells(self) -> bool:
        """Whether somebody asked for more than the token."""
        return bool((self.plan.draws["logprobs"] >= 0).any())

    @property
    def asked(self) -> list[jax.Array]:
        """What somebody asked for: the tokens first, then what is told about them, and the hidden states last."""
        assert self.drawn is not None, "read before it was sampled"
        return [*(self.drawn if self.tells else self.drawn[:1]), *([self.hidden] if self.plan.pooled else [])]

    def read(self) -> tuple[Drawn, np.ndarray | None]:
        """What was drawn, as numpy's arrays where somebody asked for it, and the hidden states if the plan pools some;
        waits for the device. Raises what the device raised."""
        read = jax.device_get(self.asked)
        hidden = read.pop() if self.plan.pooled else None
        assert self.drawn is not None
        return Drawn(*read, *self.drawn[len(read) :]), hidden


class Executor:
    """Device state and compiled programs of one engine. `warm_up` must have run before `launch`."""

    def __init__(
        self, served: Served, params: Params, mesh: Mesh, adapters: Mapping[str, Resident] | None = None
    ) -> None:
        """served: with its kernels chosen. params: in the layout and dtypes that serving reads, packed or not.
        adapters: those whose factors are among `params`, by their names."""
        if served.execution.kernels.packs_weights and not is_packed(params):
            params = pack_params(parameter_specs(served.model), dict(params))
        self.served, self.model, self.engine, self.mesh = served, served.model, served.engine, mesh
        self.params, self.adapters = params, dict(adapters or {})
        self._programs = Compiled()
        self.warmup_seconds = 0.0
        self._compilations_when_ready = 0
        implementation = served.execution.kernels.paged_attention
        self.state = empty_state(served.abstract_state(mesh), implementation)

    def free(self) -> None:
        """Gives back the memory of parameters, state and forward passes. No step may be under way; none can follow."""
        for leaf in jax.tree.leaves((self.params, self.state)):
            leaf.delete()
        self._programs = Compiled()

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
        nobody, samples = self.engine.nobody, bucket.samples
        plan = StepPlan(bucket, empty_plan(self.engine, bucket)[0], no_draws(samples, nobody))
        plan.tables = [(nobody, np.zeros(self.engine.pages_per_sequence, np.int32))]
        plan.tokens = [(nobody, np.zeros(self.engine.context_length, np.int32))]
        for bias in (None, Bias.none(samples)):
            plan.bias = bias
            launched = self.launch(plan)
            mask = abstract_adjusting(samples, self.model.vocab_size).allowed
            self.sample(launched, None if bias is None else np.full(mask.shape, -1, np.int32))
            launched.read()

    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step's forward pass and returns at once. The step must be sampled before the next is launched."""
        programs, state = self._programs, self.state
        for slot, row in plan.tables:
            state = state._replace(tables=programs.place_table(state.tables, np.int32(slot), row))
        for slot, row in plan.tokens:
            state = state._replace(tokens=programs.place_tokens(state.tokens, np.int32(slot), row))
        self.state, logits, hidden = programs.forward[plan.bucket](self.params, state, plan.packed)
        return Launched(plan, logits, hidden)

    def sample(self, launched: Launched, mask: np.ndarray | None = None) -> None:
        """Starts a step's draws and returns at once. mask: int32[samples, words], where draws are adjusted."""
        plan, tokens = launched.plan, self.state.tokens
        if plan.bias is None:
            draw = self._programs.draw[plan.bucket.samples]
            tokens, launched.drawn = draw(launched.logits, tokens, words(plan.draws), None)
        else:
            assert mask is not None, "an adjusted draw needs a mask"
            draw = self._programs.draw_adjusted[plan.bucket.samples]
            tokens, launched.drawn = draw(launched.logits, tokens, words(plan.draws), Adjusting(*plan.bias, mask))
        self.state = self.state._replace(tokens=tokens)
        for part in launched.asked:
            part.copy_to_host_async()


Program = Callable[..., Any]


@dataclass
class Compiled:
    """The programs of an engine, and how long they took."""

    forward: dict[Bucket, Program] = field(default_factory=dict)
    draw: dict[int, Program] = field(default_factory=dict)
    """By the number of samples, as the next"""
    draw_adjusted: dict[int, Program] = field(default_factory=dict)
    place_table: Program = place
    place_tokens: Program = place
    seconds: float = 0.0


def compile_steps(
    served: Served, mesh: Mesh, params: Params, on_progress: Callable[[Bucket], None] = lambda bucket: None
) -> Compiled:
    """Compiles every program, or reads it from JAX's persistent cache, for abstract parameters; on_progress(bucket)
    after each bucket's."""
    start = time.perf_counter()
    state = served.abstract_state(mesh)
    compiled = Compiled(
        place_table=lower_place(state.tables, mesh).compile(), place_tokens=lower_place(state.tokens, mesh).compile()
    )
    for bucket in served.engine.buckets:
        compiled.forward[bucket] = lower_forward(served, bucket, mesh, params).compile()
        if (samples := bucket.samples) not in compiled.draw:
            compiled.draw[samples] = _compiled_draw(_Draws.of(served, samples, adjusted=False), mesh)
            compiled.draw_adjusted[samples] = _compiled_draw(_Draws.of(served, samples, adjusted=True), mesh)
        on_progress(bucket)
    compiled.seconds = time.perf_counter() - start
    return compiled


def abstract_like(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)


def lower_forward(served: Served, bucket: Bucket, mesh: Mesh, params: Params | None = None) -> jax.stages.Lowered:
    """Lowers a bucket's forward pass for the devices of `mesh`, which may be ones that this machine doesn't have.

    params: abstract; None takes the model's parameters in its dtype.
    """
    step, args = forward_and_arguments(served, bucket, mesh, params)
    with use_mesh(mesh):
        return step.lower(*args)


def lower_draw(served: Served, samples: int, mesh: Mesh, *, adjusted: bool = False) -> jax.stages.Lowered:
    """Lowers the draws of so many samples, in the same way as `lower_forward`."""
    return _lowered_draw(_Draws.of(served, samples, adjusted=adjusted), mesh)


class _Draws(NamedTuple):
    """All that decides the program of draws but its devices."""

    samples: int
    ids: int
    vocab: int
    slots: int
    context_length: int
    implementation: str
    adjusted: bool

    @classmethod
    def of(cls, served: Served, samples: int, *, adjusted: bool) -> _Draws:
        model, engine, implementation = served.model, served.engine, served.execution.kernels.sampling
        slots = engine.nobody + 1
        return cls(samples, model.vocab_size, served.vocab, slots, engine.context_length, implementation, adjusted)


@lru_cache(maxsize=128)
def _compiled_draw(draws: _Draws, mesh: Mesh) -> Program:
    """Kept for the next model with such a vocabulary that this process opens."""
    compiled: Program = _lowered_draw(draws, mesh).compile()
    return compiled


def _lowered_draw(draws: _Draws, mesh: Mesh) -> jax.stages.Lowered:
    step, args = _draw_and_arguments(draws, mesh)
    with use_mesh(mesh):
        return step.lower(*args)


def lower_place(rows: Any, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the program that replaces a slot of an array of the state."""
    with use_mesh(mesh):
        args = (rows, _whole(mesh, jnp.int32), _whole(mesh, jnp.int32, rows.shape[1]))
        return jax.jit(place, donate_argnums=0, out_shardings=rows.sharding).lower(*args)


def forward_and_arguments(
    served: Served, bucket: Bucket, mesh: Mesh, params: Params | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted `forward_step` of a bucket and its abstract arguments on `mesh`; to be traced under use_mesh(mesh)."""
    execution = served.execution
    if params is None:
        params = abstract_params(served.model, mesh, stacked=execution.scan_layers, dtype=execution.dtype)
    state, whole = served.abstract_state(mesh), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        partial(forward_step, served, bucket),
        donate_argnums=1,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), _logits_sharding(mesh), whole),
    )
    return step, (params, state, _whole(mesh, jnp.int32, plan_size(bucket)))


def draw_and_arguments(
    served: Served, samples: int, mesh: Mesh, *, adjusted: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted `isthmus.serve.engine.sampling.draw` of so many samples and its abstract arguments on `mesh`."""
    return _draw_and_arguments(_Draws.of(served, samples, adjusted=adjusted), mesh)


def _draw_and_arguments(draws: _Draws, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    samples, ids = draws.samples, draws.ids
    adjusting = abstract_adjusting(samples, ids) if draws.adjusted else None
    args = (
        jax.ShapeDtypeStruct((samples, ids), jnp.float32, sharding=_logits_sharding(mesh)),
        _whole(mesh, jnp.int32, draws.slots, draws.context_length),
        _whole(mesh, jnp.int32, samples, len(DRAW.names or ())),
        jax.tree.map(lambda leaf: _whole(mesh, leaf.dtype, *leaf.shape), adjusting),
    )
    run = partial(draw, vocab=draws.vocab, implementation=draws.implementation)
    return jax.jit(run, donate_argnums=1, out_shardings=NamedSharding(mesh, PartitionSpec())), args


def _logits_sharding(mesh: Mesh) -> NamedSharding:
    """Each device keeps the logits of its part of the vocabulary, so that a draw moves a few numbers for each row and
    not the row."""
    return named_sharding(mesh, None, "vocab")


def _whole(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array that every device of `mesh` holds whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
