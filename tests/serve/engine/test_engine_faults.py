"""What goes wrong on the host reaches the request that it goes wrong for, and a step that never ends holds up nobody
who wants to leave."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from isthmus.checks.crowd import Arrival, play
from isthmus.errors import Overloaded
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.messages import Ending, Event, Request
from isthmus.serve.engine.sampling import Sampling
from tests.serve.engine.harness import Client, HookedExecutor, make

PATIENCE = 60


class Raises(frozenset[int]):
    """Ids that fail when they are looked at for the `nth` time; with `damage`, once that is done."""

    nth: int
    damage: Callable[[], object] = staticmethod(lambda: None)

    def __contains__(self, token: object) -> bool:
        self.nth -= 1
        if self.nth <= 0:
            self.damage()
            raise RuntimeError("no such ids")
        return False


def raises(nth: int, damage: Callable[[], object] = lambda: None) -> frozenset[int]:
    ids = Raises()
    ids.nth, ids.damage = nth, damage
    return ids


def broken(**fields: Any) -> Request:
    return Request(**{"id": "broken", "prompt": [1, 2, 3], "sampling": Sampling(), "max_tokens": 8, **fields})


BROKEN: dict[str, Callable[[], Request]] = {
    "a seed that fits no word": lambda: broken(sampling=Sampling(seed=-1)),
    "top_k that fits no word": lambda: broken(sampling=Sampling(top_k=1 << 40)),
    "no sampling": lambda: broken(sampling=None),
    "a token that fits no word": lambda: broken(prompt=[1, 1 << 40, 3]),
    "such a token past a page": lambda: broken(prompt=[*range(1, 20), 1 << 40]),
    "a token that is none, in a full page": lambda: broken(prompt=["x", *range(1, 10)]),
    "ids that fail at the first token": lambda: broken(eos_ids=raises(1)),
    "ids that fail in mid-text": lambda: broken(stop_ids=raises(4)),
    "a count that is none": lambda: broken(max_tokens=float("nan")),
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("step", [0, 3])
def test_an_error_of_one_request_ends_that_one_alone(
    fault: Callable[[], Request], step: int, executor: HookedExecutor
) -> None:
    """Else one odd request takes everybody's streams with it. `play` checks that all pages and slots are back."""
    alone = Arrival(make("alone", max_tokens=20))
    play(executor, [alone])
    beside, after = Arrival(make("beside", max_tokens=20)), Arrival(make("after", max_tokens=20), step)
    failing = Arrival(fault(), step)
    play(executor, [beside, failing, after])
    assert (failing.ending, beside.ending, after.ending) == (Ending.ERROR, Ending.LENGTH, Ending.LENGTH)
    assert failing.end is not None and failing.end.failure is not None
    assert beside.completion == after.completion == alone.completion


def test_an_error_that_loses_pages_ends_the_engine(executor: HookedExecutor) -> None:
    """Going on with pages that nobody or two requests hold would give one the other's text."""
    client = Client(executor)
    pool = client.engine.scheduler.pool
    client.engine.submit(broken(eos_ids=raises(2, damage=lambda: pool.allocate(1))))
    client.engine.submit(make("beside", max_tokens=20))
    client.engine.start()
    client.wait_for_ends(2)
    assert isinstance(client.engine.error, RuntimeError) and not client.engine.alive
    assert {event.end.reason for event in client.events if event.end} == {Ending.ERROR}
    client.engine.close()


class Gate:
    """Holds the engine thread in a launch, the `nth`, until it is opened."""

    def __init__(self, executor: HookedExecutor, nth: int = 1) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self._left = nth
        executor.hook = self._hook

    def _hook(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.entered.set()
            assert self.opened.wait(PATIENCE)


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_closing_reads_the_step_in_flight(nth: int, executor: HookedExecutor) -> None:
    """What was drawn is the client's; the caches it is written to are donated and can't be looked at again."""
    client = Client(executor)
    gate = Gate(executor, nth)
    requests = [make("a", max_tokens=28), make("b", max_tokens=28)]
    for request in requests:
        client.engine.submit(request)
    client.engine.start()
    assert gate.entered.wait(PATIENCE)
    closing = threading.Thread(target=client.engine.close)
    closing.start()
    while not client.engine._closing:
        pass
    gate.opened.set()
    closing.join(PATIENCE)
    told = Counter(event.request.id for event in client.events for _ in event.tokens)
    # A step has room for one prompt: the first draws from the first step on, the second from the second.
    assert (told["a"], told["b"]) == (nth, nth - 1)
    assert all(client.end(request).reason is Ending.CLOSED for request in requests)
    assert client.ends() == {"a": 1, "b": 1}


def test_a_step_that_never_ends_keeps_nobody(executor: HookedExecutor) -> None:
    """A hung device must not hang the shutdown; and how long it has hung can be seen."""
    client = Client(executor)
    assert client.engine.busy_seconds == 0
    gate = Gate(executor, 2)
    running, cancelled = make("running", max_tokens=20), make("cancelled", max_tokens=20)
    for request in (running, cancelled, make("waiting")):
        client.engine.submit(request)
    client.engine.start()
    assert gate.entered.wait(PATIENCE)
    before = client.engine.busy_seconds
    assert client.engine.cancel("cancelled")
    assert not client.engine.close(timeout=0.2), "it says that the thread is still there"
    assert client.engine.busy_seconds >= before + 0.2
    assert client.ends() == {"running": 1, "cancelled": 1, "waiting": 1}
    gate.opened.set()
    assert client.engine.close(PATIENCE)
    assert client.ends() == {"running": 1, "cancelled": 1, "waiting": 1}, "told once, also when it wakes up after all"
    assert client.engine.error is None


def test_a_cancelled_name_is_free_at_once(executor: HookedExecutor) -> None:
    """A retry under the same id may come before the engine has looked at the cancel."""
    client = Client(executor)
    gate = Gate(executor)
    first, second = make("name", max_tokens=20), make("name", max_tokens=4)
    client.engine.submit(first)
    client.engine.start()
    assert gate.entered.wait(PATIENCE)
    assert client.engine.cancel(first)
    client.engine.submit(second)
    assert not client.engine.cancel(first), "it would hit the second"
    gate.opened.set()
    client.wait_for_ends(2)
    assert client.end(first).reason is Ending.CANCELLED and client.end(second).reason is Ending.LENGTH
    client.engine.close()


def test_cancels_do_not_make_room_without_end(executor: HookedExecutor) -> None:
    """While a step is under way, callers who come and go must not fill the memory."""
    engine = Engine(executor, lambda events: None)
    with pytest.raises(Overloaded):
        for index in range(1000):
            engine.submit(make(f"r{index}"))
            engine.cancel(f"r{index}")
    assert engine.close()


def test_closing_tells_those_who_were_cancelled_and_never_ran(executor: HookedExecutor) -> None:
    events: list[Event] = []
    engine = Engine(executor, events.extend)
    request = make("r")
    engine.submit(request)
    engine.cancel("r")
    engine.close()
    assert [(event.request, event.end and event.end.reason) for event in events] == [(request, Ending.CLOSED)]
