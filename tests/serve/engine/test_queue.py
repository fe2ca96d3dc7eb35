"""The order in which waiting requests start, against sorting and counting."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from isthmus.serve.engine.heap import Heap
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.queue import Queue
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.sequence import Sequence


def waiting(queue: Queue, prompt: int = 1, max_tokens: int = 1, **options: object) -> Sequence:
    sequence = Sequence(Request("r", [1] * prompt, Sampling(), max_tokens, **options))  # type: ignore[arg-type]
    queue.add(sequence)
    return sequence


def start(queue: Queue) -> Sequence:
    first = next(queue.candidates())
    queue.take(first)
    first.admission = first.number
    return first


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=60))
def test_a_heap_is_a_sorted_list(changes: list[tuple[bool, int]]) -> None:
    """An item that leaves the middle, or moves, must not leave the others in disorder."""
    heap: Heap[int] = Heap()
    expected: dict[int, tuple[int, int]] = {}
    for index, (removes, number) in enumerate(changes):
        if removes and number in expected:
            heap.remove(number)
            del expected[number]
        elif not removes:
            expected[number] = (-number * 7 % 5, index)
            heap.push(number, expected[number])
        assert list(heap.in_order()) == sorted(expected, key=expected.__getitem__)
        assert len(heap) == len(expected) and heap.first() == next(heap.in_order(), None)


def test_priority_then_deadline_then_arrival() -> None:
    """Whoever is in a hurry says so, and is heard."""
    queue = Queue()
    rng = random.Random(1)
    asked = [waiting(queue, priority=rng.randrange(2), deadline=rng.choice([None, 5.0, 3.0, 9.0])) for _ in range(15)]
    asked.sort(key=lambda s: (-s.request.priority, s.request.deadline is None, s.request.deadline or 0.0, s.number))
    assert list(queue.candidates()) == asked
    assert [start(queue) for _ in asked] == asked and not queue


def test_tenants_get_equal_tokens_whatever_the_size_of_their_requests() -> None:
    """Many small requests and few large ones are the same work; neither tenant is pushed aside."""
    queue = Queue()
    sizes = {"small": 10, "middle": 40, "large": 200}
    for tenant, size in sizes.items():
        for _ in range(400):
            waiting(queue, size - 5, 5, tenant=tenant)
    got: Counter[str] = Counter()
    for _ in range(400):
        tenant = start(queue).request.tenant
        got[tenant] += sizes[tenant]
        assert max(got[name] for name in sizes) - min(got[name] for name in sizes) <= 200


def test_a_tenant_that_comes_late_goes_next_and_saves_nothing_up() -> None:
    """A newcomer doesn't stand behind a thousand requests of another, nor push them back for as long as it was away."""
    queue = Queue()
    for _ in range(50):
        waiting(queue, 10, 10, tenant="flood")
    for _ in range(20):
        start(queue)
    late = [waiting(queue, 10, 10, tenant="late") for _ in range(10)]
    started = [start(queue) for _ in range(8)]
    assert started[0] is late[0] or started[1] is late[0]
    assert 3 <= sum(one in late for one in started) <= 5


def test_tokens_that_were_not_drawn_are_given_back() -> None:
    """max_tokens is what a request may take; a tenant whose answers are short isn't charged for long ones."""
    queue = Queue()
    for tenant in ("brief", "wordy"):
        for _ in range(50):
            waiting(queue, 10, 90, tenant=tenant)
    started: Counter[str] = Counter()
    for _ in range(33):
        sequence = start(queue)
        started[sequence.request.tenant] += 1
        if sequence.request.tenant == "wordy":
            sequence.tokens += [1] * 90
            queue.settle(sequence)
        else:
            sequence.tokens += [1] * 40
            queue.settle(sequence)
    assert abs(started["brief"] - 2 * started["wordy"]) <= 2


def test_a_preempted_one_goes_before_new_ones_of_its_priority() -> None:
    """Its tokens are with the client already."""
    queue = Queue()
    first, second = waiting(queue), waiting(queue)
    for _ in range(2):
        start(queue)
    new, urgent = waiting(queue), waiting(queue, priority=1)
    queue.put_back(second)
    queue.put_back(first)
    assert [start(queue) for _ in range(4)] == [urgent, first, second, new]


def test_time_in_the_queue_ends() -> None:
    """A request is told as soon as it is of no use any more; one that has started only has its deadline."""
    queue = Queue()
    timed = waiting(queue, arrival=10.0, max_queue_time=5.0, deadline=30.0)
    late = waiting(queue, arrival=10.0, deadline=12.0)
    assert queue.next_expired(11.9) is None and queue.next_expired(12.0) is late
    queue.remove(late)
    assert queue.next_expired(14.9) is None and queue.next_expired(15.0) is timed
    start(queue)
    queue.put_back(timed)
    assert queue.next_expired(29.9) is None and queue.next_expired(30.0) is timed


def test_tenants_that_are_gone_are_forgotten() -> None:
    """A server that has seen a million callers must not remember each."""
    queue = Queue()
    for index in range(1000):
        waiting(queue, tenant=str(index))
        start(queue)
    (level,) = queue._levels.values()
    assert len(level._tenants) < 200


def test_a_million_can_wait_and_leave_from_anywhere() -> None:
    """A queue that is searched for each cancel stands still under the load that makes people cancel."""
    queue = Queue()
    rng = random.Random(2)
    asked = [waiting(queue, tenant=str(index % 7), deadline=rng.random()) for index in range(20_000)]
    rng.shuffle(asked)
    for sequence in asked[:19_990]:
        queue.remove(sequence)
    assert set(queue.candidates()) == set(asked[19_990:]) == set(islice(queue, 10))
