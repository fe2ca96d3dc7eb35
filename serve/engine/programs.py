"""The programs of an engine's steps, pure functions of parameters and state: forward passes, one for each bucket, and
draws, one for each number of samples, plain or adjusted. They are compiled, or lowered for devices that aren't here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.model.config import ModelConfig
from isthmus.model.device.hardware import platform_of
from isthmus.model.execution import DEFAULT_EXECUTION, Execution
from isthmus.model.layers import Attend
from isthmus.model.ops.attention import Scoring
from isthmus.model.ops.flag import raised
from isthmus.model.ops.kernels import choose
from isthmus.model.ops.operation import Setting
from isthmus.model.ops.paged_attention import paged_step
from isthmus.model.ops.paged_cache import PagedCache, PagedStep
from isthmus.model.ops.sampling import BAD_ROW, Drawn
from isthmus.model.sharding import named_sharding, use_mesh
from isthmus.model.transformer import Params, Transformer, abstract_params, bind
from isthmus.serve.engine.adapters import compile_place, write_place
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import FROM_DEVICE, MOST_ENDS, PADDING, PlanArrays, plan_size, split_plan
from isthmus.serve.engine.sampling import (
    DRAW,
    MOST_LOGPROBS,
    abstract_adjusting,
    columns,
    draw,
    draw_by,
    uniform_numbers,
)
from isthmus.serve.engine.state import State, abstract_state, place


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
    arrays, state = enter(engine, bucket, state, arrays)
    hidden, cache = compute(model, engine, bucket, state, arrays)
    return hidden, state._replace(cache=cache)


def enter(engine: EngineConfig, bucket: Bucket, state: State, arrays: PlanArrays) -> tuple[PlanArrays, State]:
    """A plan whose tokens are all known, and the state with its rows' tokens and pages."""
    singles, slots = arrays.positions[: bucket.rows], arrays.slots[: bucket.rows]
    at = jnp.maximum(singles, 0)
    rows = arrays.tokens[: bucket.rows]
    rows = jnp.where(rows == FROM_DEVICE, state.tokens[slots, at], rows)
    tables = state.tables.at[slots, at // engine.page_size].set(arrays.row_page)
    held = state.tokens.at[slots, at].set(rows)  # drafts, too, which later rows' draws look back at
    tokens = jnp.concatenate([rows, arrays.tokens[bucket.rows :]])
    return arrays._replace(tokens=tokens), State(state.cache, tables, held)


def compute(
    model: Transformer, engine: EngineConfig, bucket: Bucket, state: State, arrays: PlanArrays
) -> tuple[jax.Array, PagedCache]:
    """Hidden states [tokens, dim] of a plan's tokens, all of which are known, and the cache with their keys and
    values."""
    # Padding is no token of the vocabulary: it stays zero all the way, and the CPU's kernels don't multiply zeros.
    tokens = jnp.where(arrays.positions >= 0, arrays.tokens, model.config.vocab_size)
    step = PagedStep(bucket.rows, state.tables[arrays.slots], arrays.positions)
    attend = paged_attention(engine, step, model.execution.kernels.paged_attention)
    sequence = sequence_of_token(bucket)
    chosen = arrays.adapters[sequence] if model.config.lora.adapters else None
    at = jnp.maximum(arrays.positions, 0)
    return model(tokens, at, attend, state.cache, arrays.uses_long_rope[sequence] > 0, chosen)


def forward_step(
    served: Served, bucket: Bucket, params: Params, state: State, packed: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """A step's forward pass: the state after it, float32 logits [samples, ids], and the hidden states [tokens, dim].
    Pure; the first two arguments are static. packed: as in `forward`."""
    model = bind(served.model, served.execution, params)
    hidden, state = forward(model, served.engine, bucket, state, packed)
    return state, sampled_logits(model, hidden, split_plan(packed, bucket)), hidden


def sampled_logits(model: Transformer, hidden: jax.Array, arrays: PlanArrays) -> jax.Array:
    """float32[samples, ids]: the logits that tokens are drawn from. Rows that draw nothing are of zeros, which the
    CPU's kernels don't multiply."""
    return model.logits(jnp.take(hidden, arrays.sample_token, axis=0, mode="fill", fill_value=0))


def forward_steps(
    served: Served,
    bucket: Bucket,
    params: Params,
    state: State,
    packed: jax.Array,
    draws: jax.Array,
    ends: jax.Array,
    steps: jax.Array,
    flag: jax.Array,
) -> tuple[State, Drawn, jax.Array]:
    """Several steps of a bucket without blocks, whose rows each draw a token of their own: what `forward_step` and
    `draw` give one after the other, a step a turn of the loop. It ends after the step in which a row draws one of its
    `ends` or has bad logits, and after that in which the flag is raised.

    packed: as in `forward`, the first step's. draws: `words` of DRAW, the first step's, plain. ends: int32[rows,
    MOST_ENDS], the rest of them BAD_ROW. steps: int32[], at most `EngineConfig.steps_per_launch`. flag: as in
    `isthmus.model.ops.flag.raised`. Returns the state; what was drawn, [steps_per_launch, rows, ...]; and int32[], how
    many steps there were.
    """
    model, engine, kernels = bind(served.model, served.execution, params), served.engine, served.execution.kernels
    arrays, state = enter(engine, bucket, state, split_plan(packed, bucket))
    column, most = columns(draws), engine.steps_per_launch
    turn = jnp.arange(most)[:, None]
    positions = column["position"] + turn
    uniform = jax.vmap(uniform_numbers, (None, None, 0))(column["seed_low"], column["seed_high"], positions)

    def step(carry: tuple[jax.Array, jax.Array, PagedCache, Drawn]) -> tuple[jax.Array, jax.Array, PagedCache, Drawn]:
        done, last, cache, before = carry
        at = jnp.where(arrays.positions < 0, PADDING, arrays.positions + done)
        inputs = arrays._replace(tokens=last, positions=at)
        hidden, cache = compute(model, engine, bucket, state._replace(cache=cache), inputs)
        logits = sampled_logits(model, hidden, arrays)
        drawn = draw_by(column, logits, uniform[done], None, served.vocab, kernels.sampling)
        whole = jax.tree.map(lambda rows, row: rows.at[done].set(row), before, drawn)
        return done + 1, drawn.token, cache, whole

    def goes_on(carry: tuple[jax.Array, jax.Array, PagedCache, Drawn]) -> jax.Array:
        done, last, _, _ = carry
        ended = ((last[:, None] == ends) | (last[:, None] == BAD_ROW)).any()
        return (done == 0) | ((done < steps) & ~ended & ~raised(flag, done, implementation=kernels.flag))

    nothing = Drawn(
        jnp.zeros((most, bucket.rows), jnp.int32),
        jnp.zeros((most, bucket.rows), jnp.float32),
        jnp.zeros((most, bucket.rows, MOST_LOGPROBS), jnp.int32),
        jnp.zeros((most, bucket.rows, MOST_LOGPROBS), jnp.float32),
    )
    start = (jnp.int32(0), arrays.tokens, state.cache, nothing)
    done, _, cache, drawn = jax.lax.while_loop(goes_on, step, start)
    places = jnp.where(turn < done, positions, engine.context_length)
    tokens = state.tokens.at[column["slot"], places].set(drawn.token, mode="drop")
    return State(cache, state.tables, tokens), drawn, done


Program = Callable[..., Any]


@dataclass
class Compiled:
    """The programs of an engine, and how long they took."""

    forward: dict[Bucket, Program] = field(default_factory=dict)
    draw: dict[int, Program] = field(default_factory=dict)
    """By the number of samples, as the next"""
    draw_adjusted: dict[int, Program] = field(default_factory=dict)
    several: dict[Bucket, Program] = field(default_factory=dict)
    """Several steps in a launch, for the buckets that have it"""
    place_table: Program = place
    place_tokens: Program = place
    place_adapter: Program = write_place
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
    if served.model.lora.adapters:
        compiled.place_adapter = compile_place(served.model, mesh, params)
    for bucket in served.engine.buckets:
        compiled.forward[bucket] = lower_forward(served, bucket, mesh, params).compile()
        if (samples := bucket.samples) not in compiled.draw:
            compiled.draw[samples] = _compiled_draw(_Draws.of(served, samples, adjusted=False), mesh)
            compiled.draw_adjusted[samples] = _compiled_draw(_Draws.of(served, samples, adjusted=True), mesh)
        if bucket in served.engine.loops:
            compiled.several[bucket] = lower_steps(served, bucket, mesh, params).compile()
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


def lower_steps(served: Served, bucket: Bucket, mesh: Mesh, params: Params | None = None) -> jax.stages.Lowered:
    """Lowers `forward_steps`, in the same way as `lower_forward`."""
    _, (params, state, packed) = forward_and_arguments(served, bucket, mesh, params)
    whole, rows = NamedSharding(mesh, PartitionSpec()), bucket.rows
    step = jax.jit(
        partial(forward_steps, served, bucket),
        donate_argnums=1,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), whole, whole),
    )
    draws, ends = _whole(mesh, jnp.int32, rows, len(DRAW.names or ())), _whole(mesh, jnp.int32, rows, MOST_ENDS)
    with use_mesh(mesh):
        flag = _whole(mesh, jnp.uint32, 2)
        return step.lower(params, state, packed, draws, ends, _whole(mesh, jnp.int32), flag)


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
