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

from isthmus.checks.crowd import Arrival, end_of, play
from isthmus.errors import DuplicateRequest, InvalidRequest, Overloaded, RequestFailed, Unavailable
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Ending, Event
from isthmus.serve.engine.programs import Served
from tests.serve.engine.harness import CONFIG, ENGINE, Client, HookedExecutor, make
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
    assert client.end(twice).reason is Ending.CANCELLED and client.end(beside).reason is Ending.LENGTH


def test_a_cancel_that_comes_too_late_spares_the_next_request_of_that_name(executor: HookedExecutor) -> None:
    """A client may reuse its id once it has heard the end; a cancel of the old request must not hit the new one."""
    first, second = make("name", max_tokens=3), make("name", max_tokens=4)
    ended, told = threading.Event(), []

    def sink(events: list[Event]) -> None:
        told.extend(events)
        for event in events:
            if event.request is first and event.end is not None:
                engine.submit(second)
            elif event.end is not None:
                ended.set()

    def cancel_at_the_last_moment() -> None:
        if sum(len(event.tokens) for event in told if event.request is first) == 2:  # its last token is on its way
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
    assert end_of(first, told).reason is Ending.LENGTH
    assert end_of(second, told).reason is Ending.LENGTH and len(end_of(second, told).tokens) == 4


def test_a_cancelled_request_gives_its_room_to_the_next(executor: HookedExecutor) -> None:
    """Clients that hang up in mid-text, more of them than there are slots, must leave none taken."""
    arrivals = [Arrival(make(f"r{i}", max_tokens=20), step=3 * i, cancel_after=2) for i in range(9)]
    played = play(executor, arrivals)
    assert all(arrival.ending is Ending.CANCELLED for arrival in arrivals)
    assert all(2 <= len(arrival.completion) <= 3 for arrival in arrivals)
    assert Counter(event.request.id for event in played.events if event.end) == {f"r{i}": 1 for i in range(9)}


def test_events_hold_the_tokens_of_their_request(executor: HookedExecutor) -> None:
    """The front end streams what the sink is given: a token lost or doubled there is lost or doubled for the client."""
    arrivals = [Arrival(make(f"r{i}", prompt=1 + 7 * i, max_tokens=4 + i), step=i) for i in range(4)]
    played = play(executor, arrivals)
    for arrival in arrivals:
        mine = [event for event in played.events if event.request is arrival.request]
        assert [token for event in mine for token in event.tokens] == arrival.completion
        assert [event.end for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert arrival.ending is Ending.LENGTH


def test_who_fills_the_queue_does_not_keep_others_out(
    executor: HookedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks for all there is must be the one that is refused."""
    monkeypatch.setattr(executor, "engine", dataclasses.replace(executor.engine, max_waiting=38))
    engine = Client(executor).engine
    for index in range(40):
        engine.submit(dataclasses.replace(make(f"r{index}"), tenant="flood"))
    for index in range(5):
        with pytest.raises(Overloaded):
            engine.submit(dataclasses.replace(make("more"), tenant="flood"))
        engine.submit(dataclasses.replace(make(f"q{index}"), tenant="quiet"))
    with pytest.raises(Overloaded):
        engine.submit(dataclasses.replace(make("q5"), tenant="quiet"))
    for index in range(6):
        engine.cancel(f"r{index}")
    engine.submit(dataclasses.replace(make("q5"), tenant="quiet"))


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
    assert client.end(running).reason is Ending.LENGTH and client.engine.load().draining
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
    assert {event.end.reason for event in client.events if event.end} == {Ending.ERROR}
    assert not client.engine.alive and "the engine thread died" in caplog.text
    with pytest.raises(RequestFailed) as refused:
        client.engine.submit(make("d"))
    assert refused.value.reason == "ENGINE_DEAD" and "the device is gone" in str(refused.value.__cause__)
    client.engine.close()


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
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

        executor.state = executor.state._replace(cache=jax.tree.map(fill, executor.state.cache))
        arrivals = [Arrival(make("short", 3)), Arrival(make("long", 19, 10))]
        play(executor, arrivals)
        texts.append([arrival.completion for arrival in arrivals])
    assert texts[0] == texts[1] and [len(text) for text in texts[1]] == [8, 10]
