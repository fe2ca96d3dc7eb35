"""The engine thread outlives whatever its callers do, and each request hears how it ended, once."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.errors import DuplicateRequest, InvalidRequest, Overloaded, RequestFailed, Unavailable
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor, Served
from isthmus.serve.engine.request import FinishReason, Output
from tests.serve.engine.harness import CONFIG, ENGINE, Arrival, Client, HookedExecutor, make, play
from tests.support import random_params


def test_cancelling_twice_ends_a_request_once(executor: HookedExecutor) -> None:
    """An impatient client sends its cancel again; that must not end everybody's streams. What is cancelled is not in
    flight any more."""
    client = Client(executor)
    twice, beside = make("twice", max_tokens=25), make("beside")
    for request in (twice, beside):
        client.engine.submit(request)
    assert client.engine.cancel("twice") and not client.engine.cancel("twice")
    client.engine.start()
    client.wait_for_ends(2)
    assert client.engine.alive
    client.engine.close()
    assert client.ends() == {"twice": 1, "beside": 1}
    assert twice.finish_reason is FinishReason.CANCELLED and beside.finish_reason is FinishReason.LENGTH


def test_a_cancel_that_comes_too_late_spares_the_next_request_of_that_name(executor: HookedExecutor) -> None:
    """A client may reuse its id once it has heard the end; a cancel of the old request must not hit the new one."""
    first, second = make("name", max_tokens=3), make("name", max_tokens=4)
    ended = threading.Event()

    def sink(outputs: list[Output]) -> None:
        for output in outputs:
            if output.request is first and output.finish_reason is not None:
                engine.submit(second)
            elif output.finish_reason is not None:
                ended.set()

    def cancel_at_the_last_moment() -> None:
        if len(first.tokens) == len(first.prompt) + 2:  # its last token is on its way
            executor.hook = lambda: None
            engine.cancel("name")

    engine = Engine(executor, sink)
    executor.hook = cancel_at_the_last_moment
    beside = make("beside", max_tokens=20)
    engine.submit(first)
    engine.submit(beside)
    engine.start()
    assert ended.wait(60), engine.error
    engine.close()
    assert engine.error is None
    assert first.finish_reason is FinishReason.LENGTH
    assert second.finish_reason is FinishReason.LENGTH and len(second.completion) == 4


def test_a_cancelled_request_gives_its_room_to_the_next(executor: HookedExecutor) -> None:
    """Clients that hang up in mid-text, more of them than there are slots, must leave none taken."""
    arrivals = [Arrival(make(f"r{i}", max_tokens=20), step=3 * i, cancel_after=2) for i in range(9)]
    played = play(executor, arrivals)
    assert all(arrival.request.finish_reason is FinishReason.CANCELLED for arrival in arrivals)
    assert all(2 <= len(arrival.request.completion) <= 3 for arrival in arrivals)
    assert Counter(o.request.id for o in played.outputs if o.finish_reason) == {f"r{i}": 1 for i in range(9)}


def test_each_output_is_one_token_of_its_request(executor: HookedExecutor) -> None:
    """The front end streams what the sink is given: a token lost or doubled there is lost or doubled for the client."""
    arrivals = [Arrival(make(f"r{i}", prompt=1 + 7 * i, max_tokens=4 + i), step=i) for i in range(4)]
    played = play(executor, arrivals)
    for arrival in arrivals:
        mine = [output for output in played.outputs if output.request is arrival.request]
        assert [output.token for output in mine] == arrival.request.completion
        assert [output.finish_reason for output in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason is FinishReason.LENGTH


def test_a_finished_name_is_free_again(executor: HookedExecutor) -> None:
    """Ids are the client's; only those in flight are taken."""
    client = Client(executor)
    client.engine.submit(make("name"))
    with pytest.raises(DuplicateRequest, match="in flight"):
        client.engine.submit(make("name"))
    client.engine.start()
    client.wait_for_ends(1)
    assert not client.engine.cancel("name")
    client.engine.submit(make("name"))
    client.wait_for_ends(2)
    client.engine.close()


def test_too_many_waiting_are_refused(executor: HookedExecutor) -> None:
    """A queue without an end answers nobody in time."""
    client = Client(executor)
    limit = ENGINE.max_sequences + ENGINE.max_waiting
    for index in range(limit):
        client.engine.submit(make(f"r{index}"))
    with pytest.raises(Overloaded):
        client.engine.submit(make("one more"))
    client.engine.start()
    client.wait_for_ends(limit)
    client.engine.submit(make("one more"))
    client.wait_for_ends(limit + 1)
    client.engine.close()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [(0, 1, "prompt"), (32, 1, "prompt"), (3, 0, "max_tokens"), (3, 30, "max_tokens")],
)
def test_a_request_that_could_never_run_is_refused(
    prompt: int, max_tokens: int, field: str, executor: HookedExecutor
) -> None:
    """Taken in, it would wait for ever or die in the engine; the field is what its client can mend."""
    engine = Client(executor).engine
    with pytest.raises(InvalidRequest) as error:
        engine.submit(make("r", prompt, max_tokens))
    assert error.value.field == field
    engine.submit(make("largest", 31, 1))
    engine.submit(make("longest", 1, 31))


def test_draining_ends_what_runs_and_takes_nothing_new(executor: HookedExecutor) -> None:
    """A restart must not cut texts short."""
    client = Client(executor)
    running = make("running", max_tokens=20)
    client.engine.submit(running)
    client.engine.drain()
    with pytest.raises(Unavailable):
        client.engine.submit(make("late"))
    client.engine.start()
    client.wait_for_ends(1)
    assert running.finish_reason is FinishReason.LENGTH and client.engine.load().draining
    client.engine.close()


def test_closing_tells_everybody(executor: HookedExecutor) -> None:
    """A client that hears nothing waits for ever."""
    client = Client(executor)
    for name in ("a", "b", "c"):
        client.engine.submit(make(name, max_tokens=28))
    client.engine.start()
    client.engine.close()
    assert client.ends() == {"a": 1, "b": 1, "c": 1}
    assert not client.engine.alive and client.engine.in_flight == 0


def test_a_dead_engine_tells_everybody_and_takes_nothing_new(
    executor: HookedExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """When the device fails, every client must hear of it, and the next one must be sent elsewhere."""
    client = Client(executor)

    def fail() -> None:
        raise jax.errors.JaxRuntimeError("the device is gone")

    executor.hook = fail
    for name in ("a", "b", "c"):
        client.engine.submit(make(name))
    client.engine.start()
    client.wait_for_ends(3)
    assert client.ends() == {"a": 1, "b": 1, "c": 1}
    assert {o.finish_reason for o in client.outputs} == {FinishReason.ERROR}
    assert not client.engine.alive and "the engine thread died" in caplog.text
    with pytest.raises(RequestFailed) as refused:
        client.engine.submit(make("d"))
    assert refused.value.reason == "ENGINE_DEAD" and "the device is gone" in str(refused.value.__cause__)
    client.engine.close()


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_what_the_cache_held_before_reaches_nobody(kernels: str, cache_dtype: Any, mesh: Mesh) -> None:
    """With the CPU's kernels it isn't written before it is used, and memory that a process gets may hold anything."""
    engine = dataclasses.replace(ENGINE, cache_dtype=cache_dtype)
    served = Served(CONFIG, engine, CONFIG.vocab_size).with_kernels(kernels, mesh)
    executor = Executor(served, random_params(CONFIG, mesh), mesh)
    executor.warm_up()
    texts = []
    for floating, integer in ((0.0, 0), (float("nan"), 77)):

        def fill(leaf: jax.Array, values: tuple[float, int] = (floating, integer)) -> jax.Array:
            value = values[leaf.dtype == jnp.int8]
            return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)

        executor._cache = jax.tree.map(fill, executor._cache)
        requests = [make("short", 3), make("long", 19, 10)]
        play(executor, [Arrival(request) for request in requests])
        texts.append([request.completion for request in requests])
    assert texts[0] == texts[1] and [len(text) for text in texts[1]] == [8, 10]
