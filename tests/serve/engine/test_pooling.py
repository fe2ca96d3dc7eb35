"""An embedding is the mean of its prompt's hidden states, or the last one, and costs others nothing that a prompt
doesn't."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.errors import InvalidRequest
from isthmus.model.config import MixtureConfig, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, bind
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.pooling import Embedding, Pooling
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.scheduler import Scheduler
from isthmus.train.step import packed_attention
from tests.serve.engine.harness import CONFIG, ENGINE, SERVED, Client, HookedExecutor, make, only_tokens
from tests.serve.engine.simulation import Simulation, run_until
from tests.serve.engine.test_scheduler import CONFIGS, FAMILIES
from tests.support import TINY, as_kept, narrowest_dtype, random_params

BOTH = pytest.mark.parametrize("pooling", Pooling)


def pooled(name: str, prompt: list[int], pooling: Pooling, **fields: Any) -> Request:
    return Request(name, prompt, Sampling(), 0, pooling=pooling, **fields)


# the numbers


def test_a_mean_is_the_exact_one_rounded_once() -> None:
    """Sums in float32 lose digits with every token, and long prompts would have worse embeddings than short ones."""
    states = np.random.default_rng(0).standard_normal((1000, 5)).astype(np.float32) * np.float32([1e-3, 1, 1e3, 7, 1e6])
    embedding = Embedding(Pooling.MEAN, len(states))
    for start in range(0, len(states), 32):
        embedding.add(states[start : start + 32])
    want = [np.float32(math.fsum(column) / len(states)) for column in states.T.tolist()]
    assert embedding.vector.dtype == np.float32 and embedding.vector.tolist() == [float(each) for each in want]
    with pytest.raises(ValueError, match="read-only"):
        embedding.vector[0] = 0


def hidden_states(config: ModelConfig, params: Params, prompt: list[int]) -> np.ndarray:
    """float32[tokens, dim]: those of the training's forward pass."""
    tokens = np.array([prompt], np.int32)
    segments = np.zeros_like(tokens)
    model = bind(config, Execution(), params)
    hidden, _ = model(tokens, np.arange(len(prompt), dtype=np.int32)[None], packed_attention(segments), None)
    return np.asarray(hidden)[0]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", MeshShape()),
        (narrowest_dtype(), MeshShape()),
        pytest.param("float32", MeshShape(ep=2, tp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_they_are_pooled_from_the_networks_hidden_states(dtype: Any, shape: MeshShape, mesh: Mesh) -> None:
    """Whatever the devices and however a prompt is cut; the longest one fills the context, since nothing follows."""
    mixture = MixtureConfig(experts=4, per_token=2, dim=16) if shape.ep > 1 else MixtureConfig()
    config, devices = dataclasses.replace(TINY, mixture=mixture, layers=1), build_mesh(shape)
    engine = EngineConfig(
        max_sequences=2, page_size=8, block_size=16, prefill_tokens=16, draft_rows=0, steps_per_launch=1
    ).resolve(config)
    served = Served(config, engine, config.vocab_size, Execution(dtype)).with_kernels("auto", devices)
    executor = Executor(served, as_kept(config, devices, random_params(config, devices), dtype), devices)
    executor.warm_up()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, config.vocab_size, size).tolist() for size in (1, 16, 17, config.context_length)]
    arrivals = [
        Arrival(pooled(f"{len(prompt)} {pooling}", prompt, pooling)) for prompt in prompts for pooling in Pooling
    ]
    play(executor, [*arrivals, Arrival(make("beside", 3, 20))])
    params = random_params(config, mesh)
    for arrival in arrivals:
        states = hidden_states(config, params, list(arrival.request.prompt)).astype(np.float64)
        want = states[-1] if arrival.request.pooling is Pooling.LAST else states.mean(axis=0)
        assert arrival.end is not None and arrival.end.embedding is not None
        got = arrival.end.embedding
        assert arrival.ending is Ending.EMBEDDED and got.dtype == np.float32 and not got.flags.writeable
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= (1e-5 if dtype == "float32" else 0.02), arrival.request.id


def test_one_that_is_not_finite_fails_alone(mesh: Mesh) -> None:
    """A network that gives NaN for one prompt must say so, and must not leave that in the cache for the next."""
    params = random_params(CONFIG, mesh)
    params["embedding"] = params["embedding"].at[7].set(np.nan)
    executor = Executor(SERVED.with_kernels("auto", mesh), params, mesh)
    executor.warm_up()
    start = [*range(8, 28)]
    bad = [Arrival(pooled(f"bad {pooling}", [*start, 7, 8, 9], pooling)) for pooling in Pooling]
    good = [Arrival(pooled(f"good {pooling}", start, pooling)) for pooling in Pooling]
    beside = Arrival(make("beside", 3))
    engine = play(executor, [*bad, beside, *good]).engine
    assert [one.ending for one in (*bad, *good)] == 2 * [Ending.ERROR] + 2 * [Ending.EMBEDDED]
    assert all(one.end is not None and one.end.embedding is None and one.end.failure is None for one in bad)
    assert beside.ending is Ending.LENGTH
    assert engine.scheduler.counters.completion_tokens == len(beside.completion), "something was drawn for an embedding"


@BOTH
def test_what_one_computed_that_failed_is_not_kept(pooling: Pooling) -> None:
    """Numbers that aren't finite in the cache would fail every request with the same beginning."""
    simulation = Simulation(CONFIGS["room for all"])
    bad = simulation.submit(FAMILIES[0][:33], 0, pooling=pooling)
    simulation.poison.add(bad.request.id)
    simulation.drain()
    assert bad.ending is Ending.ERROR and simulation.scheduler.pool.cached == 0
    good = simulation.submit(FAMILIES[0][:33], 1)
    simulation.drain()
    assert good.cached_tokens == 0


# what is refused


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1] * 33}, "prompt"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"resumed": [1]}, "max_tokens"),
    ],
    ids=str,
)
def test_an_embedding_that_could_never_be_is_refused(
    fields: dict[str, Any], field: str, executor: HookedExecutor
) -> None:
    """Taken in, it would wait for ever or die in the engine; the field is what its client can mend."""
    engine = Client(executor).engine
    with pytest.raises(InvalidRequest) as error:
        engine.submit(dataclasses.replace(pooled("r", [1], Pooling.MEAN), **fields))
    assert error.value.field == field
    engine.submit(pooled("longest", [1] * ENGINE.context_length, Pooling.MEAN))


# what it costs


def test_a_mean_computes_its_whole_prompt_and_the_last_one_does_not() -> None:
    """The cache holds no hidden states, which a mean needs all of; what it computes is there for others."""
    simulation = Simulation(CONFIGS["room for all"])
    computed = []
    for options in ({"pooling": Pooling.MEAN}, {"pooling": Pooling.LAST}, {"pooling": Pooling.MEAN}, {}):
        before = simulation.tokens_computed
        simulation.submit(FAMILIES[0][:33], 0 if options else 1, **options)
        simulation.drain()
        computed.append(simulation.tokens_computed - before)
    assert computed == [33, 1, 33, 1]


@BOTH
def test_a_preempted_one_ends_as_it_would_have(pooling: Pooling) -> None:
    """Whoever gives way to somebody urgent waits longer, and gets the same."""
    simulation = Simulation(CONFIGS["one sequence"])
    sequence = simulation.submit(FAMILIES[0][:39], 0, pooling=pooling)
    run_until(simulation, lambda: sequence.computed >= 32)
    urgent = simulation.submit(FAMILIES[1][:9], 3, priority=1)
    simulation.drain()
    assert simulation.finished == [urgent, sequence] and sequence.ending is Ending.EMBEDDED
    assert sequence.preemptions == 1 and sequence.recomputed_tokens > 0


@BOTH
def test_one_that_is_preempted_behind_its_last_step_is_not_computed_again(pooling: Pooling) -> None:
    """The step in flight has all that it needs."""
    simulation = Simulation(CONFIGS["one sequence"])
    sequence = simulation.submit(FAMILIES[0][:16], 0, pooling=pooling)
    simulation.step()
    simulation.submit(FAMILIES[1][:9], 3, priority=1)
    simulation.step()
    assert sequence.ending is Ending.EMBEDDED and sequence.preemptions == 1
    simulation.drain()
    assert simulation.tokens_computed == 16 + 9 + 2


def test_embeddings_fill_every_step() -> None:
    """One that only waits to be read is no stream that prompts must be held back for: a thousand embeddings would take
    as many steps as they have blocks."""
    config = EngineConfig(max_sequences=8, context_length=64, block_size=16, prefill_tokens=64).resolve(ModelConfig())
    scheduler = Scheduler(config)
    clock = count_blocks(scheduler, [make("stream", 3, 5)], 0.0)[1]
    embeddings = [pooled(f"e{index}", [index] * 32, Pooling.LAST) for index in range(20)]
    assert count_blocks(scheduler, embeddings, clock)[0] == [4] * 10
    assert scheduler.counters.completion_tokens == 5


def count_blocks(scheduler: Scheduler, requests: list[Request], now: float) -> tuple[list[int], float]:
    """Runs requests from `now` on, in steps that take a second, and four more for each block. Returns how many blocks
    each step had, and when the last one ended."""
    for request in requests:
        scheduler.add(request)
    blocks, in_flight = [], None
    while (plan := scheduler.plan(now)) is not None or in_flight is not None:
        if in_flight is not None:
            now += 1 + 4 * in_flight.blocks
            drawn = only_tokens(np.ones(in_flight.bucket.samples, np.int32))
            scheduler.commit(in_flight, drawn, now, np.zeros((in_flight.bucket.tokens, 1)))
        if plan is not None:
            blocks.append(plan.blocks)
        in_flight = plan
    assert scheduler.idle
    return blocks, now
