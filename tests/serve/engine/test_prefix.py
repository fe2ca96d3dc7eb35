"""Who may start from whose pages, and that no prefix is computed or held twice."""

from __future__ import annotations

import pytest

from isthmus.serve.engine.messages import Ending, Request
from isthmus.serve.engine.prefix import root_key
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.engine.sequence import Sequence
from tests.serve.engine.simulation import Simulation, run_until
from tests.serve.engine.test_scheduler import CONFIGS, FAMILIES


def test_another_salt_is_another_cache() -> None:
    """Whoever can see that a prompt was cached can guess what others ask, a block at a time."""
    simulation = Simulation(CONFIGS["room for all"])
    cached = []
    for salt in (b"mine", b"theirs", b"", b"mine"):
        sequence = simulation.submit(FAMILIES[0][:33], 1, cache_salt=salt)
        simulation.drain()
        cached.append(sequence.cached_tokens)
    assert cached == [0, 0, 0, 32]


def test_roots_differ_in_each_part() -> None:
    """Two requests whose keys and values differ must not meet, whatever a client puts into its salt."""
    roots = set()
    for salt in (b"", b"\0", b"a", b"long", b"long\0"):
        for long in (False, True):
            sequence = Sequence(Request("r", [1], Sampling(), 1, cache_salt=salt))
            sequence.uses_long_rope = long
            roots.add(root_key(sequence))
    assert len(roots) == 10


@pytest.mark.parametrize(("option", "cached"), [("cache_read", [0, 0, 32]), ("cache_write", [0, 0, 0])])
def test_a_request_may_bypass_the_cache(option: str, cached: list[int]) -> None:
    """To measure without it, or so that a secret prompt leaves nothing behind."""
    simulation = Simulation(CONFIGS["room for all"])
    asked = [{option: False}, {option: False}, {}]
    got = []
    for options in asked:
        sequence = simulation.submit(FAMILIES[0][:33], 1, **options)
        simulation.drain()
        got.append(sequence.cached_tokens)
    assert got == cached


def test_a_prefix_that_two_computed_is_held_once() -> None:
    """Two requests that say the same for a while must not take the memory of two."""
    simulation = Simulation(CONFIGS["room for all"])
    both = [simulation.submit(FAMILIES[0][:6], 24) for _ in range(2)]  # less than a block: neither waits
    run_until(simulation, lambda: len(both[0].completion) == len(both[1].completion) == 16)
    assert both[0].pages[:5] == both[1].pages[:5] and not set(both[0].pages[5:]) & set(both[1].pages[5:])
    assert simulation.scheduler.pool.in_use == len({*both[0].pages, *both[1].pages}) <= 5 + 2
    simulation.drain()


def test_who_bypasses_reading_keeps_pages_of_its_own() -> None:
    """A request that must not depend on others' pages doesn't swap its own for theirs."""
    simulation = Simulation(CONFIGS["room for all"])
    first = simulation.submit(FAMILIES[0][:20], 10)
    second = simulation.submit(FAMILIES[0][:20], 10, cache_read=False)
    run_until(simulation, lambda: len(second.completion) == 5)
    assert not set(first.pages) & set(second.pages)
    simulation.drain()


def test_what_a_request_computed_that_failed_is_not_kept() -> None:
    """Numbers that aren't finite in the cache would fail every request with the same beginning."""
    simulation = Simulation(CONFIGS["room for all"])
    bad = simulation.submit(FAMILIES[0][:33], 5)
    simulation.poison.add(bad.request.id)
    simulation.drain()
    assert bad.ending is Ending.ERROR and simulation.scheduler.pool.cached == 0
    good = simulation.submit(FAMILIES[0][:33], 1)
    simulation.drain()
    assert good.cached_tokens == 0
