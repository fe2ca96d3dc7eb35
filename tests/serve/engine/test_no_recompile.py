"""No recompile: once the engine is warm, nothing a client can ask for makes it compile."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.checks.networks import Numbers, guests, small_executor
from isthmus.model.config import LoraConfig
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from tests.support import TINY, random_params

CONFIG = dataclasses.replace(TINY, layers=1)


def random_arrival(rng: random.Random, index: int) -> Arrival:
    prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(rng.choice([1, 2, rng.randrange(1, 60), 62]))]
    first = rng.randrange(1, len(prompt)) if len(prompt) > 1 and rng.random() < 0.2 else None
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 5, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.1]),
        min_p=rng.choice([0.0, 0.0, 0.1, 1.0]),
        seed=rng.randrange(2**64),
        logprobs=-1 if first is None else rng.randrange(3),
    )
    limit = rng.randrange(1 if first is None else 0, CONFIG.context_length - len(prompt) + 1)
    stop_ids = frozenset(rng.sample(range(CONFIG.vocab_size), rng.choice([0, 0, 3])))
    eos_ids = frozenset(rng.choice([(), (3,)]))
    request = Request(f"r{index}", prompt, sampling, limit, stop_ids, eos_ids=eos_ids, scored_from=first)
    cancel_after = rng.randrange(1, 10) if rng.random() < 0.2 else None
    if index % 10 == 0:
        request = Request(f"r{index}", prompt, sampling, 0, pooling=rng.choice([*Pooling]))
    return Arrival(request, step=rng.randrange(400), cancel_after=cancel_after)


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Fails if anything is traced or compiled meanwhile."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert events == [], "something was traced or compiled"


def test_no_request_makes_a_warm_engine_compile(mesh: Mesh) -> None:
    """A compilation in serving stops everybody's text for seconds, at a moment that a client chooses."""
    engine = EngineConfig(max_sequences=8, page_size=8, block_size=16, prefill_tokens=32, pages=30).resolve(CONFIG)
    served = Served(CONFIG, engine, CONFIG.vocab_size).with_kernels("auto", mesh)
    executor = Executor(served, random_params(CONFIG, mesh), mesh)
    executor.warm_up()
    rng = random.Random(0)
    arrivals = [random_arrival(rng, index) for index in range(200)]
    for index, limits in enumerate(({"max_queue_time": 0.0}, {"deadline": 0.0})):
        arrivals[index].request = dataclasses.replace(arrivals[index].request, **limits)
    with nothing_compiles():
        counters = play(executor, arrivals).engine.scheduler.counters
    assert executor.recompilations == 0
    reasons = {arrival.ending for arrival in arrivals}
    never = {Ending.ERROR, Ending.CLOSED, Ending.COMPLETE}
    assert reasons == set(Ending) - never, "not every way to end came up"
    assert counters.preemptions > 0 and counters.cached_prompt_tokens == 0
    jax.jit(lambda x: x + len(arrivals))(1).block_until_ready()
    assert executor.recompilations == 1, "the counter that production watches counts nothing"


@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_no_adapter_makes_a_warm_engine_compile(kernels: str) -> None:
    """Of whatever rank it is, the first that is loaded as well as those that come after others."""
    network = dataclasses.replace(CONFIG, lora=LoraConfig(5, 5.0, adapters=3))
    engine = EngineConfig(max_sequences=2, page_size=8, block_size=16, prefill_tokens=16, draft_rows=0)
    executor = small_executor(network, Numbers(), engine, kernels)
    loaded = guests(network, 0)
    assert len({guest.adapter.lora.rank for guest in loaded}) > 1
    arrivals = [
        Arrival(Request(f"r{n}", [1 + n] * 9, Sampling(), 6), 2 * n, guest=guest) for n, guest in enumerate(loaded * 2)
    ]
    with nothing_compiles():
        play(executor, arrivals)
    assert executor.recompilations == 0
